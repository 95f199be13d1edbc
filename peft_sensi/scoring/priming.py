"""A short fine-tuning before gradients are trusted, undone afterwards.

A fresh task head makes the gradients of a pretrained model noise; FAR (arXiv 2205.01541) primes for about one percent
of the iterations. The weights are moved in place and put back, so the device never holds a second model beside the
optimizer's state: the original values of what moves wait on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..anatomy.linears import has_codes
from ..anatomy.modules import is_base_parameter
from ..utils import distributed
from ..utils.errors import CalibrationError
from .calibration import LossFn, calibration_loss
from .head import _head_bias, start_head_at_prior


GATE_LR = 1e-2
GATE_PENALTY = 1e-4


@contextmanager
def primed(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    *,
    steps: int,
    lr: float,
    loss_fn: LossFn | None = None,
    progress: bool = True,
    gates: Sequence[torch.Tensor] = (),
    optimizer: str = "adamw",
) -> Iterator[dict[int, torch.Tensor]]:
    """Inside the block the model is primed, in evaluation mode; afterwards every weight is what it was, bit by bit.

    Yields the original values of what moved, on the CPU, by `id` of the parameter. `gates` are trained along with the
    weights, at their own rate and with an L1 penalty (EarlyBERT, arXiv 2101.00063).

    A linear warm-up over the first tenth. `optimizer` is one of `OPTIMIZERS`: `adamw`, or `sign` (Bernstein et al.
    2018, arXiv 1802.04434), whose steps are as large as Adam's first ones, but which needs no memory beside the
    weights: a gradient is used and freed as soon as it is there. Embeddings stay as they are: they move little, and
    their optimizer state would be the largest. A fresh head (a last Linear whose bias is exactly zero) starts at the
    log prior or mean of the labels, so that its first steps are not spent on that. Several processes take each step
    together, on the joint batch.
    """
    moving = _moving_parameters(model) if steps else _head_bias(model)
    originals = [p.detach().to("cpu", copy=True) for p in moving]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in moving:
            parameter.requires_grad_(True)
        start_head_at_prior(model, batches)
        if steps:
            model.train()
            # The stepper's state is freed before the scores come, which need memory of their own.
            _prime(model, batches, _STEPPERS[optimizer](moving, lr), steps, loss_fn, progress, gates)
        model.eval()
        yield {id(parameter): original for parameter, original in zip(moving, originals, strict=True)}
    finally:
        with torch.no_grad():
            for parameter, original in zip(moving, originals, strict=True):
                parameter.grad = None
                parameter.copy_(original)
        torch.clear_autocast_cache()


def _prime(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    stepper: AdamSteps | SignSteps,
    steps: int,
    loss_fn: LossFn | None,
    progress: bool,
    gates: Sequence[torch.Tensor],
) -> None:
    gate_optimizer = torch.optim.AdamW(gates, lr=GATE_LR, weight_decay=0.0) if gates else None
    with stepper, torch.enable_grad():
        for step in tqdm(range(steps), desc="priming", disable=not progress, leave=False):
            warm_up = min(1.0, (step + 1) / max(1, steps // 10))
            index = step % len(batches)
            name = f"calibration batch {index} (priming step {step})"
            loss = calibration_loss(model, batches[index], loss_fn, name)
            if gates:
                loss = loss + GATE_PENALTY * torch.stack([gate.abs().sum() for gate in gates]).sum().to(loss.device)
            stepper.factor = warm_up
            loss.backward()
            share = distributed.weight_of(batches[index], loss_fn is not None)
            distributed.average_gradients([*stepper.moving, *gates], share, f"priming step {step}", name)
            if not stepper.step():
                raise CalibrationError(f"The gradient of calibration batch {index} is not finite.")
            if gate_optimizer is not None:
                gate_optimizer.param_groups[0]["lr"] = GATE_LR * warm_up
                gate_optimizer.step()
                gate_optimizer.zero_grad()
            # Inside the user's own autocast block its 16-bit copies of the weights would outlive the step, and all
            # following passes would run on the weights before it.
            torch.clear_autocast_cache()


class AdamSteps:
    """AdamW on float32 masters: 16-bit weights would swallow small steps."""

    factor = 1.0

    def __init__(self, moving: Sequence[nn.Parameter], lr: float) -> None:
        full = (torch.float32, torch.float64)
        self.moving, self.lr = moving, lr
        self.masters = [p if p.dtype in full else p.detach().float().requires_grad_() for p in moving]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)

    def __enter__(self) -> AdamSteps:
        return self

    def __exit__(self, *error: Any) -> None:
        self.optimizer.zero_grad()

    def step(self) -> bool:
        """Moves the weights; false, and nothing is done, where a gradient is not finite."""
        for master, parameter in zip(self.masters, self.moving, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        if not torch.isfinite(norm):
            return False
        self.optimizer.param_groups[0]["lr"] = self.lr * self.factor
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.moving, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                parameter.grad = master.grad = None
        return True


class SignSteps:
    """Moves each weight against its gradient's sign, during the backward pass where no other process is to be asked.

    16-bit weights are rounded at random, so that small steps are not lost but taken now and then.
    """

    factor = 1.0

    def __init__(self, moving: Sequence[nn.Parameter], lr: float) -> None:
        self.moving, self.lr = moving, lr
        self.finite = True

    def __enter__(self) -> SignSteps:
        alone = self.moving if distributed.world_size() == 1 else ()
        self.handles = [p.register_post_accumulate_grad_hook(self._move) for p in alone]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _move(self, parameter: torch.Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        self.finite = self.finite and bool(torch.isfinite(grad.sum()))
        if parameter.dtype in _DROPPED_BITS:
            moved = parameter.float().sub_(grad.float().sign_(), alpha=self.lr * self.factor)
            parameter.copy_(_round_at_random(moved, _DROPPED_BITS[parameter.dtype]))
        else:
            parameter.sub_(grad.sign_(), alpha=self.lr * self.factor)

    def step(self) -> bool:
        for parameter in self.moving:
            if parameter.grad is not None:
                self._move(parameter)
        return self.finite


_STEPPERS: dict[str, type[AdamSteps] | type[SignSteps]] = {"adamw": AdamSteps, "sign": SignSteps}
OPTIMIZERS = tuple(_STEPPERS)
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32's mantissa


def _round_at_random(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Float32 values whose last `bits` are zero; right on average."""
    noise = torch.randint(0, 1 << bits, values.shape, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << bits)).view(torch.float32)


def _moving_parameters(model: nn.Module) -> list[nn.Parameter]:
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if is_base_parameter(name) and id(p) not in embeddings and p.is_floating_point() and not has_codes(p)
    ]
