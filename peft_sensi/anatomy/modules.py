"""Finds modules of a model, and the weights that they have now, behind the wrappers that PEFT puts around them."""

from __future__ import annotations

from typing import Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .linears import is_plain_embedding, matrix
from .units import Group, Side


def not_linear(module: nn.Module) -> TypeError:
    """The error for a target of a kind that has no rows to tune."""
    return TypeError(
        f"Target module {module} is not supported: only `torch.nn.Linear`, Transformers' `Conv1D` and, unit by unit, "
        f"`torch.nn.Embedding` can be targeted."
    )


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


def is_base_parameter(name: str) -> bool:
    """Whether this is the name of a parameter of the base model, and not of an adapter."""
    return not any(part.startswith("sensi_") or part == "modules_to_save" for part in name.split("."))


def embedding_of(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The model's `input` or `output` embedding, or `None` if there is none or Transformers does not know it."""
    try:
        return getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


# The names that PEFT takes for task heads. They are used for models that do not hold their transformer in a module of
# its own, such as T5 for question answering.
_HEAD_NAMES = ("classifier", "score", "qa_outputs")


def task_head(model: nn.Module) -> list[str]:
    """Names of the child modules that make up a classification-like head: all that is outside the base transformer.

    The list is empty for a transformer without a head, and for language models, whose head is pretrained.
    """
    prefix = getattr(model, "base_model_prefix", "")
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if embedding_of(model, "output") is not None:
        return []
    return [name for name in children if (name != prefix if prefix in children else name in _HEAD_NAMES)]


def unit_weights(model: nn.Module, group: Group, side: Side) -> torch.Tensor:
    """The weights that each unit owns on one side: `[group.size, side.width * side.fan]`, float32."""
    return side.per_unit(matrix(linear_of(model, side.module)).detach(), group.size).float()


def input_embedding(model: nn.Module) -> str | None:
    """Name of the embedding of the input tokens, or `None` if it does more than look up rows, or is shared."""
    table = embedding_of(model, "input")
    if table is None or not is_plain_embedding(table := base_of(table)) or is_shared(model, table):
        return None
    return next((name for name, module in model.named_modules() if base_of(module) is table), None)


def is_shared(model: nn.Module, table: nn.Module) -> bool:
    """Whether another module, such as the output layer of a language model, uses the weight of this embedding too."""
    others = (module for module in map(base_of, model.modules()) if module is not table)
    return any(getattr(other, "weight", None) is table.weight for other in others)
