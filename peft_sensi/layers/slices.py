"""What one adapter does with one Linear, and the tensors it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..anatomy.linears import bias_of, features, matrix
from .compression import KINDS, encode, sizes
from .functional import Positions
from .updates import low_rank_start, pack_mask, sparse_support, top_mask


@dataclass(frozen=True, eq=False)
class Slice:
    """What one adapter does with one Linear, whose base weight is `[out, in]`, or with the rows of an embedding.

    `kept` lists the base positions (int64, CPU) along `dim` (0 = rows, 1 = columns) that stay, in the order in which
    the adapter computes them: tuned first, then frozen, the same on both sides of a group, so that the tuned slice is
    contiguous and no output permutation is needed. A lone Linear keeps its own order instead, and `tuned` is then an
    index into `kept` rather than a number.

    `rank`, `sparse` and `sparsity` are the sizes of the parts that `updates` describes; 0 or `None` where there is
    none. `gated` columns are multiplied by a mask of units, which cuts during training close one by one. A `sparsity`
    belongs to a mask that is learned (`learns_mask`) or one bit a weight (drawn once, or learned before).
    `compressed` is the type in which trained values are stored once they are not trained any more (see `compression`).
    """

    dim: int
    size: int
    kept: torch.Tensor
    tuned: Positions
    units: int
    train_bias: bool = False
    rank: int = 0
    sparse: int = 0
    support: str = "magnitude"
    sparsity: float | None = None
    learns_mask: bool = False
    drawn_later: bool = False
    gated: bool = False
    compressed: str | None = None
    seed: int = 0

    @property
    def trims(self) -> bool:
        return len(self.kept) < self.size

    @property
    def tuned_count(self) -> int:
        return self.tuned if isinstance(self.tuned, int) else len(self.tuned)

    @cached_property
    def whole(self) -> bool:
        """Everything that is kept is tuned, and nothing else happens to the weight."""
        others = self.rank or self.sparse or self.sparsity is not None
        return 0 < self.tuned_count == len(self.kept) and not others and not self.gated and self.compressed is None

    @cached_property
    def natural(self) -> bool:
        """Nothing is trimmed or moved."""
        return torch.equal(self.kept, torch.arange(self.size, device=self.kept.device))

    @property
    def has_integers(self) -> bool:
        """Whether the adapter stores something beside floating-point values here."""
        return bool(self.sparse) or (self.sparsity is not None and not self.learns_mask) or self.gated

    @property
    def idle(self) -> bool:
        """The Linear needs no adapter layer at all."""
        parts = self.tuned_count or self.train_bias or self.rank or self.sparse or self.sparsity is not None
        return self.natural and not parts and not self.gated

    @property
    def tuned_index(self) -> torch.Tensor:
        """The places (int64) of the trained rows or columns among the kept ones."""
        return torch.arange(self.tuned, device=self.kept.device) if isinstance(self.tuned, int) else self.tuned

    @property
    def tuned_positions(self) -> torch.Tensor:
        """Base positions (int64) of the trained rows or columns, in the order of the trained tensor."""
        return self.kept[: self.tuned] if isinstance(self.tuned, int) else self.kept[self.tuned]

    def kept_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the kept part of a weight of this shape."""
        return torch.Size(len(self.kept) if dim == self.dim else size for dim, size in enumerate(shape))


def first_parts(
    base: Any, slice_: Slice, values: tuple[torch.Tensor, torch.Tensor | None] | None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors by name (see `SensiLayer`), from the base's values or refitted ones."""
    master = torch.promote_types(base.weight.dtype, torch.float32)
    weight, bias = matrix(base).detach(), bias_of(base)
    bias = None if bias is None else bias.detach()
    if values is not None:
        values = (values[0].to(weight.device), None if values[1] is None else values[1].to(weight.device))
        bias = values[1] if values[1] is not None else bias
    parts = {}
    if slice_.tuned_count:
        index = slice_.tuned_positions.to(weight.device)
        # Both are new tensors: no further copy.
        parts["weight"] = (values[0] if values is not None else weight.index_select(slice_.dim, index)).to(master)
    if bias is not None and slice_.train_bias:
        parts["bias"] = bias.index_select(0, slice_.kept.to(bias.device)) if slice_.dim == 0 else bias
    elif bias is not None and slice_.dim == 0 and slice_.tuned_count:
        parts["bias"] = bias.index_select(0, slice_.tuned_positions.to(bias.device))
    if "bias" in parts:
        parts["bias"] = parts["bias"].to(master, copy=True)
    shape = slice_.kept_shape(weight.shape)
    if slice_.rank:
        parts["down"], parts["up"] = low_rank_start(shape, slice_.rank, weight)
    if slice_.sparse or slice_.learns_mask:
        kept = weight.index_select(slice_.dim, slice_.kept.to(weight.device))
        if slice_.sparse:
            places = sparse_support(kept, slice_.sparse, slice_.support, slice_.rank or 1, slice_.seed)
            parts["places"], parts["values"] = places, torch.zeros(len(places), device=weight.device)
        if slice_.learns_mask:
            # In units of the matrix's spread, so that one learning rate moves all matrices' masks alike.
            parts["scores"] = kept.float().abs() / kept.float().std().clamp_min(1e-12)
    if slice_.sparsity is not None and not slice_.learns_mask:
        mask = torch.ones(shape, dtype=torch.bool, device=weight.device)
        if not slice_.drawn_later:
            mask = top_mask(weight.index_select(slice_.dim, slice_.kept.to(weight.device)).abs(), slice_.sparsity)
        parts["bits"] = pack_mask(mask)
    if slice_.gated:
        parts["gate"] = torch.ones(slice_.units, dtype=torch.uint8, device=weight.device)
    if slice_.compressed is not None:
        origins = {
            name: parts[name] if name in ("weight", "bias") else 0.0
            for name in trained_shapes(*features(base), bias_of(base) is not None, slice_)
        }
        return compress_parts(parts, origins, slice_)
    return parts


def compress_parts(
    parts: Mapping[str, torch.Tensor], origins: Mapping[str, torch.Tensor | float], slice_: Slice
) -> dict[str, torch.Tensor]:
    """`parts` with codes and scales of the differences from `origins` in place of the trained values."""
    assert slice_.compressed is not None
    rest = {name: tensor for name, tensor in parts.items() if name not in origins}
    codes, scales = encode(
        {n: parts[n].detach().float() - o for n, o in origins.items()}, slice_.dim, slice_.compressed
    )
    return rest | ({"codes": codes} if origins else {}) | ({"scales": scales} if len(scales) else {})


def trained_shapes(out: int, into: int, has_bias: bool, slice_: Slice) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained parts that can be narrowed (a learned mask cannot), on a base weight `[out, into]`."""
    shape = slice_.kept_shape(torch.Size((out, into)))
    shapes: dict[str, tuple[int, ...]] = {}
    if slice_.tuned_count:
        shapes["weight"] = tuple(slice_.tuned_count if dim == slice_.dim else size for dim, size in enumerate(shape))
    if has_bias and (slice_.train_bias or (slice_.dim == 0 and slice_.tuned_count)):
        shapes["bias"] = (shape[0] if slice_.train_bias else slice_.tuned_count,)
    if slice_.rank:
        shapes["down"], shapes["up"] = (slice_.rank, shape[1]), (shape[0], slice_.rank)
    if slice_.sparse:
        shapes["values"] = (min(slice_.sparse, shape.numel()),)
    return shapes


def empty_parts(base: Any, slice_: Slice) -> dict[str, torch.Tensor]:
    """Shapes and dtypes of `first_parts` on `meta`: loading with `low_cpu_mem_usage` allocates nothing twice."""
    master = torch.promote_types(base.weight.dtype, torch.float32)
    shape = slice_.kept_shape(torch.Size(features(base)))
    trained = trained_shapes(*features(base), bias_of(base) is not None, slice_)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if slice_.compressed is not None:
        codes, scales = sizes(trained, slice_.dim, slice_.compressed)
        shapes |= {"codes": ((codes,), KINDS[slice_.compressed])} if trained else {}
        shapes |= {"scales": ((scales,), torch.float32)} if scales else {}
    else:
        shapes |= {n: (size, master if n in ("weight", "bias") else torch.float32) for n, size in trained.items()}
    if slice_.sparse:
        shapes["places"] = (trained["values"], torch.int32)
    if slice_.learns_mask:
        shapes["scores"] = (tuple(shape), torch.float32)
    elif slice_.sparsity is not None:
        shapes["bits"] = ((-(-shape.numel() // 8),), torch.uint8)
    if slice_.gated:
        shapes["gate"] = ((slice_.units,), torch.uint8)
    return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in shapes.items()}


def kept_parts(
    parts: Mapping[str, torch.Tensor | None], old: Slice, new: Slice, shape: torch.Size
) -> Iterator[tuple[str, torch.Tensor]]:
    """What remains of an adapter's tensors when units leave a Linear of this base shape.

    Single values keep their number, because a file's shapes follow from the configuration: those that leave with a
    unit are replaced by zeros at the first free positions.
    """
    if torch.equal(old.kept, new.kept):
        yield from ((name, value) for name, value in parts.items() if value is not None)
        return
    now = torch.argsort(old.kept)[torch.searchsorted(old.kept.sort().values, new.kept)]  # where each kept unit was
    dims = {"weight": new.dim, "bias": 0 if new.dim == 0 else None}
    dims |= {"up": 0} if new.dim == 0 else {"down": 1}
    for name in ("weight", "bias", "down", "up"):
        if (value := parts[name]) is not None:
            dim = dims.get(name)
            yield name, value if dim is None else value.index_select(dim, now.to(value.device))
    places, values = parts["places"], parts["values"]
    if places is None or values is None:
        return
    columns = old.kept_shape(shape)[1]
    position = [places.long() // columns, places.long() % columns]
    here = torch.full((len(old.kept),), -1, device=places.device)
    here[now.to(places.device)] = torch.arange(len(now), device=places.device)
    position[new.dim] = here[position[new.dim]]
    stays = position[new.dim] >= 0
    room = new.kept_shape(shape)
    count = min(len(places), room.numel())
    flat = (position[0] * room[1] + position[1])[stays]
    free = torch.ones(room.numel(), dtype=torch.bool, device=places.device)
    free[flat] = False
    flat = torch.cat([flat, free.nonzero()[: count - len(flat), 0]])
    values = torch.cat([values[stays], values.new_zeros(count - int(stays.sum()))])
    order = flat.argsort()
    yield "places", flat[order].to(torch.int32)
    yield "values", values[order]
