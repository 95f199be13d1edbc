"""Which unit is tuned, which stays frozen and which leaves the model: one ranking, two cuts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..anatomy.units import Anatomy, Group
from ..plotting.plots import Ranking, plot_plan
from ..utils.errors import SensiError, SensiLoadError
from ..utils.formatting import human
from ..utils.states import KINDS, TRIMMED, TUNED, Row
from .packing import _pack, _unpack, check_plan_dict, unpack_states


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
        """Inverse of `to_dict`. Raises `SensiLoadError` when the plan does not fit the model."""
        check_plan_dict(values)
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
            if group.fixed and not kept.all():
                raise SensiLoadError(
                    f"The plan trims {group.name!r}, which cannot be trimmed in this model (is it quantized?): load "
                    f"the adapter on the base model that it was made for."
                )
            if (tuned & ~kept).any() or (not group.trimmable and not kept.all()):
                raise SensiLoadError(
                    f"The plan of {group.name!r} contradicts itself: it tunes or trims what it cannot."
                )
            if kept.sum() < group.least:
                raise SensiLoadError(
                    f"The plan keeps {int(kept.sum())} units of {group.name!r}, which cannot run with fewer than "
                    f"{group.least}."
                )
            states.append((kept.astype(np.uint8) + tuned.astype(np.uint8)).tobytes())
        return cls(anatomy, tuple(states), targets, values["sequence_length"], values["always_trained"])

    def summary(self) -> str:
        """A table by layer: kept and tuned units, and the shares that the budget speaks about."""
        lines = [f"{'group':<44} {'units':>7} {'kept':>7} {'tuned':>7} {'of prunable':>12} {'of model':>9}"]
        prunable, total = max(1, self.anatomy.prunable_params), max(1, self.anatomy.total_params)
        for group, states in self._rows():
            params = int((states != TRIMMED).sum()) * group.unit_params
            share = f"{params / prunable:>12.2%}" if group.trimmable else f"{'-':>12}"
            lines.append(f"{_counts(group, states)} {share} {params / total:>9.2%}")
        lines += [
            f"prunable parameters kept: {self.kept_params:,} ({self.params_share:.2%})",
            f"model parameters kept: {self.model_params_share:.2%}",
            f"prunable FLOPs kept: {self.kept_flops:,} ({self.flops_share:.2%} at {self.sequence_length} tokens)",
            f"trained values: {self.trainable_params:,} ({self.trainable_share:.2%} of the base)",
        ]
        return "\n".join(lines)

    def explain(self, scores: Mapping[str, np.ndarray]) -> str:
        """A table of the groups by their score per thousand parameters, which is what ranks them: the best first."""
        density = {g.name: 1e3 * float(scores[g.name].sum()) / (g.size * g.unit_params) for g in self.anatomy.groups}
        lines = [f"{'score / 1000 params':>19}  {'group':<44} {'units':>7} {'kept':>7} {'tuned':>7}"]
        for group, states in sorted(self._rows(), key=lambda row: -density[row[0].name]):
            lines.append(f"{density[group.name]:>19.3e}  {_counts(group, states)}")
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

    def plot(self, path: str | os.PathLike, scores: Any = None, style: str = "light", cost: str = "params") -> None:
        """Draws a map of the model. With scores, also draws the ranking of the units and the cut lines.

        Needs matplotlib (`pip install 'peft-sensi[plots]'`).

        Args:
            path: A file that ends in `.png`, `.svg` or `.pdf`.
            scores: The `Scores` that the plan was made from.
            style: `light` or `dark`.
            cost: The ranking shows each score divided by this cost of the unit: `params` or `flops`.

        Raises:
            SensiError: Matplotlib is missing, an argument is unknown, the scores belong to another model, or the
                picture cannot be written.
        """
        if cost not in ("params", "flops"):
            raise SensiError(f"`cost` must be 'params' or 'flops', got {cost!r}.")
        headline = f"{human(self.trainable_params)} values trained"
        if self.trims:
            shares = f"{self.params_share:.1%} of prunable parameters and {self.flops_share:.1%} of their FLOPs"
            headline = f"{shares} kept; {headline}"
        ranking = None if scores is None else self._ranking(scores.values, cost)
        plot_plan(drawn_rows(self), path, headline, ranking, style)

    def _ranking(self, scores: Mapping[str, Any], cost: str) -> Ranking:
        """The units that the budget is about: the trimmable ones, or all scored ones if no unit is trimmable."""
        scored = [group for group in self.anatomy.groups if group.name in scores and group.kind != "token"]
        groups = [group for group in scored if group.trimmable] or scored
        if not groups or any(len(scores[group.name]) != group.size for group in groups):
            raise SensiError("These scores do not belong to this plan's model: groups or numbers of units differ.")
        costs = [g.unit_params if cost == "params" else 2 * g.unit_macs(self.sequence_length) for g in groups]
        unit_costs = np.repeat(np.array(costs, dtype=float), [group.size for group in groups])
        return Ranking(
            scores=np.concatenate([scores[group.name].double().numpy() for group in groups]) / unit_costs,
            costs=unit_costs,
            states=np.concatenate([self.of(group) for group in groups]),
            cost="parameter" if cost == "params" else "FLOP",
            part="prunable" if groups[0].trimmable else "targeted",
        )

    def __str__(self) -> str:
        return self.summary()


def _counts(group: Group, states: np.ndarray) -> str:
    """A group's columns in the tables: its name, and how many units it has, keeps and tunes."""
    name = group.name if len(group.name) <= 44 else "…" + group.name[-43:]
    kept, tuned = int((states != TRIMMED).sum()), int((states == TUNED).sum())
    return f"{name:<44} {group.size:>7} {kept:>7} {tuned:>7}"


def rows_of(plan: Plan | Mapping[str, Any]) -> list[Row]:
    """The groups of a plan, or of the dict that an adapter's config holds. Raises `SensiLoadError` for a broken dict.

    A dict says nothing about kinds, so they are read off the groups' names.
    """
    if isinstance(plan, Plan):
        return [Row(g.name, block_of(g), g.kind, plan.of(g)) for g in plan.anatomy.groups]
    rows = []
    for name, states in unpack_states(plan).items():
        block, _, last = name.rpartition(".")
        kind = next((kind for kind in ("head", "neuron", "token") if last.endswith(KINDS[kind])), "")
        rows.append(Row(name, block if kind else name, kind or ("tensor" if len(states) == 1 else "row"), states))
    return rows


def drawn_rows(plan: Plan | Mapping[str, Any]) -> list[Row]:
    """`rows_of` without tokens, next to whose number the other units could not be seen."""
    rows = rows_of(plan)
    return [row for row in rows if row.kind != "token"] or rows


def block_of(group: Group) -> str:
    return (group.layer if group.trimmable else "") or group.name
