"""Choosing the states of all units under a budget.

Units are ranked by score per cost. The first cut keeps as many of the best as the limits on parameters and FLOPs allow
and trims the rest; the second tunes as many of the kept ones as the limit on trained values allows. A limit is never
exceeded, and no further step of any group would fit.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.optimize import minimize_scalar

from ..anatomy.units import Anatomy, Group
from ..utils.errors import BudgetError
from .budget import Budget, allowance
from .plan import Plan


def make_plan(
    anatomy: Anatomy,
    scores: Mapping[str, np.ndarray],
    budget: Budget | float | Mapping[str, float] | None,
    *,
    targets: frozenset[str] | None = None,
    protected: Mapping[str, np.ndarray] | None = None,
    available: Mapping[str, np.ndarray] | None = None,
    sequence_length: int = 128,
    multiple_of: int = 8,
    min_units: int = 1,
    always_trained: int = 0,
    tunes: bool = True,
    retention: float | None = None,
    biases_apart: bool = False,
    uniform: bool = False,
    tuned_layers: int | None = None,
) -> Plan:
    """Chooses the states of all units under the budget.

    Args:
        scores: For each group one number a unit; larger is more worth keeping. Not divided by cost yet.
        targets: Modules that may be trained; all by default.
        protected: Units that are kept whatever their score, as long as the budget allows it.
        available: Units that can be kept at all, where some are gone already.
        multiple_of: Neurons are kept in steps of so many (heads in steps of one).
        min_units: Units that stay in each block; 0 lets whole sublayers go.
        always_trained: Values that are trained in any case and count toward `trainable`.
        tunes: Whether units are tuned at all; `False` leaves all kept ones frozen.
        retention: Share of each FFN's kept neurons that are tuned, rounded down (FAR); heads are tuned whole.
        tuned_layers: Units are tuned in so many layers only, those with the best scores for their cost.
        biases_apart: Biases are among the values that are always trained, not among those of the units.
        uniform: Blocks of the same size keep the same number of units, each its own best. A step is then one head, or
            `multiple_of` neurons, in all of them at once.

    Raises:
        BudgetError: When even the smallest plan exceeds a limit, or scores are not finite.
    """
    limits = Budget() if budget is None else Budget.parse(budget)
    values = {g.name: _checked_scores(g, scores) for g in anatomy.groups}
    targets = frozenset(m for g in anatomy.groups for m in g.modules) if targets is None else targets
    kept = {g.name: np.ones(g.size, dtype=bool) for g in anatomy.groups}
    if limits != Budget() or retention or tuned_layers is not None:
        _warn_if_nothing_is_ranked([values[g.name] for g in (anatomy.trimmable if limits.trims else anatomy.groups)])
    if limits.trims:
        kept.update(
            _choose_kept(
                anatomy,
                values,
                limits,
                protected or {},
                available or {},
                sequence_length,
                multiple_of,
                min_units,
                uniform,
            )
        )
    costs = {g.name: g.unit_trainable(targets, with_bias=not biases_apart) for g in anatomy.groups}
    if tuned_layers is not None:
        costs |= dict.fromkeys(_outside_best_layers(anatomy, values, kept, costs, tuned_layers), 0)
    # A token that was never seen has no gradient, now or in training.
    seen = {g.name: g.kind != "token" or values[g.name] > 0 for g in anatomy.groups}
    tunable = {g.name: kept[g.name] & bool(costs[g.name]) & seen[g.name] for g in anatomy.groups}
    if not tunes:
        tuned = {g.name: np.zeros(g.size, dtype=bool) for g in anatomy.groups}
    elif limits.trainable is not None:
        tuned = _choose_tuned(anatomy, values, tunable, costs, limits.trainable, always_trained)
    else:
        tuned = tunable
        if retention is not None:
            for group in (g for g in anatomy.groups if g.kind == "neuron"):
                count = allowance(retention, int(tuned[group.name].sum())) if retention else 0
                tuned[group.name] &= _best(values[group.name], tuned[group.name], count)
    states = tuple((kept[g.name].astype(np.uint8) + tuned[g.name].astype(np.uint8)).tobytes() for g in anatomy.groups)
    return Plan(anatomy, states, targets, sequence_length, always_trained)


def _warn_if_nothing_is_ranked(values: list[np.ndarray]) -> None:
    scores = np.concatenate([np.zeros(0), *values])
    if len(scores) > 1 and (scores == scores[0]).all():
        value = f"{scores[0]:g}" if scores[0] else "zero"
        warnings.warn(
            f"All scores are {value}, so nothing is ranked: units are chosen by their cost, and the first ones of "
            f"each block. Check the calibration data and the loss, or choose another score.",
            stacklevel=3,
        )


def _outside_best_layers(
    anatomy: Anatomy,
    values: Mapping[str, np.ndarray],
    kept: Mapping[str, np.ndarray],
    costs: Mapping[str, int],
    count: int,
) -> list[str]:
    """Groups in no layer, or in one that is not among the `count` with the best score per trained value."""
    gains: dict[str, float] = {}
    prices: dict[str, int] = {}
    for group in anatomy.groups:
        if costs[group.name]:
            gains[group.layer] = gains.get(group.layer, 0.0) + float(values[group.name][kept[group.name]].sum())
            prices[group.layer] = prices.get(group.layer, 0) + costs[group.name] * int(kept[group.name].sum())
    layers = [layer for layer in gains if layer]
    if count > len(layers):
        raise BudgetError(f"`tuned_layers` is {count}, but the model has {len(layers)} layers with targeted modules.")
    best = sorted(layers, key=lambda layer: -gains[layer] / max(1, prices[layer]))[:count]
    return [group.name for group in anatomy.groups if group.layer not in best]


def _checked_scores(group: Group, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    if group.name not in scores:
        raise BudgetError(f"There are no scores for {group.name!r}; were they made for another model?")
    values = np.asarray(scores[group.name], dtype=np.float64)
    if values.shape != (group.size,):
        raise BudgetError(f"{group.name!r} has {group.size} units but scores of shape {values.shape}.")
    if not np.isfinite(values).all():
        raise BudgetError(f"The scores of {group.name!r} contain NaN or infinity.")
    return values


@dataclass
class _Ladder:
    """The steps by which groups grow: `counts[0]` units of each are mandatory, step `i` leads to `counts[i + 1]`."""

    orders: list[np.ndarray]  # of each group: unit indices, best first
    counts: np.ndarray
    gains: np.ndarray  # score that each step adds
    costs: np.ndarray  # [limits, steps]
    floor: np.ndarray  # [limits], cost of the mandatory units
    taken: int = 0


def _choose_kept(
    anatomy: Anatomy,
    values: dict[str, np.ndarray],
    limits: Budget,
    protected: Mapping[str, np.ndarray],
    available: Mapping[str, np.ndarray],
    sequence_length: int,
    multiple_of: int,
    min_units: int,
    uniform: bool,
) -> dict[str, np.ndarray]:
    groups = anatomy.trimmable
    costs, allowed = [], []
    if limits.params is not None:
        costs.append([g.unit_params for g in groups])
        allowed.append(allowance(limits.params, anatomy.prunable_params))
    if limits.flops is not None:
        costs.append([2 * g.unit_macs(sequence_length) for g in groups])
        allowed.append(allowance(limits.flops, 2 * anatomy.prunable_macs(sequence_length)))
    unit_costs = np.array(costs, dtype=np.int64)  # [limits, groups]
    allowed_costs = np.array(allowed, dtype=np.int64)

    # Groups that grow together: in a uniform plan those that have the same number of units of the same kind.
    together: dict[object, list[int]] = {}
    for i, g in enumerate(groups):
        together.setdefault((g.kind, g.size) if uniform else i, []).append(i)

    def ladders(keep_protected: bool) -> list[_Ladder]:
        single = [
            _ladder(
                values[g.name],
                np.flatnonzero(available.get(g.name, np.ones(g.size))),
                unit_costs[:, i],
                np.asarray(protected.get(g.name, np.zeros(g.size)), dtype=bool) & keep_protected,
                multiple_of if g.kind == "neuron" else 1,
                max(min_units, g.least),
            )
            for i, g in enumerate(groups)
        ]
        return [_joint([single[i] for i in members]) for members in together.values()]

    chosen = ladders(keep_protected=True)
    if (np.sum([ladder.floor for ladder in chosen], axis=0) > allowed_costs).any():
        chosen = ladders(keep_protected=False)  # the limit is a promise, protection is advice
    floor = np.sum([ladder.floor for ladder in chosen], axis=0)
    if (floor > allowed_costs).any():
        smallest = ", ".join(
            f"{name} >= {cost:,}"
            for name, cost in zip(
                [n for n in ("params", "flops") if getattr(limits, n) is not None], floor, strict=True
            )
        )
        # Some families cannot lose all of a block, whatever `min_units`.
        stays, ways = "what the model cannot run without", "Raise the budget"
        if multiple_of > 1:
            ways += ", or lower `multiple_of`"
        if min_units:
            number = " (the same number in all)" if uniform else ""
            stays = f"{min_units} head(s) and {multiple_of} neurons in each block{number}, and {stays}"
            ways += ", or let whole sublayers go with `min_units=0`"
        raise BudgetError(f"The budget is too small for {stays}: that alone needs {smallest}. {ways}.")
    left = allowed_costs - floor
    _fill(chosen, left)
    kept = {}
    for ladder, members in zip(chosen, together.values(), strict=True):
        for order, i in zip(ladder.orders, members, strict=True):
            mask = np.zeros(groups[i].size, dtype=bool)
            mask[order[: ladder.counts[ladder.taken]]] = True
            kept[groups[i].name] = mask
    return kept


def _ladder(
    values: np.ndarray, candidates: np.ndarray, unit_cost: np.ndarray, forced: np.ndarray, step: int, min_units: int
) -> _Ladder:
    size = len(candidates)
    values, forced = values[candidates], forced[candidates]
    order = np.lexsort((np.arange(size), -values, ~forced))
    counts = np.unique(np.append(np.arange(0, size, step), size))
    # `[0:1]` is the mandatory rung: the first count that covers the minimum and all forced units.
    counts = counts[np.searchsorted(counts, min(size, max(min_units, int(forced.sum())))) :]
    total = np.concatenate(([0.0], np.cumsum(values[order])))
    return _Ladder(
        orders=[candidates[order]],
        counts=counts,
        gains=np.diff(total[counts]),
        costs=unit_cost[:, None] * np.diff(counts)[None, :],
        floor=unit_cost * counts[0],
    )


def _joint(ladders: list[_Ladder]) -> _Ladder:
    """One ladder for groups that always keep the same number of units; its costs and gains are the sums."""
    if len(ladders) == 1:
        return ladders[0]
    counts = reduce(np.intersect1d, [ladder.counts for ladder in ladders])
    if not counts.size:
        raise BudgetError("Uniform widths are not possible: the blocks have no number of units in common.")
    places = [np.searchsorted(ladder.counts, counts) for ladder in ladders]
    totals = [np.concatenate(([0.0], np.cumsum(ladder.gains))) for ladder in ladders]
    spent = [
        ladder.floor[:, None] + np.pad(np.cumsum(ladder.costs, axis=1), ((0, 0), (1, 0))) for ladder in ladders
    ]  # [limits, counts]
    whole = sum(cost[:, place] for cost, place in zip(spent, places, strict=True))
    return _Ladder(
        orders=[ladder.orders[0] for ladder in ladders],
        counts=counts,
        gains=np.sum([np.diff(total[place]) for total, place in zip(totals, places, strict=True)], axis=0),
        costs=np.diff(whole, axis=1),
        floor=whole[:, 0],
    )


def _exchange_rate(ladders: list[_Ladder], left: np.ndarray) -> np.ndarray:
    """Weights of the limits (their sum is 1) in the price of a step, `sum_i weight_i * cost_i / left_i`.

    Under two limits, one weighted sum of them is a relaxation, solved by taking steps by score per price; the weights
    for which its value is least are those of the linear program's dual (surrogate duality, Glover 1975), and taking
    steps by that price is optimal but for the last few, which do not fit exactly.
    """
    if len(left) == 1:
        return np.ones(1)
    gains = np.concatenate([ladder.gains for ladder in ladders])
    costs = np.concatenate([ladder.costs for ladder in ladders], axis=1) / np.maximum(left, 1)[:, None]

    def relaxed_value(weight: float) -> float:
        price = np.array([weight, 1 - weight]) @ costs
        order = np.argsort(-gains / price, kind="stable")
        spent, value = np.cumsum(price[order]), np.concatenate(([0.0], np.cumsum(gains[order])))
        return float(np.interp(1.0, np.concatenate(([0.0], spent)), value))

    if gains.size == 0:
        return np.full(2, 0.5)
    weight = minimize_scalar(relaxed_value, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-6}).x
    return np.array([weight, 1 - weight])


def _fill(ladders: list[_Ladder], left: np.ndarray) -> None:
    """Takes steps in the order of score per price until none fits: a merge of the sorted ladders."""
    weights = _exchange_rate(ladders, left) / np.maximum(left, 1)

    def rung(index: int) -> tuple[float, int] | None:
        ladder = ladders[index]
        if ladder.taken == ladder.gains.size:
            return None
        price = float(weights @ ladder.costs[:, ladder.taken])
        return (-ladder.gains[ladder.taken] / max(price, np.finfo(float).tiny), index)

    heap = [entry for index in range(len(ladders)) if (entry := rung(index)) is not None]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        ladder = ladders[index]
        cost = ladder.costs[:, ladder.taken]
        if (cost > left).any():
            continue  # what is left only shrinks, so this ladder is finished
        left = left - cost
        ladder.taken += 1
        if (entry := rung(index)) is not None:
            heapq.heappush(heap, entry)


def _choose_tuned(
    anatomy: Anatomy,
    values: dict[str, np.ndarray],
    tunable: dict[str, np.ndarray],
    costs: dict[str, int],
    limit: float | int,
    always_trained: int,
) -> dict[str, np.ndarray]:
    allowed = allowance(limit, anatomy.total_params) - always_trained
    unit_costs = [costs[g.name] for g in anatomy.groups]
    ladders = []
    for group, cost in zip(anatomy.groups, unit_costs, strict=True):
        candidates = np.flatnonzero(tunable[group.name])
        ladders.append(_ladder(values[group.name], candidates, np.array([cost]), np.zeros(group.size, bool), 1, 0))
    cheapest = min((cost for cost in unit_costs if cost), default=0)
    if allowed < cheapest:
        raise BudgetError(
            f"The `trainable` limit allows {max(0, allowed):,} values, but the smallest unit has {cheapest:,}"
            f"{f' beside the {always_trained:,} that are always trained' if always_trained else ''}."
        )
    _fill(ladders, np.array([allowed], dtype=np.int64))
    tuned = {}
    for group, ladder in zip(anatomy.groups, ladders, strict=True):
        mask = np.zeros(group.size, dtype=bool)
        mask[ladder.orders[0][: ladder.counts[ladder.taken]]] = True
        tuned[group.name] = mask
    return tuned


def _best(values: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` candidates with the largest values; ties go to the smaller index."""
    mask = np.zeros(len(values), dtype=bool)
    mask[np.lexsort((np.arange(len(values)), -values, ~candidates))[:count]] = True
    return mask
