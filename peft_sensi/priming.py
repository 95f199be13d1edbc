"""A short fine-tuning before gradients are trusted, undone afterwards.

A fresh task head makes the gradients of a pretrained model noise; FAR (arXiv 2205.01541) primes for about one percent
of the iterations. The weights are moved in place and put back, so the device never holds a second model: the original
values of what moves wait on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .anatomy import is_base_parameter, task_head
from .calibration import LossFn, calibration_loss
from .errors import CalibrationError


@contextmanager
def primed(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    *,
    steps: int,
    lr: float,
    loss_fn: LossFn | None = None,
    progress: bool = True,
    on_step: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> Iterator[None]:
    """Inside the block the model is primed, in evaluation mode; afterwards every weight is what it was, bit by bit.

    AdamW with a linear warm-up over the first tenth. Embeddings stay as they are: they move little, and their optimizer
    state would be the largest. A fresh head (a last Linear whose bias is exactly zero) starts at the log prior or mean of
    the labels, so that its first steps are not spent on that.
    """
    moving = _moving_parameters(model)
    originals = [p.detach().to("cpu", copy=True) for p in moving]
    masters: list[torch.Tensor] = []
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in moving:
            parameter.requires_grad_(True)
        start_head_at_prior(model, batches)
        # 16-bit weights would swallow small steps, so they are views on float32 masters.
        masters = [p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_() for p in moving]
        optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0)
        model.train()
        bar = tqdm(range(steps), desc="priming", disable=not progress, leave=False)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 10))
            index = step % len(batches)
            loss = calibration_loss(model, batches[index], loss_fn, f"calibration batch {index} (priming step {step})")
            loss.backward()
            for master, parameter in zip(masters, moving, strict=True):
                if master is not parameter and parameter.grad is not None:
                    master.grad = parameter.grad.float()
            norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
            if not torch.isfinite(norm):
                raise CalibrationError(f"The gradient of calibration batch {index} is not finite.")
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, moving, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
                    parameter.grad = master.grad = None
        model.eval()
        yield
    finally:
        with torch.no_grad():
            for parameter, original in zip(moving, originals, strict=True):
                parameter.grad = None
                parameter.copy_(original)


def start_head_at_prior(model: nn.Module, batches: list[Mapping[str, Any]]) -> None:
    """Sets the bias of a fresh classification head to the log prior of the labels, of a regression head to their mean.

    Does nothing to a head that has been trained (its bias is not zero), and to heads whose labels are not classes.
    """
    linear = _last_linear(model)
    labels = [batch["labels"] for batch in batches if isinstance(batch.get("labels"), torch.Tensor)]
    if linear is None or linear.bias is None or not labels or bool(linear.bias.detach().any()):
        return
    values = torch.cat([label.detach().reshape(-1) for label in labels]).cpu()
    outputs = linear.out_features
    with torch.no_grad():
        if values.is_floating_point() and outputs == 1:
            linear.bias.fill_(values.float().mean().item())
        elif not values.is_floating_point() and outputs > 1:
            values = values[values >= 0]  # -100 marks positions without a label
            if len(values) and int(values.max()) < outputs:
                counts = torch.bincount(values, minlength=outputs).float() + 1.0
                linear.bias.copy_((counts / counts.sum()).log())


def head_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the task head's parameters, by name, on the CPU."""
    prefixes = tuple(f"{name}." for name in task_head(model))
    return {
        name: p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if name.startswith(prefixes) and is_base_parameter(name)
    }


def _last_linear(model: nn.Module) -> nn.Linear | None:
    linears = [
        module
        for head in task_head(model)
        for name, module in model.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear) and "modules_to_save" not in name.split(".")
    ]
    return linears[-1] if linears else None


def _moving_parameters(model: nn.Module) -> list[nn.Parameter]:
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if is_base_parameter(name) and id(p) not in embeddings and p.is_floating_point()
    ]
