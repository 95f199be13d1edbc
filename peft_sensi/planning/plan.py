"""A plan (from `allocate.make_plan`, or from an adapter's config): the states of all units, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..anatomy.latency import LIMITS, LatencyTable, latency_facts
from ..anatomy.units import Anatomy, Group
from ..plotting.plots import Ranking, plot_plan
from ..utils.errors import SensiError, SensiLoadError
from ..utils.formatting import human
from ..utils.states import FROZEN, KINDS, TRIMMED, TUNED, Row
from .packing import check_plan_dict, pack_mask, unpack_group, unpack_states


@dataclass(frozen=True)
class Plan:
    """The state of every unit (head, neuron, row or token) of a model.

    Plans are immutable and comparable, and `str(plan)` is `plan.summary()`.

    Attributes:
        anatomy: The groups of units of the base model, and what a unit of each costs.
        states: One `bytes` object for each group, in the anatomy's order. Each byte is the state of one unit: 0 is
            trimmed, 1 is frozen, 2 is tuned.
        targets: Names of the modules that may be trained. Tuning a unit trains its slices of these modules only.
        sequence_length: Number of tokens in the sequence for which FLOPs are counted.
        always_trained: Number of values that are trained beside the tuned units (output biases and norms, for
            example). The task head is not counted.
        latency: What latency tables predict, by the limit's name (see `LatencyTable.record`). It is empty without a
            table, and has no influence on whether two plans are equal.

    All FLOPs are those of one sequence, 2 for each multiply-accumulate operation. The *prunable* part of a model
    consists of the heads and neurons that can be trimmed.
    """

    anatomy: Anatomy
    states: tuple[bytes, ...]
    targets: frozenset[str]
    sequence_length: int
    always_trained: int = 0
    latency: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    def predicted(self, tables: Mapping[str, LatencyTable]) -> Plan:
        """The same plan with the predictions of these tables (by the limit's name), and without any others.

        Raises `SensiError` if a table is for another model.
        """
        records = {}
        for name, table in tables.items():
            table.check_fits(self.anatomy)
            times = [int(table.times(g, np.array([kept]))[0]) for g, kept, _ in self._counts() if g.trimmable]
            records[name] = table.record(table.rest + sum(times))
        return replace(self, latency=records)

    def of(self, group: Group) -> np.ndarray:
        """The states of a group's units, uint8 of shape `[group.size]`, read-only."""
        return np.frombuffer(self.states[self.anatomy.groups.index(group)], dtype=np.uint8)

    def _states(self) -> list[tuple[Group, np.ndarray]]:
        return [(g, np.frombuffer(s, dtype=np.uint8)) for g, s in zip(self.anatomy.groups, self.states, strict=True)]

    def _counts(self) -> list[tuple[Group, int, int]]:
        """Each group with the number of its units that stay in the model and the number of those that are tuned."""
        return [(g, int((s != TRIMMED).sum()), int((s == TUNED).sum())) for g, s in self._states()]

    @property
    def trimmed_units(self) -> dict[str, np.ndarray]:
        """For each group's name a boolean mask `[units]` of the units that leave the model."""
        return {group.name: states == TRIMMED for group, states in self._states()}

    def without(self, units: Mapping[str, np.ndarray]) -> Plan:
        """This plan without more units: a mask like those of `trimmed_units` for some of the groups."""
        masks = {group.name: units.get(group.name, False) for group in self.anatomy.groups}
        states = (np.where(masks[g.name], TRIMMED, s).astype(np.uint8).tobytes() for g, s in self._states())
        return replace(self, states=tuple(states))

    @property
    def trims(self) -> bool:
        """Whether any unit leaves the model."""
        return any(kept < group.size for group, kept, _ in self._counts())

    @property
    def kept_params(self) -> int:
        """Parameters of the prunable part that stay in the model."""
        return sum(kept * g.unit_params for g, kept, _ in self._counts() if g.trimmable)

    @property
    def kept_flops(self) -> int:
        """FLOPs of the prunable part that stay in the model."""
        return 2 * sum(kept * g.unit_macs(self.sequence_length) for g, kept, _ in self._counts() if g.trimmable)

    @property
    def trainable_params(self) -> int:
        """Trained values, without the task head."""
        return self.always_trained + sum(tuned * g.unit_trainable(self.targets) for g, _, tuned in self._counts())

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
        """Share of all base parameters that is kept. Embeddings are counted, the task head is not."""
        total = self.anatomy.total_params
        return (total - self.anatomy.prunable_params + self.kept_params) / max(1, total)

    @property
    def trainable_share(self) -> float:
        """Trained values as a share of all base parameters."""
        return self.trainable_params / max(1, self.anatomy.total_params)

    def figures(self) -> dict[str, int | float]:
        """All figures of the plan, as a JSON value. Every text, table and report about a plan reads them here.

        `params_*` and `flops_*` are about the prunable part. `base_params` are the parameters of the base without its
        task head, and `base_params_share` is the share of them that is kept. With latency tables there are
        `latency_ms`, `latency_whole_ms` and `latency_share`, or the same with `decode_latency`.
        """
        times: dict[str, float] = {}
        for name, record in self.latency.items():
            predicted, whole = record["predicted_ms"], record["whole_ms"]
            times |= {f"{name}_ms": predicted, f"{name}_whole_ms": whole, f"{name}_share": predicted / whole}
        return {
            "params_kept": self.kept_params,
            "params_prunable": self.anatomy.prunable_params,
            "params_share": self.params_share,
            "flops_kept": self.kept_flops,
            "flops_prunable": 2 * self.anatomy.prunable_macs(self.sequence_length),
            "flops_share": self.flops_share,
            "sequence_length": self.sequence_length,
            "base_params": self.anatomy.total_params,
            "base_params_share": self.model_params_share,
            "trainable_params": self.trainable_params,
            "trainable_share": self.trainable_share,
            **times,
        }

    def facts(self, number: Callable[[int], str] = "{:,}".format) -> dict[str, str]:
        """`figures` as text, by label. `number` formats the counts; see `formatting.human` for short ones."""
        values = self.figures()
        count = {name: number(value) for name, value in values.items() if isinstance(value, int)}
        share = {name: f"{value:.2%}" for name, value in values.items() if isinstance(value, float)}
        facts = {}
        if self.anatomy.trimmable:
            facts["prunable parameters kept"] = (
                f"{count['params_kept']} of {count['params_prunable']} ({share['params_share']})"
            )
            facts["prunable FLOPs kept"] = (
                f"{count['flops_kept']} of {count['flops_prunable']} "
                f"({share['flops_share']}, {self.sequence_length} tokens)"
            )
        facts |= latency_facts(self.latency)
        facts["base parameters kept"] = f"{share['base_params_share']} of {count['base_params']}, embeddings included"
        for group, _, tuned in self._counts():
            if group.kind == "token":
                facts["tokens trained"] = f"{tuned:,} of {group.size:,}"
        facts["trained values"] = (
            f"{count['trainable_params']} ({share['trainable_share']} of the base), beside the task head"
        )
        return facts

    def summary(self) -> str:
        """A table with one line for each group (units, kept, tuned, shares of parameters), followed by `facts`."""
        lines = [f"{COLUMNS} {'of prunable':>12} {'of model':>9}"]
        prunable, total = max(1, self.anatomy.prunable_params), max(1, self.anatomy.total_params)
        for group, kept, tuned in self._counts():
            params = kept * group.unit_params
            share = f"{params / prunable:.2%}" if group.trimmable else "-"
            lines.append(f"{_columns(group, kept, tuned)} {share:>12} {params / total:>9.2%}")
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.facts().items())])

    __str__ = summary

    def explain(self, scores: Mapping[str, np.ndarray]) -> str:
        """A table of the groups with their mean score per 1000 parameters, the largest first."""
        density = {g.name: 1e3 * float(scores[g.name].sum()) / (g.size * g.unit_params) for g in self.anatomy.groups}
        lines = [f"{'score / 1000 params':>19}  {COLUMNS}"]
        for group, kept, tuned in sorted(self._counts(), key=lambda counts: -density[counts[0].name]):
            lines.append(f"{density[group.name]:>19.3e}  {_columns(group, kept, tuned)}")
        return "\n".join(lines)

    def line(self) -> str:
        """The most important figures in one line, for a log."""
        units = {kind: counts for kind, counts in units_by_kind(self).items() if kind in ("head", "neuron")}
        kept = ", ".join(f"{c['kept']} of {c['size']} {KINDS[kind]}" for kind, c in units.items())
        times = [f"{self.latency[n]['predicted_ms']:.3g} ms {n}, " for n in LIMITS.values() if n in self.latency]
        return (
            f"{f'kept {kept}; ' if kept else ''}{''.join(times)}{self.params_share:.1%} of prunable parameters, "
            f"{self.flops_share:.1%} of prunable FLOPs, {self.trainable_params:,} trained values"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as a compact JSON value: for each group a packed mask of its kept and one of its tuned units."""
        groups = {
            g.name: {"size": g.size, "kept": pack_mask(s != TRIMMED), "tuned": pack_mask(s == TUNED)}
            for g, s in self._states()
        }
        return {"sequence_length": self.sequence_length, "always_trained": self.always_trained, "groups": groups}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], anatomy: Anatomy, targets: frozenset[str]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            SensiLoadError: If the dict is malformed, or if it does not fit the model that has this anatomy.
        """
        check_plan_dict(values)
        groups = values["groups"]
        if extra := sorted(set(groups) - set(anatomy.by_name)):
            raise SensiLoadError(f"The plan names the group {extra[0]!r}, which this base model does not have.")
        states = []
        for group in anatomy.groups:
            if group.name not in groups:
                raise SensiLoadError(f"The plan says nothing about {group.name!r}, which this base model has.")
            entry = groups[group.name]
            if entry["size"] != group.size and group.kind != "token":
                raise SensiLoadError(
                    f"The plan has {entry['size']} units in {group.name!r}, this base model has {group.size}."
                )
            state = unpack_group(group.name, entry)
            if len(state) != group.size:  # a vocabulary that was resized: tokens are known by their number
                if (state[group.size :] != FROZEN).any():
                    raise SensiLoadError(
                        f"The plan tunes the token {group.size + np.argmax(state[group.size :] != FROZEN)} of "
                        f"{group.name!r}, but this base model has only {group.size} tokens."
                    )
                state = np.pad(state[: group.size], (0, max(0, group.size - len(state))), constant_values=FROZEN)
            kept = state != TRIMMED
            if not group.trimmable and not kept.all():
                reason = "only heads and neurons can be trimmed"
                if group.fixed:
                    reason = (
                        "this group cannot be trimmed in this model (is it quantized?): load the adapter on the base "
                        "model that it was made for"
                    )
                raise SensiLoadError(f"The plan trims units of {group.name!r}, but {reason}.")
            if kept.sum() < group.least:
                raise SensiLoadError(
                    f"The plan keeps {int(kept.sum())} units of {group.name!r}, which cannot run with fewer than "
                    f"{group.least}."
                )
            states.append(state.tobytes())
        return cls(anatomy, tuple(states), targets, values["sequence_length"], values["always_trained"])

    def plot(self, path: str | os.PathLike, scores: Any = None, style: str = "light", cost: str = "params") -> None:
        """Draws a map of the model. With scores, also draws the ranking of the units and the cut lines.

        Needs matplotlib (the extra `plots`).

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


COLUMNS = f"{'group':<44} {'units':>7} {'kept':>7} {'tuned':>7}"


def _columns(group: Group, kept: int, tuned: int) -> str:
    name = group.name if len(group.name) <= 44 else "…" + group.name[-43:]
    return f"{name:<44} {group.size:>7} {kept:>7} {tuned:>7}"


def rows_of(plan: Plan | Mapping[str, Any]) -> list[Row]:
    """One `Row` for each group of a plan, or of the dict in an adapter's config. Raises `SensiLoadError`."""
    if isinstance(plan, Plan):
        states = plan._states()
        return [Row(g.name, (g.layer if g.trimmable else "") or g.name, g.kind, s) for g, s in states]
    rows = []
    for name, values in unpack_states(plan).items():
        block, _, last = name.rpartition(".")
        # The dict does not contain the kinds of the groups.
        kind = next((kind for kind in ("head", "neuron", "token") if last.endswith(KINDS[kind])), "")
        rows.append(Row(name, block if kind else name, kind or ("tensor" if len(values) == 1 else "row"), values))
    return rows


def drawn_rows(plan: Plan | Mapping[str, Any]) -> list[Row]:
    """`rows_of` without the tokens: there are so many of them that the other units would not be visible."""
    rows = rows_of(plan)
    return [row for row in rows if row.kind != "token"] or rows


def units_by_kind(plan: Plan | Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """For each kind of unit the numbers of all units (`size`), of `kept` ones and of `tuned` ones."""
    units: dict[str, dict[str, int]] = {}
    for row in rows_of(plan):
        counts = units.setdefault(row.kind, {"size": 0, "kept": 0, "tuned": 0})
        counts["size"] += row.size
        counts["kept"] += row.count(FROZEN, TUNED)
        counts["tuned"] += row.count(TUNED)
    return units
