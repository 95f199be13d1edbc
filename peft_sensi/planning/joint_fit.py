"""Fits all layers of a trimmed model together by gradient descent, until they compute what the untrimmed layers do.

`layer_fit` fits one layer after the other, so no layer makes up for what a later one lacks. For all weights W of the
trimmed layers, this minimizes

    sum_l sum_t |h_lt(W) - y_lt|^2 / var(y_lt)

For each layer l and token t, `h_lt` is the hidden state of the trimmed model after the layer, and `y_lt` that of the
untrimmed model. No labels are used. Hidden states of all layers as targets are those of TinyBERT (Jiao et al. 2020,
arXiv 1909.10351).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..anatomy.modules import linear_of
from ..scoring.calibration import LossFn, first_of, run_forward, tokens_in
from ..scoring.padding import seen_by
from .descent import Weights, cast_like, distance, fit_linears, in_random_order
from .least_squares import Values
from .plan import Plan
from .trimmed import trimmed


RATE = 0.005  # see `descent.fit_linears`
# The untrimmed model runs once for each batch, and its hidden states are held for all rounds. Those of all batches
# would be gigabytes, so a part of the batches goes through all rounds before the next part.
HELD_TOKENS = 8_192


def fit_layers(
    model: nn.Module,
    plan: Plan,
    layers: Sequence[str],
    refitted: Mapping[str, Values],
    batches: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    loss_fn: LossFn | None,
    rounds: int,
    progress: bool,
) -> dict[str, Values]:
    """New values for the Linears that `refitted` names, for which it has values to start from.

    `model` is the untrimmed model, in evaluation mode; it is left as it is. `layers` are those whose hidden states are
    compared. `rounds` says how often each batch is used. See `descent.fit_linears` for the result; it is also empty if
    `loss_fn` runs the model without gradients.
    """
    runner = _HiddenStates(model, layers, loss_fn)

    def error_of(values: Weights, compared: _Compared) -> tuple[torch.Tensor, float]:
        targets = compared.targets(runner)
        with trimmed(model, plan, plan.anatomy.trimmable, refitted):
            outputs = functional_call(runner, cast_like(runner, values), (compared.batch,))
        seen = [seen_by(layer, model, compared.batch, layer in plan.anatomy.tokens_first) for layer in layers]
        pairs = zip(outputs, targets, seen, strict=True)
        errors, weights = zip(*(distance(*pair) for pair in pairs), strict=True)
        return torch.stack(errors).sum(), sum(weights)

    linears = {name: linear_of(model, name) for name in refitted}
    parts = _parts([_Compared(batch, uses=rounds) for batch in in_random_order(batches, 1)])
    order = [compared for part in parts for compared in in_random_order(part, rounds)]
    checks = [_Compared(batch, uses=2) for batch in held_out]
    return fit_linears(runner, linears, refitted, order, checks, error_of, RATE, progress)


@dataclass
class _Compared:
    """A batch, and what the untrimmed model computes for it, which is held from its first to its last use."""

    batch: Mapping[str, Any]
    uses: int
    held: list[torch.Tensor] | None = None

    def targets(self, runner: _HiddenStates) -> list[torch.Tensor]:
        if (found := self.held) is None:
            with torch.no_grad():
                found = runner(self.batch)
        self.uses -= 1
        self.held = found if self.uses else None
        return found


def _parts(batches: Sequence[_Compared]) -> list[list[_Compared]]:
    """Parts of at most `HELD_TOKENS` tokens, or of one batch. All rounds of a part come before the next part."""
    parts: list[list[_Compared]] = []
    tokens = 0.0
    for compared in batches:
        own = tokens_in(compared.batch)
        if not parts or tokens + own > HELD_TOKENS:
            parts.append([])
            tokens = 0.0
        parts[-1].append(compared)
        tokens += own
    return parts


class _HiddenStates(nn.Module):
    """A model whose output is the hidden states `[batch, tokens, features]` after each of its `layers`, in order.

    A module, because `functional_call` needs one, and `loss_fn` takes the model as its argument.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model, self.layers, self.loss_fn = model, layers, loss_fn

    def forward(self, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for name in self.layers:
                layer = self.model.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(lambda module, args, out: found.append(first_of(out))))
            run_forward(self.model, batch, self.loss_fn, "a batch (fit of all layers)")
        return found
