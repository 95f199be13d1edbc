"""The latency tables of a config, which no file holds, and the records of what they predict, which adapters keep."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..anatomy.inputs import usual_length
from ..anatomy.latency import LatencyTable, check_records
from ..planning.budget import TIMES, Budget, allowance
from ..planning.costs import costs_of, kept_counts, tables_by_limit
from ..planning.latency_torch import measure_torch, tokens_of
from ..planning.plan import Plan
from ..utils import distributed
from ..utils.errors import BudgetError, SensiError


def read_latency(config: Any) -> None:
    """Replaces tables and paths in `config.latency` by records, and keeps the tables as `config.tables`.

    Records survive JSON. A file may hold records only, because it must not choose which other files are read.
    """
    given = config.latency
    if given is None:
        return
    if config.from_file or (isinstance(given, Mapping) and not _are_tables(given)):
        check_records(given)
    else:
        config.tables = tables_by_limit(given)
        config.latency = {name: table.record(table.whole) for name, table in config.tables.items()} or None


def _are_tables(given: Mapping[str, Any]) -> bool:
    return bool(given) and all(isinstance(table, LatencyTable) for table in given.values())


def note_latency(config: Any, plan: Plan) -> None:
    """Records what the config's tables predict for its new plan.

    Without its table an old record is removed, with a warning, because it says nothing about this plan.
    """
    if lost := [name for name in config.latency or () if name not in config.tables]:
        warnings.warn(
            f"The adapter's latency table is not known here ({', '.join(lost)}), so nothing is predicted for its new "
            f"plan. Set `latency` of its config to the table before the plan changes.",
            stacklevel=2,
        )
    config.latency = {name: dict(r) for name, r in plan.predicted(config.tables).latency.items()} or None


def exceeds(plan: Plan, config: Any, limits: Budget | None = None) -> bool:
    """Whether the plan keeps more than the limits allow; by default those of the config."""
    read_latency(config)  # the user may have given a table to an adapter from a file
    limits = limits or config.limits
    costs, counts = costs_of(limits, plan.anatomy, plan.sequence_length, config.tables), kept_counts(plan)
    return any(cost.kept(counts) > allowance(getattr(limits, name), cost.whole) for name, cost in costs.items())


def may_exceed(plan: Plan, config: Any) -> bool:
    """Whether the plan keeps more than the config's limits allow, or nobody knows: adapters from files have no tables.

    Raises `SensiError` if a table is for another model.
    """
    try:
        return exceeds(plan, config)
    except BudgetError:
        return True


def measure_missing(model: nn.Module, config: Any) -> None:
    """Measures the tables that the config's limits need and that the user has not given: PyTorch, on this machine.

    With several processes, the first one measures for all of them.
    """
    for name in TIMES:
        if getattr(config.limits, name) is None or name in config.tables:
            continue
        if name in (config.latency or {}):
            raise SensiError(
                f"The config has the figures of a latency table for `{name}`, but not the table: give it as `latency`."
            )
        table = None
        if distributed.rank() == 0:
            decode = name == "decode_latency"
            length = tokens_of(model, config.sequence_length or usual_length(model, decode))
            table = measure_torch(
                model,
                batch_size=1,
                sequence_length=length,
                decode=decode,
                blocks=config.layouts(),
            )
        table = distributed.broadcast_object(table)
        config.tables = {**config.tables, name: table}
