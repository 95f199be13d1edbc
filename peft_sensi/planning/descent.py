"""Gradient descent on the weights of Linears toward what an untrimmed model computes, in one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from ..anatomy.linears import oriented
from ..scoring.padding import without_padding
from ..utils import distributed
from ..utils.progress import progress_bar
from .least_squares import Values, token_weights


WARM_UP = 0.1  # share of the steps in which the rate rises; after that it falls

Batch = TypeVar("Batch")
# By path in a module. They are float32, also for a 16-bit model, whose steps would be rounded away.
Weights = dict[str, torch.Tensor]
# The error of a batch with these weights, summed over its tokens, and the sum of the tokens' weights.
ErrorOf = Callable[[Weights, Batch], tuple[torch.Tensor, float]]


def fit_linears(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
    start: Mapping[str, Values],
    order: Sequence[Batch],
    held_out: Sequence[Batch],
    error_of: ErrorOf,
    rate: float,
    progress: bool = False,
) -> dict[str, Values]:
    """New values for these parts of `module`, by the names that they have in `linears` and in `start`.

    `rate` is the highest learning rate of a Linear, as a share of the root mean square of its weight. Each batch of
    `order` makes one step. All processes get the same result, whatever their numbers of batches. It is empty if the
    error of the held-out batches is not smaller than at the start, or if a gradient is not finite. The module is left
    as it is.
    """
    paths = {id(part): path for path, part in module.named_modules(remove_duplicate=False)}
    weights: Weights = {}
    rates: dict[str, float] = {}
    for name, (weight, bias) in start.items():
        if weight.numel():
            path = paths[id(linears[name])]
            own = {f"{path}.weight": oriented(linears[name], weight)} | (
                {} if bias is None else {f"{path}.bias": bias}
            )
            weights |= {part: value.detach().float() for part, value in own.items()}
            rates |= dict.fromkeys(own, rate * float(weight.float().square().mean().sqrt()))
    values = _descend(weights, rates, order, error_of, progress)
    if values is None or not _is_better(values, weights, held_out, error_of):
        return {}
    found = {name: paths[id(linear)] for name, linear in linears.items() if f"{paths[id(linear)]}.weight" in values}
    return {n: (oriented(linears[n], values[f"{at}.weight"]), values.get(f"{at}.bias")) for n, at in found.items()}


def cast_like(module: nn.Module, values: Weights) -> Weights:
    """The values in the dtypes with which the module computes."""
    return {path: value.to(module.get_parameter(path).dtype) for path, value in values.items()}


def distance(output: torch.Tensor, target: torch.Tensor, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """The squared error of hidden states `[batch, tokens, features]`, and the sum of the tokens' weights.

    Padding is left out. Each token's error is divided by the variance of its target.
    """
    output, target = (without_padding(batch, values.float()) for values in (output, target))
    weights = token_weights(target)
    return ((output - target).square().sum(-1) * weights).sum(), float(weights.sum())


def _descend(
    start: Weights,
    rates: Mapping[str, float],
    order: Sequence[Batch],
    error_of: ErrorOf,
    progress: bool,
) -> Weights | None:
    """Weights with a smaller mean error than `start`. `None` if nothing can change or a gradient is not finite.

    `rates` has the highest learning rate of each weight.
    """
    steps = max(distributed.gather("counting batches of a fit", len(order)))
    if not start or not steps:
        return None
    values = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = Adam([{"params": [value], "lr": rates[name]} for name, value in values.items()])
    # With a warm-up of exactly one step, `OneCycleLR` divides by zero (torch 2.13).
    share = WARM_UP if round(WARM_UP * steps, 6) != 1 else 1.5 / steps
    schedule = OneCycleLR(optimizer, [rates[name] for name in values], total_steps=steps, pct_start=share)
    # A process that has fewer batches than others takes part with zeros.
    filled = [*order, *[None] * (steps - len(order))]
    for batch in progress_bar(filled, "fit of all layers", show=progress):
        gradients, total_weight = [torch.zeros_like(value) for value in values.values()], 0.0
        if batch is not None:
            with torch.enable_grad():
                error, total_weight = error_of(values, batch)
                if error.requires_grad:  # the user's `loss_fn` may run the model without gradients
                    # Zeros for a sublayer that did not run, such as a cross-attention without an encoder.
                    gradients = list(torch.autograd.grad(error, list(values.values()), materialize_grads=True))
        total = gradients[0].new_tensor(total_weight)
        distributed.all_sum([*gradients, total], "fitting layers")
        if not all(gradient.isfinite().all() for gradient in gradients):
            return None
        if not total:  # a batch without a single token that is not padding
            continue
        for value, gradient in zip(values.values(), gradients, strict=True):
            value.grad = gradient / total
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in values.items()}


def _is_better(values: Weights, start: Weights, held_out: Sequence[Batch], error_of: ErrorOf) -> bool:
    """Whether the error of the held-out batches of all processes is smaller than with `start`."""
    errors = [0.0, 0.0]
    for batch in held_out:
        for i, weights in enumerate((start, values)):
            errors[i] += float(error_of(weights, batch)[0])
    before, after = map(sum, zip(*distributed.gather("checking a fit", errors), strict=True))
    return after < before


def in_random_order(batches: Sequence[Batch], rounds: int) -> list[Batch]:
    """Each batch once per round. The order is the same at each call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        batches[i]
        for _ in range(rounds)
        for i in torch.randperm(len(batches), generator=generator, device="cpu").tolist()
    ]
