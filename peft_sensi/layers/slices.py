"""`Slice`: what one adapter does with one Linear; and the tensors that the adapter stores for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..anatomy.linears import bias_of, matrix
from .compression import KINDS, PARTS, sizes
from .functional import Pair, Positions
from .updates import pack_mask, sparse_support, start_of_down, top_mask, unpack_mask


@dataclass(frozen=True, eq=False)
class Slice:
    """What is kept, trained and masked of one Linear (or of the rows of an embedding) in one adapter."""

    base_shape: tuple[int, int]  # `(out, in)` of the base weight; for an embedding: number of tokens and width
    has_bias: bool  # whether the base has a bias
    dim: int  # 0 if the units are rows of the weight, 1 if they are columns
    # Positions (int64, CPU) of the kept rows or columns in the base, in the adapter's own order: first the tuned
    # units, then the frozen ones. Both sides of a group have the same order, so the tuned part is contiguous and no
    # output has to be permuted. A Linear outside a block keeps the base's order.
    kept: torch.Tensor
    tuned: Positions  # the tuned rows or columns, as positions in `kept`
    units: int  # number of kept units
    train_bias: bool = False  # whether the whole bias is trained; if not, only the entries of tuned rows are
    rank: int = 0  # of the low-rank term; 0 for none
    scale: float = 1.0  # factor of the low-rank term (see `updates.default_scale`)
    sparse: int = 0  # number of trained single values
    support: str = "magnitude"  # how the positions of the single values are chosen (see `updates.sparse_support`)
    sparsity: float | None = None  # share of the kept weights that a mask removes; `None` without a mask
    learns_mask: bool = False  # whether the mask is learned; if not, it is stored as one bit per weight
    drawn_later: bool = False  # whether a schedule draws the mask; until then the mask removes nothing
    gated: bool = False  # whether the columns are multiplied by a gate with one entry per unit, for cuts in training
    compressed: str | None = None  # type in which the trained values are stored (see `compression`)
    seed: int = 0  # of a random support

    @property
    def trims(self) -> bool:
        """Whether rows or columns of the base are removed."""
        return len(self.kept) < self.base_shape[self.dim]

    @property
    def tuned_count(self) -> int:
        return self.tuned if isinstance(self.tuned, int) else len(self.tuned)

    @cached_property
    def whole(self) -> bool:
        """Whether all that is kept is tuned and nothing else changes the weight."""
        others = self.rank or self.sparse or self.sparsity is not None
        return 0 < self.tuned_count == len(self.kept) and not others and not self.gated and self.compressed is None

    @cached_property
    def natural(self) -> bool:
        """Whether all rows and columns are kept in the base's order."""
        return torch.equal(self.kept, torch.arange(self.base_shape[self.dim], device=self.kept.device))

    @property
    def has_integers(self) -> bool:
        """Whether the adapter stores integers for this Linear, which FSDP1 cannot flatten with weights."""
        return bool(self.sparse) or (self.sparsity is not None and not self.learns_mask) or self.gated

    @property
    def idle(self) -> bool:
        """Whether the Linear needs no adapter layer."""
        parts = self.tuned_count or self.train_bias or self.rank or self.sparse or self.sparsity is not None
        return self.natural and not parts and not self.gated

    def tuned_on(self, device: torch.device) -> Positions:
        """`tuned`, with an index on this device."""
        return self.tuned if isinstance(self.tuned, int) else self.tuned.to(device)

    @property
    def tuned_index(self) -> torch.Tensor:
        """Positions (int64) of the tuned rows or columns among the kept ones."""
        return torch.arange(self.tuned, device=self.kept.device) if isinstance(self.tuned, int) else self.tuned

    @property
    def tuned_positions(self) -> torch.Tensor:
        """Positions (int64) of the tuned rows or columns in the base, in the order of the trained tensor."""
        return self.kept[: self.tuned] if isinstance(self.tuned, int) else self.kept[self.tuned]

    @property
    def kept_shape(self) -> torch.Size:
        return torch.Size(len(self.kept) if dim == self.dim else size for dim, size in enumerate(self.base_shape))


class TensorSpec(NamedTuple):
    """One stored tensor. `axis` is the dimension along which the Linear's rows or columns lie, if there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = False
    axis: int | None = None
    tuned_only: bool = False  # along `axis`: whether only tuned rows or columns are there, or all kept ones


def tensor_specs(slice_: Slice, dtype: torch.dtype = torch.float32, *, decoded: bool = False) -> dict[str, TensorSpec]:
    """The tensors that an adapter stores for one Linear, by name without `sensi_`. No other place lists them.

    `dtype` is the type of trained weights and biases (see `master_dtype`). With `decoded`, the tensors of a compressed
    adapter are those that it had before.
    """
    dim, count, (out, into) = slice_.dim, slice_.tuned_count, slice_.kept_shape
    specs: dict[str, TensorSpec] = {}
    if count:
        shape = (count, into) if dim == 0 else (out, count)
        specs["weight"] = TensorSpec(shape, dtype, trained=True, axis=dim, tuned_only=True)
    if slice_.train_bias:
        specs["bias"] = TensorSpec((out,), dtype, trained=True, axis=0 if dim == 0 else None)
    elif slice_.has_bias and dim == 0 and count:
        specs["bias"] = TensorSpec((count,), dtype, trained=True, axis=0, tuned_only=True)
    if slice_.rank:
        specs["down"] = TensorSpec((slice_.rank, into), torch.float32, trained=True, axis=1 if dim == 1 else None)
        specs["up"] = TensorSpec((out, slice_.rank), torch.float32, trained=True, axis=0 if dim == 0 else None)
    if slice_.sparse:
        values = min(slice_.sparse, out * into)
        specs["values"] = TensorSpec((values,), torch.float32, trained=True)
        specs["places"] = TensorSpec((values,), torch.int32)
    if slice_.learns_mask:
        specs["scores"] = TensorSpec((out, into), torch.float32, trained=True, axis=dim)
    elif slice_.sparsity is not None:
        specs["bits"] = TensorSpec((-(-out * into // 8),), torch.uint8)
    if slice_.gated:
        specs["gate"] = TensorSpec((slice_.units,), torch.uint8)
    if slice_.compressed is None or decoded:
        return specs
    coded = {name: specs[name].shape for name in PARTS if name in specs}
    specs = {name: spec for name, spec in specs.items() if name not in coded}
    codes, scales = sizes(coded, dim, slice_.compressed)
    if coded:
        specs["codes"] = TensorSpec((codes,), KINDS[slice_.compressed])
    if scales:
        specs["scales"] = TensorSpec((scales,), torch.float32)
    return specs


def master_dtype(base: Any) -> torch.dtype:
    """Type of trained weights and biases: float32, or float64 on a float64 base."""
    return torch.promote_types(base.weight.dtype, torch.float32)


def first_parts(base: Any, slice_: Slice, values: Pair | None) -> dict[str, torch.Tensor]:
    """The tensors of `tensor_specs` before training. Without `values`, the kept units compute the same as the base.

    `values` are refitted values: a weight of the shape of `sensi_weight`, and a whole bias or `None`.
    """
    specs = tensor_specs(slice_, master_dtype(base))
    weight, bias = matrix(base).detach(), bias_of(base)
    fitted, fitted_bias = (None, None) if values is None else values
    bias = bias if fitted_bias is None else fitted_bias
    kept, tuned = slice_.kept.to(weight.device), slice_.tuned_positions.to(weight.device)
    # Zero codes and scales stand for the base's own weights and biases, and for no low-rank term.
    zero = ("up", "values", "codes", "scales")
    parts = {name: torch.zeros(specs[name].shape, dtype=specs[name].dtype) for name in zero if name in specs}
    if "weight" in specs:
        parts["weight"] = weight.index_select(slice_.dim, tuned) if fitted is None else fitted
    if "bias" in specs and bias is not None:
        bias = bias.detach().to(weight.device)
        # A copy: a whole bias would share the base's storage.
        parts["bias"] = bias.clone() if slice_.dim == 1 else bias[tuned if specs["bias"].tuned_only else kept]
    if "down" in specs:
        shape = specs["down"].shape
        noise = torch.randn(shape, dtype=torch.float32, device=weight.device)
        parts["down"] = noise * start_of_down(slice_.scale, *shape)
    if {"places", "scores", "bits"} & specs.keys():
        weight = weight.index_select(slice_.dim, kept)
    if "places" in specs:
        parts["places"] = sparse_support(weight, slice_.sparse, slice_.support, slice_.rank or 1, slice_.seed)
    if "scores" in specs:
        # In units of the matrix's standard deviation, so that one learning rate suits the masks of all matrices.
        deviation = weight.float().std().clamp_min(1e-12) if weight.numel() > 1 else 1.0
        parts["scores"] = weight.float().abs() / deviation
    if "bits" in specs and slice_.sparsity is not None:
        parts["bits"] = pack_mask(top_mask(weight.abs(), 0.0 if slice_.drawn_later else slice_.sparsity))
    if "gate" in specs:
        parts["gate"] = torch.ones(specs["gate"].shape)
    return {name: parts[name].to(weight.device, spec.dtype) for name, spec in specs.items()}


def kept_parts(parts: Mapping[str, torch.Tensor], old: Slice, new: Slice) -> dict[str, torch.Tensor]:
    """The values of an adapter's tensors, without gates, after units were removed from a Linear.

    The units of `new` are some of those of `old`, and tuned or frozen as before. The number of single values follows
    from the config and must not change: the values of removed units are replaced by zeros at the first free positions.
    """
    kept = positions_in(old.kept, new.kept)
    tuned = positions_in(old.tuned_positions, new.tuned_positions)
    result: dict[str, torch.Tensor] = {}
    for name, spec in tensor_specs(new).items():
        if spec.trained and name in parts and name != "values":
            value, index = parts[name], tuned if spec.tuned_only else kept
            result[name] = value if spec.axis is None else value.index_select(spec.axis, index.to(value.device))
    if "bits" in parts:
        mask = unpack_mask(parts["bits"], old.kept_shape).index_select(old.dim, kept.to(parts["bits"].device))
        result["bits"] = pack_mask(mask)
    if "values" not in parts:
        return result
    places, values = parts["places"].long(), parts["values"]
    position = [places // old.kept_shape[1], places % old.kept_shape[1]]
    new_of_old = torch.full((len(old.kept),), -1, device=places.device)
    new_of_old[kept.to(places.device)] = torch.arange(len(kept), device=places.device)
    position[new.dim] = new_of_old[position[new.dim]]
    stays = position[new.dim] >= 0
    flat = (position[0] * new.kept_shape[1] + position[1])[stays]
    free = torch.ones(new.kept_shape.numel(), dtype=torch.bool, device=places.device)
    free[flat] = False
    count = min(len(places), len(free))
    flat = torch.cat([flat, free.nonzero()[: count - len(flat), 0]])
    values = torch.cat([values[stays], values.new_zeros(count - int(stays.sum()))])
    order = flat.argsort()
    return {**result, "places": flat[order].to(torch.int32), "values": values[order]}


def positions_in(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Where each entry of `new` is in `old`."""
    order = old.argsort()
    return order[torch.searchsorted(old[order], new)]
