"""TODO docstring."""

from __future__ import annotations

from typing import Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .linears import is_plain_embedding, matrix
from .units import Group, Side


def not_linear(module: nn.Module) -> TypeError:
    return TypeError(
        f"Target module {module} is not supported: only `torch.nn.Linear`, Transformers' `Conv1D` and, unit by unit, "
        f"`torch.nn.Embedding` can be targeted."
    )


def base_of(module: nn.Module) -> nn.Module:
    """The user's own module behind PEFT's wrappers."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear (or `Conv1D`, see `linears`) called `name`, behind PEFT's wrappers."""
    return cast(nn.Linear, base_of(model.get_submodule(name)))


def is_base_parameter(name: str) -> bool:
    """Whether a parameter's name belongs to the base model and not to an adapter on it."""
    return not any(part.startswith("sensi_") or part == "modules_to_save" for part in name.split("."))


def embedding_of(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The model's `input` or `output` embedding; `None` where it has none, or Transformers cannot tell."""
    try:
        return getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


# What PEFT takes for heads, by task type; for models whose transformer is no child of its own (T5's answers).
_HEAD_NAMES = ("classifier", "score", "qa_outputs")


def task_head(model: nn.Module) -> list[str]:
    """Names of the children that make up a classification-like head: everything outside the base transformer.

    Empty for a bare transformer and for language models, whose head belongs to the pretrained base.
    """
    prefix = getattr(model, "base_model_prefix", "")
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    if embedding_of(model, "output") is not None:
        return []
    if not prefix or prefix not in children:
        return [name for name in children if name in _HEAD_NAMES]
    return [name for name in children if name != prefix]


def unit_weights(model: nn.Module, group: Group, side: Side) -> torch.Tensor:
    """The weights of each unit on one side, as a matrix `[size, width * fan]` in float32."""
    return side.per_unit(matrix(linear_of(model, side.module)).detach(), group.size).float()


def input_embedding(model: nn.Module) -> str | None:
    """Name of the table in which input tokens are looked up; `None` where other modules share it or depend on it."""
    table = embedding_of(model, "input")
    if table is None or not is_plain_embedding(table := base_of(table)) or is_shared(model, table):
        return None
    return next((name for name, module in model.named_modules() if base_of(module) is table), None)


def is_shared(model: nn.Module, table: nn.Module) -> bool:
    """Whether another module, such as a language model's output layer, has the same weight."""
    others = {id(m): m for m in map(base_of, model.modules()) if m is not table}
    return any(getattr(other, "weight", None) is table.weight for other in others.values())
