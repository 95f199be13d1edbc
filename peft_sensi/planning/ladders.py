"""Grows groups of units step by step until the limits are reached.

A *ladder* lists the steps in which one group can grow. Ladders and limits go in; the chosen units come out.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.optimize import minimize_scalar

from ..anatomy.units import Group
from ..utils.errors import BudgetError


Masks = dict[str, np.ndarray]  # by group name, boolean `[units]`


@dataclass
class Ladder:
    """The steps in which one group grows, or several groups that always keep the same number of units.

    With `i` steps taken, each group has its best `counts[i]` units. These have the total score `scores[i]` and the
    total costs `costs[:, i]`, one for each limit. `counts[0]` units are mandatory.
    """

    orders: list[tuple[Group, np.ndarray]]  # for each group the indices of its units, best first
    counts: np.ndarray  # [steps + 1]
    scores: np.ndarray  # [steps + 1]
    costs: np.ndarray  # [limits, steps + 1]
    taken: int = 0


def best_first(values: np.ndarray, candidates: np.ndarray, forced: np.ndarray) -> np.ndarray:
    """Indices of the candidates: the forced ones first, then by value. Equal ones are ordered by index."""
    indices = np.flatnonzero(candidates)
    return indices[np.lexsort((indices, -values[indices], ~forced[indices]))]


def first_units(order: np.ndarray, count: int, group: Group) -> np.ndarray:
    """A boolean mask `[units]` of the first `count` units in this order."""
    mask = np.zeros(group.size, dtype=bool)
    mask[order[:count]] = True
    return mask


def ladder_of(
    group: Group,
    values: np.ndarray,
    unit_costs: np.ndarray,
    candidates: np.ndarray,
    forced: np.ndarray,
    step: int = 1,
    min_units: int = 0,
) -> Ladder:
    """The ladder of one group. Its mandatory units cover `min_units` and all forced candidates.

    `values` are the scores, `candidates` and `forced` boolean masks, all `[units]`; `unit_costs` is `[limits]`.
    """
    order = best_first(values, candidates, forced)
    size = len(order)
    counts = np.unique(np.append(np.arange(0, size, step), size))
    mandatory = max(min_units, int((candidates & forced).sum()))
    counts = counts[np.searchsorted(counts, min(size, mandatory)) :]
    scores = np.concatenate(([0.0], np.cumsum(values[order])))[counts]
    return Ladder([(group, order)], counts, scores, unit_costs[:, None] * counts)


def joint(ladders: list[Ladder]) -> Ladder:
    """One ladder for groups that keep the same number of units; its scores and costs are their sums."""
    if len(ladders) == 1:
        return ladders[0]
    counts = reduce(np.intersect1d, [ladder.counts for ladder in ladders])
    if not counts.size:
        raise BudgetError("Uniform widths are not possible: there is no number of units that all blocks could keep.")
    rungs = [(ladder, np.searchsorted(ladder.counts, counts)) for ladder in ladders]
    return Ladder(
        orders=[ladder.orders[0] for ladder in ladders],
        counts=counts,
        scores=np.sum([ladder.scores[rung] for ladder, rung in rungs], axis=0),
        costs=np.sum([ladder.costs[:, rung] for ladder, rung in rungs], axis=0),
    )


def take_steps(ladders: list[Ladder], left: np.ndarray) -> Masks:
    """Takes the steps with the largest score per price until no step fits: a merge of the sorted ladders.

    `left` (int64, `[limits]`) is what the limits allow beside the mandatory units. Returns the chosen units.
    """
    weights = _price_weights(ladders, left) / np.maximum(left, 1)
    heap: list[tuple[float, int, np.ndarray]] = []  # the next step of each ladder, with its cost

    def push_next_step(index: int) -> None:
        ladder, i = ladders[index], ladders[index].taken
        if i + 1 < len(ladder.counts):
            cost, gain = ladder.costs[:, i + 1] - ladder.costs[:, i], ladder.scores[i + 1] - ladder.scores[i]
            heapq.heappush(heap, (-gain / max(float(weights @ cost), np.finfo(float).tiny), index, cost))

    for index in range(len(ladders)):
        push_next_step(index)
    while heap:
        _, index, cost = heapq.heappop(heap)
        if (cost > left).any():
            continue  # it will not fit later either, because `left` only shrinks
        left = left - cost
        ladders[index].taken += 1
        push_next_step(index)
    return {
        group.name: first_units(order, ladder.counts[ladder.taken], group)
        for ladder in ladders
        for group, order in ladder.orders
    }


def _price_weights(ladders: list[Ladder], left: np.ndarray) -> np.ndarray:
    """Weights of the limits (their sum is 1) in the price of a step, `sum_i weight_i * cost_i / left_i`.

    With two limits, a single limit on their weighted sum is a relaxation of the problem. Taking the steps by score per
    price solves this relaxation. Its value is smallest for the weights of the linear program's dual (surrogate
    duality, Glover 1975). With these weights the steps are optimal, except for the last few, which do not fit exactly.
    """
    gains = np.concatenate([np.diff(ladder.scores) for ladder in ladders])
    if len(left) == 1 or gains.size == 0:
        return np.full(len(left), 1 / len(left))
    costs = np.concatenate([np.diff(ladder.costs, axis=1) for ladder in ladders], axis=1)
    costs = costs / np.maximum(left, 1)[:, None]

    def relaxed_value(weight: float) -> float:
        price = np.array([weight, 1 - weight]) @ costs
        order = np.argsort(-gains / price, kind="stable")
        spent, value = np.cumsum(price[order]), np.concatenate(([0.0], np.cumsum(gains[order])))
        return float(np.interp(1.0, np.concatenate(([0.0], spent)), value))

    weight = minimize_scalar(relaxed_value, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-6}).x
    return np.array([weight, 1 - weight])
