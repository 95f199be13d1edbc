"""Measures what the memory of a training step is used for."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


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


class WeightCopies(TorchDispatchMode):
    """Collects, in `found`, the addresses of what is computed from the model's own tensors alone.

    These are copies of weights, such as the 16-bit ones that autocast makes. Their shapes would not tell: where a
    batch has as many tokens as the model has hidden values, activations have the shape of weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held, self.found = storage_bytes(held_tensors(model)).keys(), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = storage_bytes(_tensors([*args, *kwargs.values()]))
        # The vectors of positions depend on the model alone, but there are as many as tokens.
        is_copy = given and func.overloadpacket is not torch.ops.aten.embedding
        is_copy = is_copy and all(at in self.held or at in self.found for at in given)
        for at in storage_bytes(_tensors([result])):
            if is_copy:
                self.found.add(at)
            else:  # memory that was freed and is now used for something else
                self.found.discard(at)
        return result


def saved_bytes(model: nn.Module, loss: torch.Tensor, copies: Collection[int]) -> tuple[int, int]:
    """Bytes of the activations and of the copies of weights that are saved for the backward pass of `loss`.

    Each storage is counted once, without parameters and caches. `copies` are addresses (see `WeightCopies`).
    """
    held = storage_bytes(held_tensors(model))
    saved = {at: size for at, size in storage_bytes(saved_tensors(loss)).items() if at not in held}
    of_copies = sum(size for at, size in saved.items() if at in copies)
    return sum(saved.values()) - of_copies, of_copies


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
