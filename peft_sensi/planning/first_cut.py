"""The first cut: which units stay under the limits on the model's size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..anatomy.units import Anatomy, Group
from ..utils.errors import BudgetError
from .budget import TIMES, Budget, allowance, in_words
from .costs import Cost
from .ladders import Ladder, Masks, choose, joint, ladder_of
from .packing import check_least


@dataclass(frozen=True)
class FirstCut:
    """What decides which units stay, beside their scores. The arguments of `make_plan` describe it.

    Attributes:
        limits: Of these, only the limits on the model's size are read. At least one of them is set.
        costs: What each of these limits counts (see `costs_of`).
        available: For each trimmable group a boolean mask `[units]` of the units that can be kept.

    Raises `BudgetError` if nothing can be trimmed, and `SensiError` if a layer could not run with its available units.
    """

    anatomy: Anatomy
    limits: Budget
    costs: Mapping[str, Cost]
    available: Masks
    multiple_of: int
    min_units: int
    uniform: bool

    def __post_init__(self) -> None:
        if not self.anatomy.trimmable:
            raise BudgetError(
                "The budget limits the size of the model, and `anatomy` has no heads or neurons that can be trimmed: "
                "give `build_anatomy` layouts of the `blocks`, or set only a `trainable` limit."
            )
        for group in self.anatomy.trimmable:
            check_least(group, int(self.available[group.name].sum()), "`available`")

    def check_fits(self) -> None:
        """Raises `BudgetError` if the limits do not even allow the smallest plan. This needs no scores."""
        zeros = {g.name: np.zeros(g.size) for g in self.anatomy.trimmable}
        _, mandatory = self._ladders(zeros, {name: zero > 0 for name, zero in zeros.items()})
        self._room(mandatory)

    def choose(self, values: Mapping[str, np.ndarray], protected: Masks) -> Masks:
        """The units that stay. Warns if the limits do not allow to keep all protected units.

        `values` are the scores, `protected` boolean masks, for each trimmable group `[units]`.

        Raises `BudgetError` if the limits do not even allow the smallest plan.
        """
        proportional = all(getattr(self.limits, name) is None for name in TIMES)
        ladders, mandatory = self._ladders(values, protected)
        if (mandatory <= self._allowed).all():
            return choose(ladders, self._allowed - mandatory, proportional)
        # Limits must hold, protection is only a preference. It remains where it costs nothing: in groups of which at
        # least as many units stay in any case.
        marked = {name: mask & self.available[name] for name, mask in protected.items()}
        smallest, _ = self._ladders(values, {name: np.zeros_like(mask) for name, mask in marked.items()})
        stay = {group.name: int(ladder.counts[0]) for ladder in smallest for group, _ in ladder.orders}
        ladders, mandatory = self._ladders(
            values, {name: mask & (mask.sum() <= stay[name]) for name, mask in marked.items()}
        )
        kept = choose(ladders, self._room(mandatory), proportional)
        total = sum(int(mask.sum()) for mask in marked.values())
        lost = sum(int((mask & ~kept[name]).sum()) for name, mask in marked.items())
        warnings.warn(
            f"The budget is too small for all protected units: {lost:,} of {total:,} are cut. Protected units are "
            f"outliers, on which the model may depend, or those in `protected`. A larger budget keeps more of them.",
            stacklevel=3,
        )
        return kept

    @property
    def _rest(self) -> np.ndarray:
        """The costs of what cannot be trimmed, int64 `[limits]`."""
        return np.array([cost.rest for cost in self.costs.values()], dtype=np.int64)

    @property
    def _allowed(self) -> np.ndarray:
        """What the limits allow beside what cannot be trimmed, int64 `[limits]`."""
        allowed = [allowance(getattr(self.limits, name), cost.whole) for name, cost in self.costs.items()]
        return np.array(allowed, dtype=np.int64) - self._rest

    def _ladders(self, values: Mapping[str, np.ndarray], protected: Masks) -> tuple[list[Ladder], np.ndarray]:
        """How each group can grow, and the total costs of the mandatory units: the protected ones are among these."""
        # Groups that grow together: in a uniform plan those that have the same number of units of the same kind.
        together: dict[object, list[Ladder]] = {}
        for g in self.anatomy.trimmable:
            ladder = ladder_of(
                g,
                values[g.name],
                partial(_costs_of_group, self.costs, g),
                self.available[g.name],
                protected[g.name],
                self.multiple_of if g.kind == "neuron" else 1,
                max(self.min_units, g.least),
            )
            together.setdefault((g.kind, g.size) if self.uniform else g.name, []).append(ladder)
        ladders = [joint(same) for same in together.values()]
        return ladders, np.sum([ladder.costs[:, 0] for ladder in ladders], axis=0)

    def _room(self, mandatory: np.ndarray) -> np.ndarray:
        """What the limits allow beside the mandatory units, int64 `[limits]`.

        Raises `BudgetError` if they do not even allow these.
        """
        if (mandatory <= self._allowed).all():
            return self._allowed - mandatory
        smallest = ", ".join(map(in_words, self.costs, (mandatory + self._rest).tolist()))
        # Some families cannot run without certain units, whatever `min_units` is.
        stays, ways, settings = "what the model cannot run without", "Raise the budget", []
        if self.multiple_of > 1:
            ways += ", or lower `multiple_of`"
            settings.append("multiple_of")
        if self.min_units:
            number = " (the same number in all)" if self.uniform else ""
            stays = f"{self.min_units} head(s) and {self.multiple_of} neurons in each block{number}, and {stays}"
            ways += ", or let whole sublayers go with `min_units=0`"
            settings.append("min_units")
        problem = f"The budget is too small for {stays}: that alone needs {smallest}."
        raise BudgetError(problem, f"{ways}.", limits=self.costs, settings=settings)


def _costs_of_group(costs: Mapping[str, Cost], group: Group, counts: np.ndarray) -> np.ndarray:
    """The costs of these numbers of units of a group, int64 `[limits, n]`."""
    return np.array([cost.of(group, counts) for cost in costs.values()], dtype=np.int64)
