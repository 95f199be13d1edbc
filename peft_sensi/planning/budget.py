"""What a user may ask for: limits on parameters, FLOPs and trained values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..utils.checks import shown
from ..utils.errors import BudgetError


LIMITS = ("params", "flops", "trainable")


@dataclass(frozen=True)
class Budget:
    """Limits that all hold at once; `None` is no limit.

    A float in (0, 1] (or the int 1) is a share: of the prunable part for `params` and `flops`, of all base parameters
    for `trainable`. An int above 1 is an absolute count of parameters, of FLOPs for one sequence, or of values.
    """

    params: float | int | None = None
    flops: float | int | None = None
    trainable: float | int | None = None

    def __post_init__(self) -> None:
        for name in LIMITS:
            if getattr(self, name) is not None:
                _check_limit(name, getattr(self, name))

    @property
    def trims(self) -> bool:
        return self.params is not None or self.flops is not None

    @classmethod
    def parse(cls, budget: Any) -> Budget:
        """Reads a number (a limit on `params`) or a mapping of limits. Raises `BudgetError`."""
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, Mapping):
            return cls(params=_check_limit("params", budget))
        if not budget:
            raise BudgetError(f"The budget is empty: name at least one limit of {', '.join(LIMITS)}.")
        if unknown := [name for name in budget if name not in LIMITS]:
            raise BudgetError(f"Unknown limit {shown(unknown[0])} in the budget: the limits are {', '.join(LIMITS)}.")
        return cls(**{name: _check_limit(name, value) for name, value in budget.items()})


def _check_limit(name: str, value: Any) -> float | int:
    expected = f"`{name}` must be a share in (0, 1] or a whole count above 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(f"{expected}, got {shown(value)} of type {type(value).__name__}.")
    if (isinstance(value, float) and not math.isfinite(value)) or value <= 0:
        raise BudgetError(f"{expected}, got {shown(value)}.")
    if isinstance(value, float) and value > 1:
        hint = f" (write {int(value)} for a count)" if value.is_integer() else ""
        raise BudgetError(f"{expected}, got {value!r}{hint}.")
    return value


def allowance(limit: float | int, whole: int) -> int:
    """The largest whole number that the limit allows of `whole`.

    Shares are read as the decimal the user wrote: 0.29 of 100 is 29, although 0.29 * 100 is below it in binary.
    """
    if isinstance(limit, int) and limit > 1:
        return min(limit, 2**62)  # plans count in int64
    return math.floor(Decimal(repr(float(limit))) * whole)
