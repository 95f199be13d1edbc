"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import is_base_parameter, task_head
from ..utils import distributed


def start_head_at_prior(model: nn.Module, batches: list[Mapping[str, Any]]) -> None:
    """Sets the bias of a fresh classification head to the log prior of the labels, of a regression head to their mean.

    The labels are those of all processes. Does nothing to a head that has been trained (its bias is not zero), and to
    heads whose labels are not classes.
    """
    linear = _last_linear(model)
    if linear is None or linear.bias is None or bool(linear.bias.detach().any()):
        return
    outputs = linear.out_features
    pooled = distributed.gather("counting labels", _count_labels(batches, outputs))
    numbers = [number for number, _, _ in pooled if number is not None]
    counts = [count for _, count, _ in pooled if count is not None]
    with torch.no_grad():
        if outputs == 1 and numbers:
            linear.bias.fill_(sum(total for _, total in numbers) / sum(number for number, _ in numbers))
        elif outputs > 1 and counts and not any(strange for _, _, strange in pooled):
            smoothed = torch.tensor(counts).sum(0).float() + 1.0
            linear.bias.copy_((smoothed / smoothed.sum()).log())


def _count_labels(
    batches: list[Mapping[str, Any]], outputs: int
) -> tuple[tuple[int, float] | None, list[int] | None, bool]:
    """Number and sum of labels that are numbers, how often each class occurs, and whether there are other classes."""
    labels = [batch["labels"] for batch in batches if isinstance(batch.get("labels"), torch.Tensor)]
    if not labels or any(_is_multi_hot(batch, outputs) for batch in batches):
        return None, None, False
    values = torch.cat([label.detach().reshape(-1) for label in labels]).cpu()
    if values.is_floating_point():
        return (len(values), float(values.double().sum())), None, False
    values = values[values >= 0]  # -100 marks positions without a label
    if not len(values):
        return None, None, False
    if int(values.max()) >= outputs:
        return None, None, True
    return None, torch.bincount(values, minlength=outputs).tolist(), False


def _is_multi_hot(batch: Mapping[str, Any], outputs: int) -> bool:
    """Whether an example's labels are a row of zeros and ones, one a class, and not the classes of its tokens."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, torch.Tensor) or labels.dim() < 2 or labels.shape[-1] != outputs:
        return False
    return not isinstance(ids, torch.Tensor) or labels.shape != ids.shape


def head_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the task head's parameters, by the names that they have in the base, on the CPU."""
    prefixes = tuple(f"{name}." for name in task_head(model))
    return {
        # The head of a model that already has an adapter is inside a wrapper of PEFT's.
        name.replace(".original_module.", "."): p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if name.startswith(prefixes) and is_base_parameter(name)
    }


def head_at_prior(model: nn.Module, batches: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """`head_state` after `start_head_at_prior`; the head itself stays as it is."""
    linear = _last_linear(model)
    before = None if linear is None or linear.bias is None else linear.bias.detach().clone()
    start_head_at_prior(model, batches)
    head = head_state(model)
    if linear is not None and before is not None:
        with torch.no_grad():
            linear.bias.copy_(before)
    return head


def _last_linear(model: nn.Module) -> nn.Linear | None:
    linears = [
        module
        for head in task_head(model)
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear) and "modules_to_save" not in name.split(".")
    ]
    return linears[-1] if linears else None


def _head_bias(model: nn.Module) -> list[nn.Parameter]:
    """What `start_head_at_prior` changes."""
    linear = _last_linear(model)
    return [] if linear is None or linear.bias is None else [linear.bias]
