"""Compressed adapters: float32 tensors go in, bfloat16 or int8 codes (and float32 scales) come out, and back.

All trained tensors of one adapter on one Linear become one vector of codes, in the order of `PARTS`, each row by row.
`weight` and `bias` are encoded as differences from the base's values, which are small and need fewer digits.

- `bfloat16`: the codes are the rounded values.
- `int8`: `value = code * scale`. Codes are from -127 to 127. There is a float32 scale for each tuned row or column,
  for each row of `down`, for each column of `up`, and for every `BLOCK` entries of `bias` and `values`. The scales are
  a second vector in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F


KINDS = {"bfloat16": torch.bfloat16, "int8": torch.int8}
PARTS = ("weight", "bias", "down", "up", "values")
BLOCK = 64
_LARGEST = 127

Shapes = Mapping[str, tuple[int, ...]]  # by name, for those of `PARTS` that an adapter has


def sizes(shapes: Shapes, dim: int, kind: str) -> tuple[int, int]:
    """Numbers of codes and of scales. `dim` is 0 if rows of `weight` are tuned, 1 if columns are."""
    codes = sum(torch.Size(shape).numel() for shape in shapes.values())
    return codes, sum(_scales(name, shape, dim) for name, shape in shapes.items()) if kind == "int8" else 0


def encode(parts: Mapping[str, torch.Tensor], dim: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (of the dtype `KINDS[kind]`) and scales (float32, empty for bfloat16), both one-dimensional.

    `weight` and `bias` in `parts` must be differences already. `dim` is as in `sizes`.
    """
    ordered = [(name, parts[name].detach().float()) for name in PARTS if name in parts]
    device = ordered[0][1].device if ordered else None
    if kind == "bfloat16":
        codes = [part.flatten().to(torch.bfloat16) for _, part in ordered]
        return torch.cat([*codes, torch.empty(0, dtype=torch.bfloat16, device=device)]), torch.empty(0, device=device)
    codes = [torch.empty(0, dtype=torch.int8, device=device)]
    scales = [torch.empty(0, dtype=torch.float32, device=device)]
    for name, part in ordered:
        scale = _largest(name, part, dim) / _LARGEST
        rounded = (part / _spread(name, scale, part.shape, dim).clamp_min(torch.finfo(torch.float32).tiny)).round()
        codes.append(rounded.clamp(-_LARGEST, _LARGEST).to(torch.int8).flatten())
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def decode(codes: torch.Tensor, scales: torch.Tensor | None, shapes: Shapes, dim: int) -> dict[str, torch.Tensor]:
    """The inverse of `encode` up to rounding: float32 tensors by name."""
    parts, at, scale_at = {}, 0, 0
    for name in (part for part in PARTS if part in shapes):
        shape = torch.Size(shapes[name])
        part = codes[at : at + shape.numel()].view(shape).float()
        at += shape.numel()
        if codes.dtype == torch.int8 and scales is not None:
            count = _scales(name, shape, dim)
            part *= _spread(name, scales[scale_at : scale_at + count].float(), shape, dim)
            scale_at += count
        parts[name] = part
    return parts


def _axis(name: str, dim: int) -> int:
    """The dimension of a matrix along which each position has its own scale."""
    return {"weight": dim, "down": 0, "up": 1}[name]


def _scales(name: str, shape: tuple[int, ...], dim: int) -> int:
    return -(-shape[0] // BLOCK) if len(shape) == 1 else shape[_axis(name, dim)]


def _largest(name: str, part: torch.Tensor, dim: int) -> torch.Tensor:
    size = part.abs()
    if part.dim() == 1:
        return F.pad(size, (0, -len(part) % BLOCK)).view(-1, BLOCK).amax(1)
    if not part.numel():
        return part.new_zeros(part.shape[_axis(name, dim)])
    return size.amax(1 - _axis(name, dim))


def _spread(name: str, scales: torch.Tensor, shape: torch.Size, dim: int) -> torch.Tensor:
    """The scales in a shape that broadcasts to the tensor."""
    if len(shape) == 1:
        return scales.repeat_interleave(BLOCK)[: shape[0]]
    return scales.unsqueeze(1 - _axis(name, dim))
