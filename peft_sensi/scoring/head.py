"""Start values of a fresh task head: for priming, and for the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import is_base_parameter, name_in_base
from ..anatomy.task_heads import task_head
from ..utils import distributed


def start_head_at_prior(model: nn.Module, batches: list[Mapping[str, Any]]) -> None:
    """Sets the bias of a fresh head to the prior, so that priming's steps are not spent on the labels' distribution.

    For classification the prior is `log((count + 1) / sum(count + 1))` of each class, for regression the mean of the
    labels; both over the batches of all processes. A head with a nonzero bias has been trained, so it stays as it is.
    So does a head whose labels are neither classes nor single numbers.
    """
    for bias in head_bias(model):
        if (prior := _prior(bias, batches)) is not None:
            with torch.no_grad():
                bias.copy_(prior)


def head_to_train(
    model: nn.Module, batches: list[Mapping[str, Any]], primed: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The values from which the training of the task head starts: its own, or its values after priming.

    A fresh head starts at the prior if that explains most of the labels: numbers, and classes whose distribution has
    less than half of the largest entropy, such as tags of words. Otherwise its bias starts without the prior, as
    Transformers makes it. The first steps then push all examples to the frequent classes, which makes the head grow
    faster, and the layers below learn earlier.

    Args:
        primed: `head_state` of the primed model, whose head had started at the prior. The model itself is not primed.
    """
    head = dict(primed or head_state(model))
    names = {id(p): name_in_base(name) for name, p in model.named_parameters()}
    for bias in head_bias(model):
        prior = _prior(bias, batches)
        if prior is None:
            continue
        starts_there = _explains_most(prior)
        name = names[id(bias)]
        if primed and not starts_there:
            head[name] = head[name] - prior.to(head[name])
        elif starts_there and not primed:
            head[name] = prior.to(head[name])
    return head


def _prior(bias: torch.Tensor, batches: list[Mapping[str, Any]]) -> torch.Tensor | None:
    """The start value that `start_head_at_prior` describes (float32, on the CPU); `None` if the bias must stay."""
    if bool(bias.detach().any()):
        return None
    outputs = len(bias)
    labels = torch.cat(distributed.gather("counting labels", _labels(batches, outputs)))
    if labels.is_floating_point() and outputs == 1 and len(labels):
        return labels.double().mean()[None].float()
    if labels.is_floating_point() or outputs == 1 or not len(labels) or int(labels.max()) >= outputs:
        return None
    counts = torch.bincount(labels, minlength=outputs).float() + 1.0
    return (counts / counts.sum()).log()


def _explains_most(prior: torch.Tensor) -> bool:
    """Whether the prior of `_prior` is a mean, or is closer to a single class than to all classes alike."""
    return len(prior) == 1 or float(-(prior.exp() * prior).sum()) < math.log(len(prior)) / 2


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
        name_in_base(name): p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if name.startswith(prefixes) and is_base_parameter(name)
    }


def head_bias(model: nn.Module) -> list[nn.Parameter]:
    """The parameter that `start_head_at_prior` may change, the bias of the head's last Linear, if there is one."""
    linears = [
        module
        for head in task_head(model)
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear) and "modules_to_save" not in name.split(".")
    ]
    return [linear.bias for linear in linears[-1:] if linear.bias is not None]
