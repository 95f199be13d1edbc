"""Modules that an adapter trains and saves whole, such as the task head and norms, on a base of 16 bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from ..anatomy.linears import has_codes, is_plain_embedding
from .masters import SHORT, warn_of_short, without_rounding


class SavedWhole(ModulesToSaveWrapper):
    """PEFT's wrapper, with float32 copies ("masters") of 16-bit weights. Small steps would be lost in 16 bits.

    The adapter's copy of the module holds the masters. Each forward pass rounds them to the dtype that the base's own
    module has. So the merged model, which has this dtype, computes the same.
    """

    def update(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update(adapter_name, *args, **kwargs)
        self.hold_masters(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates the copy of one of these adapters, or the base's own module if none of them has a copy here.

        PEFT calls this for adapters with a copy only. Transformers' own `set_adapter` calls it for all of them.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter([name for name in names if name in self.modules_to_save], inference_mode)
        for name in self.modules_to_save.keys() - set(self.active_adapters):
            self.modules_to_save[name].requires_grad_(False)

    def hold_masters(self, adapter_name: str) -> None:
        """Makes the 16-bit weights of the adapter's copy float32."""
        for parameter in self.modules_to_save[adapter_name].parameters():
            if parameter.dtype in SHORT and not has_codes(parameter):
                parameter.data = parameter.data.float()

    def rounded(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The masters in the 16-bit dtype of the base, by name; differentiable. Empty for a wider base."""
        dtypes = {name: parameter.dtype for name, parameter in self.original_module.named_parameters()}
        return {
            name: parameter.to(dtypes[name])
            for name, parameter in self.modules_to_save[adapter_name].named_parameters()
            if dtypes.get(name) in SHORT and parameter.dtype not in SHORT
        }

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return super()._apply(without_rounding(fn, self.modules_to_save.parameters()), recurse)

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__  # in printed models and in PEFT's messages

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        name = self.active_adapters[0]
        module = self.modules_to_save[name]
        if self.training and torch.is_grad_enabled() and not getattr(module, "_is_fsdp_managed_module", False):
            warn_of_short(module.parameters())
        if is_plain_embedding(module):  # rounding the rows that were looked up is the same, and cheaper
            return module(*args, **kwargs).to(self.original_module.weight.dtype)
        rounded = self.rounded(name)
        return functional_call(module, rounded, args, kwargs) if rounded else module(*args, **kwargs)

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        value = super()._getattr_wrapped(name, modules)
        # The code of a model may compute with a weight of this module, or ask for its dtype.
        return self.rounded(self.active_adapters[0]).get(name, value) if isinstance(value, nn.Parameter) else value

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        module: nn.Module = super().unload_and_optionally_merge_module(*args, **kwargs)
        if module is not self.original_module:
            with torch.no_grad():
                rounded = [(module.get_parameter(n), v) for n, v in self.rounded(self.active_adapters[0]).items()]
                new = {id(master): nn.Parameter(value, master.requires_grad) for master, value in rounded}
            for owner in module.modules():  # the masters themselves do not change, so a failed merge can be undone
                owner._parameters.update({n: new[id(p)] for n, p in owner._parameters.items() if id(p) in new})
        return module


def saved_modules(model: nn.Module, adapter_name: str) -> dict[str, ModulesToSaveWrapper]:
    """The wrappers of the modules that an adapter saves whole, by their paths."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {name: wrapper for name, wrapper in wrappers.items() if adapter_name in wrapper.modules_to_save}


def activate(wrapper: AuxiliaryTrainingWrapper, adapters: list[str], inference_mode: bool = False) -> None:
    """Activates the copy of the active `adapters`, if exactly one of them has a copy of the module."""
    names = [name for name in adapters if name in wrapper._get_available_adapters()]
    if len(names) == 1 and wrapper.active_adapters != names:
        wrapper.set_adapter(names, inference_mode=inference_mode)


def freeze_saved_modules(model: nn.Module) -> None:
    """Freezes all modules that adapters save whole. Transformers freezes only layers of what it loads to be used."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.requires_grad_(False)


def hold_masters(model: nn.Module, adapter_name: str, wanted: bool = True) -> None:
    """Gives the modules that this adapter saves whole float32 masters. Warns if they are not `wanted`, but needed."""
    if not wanted and any(parameter.dtype in SHORT for parameter in model.parameters()):
        warnings.warn(
            "`autocast_adapter_dtype=False` has no effect: trained values are float32 on a 16-bit base, too, because "
            "16 bits would round small steps away. `compress` makes a finished adapter smaller.",
            stacklevel=2,
        )
    for wrapper in saved_modules(model, adapter_name).values():
        wrapper.__class__ = SavedWhole  # PEFT has made the wrapper, and nothing else of it changes
        wrapper.hold_masters(adapter_name)
