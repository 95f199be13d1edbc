"""Choosing the state of every unit under a budget: scores and limits go in, a `Plan` comes out.

Units are ranked by score per cost. The first cut keeps the best units that the limits on parameters, FLOPs and
latencies allow, and trims the rest. The second cut tunes the best kept units that the limit on trained values allows.
No limit is exceeded, and no further step of any group would fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..anatomy.units import Anatomy, Group
from ..scoring.scores import Scores
from ..utils.checks import check_types
from ..utils.errors import BudgetError, SensiError
from .budget import Budget, allowance
from .costs import costs_of, tables_by_limit
from .first_cut import FirstCut
from .ladders import Masks, best_first, choose, first_units, ladder_of
from .plan import Plan


def make_plan(
    anatomy: Anatomy,
    scores: Scores | Mapping[str, Any],
    budget: Budget | float | Mapping[str, float] | None,
    *,
    targets: Iterable[str] | None = None,
    protected: Mapping[str, Any] | None = None,
    available: Mapping[str, Any] | None = None,
    sequence_length: int | None = None,
    multiple_of: int = 8,
    min_units: int = 1,
    always_trained: int = 0,
    tunes: bool = True,
    retention: float | None = None,
    biases_apart: bool = False,
    uniform: bool = False,
    tuned_layers: int | None = None,
    latency: Any = None,
) -> Plan:
    """Chooses the states of all units under the budget. All limits hold.

    A single limit on `params` or `flops` is filled by taking the steps with the best score per cost. The kept score
    may then be slightly below the best possible one, because the last steps do not fit exactly. Under several limits,
    or limits on latencies, a search improves on this choice.

    Args:
        anatomy: The groups of units, from `build_anatomy`.
        scores: The result of `compute_scores`, or for each group's name an array or tensor of shape `[units]`. Units
            with larger scores are kept first. This function divides the scores by the units' costs.
        budget: A limit on `params`, or a dict or `Budget` with several limits. `None`: everything stays and is tuned.
        targets: Names of the modules that may be trained. Default: all modules of all groups.
        protected: For each group a boolean mask `[units]`. These units are kept whatever their scores. If the budget
            is too small for all of them, they are kept where that costs nothing, with a warning. Default: the
            protected units of `scores`.
        available: For each group a boolean mask `[units]` of the units that can be kept. Default: all. Where fewer
            than `min_units` are available, all of these stay.
        sequence_length: Number of tokens for which FLOPs are counted. Default: that of `scores`, else 128.
        multiple_of: Neurons are kept in multiples of this number. Heads are kept one by one.
        min_units: Smallest number of units that stay in each block. With 0, whole sublayers may be trimmed.
        always_trained: Number of values that are trained in any case. They count toward the `trainable` limit.
        tunes: Whether units are tuned at all. If not, all kept units are frozen.
        retention: Share of the kept neurons of each FFN that is tuned, rounded down (FAR). All kept heads are tuned.
        biases_apart: Whether the biases are counted in `always_trained` and not as part of the units.
        uniform: Whether all blocks of the same size keep the same number of units, each block its own best ones.
        tuned_layers: Units are tuned only in this number of layers: those with the largest scores for their cost.
        latency: The `LatencyTable` (or its path) for limits on latencies; a list of two for `latency` and
            `decode_latency`. Without such a limit, the plan only predicts the latencies.

    Raises:
        BudgetError: If even the smallest plan exceeds a limit, or if a group's scores are missing, have the wrong
            shape or are not finite.
        SensiError: If another argument has a wrong type or range, or names a module or group that is not in `anatomy`,
            or if `available` has fewer units of a group than its layer needs to run.
    """
    if isinstance(scores, Scores):
        protected = scores.protected if protected is None else protected
        sequence_length = sequence_length or scores.sequence_length
        scores = scores.values
    elif not isinstance(scores, Mapping):
        raise SensiError(
            f"`scores` must be a `Scores` or a mapping from group names to arrays, got {type(scores).__name__}."
        )
    if not isinstance(anatomy, Anatomy):
        raise SensiError(f"`anatomy` must be what `build_anatomy(model)` returns, got {type(anatomy).__name__}.")
    counts = {"multiple_of": multiple_of, "min_units": min_units, "sequence_length": sequence_length}
    shares = {"tuned_layers": tuned_layers, "retention": retention, "always_trained": always_trained}
    check_types({**counts, **shares, "targets": targets})
    if not all(isinstance(masks, Mapping | None) for masks in (protected, available)):
        raise SensiError("`protected` and `available` must be mappings from group names to masks.")
    modules = frozenset(module for g in anatomy.groups for module in g.modules)
    targets = modules if targets is None else frozenset(targets)
    # Scores may have been made for more groups than this anatomy has, such as tokens, and have masks of these.
    groups = {g.name for g in anatomy.groups} | scores.keys()
    _check_names("targets", targets, modules, "modules")
    _check_names("protected", protected or (), groups, "groups")
    _check_names("available", available or (), groups, "groups")
    length = sequence_length or 128
    limits = Budget() if budget is None else Budget.parse(budget)
    tables = tables_by_limit(latency)
    values = {g.name: _scores_of(g, scores) for g in anatomy.groups}
    if limits != Budget() or retention or tuned_layers is not None:
        _warn_if_all_equal([values[g.name] for g in (anatomy.trimmable if limits.trims else anatomy.groups)])

    kept: Masks = {g.name: np.ones(g.size, dtype=bool) for g in anatomy.groups}
    if limits.trims:
        must_stay = {g.name: _mask(protected, g, default=False) for g in anatomy.trimmable}
        can_stay = {g.name: _mask(available, g, default=True) for g in anatomy.trimmable}
        costs = costs_of(limits, anatomy, length, tables)
        first_cut = FirstCut(anatomy, limits, costs, can_stay, multiple_of, min_units, uniform)
        kept |= first_cut.choose(values, must_stay)

    prices = {g.name: g.unit_trainable(targets, with_bias=not biases_apart) for g in anatomy.groups}
    if tuned_layers is not None:
        prices |= dict.fromkeys(_outside_best_layers(anatomy, values, kept, prices, tuned_layers), 0)
    tuned = {g.name: kept[g.name] & bool(tunes and prices[g.name]) for g in anatomy.groups}
    for group in anatomy.groups:
        if group.kind == "token":
            # A token that is not in the calibration data has no gradient. Training would not change it either.
            tuned[group.name] &= values[group.name] > 0
    if tunes and limits.trainable is not None:
        tuned = _choose_tuned(anatomy, values, tuned, prices, limits.trainable, always_trained)
    elif retention is not None:
        for group in anatomy.groups:
            if group.kind == "neuron":
                candidates = tuned[group.name]
                count = allowance(retention, int(candidates.sum())) if retention else 0
                order = best_first(values[group.name], candidates, forced=np.zeros_like(candidates))
                tuned[group.name] = first_units(order, count, group)
    states = tuple((kept[g.name].astype(np.uint8) + tuned[g.name].astype(np.uint8)).tobytes() for g in anatomy.groups)
    return Plan(anatomy, states, targets, length, always_trained).predicted(tables)


def check_fits(
    anatomy: Anatomy,
    limits: Budget,
    sequence_length: int,
    *,
    available: Mapping[str, Any] | None = None,
    multiple_of: int = 8,
    min_units: int = 1,
    uniform: bool = False,
    latency: Any = None,
) -> None:
    """Raises the error of `make_plan` if not even the smallest plan meets the limits on the size of the model.

    This needs no scores, which take long. The arguments are those of `make_plan`.
    """
    if limits.trims:
        can_stay = {g.name: _mask(available, g, default=True) for g in anatomy.trimmable}
        costs = costs_of(limits, anatomy, sequence_length, tables_by_limit(latency))
        FirstCut(anatomy, limits, costs, can_stay, multiple_of, min_units, uniform).check_fits()


def _check_names(argument: str, names: Iterable[str], known: Collection[str], kind: str) -> None:
    """Raises `SensiError` for a name that would have no effect."""
    if unknown := sorted(set(names) - set(known)):
        example = f", such as {min(known)!r}" if known else ""
        raise SensiError(
            f"`{argument}` has {unknown[0]!r}, but the anatomy has no such name: give the names of its {kind}, which "
            f"are whole paths{example}."
        )


_ADVICE = "give the scores that `compute_scores` returns for this model."


def _scores_of(group: Group, scores: Mapping[str, Any]) -> np.ndarray:
    if group.name not in scores:
        raise BudgetError(f"There are no scores for {group.name!r}: {_ADVICE}")
    try:
        values = np.asarray(_array(scores[group.name]), dtype=np.float64)
    except (TypeError, ValueError, NotImplementedError) as error:  # the last for tensors on `meta`
        raise BudgetError(f"The scores of {group.name!r} are no array of numbers ({error}): {_ADVICE}") from None
    if values.shape != (group.size,):
        raise BudgetError(
            f"{group.name!r} has {group.size} units, but its scores have the shape {values.shape}: {_ADVICE}"
        )
    if not np.isfinite(values).all():
        raise BudgetError(f"The scores of {group.name!r} contain NaN or infinity: {_ADVICE}")
    return values


def _array(value: Any) -> Any:
    """A torch tensor of any dtype on any device as a NumPy array; anything else as it is."""
    return value.detach().cpu().double().numpy() if hasattr(value, "detach") else value


def _mask(masks: Mapping[str, Any] | None, group: Group, default: bool) -> np.ndarray:
    mask = (masks or {}).get(group.name)
    if mask is None:
        return np.full(group.size, default)
    if (found := np.asarray(_array(mask), dtype=bool)).shape != (group.size,):
        raise BudgetError(
            f"{group.name!r} has {group.size} units, but a mask for it has the shape {found.shape}: give masks of the "
            f"shape `[units]`, or leave the group out."
        )
    return found


def _warn_if_all_equal(values: list[np.ndarray]) -> None:
    scores = np.concatenate([np.zeros(0), *values])
    if len(scores) > 1 and (scores == scores[0]).all():
        value = f"{scores[0]:g}" if scores[0] else "zero"
        warnings.warn(
            f"All scores are {value}, so nothing is ranked. Units are chosen by their costs, and the first units of "
            f"each block are kept. Check the calibration data and the loss, or choose another score.",
            stacklevel=3,
        )


def _outside_best_layers(
    anatomy: Anatomy, values: Mapping[str, np.ndarray], kept: Masks, costs: Mapping[str, int], count: int
) -> list[str]:
    """Names of the groups outside the `count` layers with the largest scores for their trained values."""
    totals: dict[str, tuple[float, int]] = {}  # score and trained values of each layer
    for group in anatomy.groups:
        if costs[group.name] and group.layer:
            (score, price), mask = totals.get(group.layer, (0.0, 0)), kept[group.name]
            score, price = score + float(values[group.name][mask].sum()), price + costs[group.name] * int(mask.sum())
            totals[group.layer] = score, price
    if count > len(totals):
        raise BudgetError(
            f"`tuned_layers` is {count}, but the model has {len(totals)} layers with targeted modules: lower it."
        )
    best = sorted(totals, key=lambda layer: -totals[layer][0] / max(1, totals[layer][1]))[:count]
    return [group.name for group in anatomy.groups if group.layer not in best]


def _choose_tuned(
    anatomy: Anatomy,
    values: Mapping[str, np.ndarray],
    tunable: Masks,
    costs: Mapping[str, int],
    limit: float | int,
    always_trained: int,
) -> Masks:
    """The tunable units that are tuned under the limit on trained values."""
    allowed = allowance(limit, anatomy.total_params) - always_trained
    cheapest = min((cost for cost in costs.values() if cost), default=0)
    if allowed < cheapest:
        beside = f" beside the {always_trained:,} that are always trained" if always_trained else ""
        raise BudgetError(
            f"The limit on trained values allows {max(0, allowed):,}, but the smallest unit has {cheapest:,}{beside}.",
            "Raise `trainable`.",
            limits=["trainable"],
        )
    ladders = [
        ladder_of(
            g,
            values[g.name],
            partial(np.multiply, [[costs[g.name]]]),
            tunable[g.name],
            np.zeros(g.size, dtype=bool),
        )
        for g in anatomy.groups
    ]
    return choose(ladders, np.array([allowed], dtype=np.int64))
