"""Which unit is tuned, which stays frozen and which leaves the model.

One ranking, two cuts: units are ranked by score per cost. The first cut keeps as many of the best as the limits on
parameters and FLOPs allow and trims the rest; the second tunes as many of the kept ones as the limit on trained values
allows. A limit is never exceeded, and no further step of any group would fit.
"""

from __future__ import annotations

import base64
import heapq
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog

from .anatomy import Anatomy, Group
from .budget import Budget, allowance
from .errors import BudgetError, SensiLoadError


TRIMMED, FROZEN, TUNED = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """The state of every unit, and what that costs. Immutable and comparable; `str(plan)` is the summary.

    `states` holds one byte a unit (0 trimmed, 1 frozen, 2 tuned), group by group in the anatomy's order. `targets` are
    the modules whose slices of a tuned unit are trained; `always_trained` counts values that are trained whatever the
    plan says (output biases, norms). FLOPs are 2 x MACs of one sequence of `sequence_length` tokens.
    """

    anatomy: Anatomy
    states: tuple[bytes, ...]
    targets: frozenset[str]
    sequence_length: int
    always_trained: int = 0

    def of(self, group: Group) -> np.ndarray:
        """States (uint8) of the units of one group."""
        return np.frombuffer(self.states[self.anatomy.groups.index(group)], dtype=np.uint8)

    def _rows(self) -> list[tuple[Group, np.ndarray]]:
        return [(g, np.frombuffer(s, dtype=np.uint8)) for g, s in zip(self.anatomy.groups, self.states, strict=True)]

    @property
    def trims(self) -> bool:
        return any((states == TRIMMED).any() for _, states in self._rows())

    @property
    def kept_params(self) -> int:
        """Parameters of the prunable part that stay in the model."""
        return sum(int((s != TRIMMED).sum()) * g.unit_params for g, s in self._rows() if g.trimmable)

    @property
    def kept_flops(self) -> int:
        """FLOPs of the prunable part for one sequence."""
        return 2 * sum(
            int((s != TRIMMED).sum()) * g.unit_macs(self.sequence_length) for g, s in self._rows() if g.trimmable
        )

    @property
    def trainable_params(self) -> int:
        """Trained values, the task head left out."""
        tuned = sum(int((s == TUNED).sum()) * g.unit_trainable(self.targets) for g, s in self._rows())
        return tuned + self.always_trained

    @property
    def params_share(self) -> float:
        """Share of the prunable parameters that is kept."""
        return self.kept_params / max(1, self.anatomy.prunable_params)

    @property
    def flops_share(self) -> float:
        """Share of the prunable FLOPs that is kept."""
        return self.kept_flops / max(1, 2 * self.anatomy.prunable_macs(self.sequence_length))

    @property
    def model_params_share(self) -> float:
        """Share of all base parameters, embeddings included and the task head left out, that is kept."""
        total = self.anatomy.total_params
        return (total - self.anatomy.prunable_params + self.kept_params) / max(1, total)

    @property
    def trainable_share(self) -> float:
        """Trained values over all base parameters."""
        return self.trainable_params / max(1, self.anatomy.total_params)

    def to_dict(self) -> dict[str, Any]:
        """A compact JSON value: bit masks of kept and of tuned units, packed and base64-encoded."""
        groups = {
            g.name: {"size": g.size, "kept": _pack(s != TRIMMED), "tuned": _pack(s == TUNED)} for g, s in self._rows()
        }
        return {
            "sequence_length": self.sequence_length,
            "always_trained": self.always_trained,
            "groups": groups,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], anatomy: Anatomy, targets: frozenset[str]) -> Plan:
        """Inverse of `to_dict` on the model it was made for. Raises `SensiLoadError` when it does not fit that model."""
        _check_plan_dict(values)
        groups = values["groups"]
        if extra := sorted(set(groups) - set(anatomy.by_name)):
            raise SensiLoadError(f"The plan names the group {extra[0]!r}, which this base model does not have.")
        states = []
        for group in anatomy.groups:
            if group.name not in groups:
                raise SensiLoadError(f"The plan says nothing about {group.name!r}, which this base model has.")
            entry = groups[group.name]
            if entry["size"] != group.size:
                raise SensiLoadError(
                    f"The plan has {entry['size']} units in {group.name!r}, this base model has {group.size}."
                )
            kept, tuned = (_unpack(entry[key], group.size, f"{group.name}.{key}") for key in ("kept", "tuned"))
            if (tuned & ~kept).any() or (not group.trimmable and not kept.all()):
                raise SensiLoadError(f"The plan of {group.name!r} contradicts itself: it tunes or trims what it cannot.")
            states.append((kept.astype(np.uint8) + tuned.astype(np.uint8)).tobytes())
        return cls(anatomy, tuple(states), targets, values["sequence_length"], values["always_trained"])

    def summary(self) -> str:
        """A table by layer: kept and tuned units, and the shares that the budget speaks about."""
        lines = [f"{'group':<44} {'units':>7} {'kept':>7} {'tuned':>7} {'of prunable':>12} {'of model':>9}"]
        prunable, total = max(1, self.anatomy.prunable_params), max(1, self.anatomy.total_params)
        for group, states in self._rows():
            kept, tuned = int((states != TRIMMED).sum()), int((states == TUNED).sum())
            params = kept * group.unit_params
            share = f"{params / prunable:>12.2%}" if group.trimmable else f"{'-':>12}"
            name = group.name if len(group.name) <= 44 else "…" + group.name[-43:]
            lines.append(f"{name:<44} {group.size:>7} {kept:>7} {tuned:>7} {share} {params / total:>9.2%}")
        lines.append(
            f"prunable parameters kept {self.kept_params:,} ({self.params_share:.2%}), "
            f"model parameters kept {self.model_params_share:.2%}, "
            f"prunable FLOPs kept {self.kept_flops:,} ({self.flops_share:.2%} at {self.sequence_length} tokens), "
            f"trained values {self.trainable_params:,} ({self.trainable_share:.2%} of the base)"
        )
        return "\n".join(lines)

    def line(self) -> str:
        """One line for the log."""
        heads, neurons = ([(g.size, s) for g, s in self._rows() if g.kind == kind] for kind in ("head", "neuron"))
        kept = ", ".join(
            f"{sum(int((s != TRIMMED).sum()) for _, s in rows)} of {sum(size for size, _ in rows)} {kind}"
            for kind, rows in (("heads", heads), ("neurons", neurons))
            if rows
        )
        return (
            f"{'kept ' + kept + '; ' if kept else ''}{self.params_share:.1%} of prunable parameters, "
            f"{self.flops_share:.1%} of prunable FLOPs, {self.trainable_params:,} trained values"
        )

    def __str__(self) -> str:
        return self.summary()


def make_plan(
    anatomy: Anatomy,
    scores: Mapping[str, np.ndarray],
    budget: Budget | float | Mapping[str, float] | None,
    *,
    targets: frozenset[str] | None = None,
    protected: Mapping[str, np.ndarray] | None = None,
    sequence_length: int = 128,
    multiple_of: int = 8,
    min_units: int = 1,
    always_trained: int = 0,
    tunes: bool = True,
    retention: float | None = None,
    biases_apart: bool = False,
) -> Plan:
    """Chooses the states of all units under the budget.

    Args:
        scores: For each group one number a unit; larger is more worth keeping. Not divided by cost yet.
        targets: Modules that may be trained; all by default.
        protected: Units that are kept whatever their score, as long as the budget allows it.
        multiple_of: Neurons are kept in steps of so many (heads in steps of one).
        min_units: Units that stay in each block; 0 lets whole sublayers go.
        always_trained: Values that are trained in any case and count towards `trainable`.
        tunes: Whether units are tuned at all; `False` leaves all kept ones frozen.
        retention: Share of each FFN's kept neurons that are tuned, rounded down (FAR); heads are tuned whole.
        biases_apart: Biases are among the values that are always trained, not among those of the units.

    Raises:
        BudgetError: When even the smallest plan exceeds a limit, or scores are not finite.
    """
    limits = Budget() if budget is None else Budget.parse(budget)
    values = {g.name: _checked_scores(g, scores) for g in anatomy.groups}
    targets = frozenset(m for g in anatomy.groups for m in g.modules) if targets is None else targets
    kept = {g.name: np.ones(g.size, dtype=bool) for g in anatomy.groups}
    if limits.trims:
        kept.update(_choose_kept(anatomy, values, limits, protected or {}, sequence_length, multiple_of, min_units))
    if not tunes:
        tuned = {g.name: np.zeros(g.size, dtype=bool) for g in anatomy.groups}
    elif limits.trainable is not None:
        costs = {g.name: g.unit_trainable(targets, with_bias=not biases_apart) for g in anatomy.groups}
        tuned = _choose_tuned(anatomy, values, kept, costs, limits.trainable, always_trained)
    else:
        tuned = {g.name: kept[g.name] & bool(g.unit_trainable(targets)) for g in anatomy.groups}
        if retention is not None:
            for group in (g for g in anatomy.groups if g.kind == "neuron"):
                count = allowance(retention, int(tuned[group.name].sum())) if retention else 0
                tuned[group.name] &= _best(values[group.name], tuned[group.name], count)
    states = tuple((kept[g.name].astype(np.uint8) + tuned[g.name].astype(np.uint8)).tobytes() for g in anatomy.groups)
    return Plan(anatomy, states, targets, sequence_length, always_trained)


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
    """The steps by which one group can grow: `counts[0]` units are mandatory, step `i` leads to `counts[i + 1]`."""

    order: np.ndarray  # unit indices, best first
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
    sequence_length: int,
    multiple_of: int,
    min_units: int,
) -> dict[str, np.ndarray]:
    groups = anatomy.trimmable
    if not any(values[g.name].any() for g in groups):
        warnings.warn("All scores are zero: the plan keeps the first units of each block.")
    costs, allowed = [], []
    if limits.params is not None:
        costs.append([g.unit_params for g in groups])
        allowed.append(allowance(limits.params, anatomy.prunable_params))
    if limits.flops is not None:
        costs.append([2 * g.unit_macs(sequence_length) for g in groups])
        allowed.append(allowance(limits.flops, 2 * anatomy.prunable_macs(sequence_length)))
    unit_costs = np.array(costs, dtype=np.int64)  # [limits, groups]
    allowed_costs = np.array(allowed, dtype=np.int64)

    def ladders(keep_protected: bool) -> list[_Ladder]:
        return [
            _ladder(
                values[g.name],
                unit_costs[:, i],
                np.asarray(protected.get(g.name, np.zeros(g.size)), dtype=bool) & keep_protected,
                multiple_of if g.kind == "neuron" else 1,
                min_units,
            )
            for i, g in enumerate(groups)
        ]

    chosen = ladders(keep_protected=True)
    if (sum(ladder.floor for ladder in chosen) > allowed_costs).any():
        chosen = ladders(keep_protected=False)  # the limit is a promise, protection is advice
    floor = sum(ladder.floor for ladder in chosen)
    if (floor > allowed_costs).any():
        smallest = ", ".join(
            f"{name} >= {cost:,}"
            for name, cost in zip([n for n in ("params", "flops") if getattr(limits, n) is not None], floor, strict=True)
        )
        raise BudgetError(
            f"The budget is too small: {min_units} head(s) and {multiple_of} neurons in each block already need "
            f"{smallest}. Raise the budget, lower `multiple_of`, or let whole sublayers go with `min_units=0`."
        )
    left = allowed_costs - floor
    if len(allowed_costs) > 1:
        left = _take_by_linear_program(chosen, left)
    _fill(chosen, left)
    kept = {}
    for group, ladder in zip(groups, chosen, strict=True):
        mask = np.zeros(group.size, dtype=bool)
        mask[ladder.order[: ladder.counts[ladder.taken]]] = True
        kept[group.name] = mask
    return kept


def _ladder(values: np.ndarray, unit_cost: np.ndarray, forced: np.ndarray, step: int, min_units: int) -> _Ladder:
    size = len(values)
    order = np.lexsort((np.arange(size), -values, ~forced))
    counts = np.unique(np.append(np.arange(0, size, step), size))
    # `[0:1]` is the mandatory rung: the first count that covers the minimum and all forced units.
    counts = counts[np.searchsorted(counts, min(size, max(min_units, int(forced.sum())))) :]
    total = np.concatenate(([0.0], np.cumsum(values[order])))
    return _Ladder(
        order=order,
        counts=counts,
        gains=np.diff(total[counts]),
        costs=unit_cost[:, None] * np.diff(counts)[None, :],
        floor=unit_cost * counts[0],
    )


def _take_by_linear_program(ladders: list[_Ladder], left: np.ndarray) -> np.ndarray:
    """Takes the steps that maximise the kept score under several limits; returns what is left of them.

    Scores fall along a ladder, so the relaxation takes steps from the top by itself, and a basic solution is fractional
    in at most as many steps as there are limits. Rounding those down costs at most their score, a vanishing part of
    thousands of steps, and what they leave is filled afterwards; the integer program takes minutes for the same.
    """
    gains = np.concatenate([ladder.gains for ladder in ladders])
    costs = np.concatenate([ladder.costs for ladder in ladders], axis=1)
    if gains.size == 0:
        return left
    result = linprog(
        c=-gains / max(np.abs(gains).max(), np.finfo(float).tiny),
        A_ub=costs / np.maximum(left, 1)[:, None],
        b_ub=np.minimum(left, 1),
        bounds=(0, 1),
        method="highs",
    )
    if result.x is None:
        return left
    taken = np.split(result.x > 1 - 1e-6, np.cumsum([ladder.gains.size for ladder in ladders])[:-1])
    for ladder, steps in zip(ladders, taken, strict=True):
        # Ties can make the solver skip a rung; a ladder is climbed from below, and only as far as the limits allow.
        for step in range(int(steps.sum())):
            if (ladder.costs[:, step] > left).any():
                break
            left = left - ladder.costs[:, step]
            ladder.taken = step + 1
    return left


def _fill(ladders: list[_Ladder], left: np.ndarray) -> None:
    """Takes steps in the order of score per cost until none fits: with one limit, a merge of the sorted ladders."""
    # With several limits a step costs what it takes of the scarcest one.
    scarcity = np.maximum(left, 1).astype(np.float64)

    def rung(index: int) -> tuple[float, int] | None:
        ladder = ladders[index]
        if ladder.taken == ladder.gains.size:
            return None
        price = float((ladder.costs[:, ladder.taken] / scarcity).max())
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
    kept: dict[str, np.ndarray],
    costs: dict[str, int],
    limit: float | int,
    always_trained: int,
) -> dict[str, np.ndarray]:
    allowed = allowance(limit, anatomy.total_params) - always_trained
    unit_costs = [costs[g.name] for g in anatomy.groups]
    ladders = []
    for group, cost in zip(anatomy.groups, unit_costs, strict=True):
        candidates = np.flatnonzero(kept[group.name]) if cost else np.zeros(0, dtype=np.int64)
        ladder = _ladder(values[group.name][candidates], np.array([cost]), np.zeros(len(candidates), bool), 1, 0)
        ladder.order = candidates[ladder.order]
        ladders.append(ladder)
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
        mask[ladder.order[: ladder.counts[ladder.taken]]] = True
        tuned[group.name] = mask
    return tuned


def _best(values: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` candidates with the largest values; ties go to the smaller index."""
    mask = np.zeros(len(values), dtype=bool)
    mask[np.lexsort((np.arange(len(values)), -values, ~candidates))[:count]] = True
    return mask


def _pack(mask: np.ndarray) -> str:
    if mask.all():
        return "all"
    return base64.b64encode(np.packbits(mask).tobytes()).decode() if mask.any() else "none"


def _unpack(text: str, size: int, where: str) -> np.ndarray:
    if text in ("all", "none"):
        return np.full(size, text == "all")
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    except ValueError as error:
        raise SensiLoadError(f"The plan's mask {where!r} is not base64: {error}.") from None
    if len(bits) != -(-size // 8) * 8 or bits[size:].any():
        raise SensiLoadError(f"The plan's mask {where!r} holds {len(bits)} bits where {size} units need another number.")
    return bits[:size].astype(bool)


def _check_plan_dict(values: Any) -> None:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48

    if not isinstance(values, Mapping) or set(values) != {"sequence_length", "always_trained", "groups"}:
        raise SensiLoadError("A plan has exactly the keys sequence_length, always_trained and groups.")
    if not is_count(values["sequence_length"]) or not is_count(values["always_trained"]):
        raise SensiLoadError("The plan's sequence_length and always_trained must be whole numbers.")
    if not isinstance(values["groups"], Mapping):
        raise SensiLoadError("The plan's groups must be a mapping from group names.")
    for name, entry in values["groups"].items():
        good = isinstance(entry, Mapping) and set(entry) == {"size", "kept", "tuned"} and is_count(entry["size"])
        if not good or not all(isinstance(entry[key], str) for key in ("kept", "tuned")):
            raise SensiLoadError(f"The plan's group {name!r} must have a size and two masks, kept and tuned.")
