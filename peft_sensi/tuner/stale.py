"""Notices optimizers and DDP wrappers that hold parameters which a model has lost.

When an adapter gets another plan, its parameters are replaced: by a trim, at the end of a schedule of cuts, or by a
checkpoint. Without these checks, an optimizer that holds the old ones would silently train tensors that the model no
longer has, and DDP would not synchronize the new ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..utils.errors import SensiError


# By identity, because tensors compare by their values; weak, so that nothing is kept alive.
_stale: dict[int, weakref.ref[torch.Tensor]] = {}
_hook: Any = None


def mark_stale(parameters: Iterable[torch.Tensor]) -> None:
    """Registers parameters that a model has just lost. The first call installs a hook on all torch optimizers."""
    global _hook
    for parameter in parameters:
        _stale[id(parameter)] = weakref.ref(parameter)
    for key in [key for key, reference in _stale.items() if reference() is None]:
        del _stale[key]
    if _stale and _hook is None:
        _hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: check_optimizer(optimizer))


def unmark_stale(parameters: Iterable[torch.Tensor]) -> None:
    """Forgets that a model has lost these parameters, because it has them back."""
    for parameter in parameters:
        if _is_stale(parameter):
            del _stale[id(parameter)]


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises `SensiError` when an optimizer is about to step parameters that a model has lost."""
    if not _stale:
        return
    held, copies = [p for group in optimizer.param_groups for p in group["params"]], _storages_of_copies()
    if any(map(_is_stale, held)) or (copies and any(p.untyped_storage().data_ptr() in copies for p in held)):
        raise SensiError(
            "This optimizer was made before units were removed (by `trim()`, at the end of a schedule of cuts, or by "
            "a checkpoint with another plan). It holds parameters that the model no longer has, and not those in "
            "their place. Make a new optimizer, and a new learning rate scheduler for it (or a new `Trainer`)."
        )


def _storages_of_copies() -> set[int]:
    """Where DeepSpeed's optimizers hold copies of parameters that a model has lost."""
    mappings = [getattr(reference(), "_hp_mapping", None) for reference in _stale.values()]
    return {mapping.hp_fragment.untyped_storage().data_ptr() for mapping in mappings if mapping is not None}


def check_wrapper() -> None:
    """Raises `SensiError` when the forward pass runs inside a DDP wrapper of parameters that the model has lost."""
    wrapper = DistributedDataParallel._get_active_ddp_module() if _stale else None
    if wrapper is not None and any(map(_is_stale, getattr(wrapper, "_module_parameters", ()))):
        raise SensiError(
            "This DistributedDataParallel wrapper was made before units were removed, so it would not synchronize the "
            "adapter's new parameters. Wrap the model again (or make a new `Trainer`)."
        )


def _is_stale(parameter: torch.Tensor) -> bool:
    reference = _stale.get(id(parameter))
    return reference is not None and reference() is parameter
