"""Grows groups of units step by step until the limits are reached.

A *ladder* lists the steps in which one group can grow. Ladders and limits go in; the chosen units come out.

If the costs are proportional to the numbers of units, the steps with the best score per cost are the best choice, up
to the last few. Measured times are not: a step may be free and the next one expensive. `improve` then searches for a
better choice, with the prices of the limits as a guide.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
from scipy.optimize import linprog

from ..anatomy.units import Group
from ..utils.errors import BudgetError


Masks = dict[str, np.ndarray]  # by group name, boolean `[units]`
WIDTH = 2000  # partial choices that `improve` follows at the same time
_MOST_TANGENTS = 200


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
    costs: Callable[[np.ndarray], np.ndarray],
    candidates: np.ndarray,
    forced: np.ndarray,
    step: int = 1,
    min_units: int = 0,
) -> Ladder:
    """The ladder of one group. Its mandatory units cover `min_units` and all forced candidates.

    `values` are the scores, `candidates` and `forced` boolean masks, all `[units]`. `costs` turns numbers of kept
    units `[n]` into costs (int64, `[limits, n]`).
    """
    order = best_first(values, candidates, forced)
    size = len(order)
    counts = np.unique(np.append(np.arange(0, size, step), size))
    mandatory = max(min_units, int((candidates & forced).sum()))
    counts = counts[np.searchsorted(counts, min(size, mandatory)) :]
    scores = np.concatenate(([0.0], np.cumsum(values[order])))[counts]
    return Ladder([(group, order)], counts, scores, costs(counts))


def joint(ladders: list[Ladder]) -> Ladder:
    """One ladder for groups that keep the same number of units; its scores and costs are their sums."""
    if len(ladders) == 1:
        return ladders[0]
    counts = reduce(np.intersect1d, [ladder.counts for ladder in ladders])
    if not counts.size:
        raise BudgetError(
            "Uniform widths are not possible: there is no number of units that all blocks could keep.",
            "Leave `widths='uniform'` out, or trim the base again.",
            settings=["widths"],
        )
    rungs = [(ladder, np.searchsorted(ladder.counts, counts)) for ladder in ladders]
    return Ladder(
        orders=[ladder.orders[0] for ladder in ladders],
        counts=counts,
        scores=np.sum([ladder.scores[rung] for ladder, rung in rungs], axis=0),
        costs=np.sum([ladder.costs[:, rung] for ladder, rung in rungs], axis=0),
    )


def choose(ladders: list[Ladder], left: np.ndarray, proportional: bool = True) -> Masks:
    """Chooses how many steps each ladder takes, and returns the chosen units.

    No limit is exceeded, and no further step fits. `left` (int64, `[limits]`) is what the limits allow beside the
    mandatory units. `proportional` says that all costs are proportional to the numbers of units.
    """
    # With one limit and proportional costs, its price changes nothing in the order of the steps.
    is_simple = proportional and len(left) == 1
    prices = np.ones(1) / np.maximum(left, 1) if is_simple else _prices(ladders, left)
    take_steps(ladders, left, prices)
    if not is_simple:
        improve(ladders, left, prices)
        take_steps(ladders, left, prices)
    return {
        group.name: first_units(order, ladder.counts[ladder.taken], group)
        for ladder in ladders
        for group, order in ladder.orders
    }


def take_steps(ladders: list[Ladder], left: np.ndarray, prices: np.ndarray) -> None:
    """Takes the steps with the largest score per price until no step fits: a merge of the sorted ladders."""
    left = left - _spent(ladders)
    heap: list[tuple[float, int, np.ndarray]] = []  # the next step of each ladder, with its cost

    def push_next_step(index: int) -> None:
        ladder, i = ladders[index], ladders[index].taken
        if i + 1 < len(ladder.counts):
            cost, gain = ladder.costs[:, i + 1] - ladder.costs[:, i], ladder.scores[i + 1] - ladder.scores[i]
            price = float(prices @ cost)
            heapq.heappush(heap, (-float(gain) / price if price > 0 else -math.inf, index, cost))

    for index in range(len(ladders)):
        push_next_step(index)
    while heap:
        _, index, cost = heapq.heappop(heap)
        if (cost > left).any():
            continue  # it will not fit later either, because `left` only shrinks
        left = left - cost
        ladders[index].taken += 1
        push_next_step(index)


def _spent(ladders: list[Ladder]) -> np.ndarray:
    """The costs of the steps taken so far, int64 `[limits]`."""
    return np.sum([ladder.costs[:, ladder.taken] - ladder.costs[:, 0] for ladder in ladders], axis=0)


def improve(ladders: list[Ladder], left: np.ndarray, prices: np.ndarray) -> None:
    """Replaces the steps taken by a choice with a larger total score, if it finds one.

    Decides one ladder after the other and follows all partial choices that can still become better than the best known
    one. At most as much can be added to a partial choice as the ladders that are still open are worth at these
    `prices`, beyond their costs (Lagrangian relaxation; Fisher 1981). If more than `WIDTH` partial choices are left,
    only the most promising are followed. So the choice is the best one if that never happens, as in small problems.
    """
    known = sum(float(ladder.scores[ladder.taken]) for ladder in ladders)
    costs = [ladder.costs - ladder.costs[:, :1] for ladder in ladders]
    worth = [ladder.scores - prices @ cost for ladder, cost in zip(ladders, costs, strict=True)]
    bound = float(prices @ left) + sum(float(values.max()) for values in worth)
    known += 1e-12 * abs(bound)  # of two equal choices, the known one stays
    # Each row is a partial choice: its worth, its costs, and the number of steps in each ladder.
    so_far, spent = np.zeros(1), np.zeros((len(left), 1), dtype=np.int64)
    steps = np.zeros((1, 0), dtype=np.int32)
    for cost, values in zip(costs, worth, strict=True):
        bound -= float(values.max())  # now without the ladders that are decided
        useful = np.flatnonzero(values > known - bound - so_far.max())
        total = so_far[:, None] + values[useful]
        sums = spent[:, :, None] + cost[:, None, useful]
        rows, columns = np.nonzero((sums <= left[:, None, None]).all(axis=0) & (total + bound > known))
        if len(rows) > WIDTH:
            promise = total[rows, columns]
            least = np.partition(promise, -WIDTH)[-WIDTH]
            # Of equal ones the first, on every machine.
            best = np.concatenate([np.flatnonzero(promise > least), np.flatnonzero(promise == least)])[:WIDTH]
            rows, columns = rows[best], columns[best]
        so_far, spent = total[rows, columns], sums[:, rows, columns]
        steps = np.column_stack([steps[rows], useful[columns]])
        if not len(rows):
            return
    scores = np.sum([ladder.scores[steps[:, i]] for i, ladder in enumerate(ladders)], axis=0)
    best_row = int(np.argmax(scores))
    if scores[best_row] > known:
        for ladder, taken in zip(ladders, steps[best_row].tolist(), strict=True):
            ladder.taken = taken


def _prices(ladders: list[Ladder], left: np.ndarray) -> np.ndarray:
    """What one unit of each limit is worth in scores, `[limits]`.

    If every unit of a limit could be bought at its price, the best choice would be worth at least as much as under the
    limits. The prices for which it is worth least are the dual values of the linear program in which ladders may stop
    between two steps. Taking the steps by score per price is then optimal, except for the last few, which do not fit
    exactly. The worth is a convex function of the prices, and the largest of its tangents is minimized, again and
    again, until they touch (Kelley 1960).
    """
    scale = 1 / np.maximum(left, 1)
    starts = np.cumsum([0, *(len(ladder.counts) for ladder in ladders)])
    costs = np.concatenate([ladder.costs - ladder.costs[:, :1] for ladder in ladders], axis=1) * scale[:, None]
    scores = np.concatenate([ladder.scores - ladder.scores[0] for ladder in ladders])
    largest = sum(float(ladder.scores.max() - ladder.scores[0]) for ladder in ladders)
    prices, tangents = np.zeros(len(left)), []
    if largest > 0:
        for _ in range(_MOST_TANGENTS):
            worth = (scores - prices * largest @ costs) / largest
            best = [start + int(np.argmax(worth[start:end])) for start, end in pairwise(starts)]
            slope = np.minimum(left, 1) - costs[:, best].sum(axis=1)
            tangents.append([*slope, -1.0, scores[best].sum() / largest])
            rows = np.array(tangents)
            bounds = [*[(0.0, 1.0)] * len(left), (None, None)]  # all that is left is worth no more than everything
            lowest = linprog([*np.zeros(len(left)), 1.0], rows[:, :-1], -rows[:, -1], bounds=bounds)
            if lowest.status != 0 or rows[-1, -1] + slope @ prices - lowest.fun < 1e-9:
                break
            prices = lowest.x[:-1]
    # Without a limit that binds, every order of the steps gives the same choice.
    return (prices * largest if (prices > 0).any() else np.ones(len(left))) * scale
