"""The units of a plan as rows for a table or a picture, with or without the model that the plan belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plan import FROZEN, TRIMMED, TUNED, Plan, unpack_states
from .units import Group


STATES = {TUNED: "tuned", FROZEN: "frozen", TRIMMED: "trimmed"}
KINDS = {"head": "heads", "neuron": "neurons", "row": "rows", "token": "tokens", "tensor": "tensors"}


@dataclass(frozen=True)
class Row:
    """One group of units. `states` is uint8, one a unit; `block` is the layer's path, or the module's outside one."""

    name: str
    block: str
    kind: str
    states: np.ndarray

    @property
    def size(self) -> int:
        return len(self.states)

    def count(self, *states: int) -> int:
        return int(np.isin(self.states, states).sum())


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


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """What tells paths apart: `bert.encoder.layer.0` is `0`, and `encoder.block.0` among decoders is `encoder 0`."""
    paths = list(dict.fromkeys(paths))
    parts = [path.split(".") for path in paths]
    if len(paths) == 1:
        return {paths[0]: next((part for part in reversed(parts[0]) if part.isdecimal()), parts[0][-1])}
    if len({len(p) for p in parts}) == 1:
        keep = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        return {path: " ".join(p[i] for i in keep) for path, p in zip(paths, parts, strict=True)}
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    return {path: " ".join(p[common:]) or p[-1] for path, p in zip(paths, parts, strict=True)}


def shortened(label: str, width: int) -> str:
    """The first word, which tells the block, and the end."""
    first = label.partition(" ")[0][: width // 2]
    return label if len(label) <= width else f"{first} …{label[len(first) + 2 - width :]}"


def human(number: float) -> str:
    """A count in three digits and a unit: `84.9 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"
    return f"{number:,.0f}"
