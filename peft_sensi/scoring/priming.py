"""Priming: a short fine-tuning before gradients are taken, undone afterwards.

With a fresh task head, the gradients of a pretrained model are noise. FAR (arXiv 2205.01541) primes for about one
percent of the iterations. A step uses only a few examples of a batch, to save time. The original weights are kept on
the CPU, so the device never holds a second model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from ..anatomy.linears import has_codes
from ..anatomy.modules import is_base_parameter
from ..utils import distributed
from ..utils.errors import not_finite
from ..utils.progress import progress_bar
from ..utils.undo import surely
from .calibration import (
    ScoringOptions,
    calibration_loss,
    can_be_divided,
    check_differentiable,
    examples_of,
    is_labeled,
    saved_buffers,
    weight_of,
)
from .examples import examples_in
from .head import head_bias, start_head_at_prior


EXAMPLES = 6  # in a priming step
LIFT = 3.0  # of the rate, for further steps
GATE_LR = 1e-2
GATE_PENALTY = 1e-4


@contextmanager
def primed(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    options: ScoringOptions,
    gates: Sequence[torch.Tensor] = (),
    is_enough: Callable[[], bool] = lambda: True,
) -> Iterator[dict[int, torch.Tensor]]:
    """Inside the block, the model is primed and in evaluation mode. Afterwards every weight is restored, bit by bit.

    Yields the original values of the weights that priming changes, on the CPU, by `id` of the parameter. `gates` are
    trained together with the weights, at their own learning rate and with an L1 penalty (EarlyBERT, arXiv 2101.00063).

    The learning rate rises linearly over the first tenth of the steps. The steps of the optimizer `sign` (Bernstein et
    al. 2018, arXiv 1802.04434) are as large as Adam's first steps, but it needs no memory besides the weights: each
    gradient is used and freed at once. A fresh head starts at the prior of the labels (see `start_head_at_prior`).
    Several processes take each step together, on the examples of all of them.

    If `is_enough` returns false after the steps, as many follow at `LIFT` times the rate: some models learn nothing at
    a rate that suits others.

    Raises `CalibrationError` if a loss or gradient is not finite.
    """
    moving = _primed_parameters(model) if options.priming_steps else head_bias(model)
    originals = [p.detach().to("cpu", copy=True) for p in moving]
    restore_buffers = saved_buffers(model)

    @torch.no_grad()
    def restore() -> None:
        for parameter, original in zip(moving, originals, strict=True):
            parameter.grad = None
            parameter.copy_(original)
        restore_buffers()

    try:
        model.requires_grad_(False)
        for parameter in moving:
            parameter.requires_grad_(True)
        start_head_at_prior(model, batches)
        if options.priming_steps:
            for factor in (1.0, LIFT):
                stepper = _STEPPERS[options.priming_optimizer](moving, factor * options.priming_lr)
                model.train()
                _prime(model, batches, stepper, options, gates)
                del stepper  # its state is freed before the scores need memory
                model.eval()
                if is_enough():
                    break
        model.eval()
        yield {id(parameter): original for parameter, original in zip(moving, originals, strict=True)}
    finally:
        surely(restore)
        torch.clear_autocast_cache()


def _prime(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    stepper: AdamSteps | SignSteps,
    options: ScoringOptions,
    gates: Sequence[torch.Tensor],
) -> None:
    gate_optimizer = AdamW(gates, lr=GATE_LR, weight_decay=0.0) if gates else None
    with stepper, torch.enable_grad():
        for step in progress_bar(range(options.priming_steps), "priming", show=options.progress):
            warm_up = min(1.0, (step + 1) / max(1, options.priming_steps // 10))
            turn, index = divmod(step, len(batches))
            name = f"calibration batch {index} (priming step {step})"
            batch = _some_examples(batches[index], turn)
            loss = calibration_loss(model, batch, options.loss_fn, name)
            check_differentiable(loss, name)
            if gates:
                loss = loss + GATE_PENALTY * torch.stack([gate.abs().sum() for gate in gates]).sum().to(loss.device)
            stepper.factor = warm_up
            loss.backward()
            weight = weight_of(batch, options.loss_fn is not None)
            distributed.average_gradients([*stepper.moving, *gates], weight, f"priming step {step}", name)
            if not stepper.step():
                raise not_finite(f"The gradient of calibration batch {index} is not finite")
            if gate_optimizer is not None:
                gate_optimizer.param_groups[0]["lr"] = GATE_LR * warm_up
                gate_optimizer.step()
                gate_optimizer.zero_grad()
            # Inside the user's autocast block, the 16-bit copies of the weights would be kept after the step, and all
            # following passes would use the old weights.
            torch.clear_autocast_cache()


def examples_primed_on(batches: int, options: ScoringOptions) -> int:
    """How many examples of each of these batches priming uses, at most."""
    return EXAMPLES * math.ceil(options.priming_steps / batches)


def _some_examples(batch: Mapping[str, Any], turn: int) -> Mapping[str, Any]:
    """`EXAMPLES` examples of a batch, different ones in each turn. All of a batch that cannot be divided, or is small.

    The part must have a label: a loss over tokens is not finite without labels.
    """
    size = examples_in(batch)
    if size <= EXAMPLES or not can_be_divided(batch):
        return batch
    rows = [(turn * EXAMPLES + i) % size for i in range(EXAMPLES)]
    part = examples_of(batch, rows)
    return part if is_labeled(part) else batch


class AdamSteps(ExitStack):
    """AdamW on float32 copies of the weights, because small steps would be lost in 16-bit weights.

    A fused step needs no temporary tensors, so weights without a copy share one optimizer. Each other weight has an
    optimizer of its own, so that temporary tensors and float32 gradients are as large as one weight, and not as large
    as the model.
    """

    factor = 1.0

    def __init__(self, moving: Sequence[nn.Parameter], lr: float) -> None:
        super().__init__()
        full = (torch.float32, torch.float64)
        self.moving, self.lr = moving, lr
        parts: list[list[tuple[nn.Parameter, torch.Tensor]]] = [[]]  # the first one is shared
        for parameter in moving:
            master = parameter if parameter.dtype in full else parameter.detach().float().requires_grad_()
            if master is parameter and _has_fused_step(parameter):
                parts[0].append((parameter, master))
            else:
                parts.append([(parameter, master)])
        # A step has few examples, so PyTorch's default on CPUs, one operation after another, would take a third.
        self.parts = [
            (part, AdamW([m for _, m in part], lr, weight_decay=0.0, fused=_has_fused_step(part[0][0]) or None))
            for part in parts
            if part
        ]

    def step(self) -> bool:
        """Updates the weights. If a gradient is not finite, changes nothing and returns `False`."""
        gradients = [p.grad for p in self.moving if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        if not norms:
            return True
        norm = torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
        if not torch.isfinite(norm):
            return False
        clip = (1.0 / (norm + 1e-6)).clamp_max(1.0)  # as `clip_grad_norm_` with a largest norm of 1
        for part, optimizer in self.parts:
            moved = [(p.grad, p, master) for p, master in part if p.grad is not None]
            for gradient, parameter, master in moved:
                master.grad = gradient.to(master.dtype).mul_(clip.to(parameter.device))
            optimizer.param_groups[0]["lr"] = self.lr * self.factor
            optimizer.step()
            for _, parameter, master in moved:
                if master is not parameter:
                    with torch.no_grad():
                        parameter.copy_(master)
                parameter.grad = master.grad = None
        return True


def _has_fused_step(parameter: torch.Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda")


class SignSteps(ExitStack):
    """Moves each weight by the learning rate, against the sign of its gradient.

    A single process updates each weight as soon as its gradient is there, during the backward pass. Several processes
    average the gradients first. 16-bit weights are rounded at random, so that small steps have an effect on average.
    """

    factor = 1.0

    def __init__(self, moving: Sequence[nn.Parameter], lr: float) -> None:
        super().__init__()
        self.moving, self.lr = moving, lr
        self.finite = True
        for parameter in moving if distributed.world_size() == 1 else ():
            self.enter_context(parameter.register_post_accumulate_grad_hook(self._move))

    @torch.no_grad()
    def _move(self, parameter: torch.Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        self.finite = self.finite and bool(torch.isfinite(grad.sum(dtype=torch.float32)))
        step = self.lr * self.factor
        if parameter.dtype not in _DROPPED_BITS:
            parameter.sub_(grad.sign_(), alpha=step)
            return
        # A part at a time: the float32 values and the noise of a whole weight would take five times its memory.
        parameter, grad = torch.atleast_1d(parameter, grad.sign_())
        count = max(1, _AT_ONCE * len(parameter) // max(1, parameter.numel()))
        for rows, signs in zip(parameter.split(count), grad.split(count), strict=True):
            moved = rows.float().sub_(signs, alpha=step)
            rows.copy_(_round_at_random(moved, _DROPPED_BITS[parameter.dtype]))

    def step(self) -> bool:
        """Updates the weights that still have a gradient. Returns whether all gradients were finite."""
        for parameter in self.moving:
            if parameter.grad is not None:
                self._move(parameter)
        return self.finite


_STEPPERS: dict[str, type[AdamSteps] | type[SignSteps]] = {"adamw": AdamSteps, "sign": SignSteps}
OPTIMIZERS = tuple(_STEPPERS)
_AT_ONCE = 2**22  # weights
# How many bits of a float32's mantissa the type does not have.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def _round_at_random(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds float32 values at random so that their last `bits` bits are zero. The expected value is unchanged."""
    noise = torch.randint(0, 1 << bits, values.shape, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << bits)).view(torch.float32)


def _primed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Float parameters of the base without embeddings, which would change little and need the most optimizer state."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [
        p
        for name, p in model.named_parameters()
        if is_base_parameter(name) and id(p) not in embeddings and p.is_floating_point() and not has_codes(p)
    ]
