"""Finds the adapters of a model whose training has phases, and puts one back to the start of its phase."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from ..anatomy.modules import unwrapped
from ..layers.layer import layers_of
from .config import SensiConfig


def scheduled_model(model: nn.Module) -> nn.Module:
    """The model without wrappers, or the `PeftModel` with a schedule inside of it: a user's module may hold it."""
    whole = unwrapped(model)
    inside = (module for module in whole.modules() if isinstance(module, PeftModel))
    return next((module for module in (whole, *inside) if scheduled_adapters(module)), whole)


def scheduled_adapters(model: nn.Module) -> dict[str, SensiConfig]:
    """The active adapters with a schedule whose training is not finished, with their configs."""
    # The layers know what is active, however the adapters were added (PEFT, Transformers, `inject_adapter_in_model`).
    layers = layers_of(model).values()
    active = {name for layer in layers for name in layer.active_adapters if name in layer.sensi_slices}
    configs = (getattr(model, "peft_config", None) or {}).items()
    sensi = {n: config for n, config in configs if n in active and isinstance(config, SensiConfig)}
    return {n: config for n, config in sensi.items() if config.schedule is not None or config.past_cuts is not None}


def unfreeze_dense(model: nn.Module, adapter_name: str) -> None:
    """Makes the dense part trainable again, if the phase `freeze_dense` has frozen it."""
    for layer in layers_of(model, adapter_name).values():
        # PEFT keeps adapters that are not active frozen.
        if layer.sensi_frozen.pop(adapter_name, False) and adapter_name in layer.active_adapters:
            layer.part("weight", adapter_name).requires_grad_(True)
