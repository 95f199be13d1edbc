"""Measures what the memory of a training step is used for."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def storage_bytes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage by its address. A storage that several tensors share is counted once."""
    dense = (part for tensor in tensors if not tensor.is_meta for part in _dense(tensor))
    storages = (tensor.untyped_storage() for tensor in dense)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _dense(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)


def held_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and other tensors that modules keep, such as the cache of fused weights."""
    found: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            found += _tensors(value)
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    if type(value) is dict:
        return [t for item in value.values() for t in _tensors(item)]
    return []


class SavedActivations:
    """Counts the tensors that autograd saves for the backward pass, each storage once, without parameters and caches.

    Copies of weights (autocast makes 16-bit copies) are counted separately, as `weight_copies`. A matrix is an
    activation if one of its dimensions is `rows` or `rows * columns`, the size of the batch.
    """

    def __init__(self, model: nn.Module, rows: int, columns: int) -> None:
        self.model, self.sizes = model, {rows, rows * columns}
        self.activations: dict[int, int] = {}
        self.weight_copies: dict[int, int] = {}
        self._keep: list[torch.Tensor] = []  # keeps storages alive, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        of_batch = tensor.dim() > 2 or self.sizes & set(tensor.shape)
        kind = self.activations if of_batch else self.weight_copies
        kind |= storage_bytes([tensor])
        self._keep.append(tensor.detach())
        return tensor

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        held = storage_bytes(held_tensors(self.model))  # only now, because the first forward pass fills caches
        for kind in (self.activations, self.weight_copies):
            for address in held.keys() & kind.keys():
                del kind[address]
        self._keep.clear()

    @property
    def activation_bytes(self) -> int:
        return sum(self.activations.values())

    @property
    def weight_copy_bytes(self) -> int:
        return sum(self.weight_copies.values())


def free_at_once() -> None:
    """Makes glibc return freed memory to the system at once, so that each phase has its own peak."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 0)  # M_TRIM_THRESHOLD


def peak_of_process(reset: bool = False) -> int:
    """Peak resident memory in bytes since the last reset (Linux only). `reset` starts a new measurement."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
