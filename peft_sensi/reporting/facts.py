"""Figures and facts about a plan or a saved adapter: JSON values for programs, short texts for people."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..anatomy.latency import latency_facts
from ..planning.plan import Plan
from ..planning.rows import kind_names, rows_of, units_by_kind
from ..utils.formatting import human, size_of
from ..utils.states import STATES
from .saved import SavedAdapter, short_fingerprint


def plan_figures(plan: Plan) -> dict[str, Any]:
    """`Plan.figures` and, as `groups`, the counts of each group. A JSON value."""
    return {**plan.figures(), "groups": group_counts(plan)}


def group_counts(plan: Plan | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, kind and size of each group, and its numbers of tuned, frozen and trimmed units. A JSON value."""
    return [
        {"name": row.name, "kind": row.kind, "size": row.size, **{name: row.count(s) for s, name in STATES.items()}}
        for row in rows_of(plan)
    ]


def adapter_figures(adapter: SavedAdapter, plan: Plan | None) -> dict[str, Any]:
    """Everything that is known about an adapter, as a JSON value.

    `plan` adds the figures that need the base model. Without it, only the units of each group are counted.
    """
    config = adapter.config
    return {
        "folder": str(adapter.folder),
        "base_model": adapter.base,
        "task_type": adapter.task,
        "budget": config.budget,
        "score": config.score,
        "granularity": config.granularity,
        "update": config.update,
        "rank": config.rank,
        "compressed": config.compressed,
        "also_trained": config.also_train,
        "saved_whole": config.modules_to_save,
        "format_version": config.format_version,
        "fingerprint": short_fingerprint(config),
        "latency": config.latency,
        "file_bytes": adapter.file_bytes,
        "tensors": len(adapter.tensors),
        "values": _values_by_type(adapter),
        "plan": plan_figures(plan) if plan is not None else {"groups": group_counts(config.plan)},
    }


def _values_by_type(adapter: SavedAdapter) -> Counter[str]:
    """The number of values in the adapter's file, by dtype."""
    by_type: Counter[str] = Counter()
    for dtype, shape in adapter.tensors.values():
        by_type[dtype] += math.prod(shape)
    return by_type


def adapter_facts(adapter: SavedAdapter, plan: Plan | None) -> dict[str, str]:
    """The most important figures of an adapter as texts, by label."""
    config, by_type = adapter.config, _values_by_type(adapter)
    values = ", ".join(f"{human(count)} {dtype}" for dtype, count in sorted(by_type.items()))
    # Modules that the file contains whole. Names that differ in a layer's number only count as one name.
    keys = [f".{key}" for key in adapter.tensors]
    whole = [name for name in config.modules_to_save or [] if any(f".{name}." in key for key in keys)]
    alike = Counter(re.sub(r"\b\d+\b", "*", name) for name in whole)
    limits: Any = config.budget if isinstance(config.budget, Mapping) else {"params": config.budget}
    facts = {
        "base model": adapter.base or "unknown",
        "task": adapter.task or "not stated",
        "budget asked": "none"
        if config.budget is None
        else ", ".join(f"{name} {limit_words(value)}" for name, value in limits.items()),
        "ranked by": f"{config.score}, {config.granularity}s",
        "update": (config.update or "dense")
        + (f" of rank {config.rank}" if config.rank else "")
        + (f", stored as {config.compressed}" if config.compressed else ""),
        "saved whole": ", ".join(name if count == 1 else f"{name} ({count})" for name, count in alike.items())
        or "nothing",
        "file": f"{size_of(adapter.file_bytes)}, {len(adapter.tensors)} tensors ({values} values)",
        "fingerprint": short_fingerprint(config) or "none: any base of the same shapes is accepted",
    }
    if plan is not None:
        return facts | plan.facts(human)
    return facts | unit_facts(config.plan) | latency_facts(config.latency or {})


def unit_facts(plan: Plan | Mapping[str, Any]) -> dict[str, str]:
    """The numbers of kept and tuned units, by kind. Where no unit is tuned (low-rank updates), only the kept ones."""
    units, names = units_by_kind(plan), kind_names(rows_of(plan))
    tunes = any(counts["tuned"] for counts in units.values())
    facts = {}
    for kind, counts in units.items():
        tuned = f", {counts['tuned']:,} tuned" if tunes else ""
        facts[names[kind]] = f"{counts['kept']:,} of {counts['size']:,} kept{tuned}"
    return facts


def limit_words(limit: float | int | str) -> str:
    """A share such as `0.5`, a count such as `100 k`, or a time such as `12ms`."""
    if isinstance(limit, str):
        return limit
    return human(limit) if isinstance(limit, int) and limit > 1 else f"{limit:.4g}"
