"""Putting an adapter's slices into a model, and changing them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..anatomy.linears import is_plain, is_plain_embedding
from ..anatomy.modules import not_linear
from ..anatomy.units import Group
from ..layers.compression import PARTS
from ..layers.embedding import SensiEmbedding
from ..layers.layer import SensiLayer
from ..layers.linear import SensiLinear
from ..layers.slices import Slice, kept_parts
from ..planning.plan import Plan
from ..utils import replicas
from ..utils.errors import SensiError, SensiLoadError
from .config import SensiConfig
from .slicing import slices_of
from .targets import plan_of


logger = logging.getLogger(__name__)


def wrap_module(
    model: nn.Module,
    name: str,
    adapter_name: str,
    slice_: Slice,
    group: Group,
    config: SensiConfig,
    refitted: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> SensiLinear | SensiEmbedding:
    """Gives the module called `name` a slice for this adapter, replacing a plain Linear or embedding first."""
    base: Any = model.get_submodule(name)
    layer: SensiLinear | SensiEmbedding
    if isinstance(base, SensiLinear | SensiEmbedding):
        layer = base
    else:
        if is_plain_embedding(base):
            layer = SensiEmbedding(base, adapter_name)
        elif is_plain(base):
            layer = SensiLinear(base, adapter_name)
        else:
            raise not_linear(base)
        layer.sensi_in_block = group.in_block
        if group.output == name:
            layer.sensi_units = group.size
            layer.sensi_attributes = [(*_number(model, path), per_unit) for path, per_unit in group.attributes]
        replace_module(model, name, layer)
    layer.update_layer(adapter_name, slice_, refitted, config.init_weights, config.inference_mode)
    if config.from_file:
        layer.sensi_unchecked.add(adapter_name)
    return layer


def _number(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the name of an attribute that counts units: a layout from a file may name anything."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if type(getattr(module, name, 0)) is not int:
        raise SensiLoadError(f"`blocks` names {path!r}, which is no number in this model and cannot follow the units.")
    return module, name


def root_of(model: nn.Module) -> nn.Module:
    """The user's own model, in whose paths groups and modules are named."""
    return model.base_model.model if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def save_whole(config: SensiConfig, names: list[str]) -> None:
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *names])) or None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _layers(root: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers that an adapter has, by name."""
    layers = {name: m for name, m in root.named_modules() if isinstance(m, SensiLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.sensi_slices}


def replan(model: nn.Module, config: SensiConfig, adapter_name: str, plan: dict[str, Any]) -> None:
    """Gives an adapter in place another plan, because the checkpoint that is being loaded was trained under it."""
    root = root_of(model)
    layers = _layers(root, adapter_name)
    if any(replicas.is_sharded(m) for m in layers.values()) or any(m.sensi_base_dropped for m in layers.values()):
        raise SensiLoadError(
            "The checkpoint was trained under another plan than the one that this model was wrapped with, and a "
            "sharded model or one without its base cannot change it. Wrap the model with `SensiConfig(plan=...)` of "
            "the checkpoint."
        )
    before, config.plan = config.plan, plan
    try:
        slices = slices_of(root, config, plan_of(root, config))
    except SensiLoadError:
        config.plan = before
        raise
    for name, layer in layers.items():
        if name not in slices:
            layer.delete_adapter(adapter_name)
    for name, (slice_, group) in slices.items():
        wrap_module(root, name, adapter_name, slice_, group, config)
    logger.info("The checkpoint has another plan than this model was wrapped with: the layers follow the checkpoint.")


def shrink(model: nn.Module, config: SensiConfig, adapter_name: str, plan: Plan) -> None:
    """Removes the units that `plan` trims from an adapter that has trimmed none, keeping what it has learned."""
    root = root_of(model)
    layers = _layers(root, adapter_name)
    config.plan, config.schedule = plan.to_dict(), None
    slices = slices_of(root, config, plan)
    for name in set(layers) - set(slices):
        layers[name].delete_adapter(adapter_name)  # it had nothing but a gate, which stayed open
    for name, (slice_, group) in slices.items():
        old, parts = None, {}
        if name in layers:
            old = layers[name].sensi_slices[adapter_name]
            parts = {part: layers[name].part(part, adapter_name) for part in (*PARTS, "places")}
        layer = wrap_module(root, name, adapter_name, slice_, group, config)
        if old is None:
            continue
        with torch.no_grad():
            for part, value in kept_parts(parts, old, slice_, torch.Size((layer.out_features, layer.in_features))):
                if (parameter := layer.part(part, adapter_name)) is not None:  # something of the sublayer is left
                    parameter.copy_(value)
        if parts["weight"] is not None:
            layer.set_requires_grad(adapter_name, parts["weight"].requires_grad)


def drop_originals(model: nn.Module, adapter_name: str) -> None:
    """Frees the base's own copies of the modules that an adapter trains and saves whole."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for module in wrapper.original_module.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.new_empty(0), requires_grad=False)


def set_head(model: nn.Module, adapter_name: str, head: dict[str, torch.Tensor]) -> None:
    """Starts the adapter's copy of the task head from what priming taught it; the base's own head stays as it is."""
    with torch.no_grad():
        for name, value in head.items():
            top, _, rest = name.partition(".")
            wrapper = model.get_submodule(top)
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                own = dict(wrapper.modules_to_save[adapter_name].named_parameters())
                if rest not in own or own[rest].shape != value.shape:
                    found = tuple(own[rest].shape) if rest in own else "no such parameter"
                    raise SensiError(f"The scores' head has {name!r} {tuple(value.shape)}, this model {found}.")
                parameter = own[rest]
                if not parameter.is_meta:
                    parameter.copy_(value)
