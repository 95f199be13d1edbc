"""Units, the weights that they own and their costs. `build` finds the units of a model.

A *unit* is an attention head (with grouped-query attention: a key/value head with its query heads), an FFN neuron, an
output row of a Linear that belongs to no known block, or a token's row of an embedding. A *group* holds the units of
one sublayer. A head or neuron owns slices of several weights (its *sides*). Without these slices, the model computes
the same as if the unit's activation were zero at the input of the group's output projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..utils.formatting import human, short_repr
from ..utils.states import KINDS


if TYPE_CHECKING:
    import torch  # and in two methods: plans, and the tables that show them, do without PyTorch


Kind = Literal["head", "neuron", "row", "token", "tensor"]


@dataclass(frozen=True)
class Side:
    """The slice of one weight `[out, in]` that each unit of a group owns.

    Attributes:
        module: Name of the Linear or embedding.
        dim: 0 for output rows (with their bias entries, if `bias`), 1 for input columns.
        width: Rows or columns per unit: unit `u` owns `offset + u * width` to `offset + (u + 1) * width - 1`.
        fan: Length of the other dimension.
        tokens: Whether the weight is multiplied with each token.
        rows: Number of other vectors that the weight is multiplied with (relative positions). It does not depend on
            the number of tokens.
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
        """Parameters of one unit on this side."""
        return self.width * (self.fan + int(self.bias and self.dim == 0))

    def per_unit(self, weight: torch.Tensor, units: int) -> torch.Tensor:
        """The entries of `weight` (`[out, in]`, or a bias `[out]`) that each unit owns: `[units, entries]`."""
        owned = weight.narrow(self.dim, self.offset, units * self.width)
        return (owned if self.dim == 0 else owned.t()).reshape(units, -1)

    def positions(self, units: np.ndarray) -> np.ndarray:
        """Indices (int64) of the rows or columns of the given units, in the units' order."""
        return (self.offset + units[:, None] * self.width + np.arange(self.width)).reshape(-1)


@dataclass(frozen=True, repr=False)
class Group:
    """The units of one sublayer.

    Attributes:
        name: Such as `bert.encoder.layer.0.heads`; each group has another.
        kind: `head`, `neuron`, `row`, `token` or `tensor`.
        size: Number of units.
        sides: The slices of matrices that belong to the units.
        output: The module at whose input gates act (for rows and tokens: at whose output).
        layer: Name of the layer that the sublayer belongs to.
        norm: The module whose input is the residual sum after the sublayer; if empty, the layer returns that sum.
        factor: Path of the number, or vector `[features]`, by which the layer multiplies the sublayer's output before
            it adds it to the residual sum; if empty, it adds the output itself.
        attributes: Paths of numbers that a trim must change, each with its amount per unit.
        attention_width: Query heads per unit times head size; 0 for other kinds than heads.
        repeats: How often the layer runs in one pass.
        least: How many units must stay, so that the layer's code can run.
        fixed: The units can be tuned, but neither trimmed nor reordered, because other code relies on them.
        relative_rows: Number of relative positions that an attention multiplies with each token (DeBERTa).
        tokens_first: The layer's hidden states are `[tokens, batch, features]`, not `[batch, tokens, features]`.
    """

    name: str
    kind: Kind
    size: int
    sides: tuple[Side, ...]
    output: str
    layer: str = ""
    norm: str = ""
    factor: str = ""
    attributes: tuple[tuple[str, int], ...] = ()
    attention_width: int = 0
    repeats: int = 1
    least: int = 0
    fixed: bool = False
    relative_rows: int = 0
    tokens_first: bool = False

    __repr__ = short_repr

    @property
    def in_block(self) -> bool:
        """Whether the units are heads or neurons of a known block."""
        return self.kind in ("head", "neuron")

    @property
    def trimmable(self) -> bool:
        """Whether units can be removed from the model."""
        return self.in_block and not self.fixed

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that hold the units' weights."""
        return tuple(dict.fromkeys(side.module for side in self.sides))

    @property
    def unit_params(self) -> int:
        """Parameters of one unit. In BERT-base, a head has 196,800 and a neuron 1,537."""
        return sum(side.unit_params for side in self.sides)

    def unit_macs(self, sequence_length: int) -> int:
        """Multiply-accumulates of one unit for one sequence (Kwon et al. 2022, arXiv 2204.09656).

        With `S` tokens, hidden size `H` and head size `d`, a head costs `3*S*H*d + 2*S^2*d + S*d*H` and a neuron
        `2*S*H`: each weight once per token, and for a head the two products with the attention matrix (`2*S^2*d`).
        """
        weights = sum(side.width * side.fan * (sequence_length * side.tokens + side.rows) for side in self.sides)
        products = sequence_length * (2 * sequence_length + self.relative_rows)
        return self.repeats * (weights + products * self.attention_width)

    def unit_trainable(self, targets: frozenset[str], with_bias: bool = True) -> int:
        """How many parameters are trained with one unit: those that lie in the modules `targets`."""
        sides = [side for side in self.sides if side.module in targets]
        return sum(side.unit_params if with_bias else side.width * side.fan for side in sides)

    def positions(self, module: str, units: np.ndarray) -> torch.Tensor:
        """The rows or columns (int64) of a module's weight that belong to the units of a boolean mask `[units]`."""
        import torch

        chosen = np.flatnonzero(units)
        return torch.from_numpy(np.concatenate([s.positions(chosen) for s in self.sides if s.module == module]))

    def zeros(self) -> torch.Tensor:
        """A float32 zero for each unit, on the CPU. Torch's default dtype and device have no influence."""
        import torch

        return torch.zeros(self.size, dtype=torch.float32, device="cpu")

    def as_one_unit(self) -> Group:
        """The same sublayer with a single unit, which is kept or trimmed as a whole."""
        return replace(
            self,
            size=1,
            sides=tuple(replace(side, width=side.width * self.size) for side in self.sides),
            attributes=tuple((path, per_unit * self.size) for path, per_unit in self.attributes),
            attention_width=self.attention_width * self.size,
            least=min(self.least, 1),
        )


@dataclass(frozen=True, repr=False)
class Anatomy:
    """All groups of units of a model. The *prunable* part consists of the groups that can be trimmed.

    Attributes:
        groups: One for each sublayer, and for each module outside of the blocks that is targeted.
        total_params: Number of parameters of the base without its task head; `trainable` limits are shares of it.
        model_type: That of the Transformers config, such as `bert`.
    """

    groups: tuple[Group, ...]
    total_params: int
    model_type: str = ""

    def __repr__(self) -> str:
        units = {kind: sum(g.size for g in self.groups if g.kind == kind) for kind in KINDS}
        counts = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in units.items() if count)
        prunable = f"{human(self.prunable_params)} of {human(self.total_params)} parameters prunable"
        return f"<Anatomy of {self.model_type or 'a model'}: {counts or 'no units'}; {prunable}>"

    @cached_property
    def by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def tokens_first(self) -> frozenset[str]:
        """Names of the layers whose hidden states are `[tokens, batch, features]`."""
        return frozenset(group.layer for group in self.groups if group.tokens_first)

    @property
    def trimmable(self) -> tuple[Group, ...]:
        """The groups whose units can be removed."""
        return tuple(group for group in self.groups if group.trimmable)

    @property
    def prunable_params(self) -> int:
        """Number of parameters of the prunable part."""
        return sum(group.size * group.unit_params for group in self.trimmable)

    def prunable_macs(self, sequence_length: int) -> int:
        """Multiply-accumulates of the prunable part for one sequence; one is two FLOPs."""
        return sum(group.size * group.unit_macs(sequence_length) for group in self.trimmable)
