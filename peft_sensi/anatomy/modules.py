"""Finds modules of a model, and the weights that they have now, behind the wrappers that PEFT puts around them."""

from __future__ import annotations

import re
from collections import Counter
from operator import attrgetter
from typing import Any, Literal, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..utils.checks import shown
from ..utils.errors import AnatomyError, SensiError
from .linears import is_plain_embedding, matrix
from .units import Group, Side


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def not_linear(name: str, module: nn.Module) -> AnatomyError:
    """The error for a target of a kind that has no rows to tune. `name` is its path in the model."""
    shown = f"{type(module).__name__}(...)" if any(module.children()) else module  # that of a whole model has pages
    return AnatomyError(
        f"Target module {name!r}, {shown}, is not supported: only `torch.nn.Linear`, Transformers' `Conv1D` "
        f"and, unit by unit, `torch.nn.Embedding` can be targeted."
    )


def check_module(model: Any) -> None:
    """Raises `SensiError` for anything but a module, such as the name of a model."""
    if not isinstance(model, nn.Module):
        raise SensiError(f"The model must be a `torch.nn.Module`, got {shown(model)}: load it first.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP, DataParallel, FSDP, DeepSpeed and `torch.compile`, in whatever order.

    Raises `SensiError` for anything but a module.
    """
    check_module(model)
    # Accelerate's function removes a compiled wrapper outside of DDP but not one inside of it.
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def base_of(module: nn.Module) -> nn.Module:
    """The user's own module, without the wrappers that PEFT has put around it."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The user's own Linear (or `Conv1D`, see `linears`) called `name`, without PEFT's wrappers."""
    return cast(nn.Linear, base_of(model.get_submodule(name)))


def name_in_base(path: str) -> str:
    """The name that a module or parameter has in the base model, if adapters save it or a module around it whole."""
    return re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)", "", path)


def is_base_parameter(name: str) -> bool:
    """Whether this is the name of a parameter of the base model, and not of an adapter."""
    return not any(part.startswith("sensi_") or part == "modules_to_save" for part in name.split("."))


def embedding_of(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The model's `input` or `output` embedding, or `None` if there is none or Transformers does not know it."""
    try:
        return getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalization with trained values, by the name of its class, which may be any model's own."""
    values = list(module.parameters(recurse=False))
    # A class with modules inside of it only has a norm, such as `RobertaPreLayerNormLMHead`.
    return "Norm" in type(module).__name__ and bool(values) and not list(module.children())


def residual_factor(model: nn.Module, group: Group) -> torch.Tensor:
    """What a layer multiplies a sublayer's output by before it adds it to the residual sum, `[]` or `[features]`."""
    return torch.as_tensor(attrgetter(group.factor)(model) if group.factor else 1.0).detach().float()


def unit_weights(model: nn.Module, group: Group, side: Side) -> torch.Tensor:
    """The weights that each unit owns on one side: `[group.size, side.width * side.fan]`, float32."""
    return side.per_unit(matrix(linear_of(model, side.module)).detach(), group.size).float()


def input_embedding(model: nn.Module) -> str | None:
    """Name of the embedding of the input tokens, or `None` if it does more than look up rows, or is shared."""
    table = embedding_of(model, "input")
    if table is None or not is_plain_embedding(table := base_of(table)) or is_shared(model, table):
        return None
    if id(table) in in_several_places(model):
        return None
    return next((name for name, module in model.named_modules() if base_of(module) is table), None)


def is_shared(model: nn.Module, table: nn.Module) -> bool:
    """Whether another module, such as the output layer of a language model, uses the weight of this embedding too."""
    others = (module for module in map(base_of, model.modules()) if module is not table)
    return any(getattr(other, "weight", None) is table.weight for other in others)


def in_several_places(model: nn.Module) -> set[int]:
    """The ids of modules that several modules hold, or one under several names. An adapter would replace one of them.

    What is inside such a module has one place: it is replaced for all who hold the module.
    """
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    return {key for key, count in places.items() if count > 1 and key != id(None)}


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the user's hooks from a base layer to the layer around it, or back.

    The layer computes the adapted output itself and does not call the base layer, so hooks of that would be skipped.
    The dicts themselves change places, because the handles that remove hooks refer to them.
    """
    for name in _HOOKS:
        ours, theirs = getattr(source, name), getattr(target, name)
        if ours:
            ours.update(theirs)
            setattr(target, name, ours)
            setattr(source, name, type(ours)())
    if target._is_full_backward_hook is None:
        target._is_full_backward_hook, source._is_full_backward_hook = source._is_full_backward_hook, None
