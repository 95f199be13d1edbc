"""A plan (from `allocate.make_plan`, or from an adapter's config): the states of all units, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..anatomy.latency import LIMIT_OF, LatencyTable, latency_facts
from ..anatomy.units import Anatomy, Group
from ..plotting.plots import plot_plan
from ..utils.errors import SensiError
from ..utils.formatting import data_frame, find_name, html_table, human, short_names, text_table, wrapped
from ..utils.states import FROZEN, TRIMMED, TUNED, UPDATED, Row
from .packing import check_least, check_plan_dict, other_group, pack_mask, states_for
from .rows import drawn_rows, kind_names, ranking_of, rows_of, units_by_kind


@dataclass(frozen=True, repr=False)
class Plan:
    """The state of every unit (head, neuron, row or token) of a model.

    Plans are immutable and comparable. `print(plan)` shows `plan.summary()`, `plan["...layer.0.heads"]` are the states
    of a group, and `plan.to_frame()` is a table of the groups for pandas.

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
        update: What the matrices of `targets` have beside tuned units, in words: `low-rank, rank 8`, for example. It
            is empty for a dense update, and has no influence on whether two plans are equal either.

    All FLOPs are those of one sequence, 2 for each multiply-accumulate operation. The *prunable* part of a model
    consists of the heads and neurons that can be trimmed.
    """

    anatomy: Anatomy
    states: tuple[bytes, ...]
    targets: frozenset[str]
    sequence_length: int
    always_trained: int = field(default=0, compare=False)
    latency: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    update: str = field(default="", compare=False)

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
        """The states of a group's units, uint8 of shape `[group.size]`, read-only.

        Raises `SensiError` for anything else than a group of this plan.
        """
        try:
            index = self.anatomy.groups.index(group)
        except ValueError:
            raise SensiError(
                f"{group!r} is no group of this plan: `of` takes one of `plan.anatomy.groups`. By name, write "
                f"`plan[{self.anatomy.groups[0].name!r}]`."
            ) from None
        return np.frombuffer(self.states[index], dtype=np.uint8)

    def __getitem__(self, name: str) -> np.ndarray:
        """The states of the group with this name, or with the only name that ends so: uint8 of shape `[units]`.

        Raises `SensiError` if there is no such group.
        """
        return self.of(self.anatomy.by_name[find_name(name, self.anatomy.by_name, "plan")])

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
        """This plan without more units: for some groups a boolean mask `[units]`, by name as in `plan[name]`.

        It has no predicted latencies until they are `predicted` again. Raises `SensiError` if a mask does not fit, or
        has units that cannot be removed.
        """
        masks = {find_name(name, self.anatomy.by_name, "plan"): np.asarray(mask) for name, mask in units.items()}
        for name, mask in masks.items():
            group = self.anatomy.by_name[name]
            if mask.shape != (group.size,) or (mask.any() and not group.trimmable):
                raise SensiError(f"`units[{name!r}]` must be a mask of {group.size} units that can be removed.")
        states = [np.where(masks.get(g.name, False), TRIMMED, s).astype(np.uint8) for g, s in self._states()]
        for group, left in zip(self.anatomy.groups, states, strict=True):
            if group.name in masks:
                check_least(group, int((left != TRIMMED).sum()), "`units`")
        return replace(self, states=tuple(left.tobytes() for left in states), latency={})

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
        """Share of the prunable parameters that is kept; 1 if nothing can be trimmed at this granularity."""
        return self.kept_params / self.anatomy.prunable_params if self.anatomy.prunable_params else 1.0

    @property
    def flops_share(self) -> float:
        """Share of the prunable FLOPs that is kept; 1 if nothing can be trimmed at this granularity."""
        whole = 2 * self.anatomy.prunable_macs(self.sequence_length)
        return self.kept_flops / whole if whole else 1.0

    @property
    def model_params_share(self) -> float:
        """Share of the base's parameters that is kept. Embeddings are counted, the task head is not."""
        total = self.anatomy.total_params
        return (total - self.anatomy.prunable_params + self.kept_params) / max(1, total)

    @property
    def trainable_share(self) -> float:
        """Trained values as a share of the base's parameters. Neither counts the task head."""
        return self.trainable_params / max(1, self.anatomy.total_params)

    def is_updated(self, group: Group) -> bool:
        """Whether the matrices of a group have an update beside tuned units, such as a low-rank one."""
        return bool(self.update) and group.kind != "token" and not self.targets.isdisjoint(group.modules)

    @property
    def update_words(self) -> str:
        """The update and the number of matrices that have it: `low-rank, rank 8, on 72 matrices`. May be empty."""
        groups = [group for group, kept, _ in self._counts() if kept and self.is_updated(group)]
        matrices = {module for group in groups for module in group.modules} & self.targets
        return f"{self.update}, on {len(matrices):,} matrices" if self.update else ""

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
        if tokens := [(tuned, group.size) for group, _, tuned in self._counts() if group.kind == "token"]:
            trained, size = map(sum, zip(*tokens, strict=True))
            facts["tokens trained"] = f"{trained:,} of {size:,}"
        if self.update:
            facts["matrices trained"] = self.update_words
        facts["trained values"] = (
            f"{count['trainable_params']} ({share['trainable_share']} of the base), beside the task head"
        )
        return facts

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the table of groups. Without tuned units, there is no column of them."""
        names = short_names(group.name for group in self.anatomy.groups)
        prunable, total = max(1, self.anatomy.prunable_params), max(1, self.anatomy.total_params)
        tunes = any(tuned for *_, tuned in self._counts())
        rows = []
        for group, kept, tuned in self._counts():
            params = kept * group.unit_params
            counts = [f"{n:,}" for n in (group.size, kept, tuned)[: 2 + tunes]]
            share = f"{params / prunable:.2%}" if group.trimmable else "-"
            rows.append([names[group.name], *counts, share, f"{params / total:.2%}"])
        return ["group", "units", "kept", *["tuned"][:tunes], "prunable", "model"], rows

    def summary(self) -> str:
        """A table with one line for each group, followed by `facts`, in lines of at most 80 characters.

        Its columns are the group, its units, how many are kept and tuned, and the kept parameters as shares of the
        prunable part and of the model.
        """
        return wrapped([*text_table(*self._table()), *(f"{name}: {value}" for name, value in self.facts().items())])

    __str__ = summary

    def __repr__(self) -> str:
        return f"<Plan of {len(self.anatomy.groups)} groups: {self.line()}>"

    def _repr_html_(self) -> str:
        return html_table(*self._table(), caption=self.line())

    def to_frame(self) -> Any:
        """The groups as a pandas DataFrame. Raises `SensiError` if pandas is not installed.

        The columns are `group`, `block`, `kind`, `units`, `kept`, `tuned`, `trimmable`, `unit_params`, `kept_params`
        and `kept_flops` (of one sequence).
        """
        rows = {row.name: row for row in rows_of(self)}
        return data_frame([
            {"group": g.name, "block": rows[g.name].block, "kind": g.kind, "units": g.size, "kept": kept,
             "tuned": tuned, "trimmable": g.trimmable, "unit_params": g.unit_params,
             "kept_params": kept * g.unit_params, "kept_flops": 2 * kept * g.unit_macs(self.sequence_length)}
            for g, kept, tuned in self._counts()
        ])  # fmt: skip

    def explain(self, scores: Mapping[str, np.ndarray]) -> str:
        """A table of the groups with their mean score per 1000 parameters, the largest first."""
        density = {g.name: 1e3 * float(scores[g.name].sum()) / (g.size * g.unit_params) for g in self.anatomy.groups}
        names = short_names(density)
        rows = [
            [names[group.name], f"{density[group.name]:.3e}", *(f"{n:,}" for n in (group.size, kept, tuned))]
            for group, kept, tuned in sorted(self._counts(), key=lambda counts: -density[counts[0].name])
        ]
        return "\n".join(text_table(["group", "score/1k params", "units", "kept", "tuned"], rows))

    def line(self) -> str:
        """The most important figures in one line, for a log."""
        units = {kind: counts for kind, counts in units_by_kind(self).items() if kind in ("head", "neuron")}
        names = kind_names(self.rows())
        kept = ", ".join(f"{c['kept']} of {c['size']} {names[kind]}" for kind, c in units.items())
        times = [f"{self.latency[n]['predicted_ms']:.3g} ms {n}, " for n in LIMIT_OF.values() if n in self.latency]
        shares = f"{self.params_share:.1%} of prunable parameters, {self.flops_share:.1%} of prunable FLOPs, "
        return (
            f"{f'kept {kept}; ' if kept else ''}{''.join(times)}{shares if self.anatomy.trimmable else ''}"
            f"{self.trainable_params:,} trained values{f' ({self.update_words})' if self.update else ''}"
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
            raise other_group(extra[0], of_plan=True)
        states = []
        for group in anatomy.groups:
            if group.name not in groups:
                raise other_group(group.name, of_plan=False)
            states.append(states_for(group, groups[group.name]).tobytes())
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
        tokens = sum(tuned for group, _, tuned in self._counts() if group.kind == "token")
        note = f"{tokens:,} tokens are tuned, too" if tokens else ""
        if self.trims:
            shares = f"{self.params_share:.1%} of prunable parameters and {self.flops_share:.1%} of their FLOPs"
            headline = f"{shares} kept; {headline}"
        ranking = None if scores is None else ranking_of(self, scores.values, cost)
        plot_plan(drawn_rows(self), path, headline, ranking, style, note)

    def rows(self) -> list[Row]:
        """The groups as tables and pictures show them."""
        words = self.update_words
        return [
            Row(g.name, (g.layer if g.in_block else "") or g.name, g.kind, self._shown(g, states), words)
            for g, states in self._states()
        ]

    def _shown(self, group: Group, states: np.ndarray) -> np.ndarray:
        return np.where(states == FROZEN, UPDATED, states).astype(np.uint8) if self.is_updated(group) else states
