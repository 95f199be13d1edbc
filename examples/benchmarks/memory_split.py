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


def saved_tensors(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that autograd has saved for the backward pass of `loss`, read from the nodes of its graph.

    Hooks on saved tensors would not do: where there are hooks, `peft_sensi.layers.sources` saves more.
    """
    found: list[torch.Tensor] = []
    nodes, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        waiting += [following for following, _ in node.next_functions]
        found += _tensors([getattr(node, name) for name in dir(node) if name.startswith("_saved_")])
        found += _tensors(getattr(node, "saved_tensors", ()))
    return found


def saved_bytes(model: nn.Module, loss: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Bytes of the activations and of the copies of weights that are saved for the backward pass of `loss`.

    Each storage is counted once, without parameters and caches. Autocast makes 16-bit copies of weights. A matrix is
    an activation if one of its dimensions is `rows` or `rows * columns`, the size of the batch.
    """
    sizes, held = {rows, rows * columns}, storage_bytes(held_tensors(model))
    activations: dict[int, int] = {}
    copies: dict[int, int] = {}
    for tensor in saved_tensors(loss):
        kind = activations if tensor.dim() > 2 or sizes & set(tensor.shape) else copies
        kind |= storage_bytes([tensor])
    return tuple(sum(n for at, n in kind.items() if at not in held) for kind in (activations, copies))  # type: ignore[return-value]


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
