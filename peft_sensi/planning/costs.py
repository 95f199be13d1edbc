"""What the trimming limits count: parameters, FLOPs and nanoseconds, for each number of units that a group keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..anatomy.latency import LatencyTable
from ..anatomy.units import Anatomy, Group
from ..utils.errors import BudgetError, SensiError
from .budget import TIMES, Budget
from .plan import Plan


Tables = Mapping[str, LatencyTable]  # by the name of the limit: `latency` or `decode_latency`


@dataclass(frozen=True)
class Cost:
    """What one limit counts, in whole numbers.

    Attributes:
        of: The cost of a group (int64, `[n]`) for each of `n` numbers of kept units.
        whole: The cost of the untrimmed model: of the prunable part, and for latencies of everything.
        rest: The part of `whole` that cannot be trimmed.
    """

    of: Callable[[Group, np.ndarray], np.ndarray]
    whole: int
    rest: int = 0

    def kept(self, counts: Mapping[Group, int]) -> int:
        """The cost of a model that keeps these numbers of units of its trimmable groups."""
        return self.rest + sum(int(self.of(g, np.array([n]))[0]) for g, n in counts.items() if g.trimmable)


def costs_of(limits: Budget, anatomy: Anatomy, sequence_length: int, tables: Tables) -> dict[str, Cost]:
    """The costs of all limits on the model's size that are set, by the limit's name.

    Raises `BudgetError` if a limit needs a latency table that is missing, and `SensiError` if a table is for another
    model.
    """
    costs = {}
    if limits.params is not None:
        costs["params"] = Cost(lambda group, n: group.unit_params * n, anatomy.prunable_params)
    if limits.flops is not None:
        whole = 2 * anatomy.prunable_macs(sequence_length)
        costs["flops"] = Cost(lambda group, n: 2 * group.unit_macs(sequence_length) * n, whole)
    for name in TIMES:
        if getattr(limits, name) is not None:
            if name not in tables:
                raise BudgetError(
                    f"A limit on `{name}` needs a latency table of the device that will run the model: make it with "
                    f"`measure_latency` or `peft-sensi measure`, and give it as `latency`."
                )
            tables[name].check_fits(anatomy)
            costs[name] = Cost(tables[name].times, tables[name].whole, tables[name].rest)
    return costs


def kept_counts(plan: Plan) -> dict[Group, int]:
    """How many units of each trimmable group stay in the model: what `Cost.kept` counts."""
    trimmed = plan.trimmed_units
    return {group: int((~trimmed[group.name]).sum()) for group in plan.anatomy.trimmable}


def tables_by_limit(tables: Any) -> dict[str, LatencyTable]:
    """One latency table or its path, several of them in a list, or a mapping that this function has returned.

    Raises `SensiError` for anything else and for two tables of the same phase, and the errors of `LatencyTable.load`.
    """
    given = tables.values() if isinstance(tables, Mapping) else tables
    given = [] if given is None else [given] if not hasattr(given, "__iter__") or isinstance(given, str) else given
    found: dict[str, LatencyTable] = {}
    for table in given:
        if not isinstance(table, LatencyTable):
            try:
                table = LatencyTable.load(table)
            except FileNotFoundError:
                raise SensiError(
                    f"There is no latency table {str(table)!r}: `measure_latency` and `peft-sensi measure` make one."
                ) from None
            except TypeError:
                message = f"`latency` must be a LatencyTable, the path of one, or a list of them, got {table!r:.80}."
                raise SensiError(message) from None
        else:
            _check_table(table)
        if table.limit in found:
            raise SensiError(f"`latency` has two tables of the phase {table.phase!r}: give one of each phase.")
        found[table.limit] = table
    return found


def _check_table(table: LatencyTable) -> None:
    """Checks a table that was made or changed in code like one from a file. Raises `SensiError`."""
    try:
        LatencyTable.from_dict(table.to_dict())
    except TypeError as error:  # a value that JSON does not have
        raise SensiError(f"A latency table holds plain numbers, texts and tuples of them only: {error}.") from None
