"""Budgets: limits on parameters, FLOPs, latencies and trained values, read from what a user gives and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..utils.checks import shown
from ..utils.errors import BudgetError


LIMITS = ("params", "flops", "trainable")  # limits on counts
TIMES = ("latency", "decode_latency")  # limits on times
DEFAULT_LIMITS = {"params": 0.5}  # where the user gives no limit, and something is to be trimmed
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


@dataclass(frozen=True)
class Budget:
    """Limits that all hold at once. `None` means no limit.

    A float in (0, 1] is a share, and so is the int 1. An int above 1 is an absolute count. Latencies are not counts:
    an absolute limit on one is a text such as `"12ms"` (units `s`, `ms`, `us` and `ns`).

    Attributes:
        params: Share or number of the prunable parameters (heads and neurons) that may stay in the model.
        flops: Share or number of the prunable part's FLOPs for one sequence.
        trainable: Number of trained values, as a share of the base's parameters without its task head, or as a count.
        latency: Share of the untrimmed model's predicted latency, or a time; a `LatencyTable` predicts it.
        decode_latency: The same for one decoding step with a cache.

    Raises:
        BudgetError: If a limit is neither a share nor a count (for a latency: a time).
    """

    params: float | int | None = None
    flops: float | int | None = None
    trainable: float | int | None = None
    latency: float | str | None = None
    decode_latency: float | str | None = None

    def __post_init__(self) -> None:
        for name in (*LIMITS, *TIMES):
            if getattr(self, name) is not None:
                _check_limit(name, getattr(self, name))

    @property
    def trims(self) -> bool:
        """Whether there is a limit on the size of the model, so that units may have to leave it."""
        return any(getattr(self, name) is not None for name in ("params", "flops", *TIMES))

    @classmethod
    def parse(cls, budget: Any) -> Budget:
        """Reads a number, which is a limit on `params`, or a mapping from names to limits. There, `None` is no limit.

        Raises:
            BudgetError: If a limit has an unknown name or is neither a share nor a count or a time, or if there is no
                limit.
        """
        if isinstance(budget, Budget):
            return budget
        limits = budget if isinstance(budget, Mapping) else {"params": budget}
        names = (*LIMITS, *TIMES)
        if unknown := [name for name in limits if name not in names]:
            raise BudgetError(f"Unknown limit {shown(unknown[0])} in the budget: the limits are {', '.join(names)}.")
        if all(limit is None for limit in limits.values()):
            raise BudgetError(f"The budget is empty: name at least one limit of {', '.join(names)}.")
        return cls(**limits)

    @classmethod
    def of_amounts(cls, amounts: Mapping[str, int]) -> Budget:
        """Limits that are whole numbers: counts, and nanoseconds for latencies. A count is at least 2."""
        # An int of 1 would be read as a share.
        limits: dict[str, Any] = {n: f"{amount}ns" if n in TIMES else max(2, amount) for n, amount in amounts.items()}
        return cls(**limits)


def as_plain(value: Any) -> Any:
    """A [`Budget`] or another mapping as a dict, which JSON can hold, without limits that are not set."""
    found = vars(value) if isinstance(value, Budget) else value
    return {name: each for name, each in found.items() if each is not None} if isinstance(found, Mapping) else value


def _check_limit(name: str, value: Any) -> Any:
    if name in TIMES:
        is_share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        if not is_share and not (isinstance(value, str) and nanoseconds(value)):
            raise BudgetError(f"`{name}` must be a share in (0, 1] or a time such as '12ms', got {shown(value)}.")
        return value
    expected = f"`{name}` must be a share in (0, 1] or a whole count above 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(f"{expected}, got {shown(value)} of type {type(value).__name__}.")
    if not 0 < value < math.inf or (isinstance(value, float) and value > 1):
        hint = f" (write {int(value)} for a count)" if value > 1 and float(value).is_integer() else ""
        raise BudgetError(f"{expected}, got {shown(value)}{hint}.")
    return value


def in_words(limit: str, amount: int) -> str:
    """The amount of what is limited, such as `"1,024 parameters"`. Latencies are in nanoseconds."""
    if limit in TIMES:
        return f"a latency of {amount / 1e6:.4g} ms" + (" for a decoding step" if limit == "decode_latency" else "")
    return f"{amount:,} {'FLOPs' if limit == 'flops' else 'parameters'}"


def nanoseconds(text: str) -> int | None:
    """The nanoseconds of a time such as `12ms`, rounded down; `None` if the text is not a time above zero."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(ns|us|ms|s)\s*", text)
    return (math.floor(Decimal(match[1]) * _NANOSECONDS[match[2]]) or None) if match else None


def allowance(limit: float | int | str, whole: int) -> int:
    """The largest whole number that a limit allows: the count itself, or that share of `whole`, rounded down.

    The text of a time is a count of nanoseconds. A share means the decimal number that the user wrote: 0.29 of 100 is
    29, although `0.29 * 100` is below 29.
    """
    if isinstance(limit, str):
        limit = max(2, nanoseconds(limit) or 0)
    if isinstance(limit, int) and limit > 1:
        return min(limit, 2**62)  # the costs of plans are int64
    return math.floor(Decimal(repr(float(limit))) * whole)
