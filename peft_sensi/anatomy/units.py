"""A unit, what it owns and what it costs; `anatomy` finds them in a model.

A *unit* is an attention head (with grouped-query attention: a key/value head with its query heads), an FFN neuron, an
output row of a Linear that belongs to no known block, or a token's row in a table of embeddings. A *group* holds the
units of one sublayer. Removing a head or a neuron means removing slices of several weights at once (its *sides*), and
exactly the same function remains as when the unit's activation is multiplied by zero at the input of the group's
output projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch


Kind = Literal["head", "neuron", "row", "token", "tensor"]


@dataclass(frozen=True)
class Side:
    """The slice of one weight `[out, in]` that each unit of a group owns.

    `dim` 0 means output rows (with their bias entries), 1 input columns; unit `u` owns the positions
    `offset + u * width ... offset + (u + 1) * width`. `fan` is the length of the other dimension. The weight runs once
    for each token unless `tokens` is false, and once for each of `rows` vectors that do not depend on the input.
    """

    module: str
    dim: int
    width: int
    fan: int
    bias: bool = False
    offset: int = 0
    tokens: bool = True
    rows: int = 0

    @property
    def unit_params(self) -> int:
        return self.width * (self.fan + int(self.bias and self.dim == 0))

    def per_unit(self, weight: torch.Tensor, units: int) -> torch.Tensor:
        """The entries of a weight `[out, in]` that each of the units owns, as a matrix `[units, width * fan]`."""
        owned = weight.narrow(self.dim, self.offset, units * self.width)
        return (owned if self.dim == 0 else owned.t()).reshape(units, -1)

    def positions(self, units: np.ndarray) -> np.ndarray:
        """Rows or columns (int64) of the given units, in the units' order."""
        return (self.offset + units[:, None] * self.width + np.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class Group:
    """The units of one sublayer. `output` is the module at whose input (rows, tokens: at whose output) a gate acts.

    The units of a `fixed` group can be tuned but not trimmed, nor change places: something outside counts on them. A
    layer runs `repeats` times in one pass, and at least `least` units must stay for it to run. `relative_rows` is the
    number of relative positions with which an attention of disentangled positions multiplies each token.
    """

    name: str
    kind: Kind
    size: int
    sides: tuple[Side, ...]
    output: str
    layer: str = ""
    norm: str = ""
    attributes: tuple[tuple[str, int], ...] = ()
    attention_width: int = 0
    repeats: int = 1
    least: int = 0
    fixed: bool = False
    relative_rows: int = 0

    @property
    def in_block(self) -> bool:
        return self.kind in ("head", "neuron")

    @property
    def trimmable(self) -> bool:
        return self.in_block and not self.fixed

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(side.module for side in self.sides))

    @property
    def unit_params(self) -> int:
        """Parameters of one unit; BERT-base: head 196,800, neuron 1,537."""
        return sum(side.unit_params for side in self.sides)

    def unit_macs(self, sequence_length: int) -> int:
        """Multiply-accumulates of one unit for one sequence (Kwon et al. 2022, arXiv 2204.09656).

        A head costs `3*S*H*d + 2*S^2*d + S*d*H`, a neuron `2*S*H`: every weight once a token, and for a head the two
        products of the attention matrix.
        """
        weights = sum(side.width * side.fan * (sequence_length * side.tokens + side.rows) for side in self.sides)
        products = sequence_length * (2 * sequence_length + self.relative_rows)
        return self.repeats * (weights + products * self.attention_width)

    def unit_trainable(self, targets: frozenset[str], with_bias: bool = True) -> int:
        """Values that training one unit adds: only what lies in targeted modules."""
        sides = [side for side in self.sides if side.module in targets]
        return sum(side.unit_params if with_bias else side.width * side.fan for side in sides)

    def zeros(self) -> torch.Tensor:
        """A float32 zero for each unit, on the CPU, whatever torch's defaults are."""
        return torch.zeros(self.size, dtype=torch.float32, device="cpu")

    def as_one_unit(self) -> Group:
        """The same sublayer, to be kept or to go as a whole."""
        return replace(
            self,
            size=1,
            sides=tuple(replace(side, width=side.width * self.size) for side in self.sides),
            attributes=tuple((path, per_unit * self.size) for path, per_unit in self.attributes),
            attention_width=self.attention_width * self.size,
            least=min(self.least, 1),
        )


@dataclass(frozen=True)
class Anatomy:
    """All groups of a model. `total_params` counts the base without its task head (the unit of `trainable` shares)."""

    groups: tuple[Group, ...]
    total_params: int
    model_type: str = ""
    by_name: dict[str, Group] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {group.name: group for group in self.groups})

    @property
    def trimmable(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.trimmable)

    @property
    def prunable_params(self) -> int:
        return sum(group.size * group.unit_params for group in self.trimmable)

    def prunable_macs(self, sequence_length: int) -> int:
        return sum(group.size * group.unit_macs(sequence_length) for group in self.trimmable)
