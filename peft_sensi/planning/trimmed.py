"""Removes units from a base model temporarily, so that it computes what the trimmed model will compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy.linears import bias_of, matrix, oriented, update_features
from ..anatomy.modules import linear_of
from ..anatomy.units import Group
from ..utils.states import TRIMMED
from .plan import Plan


@contextmanager
def trimmed(
    model: nn.Module,
    plan: Plan,
    groups: Iterable[Group],
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> Iterator[None]:
    """Inside the block, the units of these groups that the plan trims are removed from the model.

    The kept units stay in the base model's order. `values` are other weights and biases of their Linears (see
    `assign`), by module name. The new weights have no gradients.
    """
    values = values or {}
    with ExitStack() as restore:
        for group in groups:
            kept = int((plan.of(group) != TRIMMED).sum())
            for name in group.modules:
                linear = linear_of(model, name)
                restore.enter_context(reassigned(linear))  # also where no unit is removed: `assign` may be called
                if name in values:
                    assign(linear, *values[name])
                elif kept < group.size:
                    assign(linear, *kept_values(linear, name, group, plan))
            for path, per_unit in group.attributes if kept < group.size else ():
                parent, _, attribute = path.rpartition(".")
                module = model.get_submodule(parent)
                restore.callback(setattr, module, attribute, getattr(module, attribute))
                setattr(module, attribute, kept * per_unit)
        yield


def kept_values(linear: Any, name: str, group: Group, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight `[out, in]` and the bias `[out]` of the Linear `name`, without the units that the plan trims."""
    weight, bias = matrix(linear).detach(), bias_of(linear)
    index = group.positions(name, plan.of(group) != TRIMMED).to(weight.device)
    dim = next(side.dim for side in group.sides if side.module == name)
    if bias is not None:
        bias = bias.detach().index_select(0, index) if dim == 0 else bias.detach()
    return weight.index_select(dim, index), bias


@contextmanager
def reassigned(linear: Any) -> Iterator[None]:
    """Inside the block, `assign` may be called for this Linear. Afterwards it has its own parameters again."""
    weight, bias = linear.weight, linear.bias
    try:
        yield
    finally:
        _put(linear, weight, bias)


def assign(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives a Linear another weight `[out, in]` and bias `[out]` in its own dtype.

    Only for use inside `trimmed` or `reassigned`, which restore its own parameters.
    """
    dtype = linear.weight.dtype
    new_weight = nn.Parameter(oriented(linear, weight).to(dtype), requires_grad=False)
    _put(linear, new_weight, None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False))


def _put(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    # Written to `_parameters`, because a parameter that is assigned under `init_empty_weights` loses its values.
    linear._parameters.update(weight=weight, bias=bias)
    update_features(linear)
