"""The units of a plan as rows for a table or a picture, with or without the model that the plan belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .anatomy.units import Group
from .plan import Plan, unpack_states
from .utils.states import KINDS, Row


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
