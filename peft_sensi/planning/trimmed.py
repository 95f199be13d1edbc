"""The base model with units cut away for a while: what a trimmed model computes, before there is an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.linears import bias_of, matrix, oriented, update_features
from ..anatomy.modules import linear_of
from ..anatomy.units import Group
from ..utils.states import TRIMMED
from .plan import Plan


@contextmanager
def cut(model: nn.Module, plan: Plan, groups: Iterable[Group]) -> Iterator[None]:
    """Inside the block the units of these groups that the plan trims are absent, as in the trimmed model: smaller
    matrices, smaller head counts. Those that are kept stay in the base's order. Without gradients.
    """
    before: list[tuple[Any, torch.Tensor, torch.Tensor | None]] = []
    told: list[tuple[Any, str, Any]] = []
    try:
        for group in groups:
            kept = np.flatnonzero(plan.of(group) != TRIMMED)
            for name in group.modules:
                linear = linear_of(model, name)
                before.append((linear, linear.weight, linear.bias))  # also of whole groups: see `put`
                if len(kept) == group.size:
                    continue
                sides = [side for side in group.sides if side.module == name]
                positions = np.concatenate([side.positions(kept) for side in sides])
                index = torch.from_numpy(positions).to(linear.weight.device)
                weight, bias = matrix(linear).detach().index_select(sides[0].dim, index), bias_of(linear)
                if bias is not None and sides[0].dim == 0:
                    bias = bias.detach().index_select(0, index)
                put(linear, weight, bias)
            for path, per_unit in group.attributes:
                if len(kept) == group.size:
                    continue
                parent, _, attribute = path.rpartition(".")
                module = model.get_submodule(parent)
                told.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, len(kept) * per_unit)
        yield
    finally:
        for linear, weight, bias in reversed(before):
            linear._parameters["weight"], linear._parameters["bias"] = weight, bias
            update_features(linear)
        for module, attribute, value in reversed(told):
            setattr(module, attribute, value)


def put(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Inside `cut`: gives a Linear of its groups another weight `[out, in]` and bias, in its own dtype."""
    dtype = linear.weight.dtype
    # Not by assignment: under `init_empty_weights` whatever is registered would lose its values.
    linear._parameters["weight"] = nn.Parameter(oriented(linear, weight).to(dtype), requires_grad=False)
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    update_features(linear)
