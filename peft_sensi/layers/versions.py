"""A tensor goes in; what changes when something is written into it comes out, for caches."""

from __future__ import annotations

import torch


def writes(tensor: torch.Tensor) -> int:
    """How often values were written into a tensor. Tensors made under `torch.inference_mode` do not count: -1."""
    return -1 if tensor.is_inference() else tensor._version


def version_of(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """What changes when a tensor gets another storage, or when values are written into it."""
    return None if tensor is None else (tensor.data_ptr(), writes(tensor))
