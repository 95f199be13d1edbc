"""The groups of a plan, or of the dict in an adapter's config, as `Row`s for tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..plotting.plots import Ranking
from ..utils.errors import SensiError
from ..utils.states import KINDS, TUNED, Row
from .packing import unpack_states


def rows_of(plan: Any) -> list[Row]:
    """One `Row` for each group of a `Plan`, or of the dict in an adapter's config. Raises `SensiLoadError`."""
    if not isinstance(plan, Mapping):
        return plan.rows()
    rows = []
    for name, values in unpack_states(plan).items():
        block, _, last = name.rpartition(".")
        # The dict does not contain the kinds of the groups.
        kind = next((kind for kind in ("head", "neuron", "token") if last.endswith(KINDS[kind])), "")
        rows.append(Row(name, block if kind else name, kind or ("tensor" if len(values) == 1 else "row"), values))
    return rows


def drawn_rows(plan: Any) -> list[Row]:
    """`rows_of` without the tokens: there are so many of them that the other units would not be visible."""
    rows = rows_of(plan)
    return [row for row in rows if row.kind != "token"] or rows


def units_by_kind(plan: Any) -> dict[str, dict[str, int]]:
    """For each kind of unit the numbers of all units (`size`), of `kept` ones and of `tuned` ones."""
    units: dict[str, dict[str, int]] = {}
    for row in rows_of(plan):
        counts = units.setdefault(row.kind, {"size": 0, "kept": 0, "tuned": 0})
        counts["size"] += row.size
        counts["kept"] += row.kept
        counts["tuned"] += row.count(TUNED)
    return units


def kind_names(rows: Iterable[Row]) -> dict[str, str]:
    """What the units of each kind are called. With `granularity="tensor"`, each one is a whole attention or FFN."""
    sizes = [row.size for row in rows if row.kind in ("head", "neuron")]
    whole = {"head": "attentions", "neuron": "FFNs"} if sizes and set(sizes) == {1} else {}
    return KINDS | whole


def ranking_of(plan: Any, scores: Mapping[str, Any], cost: str) -> Ranking:
    """The units of a `Plan` that the budget is about: the trimmable ones, or all scored ones if no unit is trimmable.

    `scores` are tensors `[units]`, `cost` is `params` or `flops`. Raises `SensiError` if the scores do not fit.
    """
    scored = [group for group in plan.anatomy.groups if group.name in scores and group.kind != "token"]
    groups = [group for group in scored if group.trimmable] or scored
    if not groups or any(len(scores[group.name]) != group.size for group in groups):
        raise SensiError(
            "These scores do not belong to this plan's model: groups or numbers of units differ. Give the scores from "
            "which the plan was made."
        )
    costs = [g.unit_params if cost == "params" else 2 * g.unit_macs(plan.sequence_length) for g in groups]
    unit_costs = np.repeat(np.array(costs, dtype=float), [group.size for group in groups])
    states = {row.name: row.states for row in plan.rows()}
    return Ranking(
        scores=np.concatenate([scores[group.name].double().numpy() for group in groups]) / unit_costs,
        costs=unit_costs,
        states=np.concatenate([states[group.name] for group in groups]),
        cost="parameter" if cost == "params" else "FLOP",
        part="prunable" if groups[0].trimmable else "targeted",
    )
