"""Budgets: limits on parameters, FLOPs and trained values, read from what a user gives and checked."""

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
    """Limits that all hold at once. `None` means no limit.

    A float in (0, 1] is a share, and so is the int 1. An int above 1 is an absolute count.

    Attributes:
        params: Share or number of the prunable parameters (heads and neurons) that may stay in the model.
        flops: Share or number of the prunable part's FLOPs for one sequence.
        trainable: Number of trained values, as a share of all base parameters or as a count.

    Raises:
        BudgetError: If a limit is neither a share nor a count.
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
        """Whether there is a limit on the size of the model, so that units may have to leave it."""
        return self.params is not None or self.flops is not None

    @classmethod
    def parse(cls, budget: Any) -> Budget:
        """Reads a number, which is a limit on `params`, or a mapping from names to limits.

        Raises:
            BudgetError: If a limit has an unknown name or is neither a share nor a count, or if there is no limit.
        """
        if isinstance(budget, Budget):
            return budget
        limits = budget if isinstance(budget, Mapping) else {"params": budget}
        if not limits:
            raise BudgetError(f"The budget is empty: name at least one limit of {', '.join(LIMITS)}.")
        if unknown := [name for name in limits if name not in LIMITS]:
            raise BudgetError(f"Unknown limit {shown(unknown[0])} in the budget: the limits are {', '.join(LIMITS)}.")
        return cls(**{name: _check_limit(name, value) for name, value in limits.items()})


def _check_limit(name: str, value: Any) -> float | int:
    expected = f"`{name}` must be a share in (0, 1] or a whole count above 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(f"{expected}, got {shown(value)} of type {type(value).__name__}.")
    if not 0 < value < math.inf or (isinstance(value, float) and value > 1):
        hint = f" (write {int(value)} for a count)" if value > 1 and float(value).is_integer() else ""
        raise BudgetError(f"{expected}, got {shown(value)}{hint}.")
    return value


def allowance(limit: float | int, whole: int) -> int:
    """The largest whole number that a limit allows: the count itself, or that share of `whole`, rounded down.

    A share means the decimal number that the user wrote: 0.29 of 100 is 29, although `0.29 * 100` is below 29.
    """
    if isinstance(limit, int) and limit > 1:
        return min(limit, 2**62)  # the costs of plans are int64
    return math.floor(Decimal(repr(float(limit))) * whole)
