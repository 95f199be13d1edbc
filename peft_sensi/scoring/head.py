"""Start values of a fresh task head: the prior of the calibration labels, or the values after `priming`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import is_base_parameter, task_head
from ..utils import distributed


def start_head_at_prior(model: nn.Module, batches: list[Mapping[str, Any]]) -> None:
    """Sets the bias of a fresh head so that its first training steps are not spent on the labels' distribution.

    For classification the bias becomes `log((count + 1) / sum(count + 1))` of each class, for regression the mean of
    the labels; both over the batches of all processes. A head with a nonzero bias has been trained, so it stays as it
    is. A head also stays as it is if the labels are neither classes nor single numbers.
    """
    for bias in head_bias(model):
        if bool(bias.detach().any()):
            return
        outputs = len(bias)
        labels = torch.cat(distributed.gather("counting labels", _labels(batches, outputs)))
        if not len(labels):
            return
        with torch.no_grad():
            if labels.is_floating_point() and outputs == 1:
                bias.fill_(float(labels.double().mean()))
            elif not labels.is_floating_point() and outputs > 1 and int(labels.max()) < outputs:
                counts = torch.bincount(labels, minlength=outputs).float() + 1.0
                bias.copy_((counts / counts.sum()).log())


def _labels(batches: list[Mapping[str, Any]], outputs: int) -> torch.Tensor:
    """All labels of the batches as one vector; empty if there are none, or if they are neither classes nor numbers."""
    batches = [batch for batch in batches if isinstance(batch.get("labels"), torch.Tensor)]
    labels = [batch["labels"] for batch in batches]
    # With one number for each of the `outputs` (and not for each token), an example has several classes or targets.
    per_output = [batch for batch in batches if batch["labels"].dim() > 1 and batch["labels"].shape[-1] == outputs]
    if not labels or any(getattr(b.get("input_ids"), "shape", None) != b["labels"].shape for b in per_output):
        return torch.empty(0, dtype=torch.long, device="cpu")
    values = torch.cat([label.detach().reshape(-1) for label in labels]).cpu()
    return values if values.is_floating_point() else values[values >= 0].long()  # -100 marks tokens without a label


def head_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the task head's parameters on the CPU, by the names that they have in the base model."""
    prefixes = tuple(f"{name}." for name in task_head(model))
    return {
        # In a model that already has an adapter, PEFT wraps the head.
        name.replace(".original_module.", "."): p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if name.startswith(prefixes) and is_base_parameter(name)
    }


def head_at_prior(model: nn.Module, batches: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """`head_state` as it would be after `start_head_at_prior`. The head itself is not changed."""
    before = [(bias, bias.detach().clone()) for bias in head_bias(model)]
    start_head_at_prior(model, batches)
    head = head_state(model)
    with torch.no_grad():
        for bias, value in before:
            bias.copy_(value)
    return head


def head_bias(model: nn.Module) -> list[nn.Parameter]:
    """The parameter that `start_head_at_prior` may change, the bias of the head's last Linear, if there is one."""
    linears = [
        module
        for head in task_head(model)
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear) and "modules_to_save" not in name.split(".")
    ]
    return [linear.bias for linear in linears[-1:] if linear.bias is not None]
