"""A base model with units removed for a while: what the trimmed model will compute, before an adapter exists."""

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
def trimmed(model: nn.Module, plan: Plan, groups: Iterable[Group]) -> Iterator[None]:
    """Inside the block, the units of these groups that the plan trims are removed from the model.

    The weights are smaller, as in the trimmed model, and so are the numbers of heads that attention modules hold. The
    kept units stay in the base model's order. The new weights have no gradients. After the block the model has its
    own weights again.
    """
    weights: list[tuple[Any, torch.Tensor, torch.Tensor | None]] = []
    attributes: list[tuple[Any, str, Any]] = []
    try:
        for group in groups:
            kept = np.flatnonzero(plan.of(group) != TRIMMED)
            for name in group.modules:
                linear = linear_of(model, name)
                # Also where no unit is removed, because `assign` may replace the weights.
                weights.append((linear, linear.weight, linear.bias))
                if len(kept) == group.size:
                    continue
                sides = [side for side in group.sides if side.module == name]
                positions = np.concatenate([side.positions(kept) for side in sides])
                index = torch.from_numpy(positions).to(linear.weight.device)
                weight, bias = matrix(linear).detach().index_select(sides[0].dim, index), bias_of(linear)
                if bias is not None and sides[0].dim == 0:
                    bias = bias.detach().index_select(0, index)
                assign(linear, weight, bias)
            for path, per_unit in group.attributes if len(kept) < group.size else ():
                parent, _, attribute = path.rpartition(".")
                module = model.get_submodule(parent)
                attributes.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, len(kept) * per_unit)
        yield
    finally:
        for linear, weight, bias in reversed(weights):
            linear._parameters["weight"], linear._parameters["bias"] = weight, bias
            update_features(linear)
        for module, attribute, value in reversed(attributes):
            setattr(module, attribute, value)


def assign(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives a Linear another weight `[out, in]` and bias `[out]`, converted to its own dtype.

    Only to be called inside `trimmed` for a Linear of the trimmed groups: leaving the block restores the old values.
    """
    dtype = linear.weight.dtype
    # Written to `_parameters`, because a parameter that is assigned under `init_empty_weights` loses its values.
    linear._parameters["weight"] = nn.Parameter(oriented(linear, weight).to(dtype), requires_grad=False)
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    update_features(linear)
