"""Gates on units, and each example's gradients with respect to them.

A gate is one factor per unit, fixed at 1. It acts on the input of the group's output projection; for the rows of a
single Linear and for tokens, it acts on the output of the Linear or embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..anatomy.units import Anatomy, Group
from ..utils.errors import CalibrationError, not_finite
from .calibration import LossFn, calibration_loss, can_be_divided, check_differentiable, examples_of
from .examples import RowsOfExamples, examples_in


# The loss of a batch is a mean over terms, such as examples or labeled tokens. A `Weighting` takes a batch and returns
# the number of terms of each example: float32 `[examples]`.
Weighting = Callable[[Mapping[str, Any]], torch.Tensor]


def gate_gradients(
    model: nn.Module,
    anatomy: Anatomy,
    batch: Mapping[str, Any],
    loss_fn: LossFn | None = None,
    where: str = "a calibration batch",
    weighting: Weighting | None = None,
) -> dict[str, torch.Tensor]:
    """Derivatives of each example's own loss with respect to each unit's gate: `{group: [examples, units]}`, float32.

    One forward and one backward pass: every example has its own row of gates. If `n_i` of the `N` terms of the batch's
    loss come from example `i`, the example's own gradient is `N / n_i` times its row of the batch's gradient.
    `weighting` gives the `n_i`; it defaults to `find_weighting` on this batch. An example without terms gets zeros.

    Raises `CalibrationError` if the loss or a gradient is not finite, or if the loss does not depend on the model.
    """
    if weighting is None:
        weighting = find_weighting(model, anatomy, [batch], loss_fn)
    terms = weighting(batch)
    factors = torch.where(terms > 0, terms.sum() / terms, 0.0)[:, None]
    gradients = _batch_gradients(model, anatomy, batch, loss_fn, where)
    return {
        name: rows * (factors.to(rows.device) if len(rows) == len(factors) else len(factors))
        for name, rows in gradients.items()
    }


def _batch_gradients(
    model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any], loss_fn: LossFn | None, where: str
) -> dict[str, torch.Tensor]:
    """Derivatives of the batch's loss with respect to the gates, `{group: [examples, units]}` in float32.

    If it is not known which rows of a module's input belong to an example, each row has gates of its own.
    """
    gates: dict[tuple[str, int], torch.Tensor] = {}
    examples = RowsOfExamples(model, batch)

    def gated(group: Group, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        if group.tokens_first:
            x, ids = x.transpose(0, 1), None if ids is None else ids.transpose(0, 1)
        shape, rows = x.shape, examples.of(x.shape if ids is None else ids.shape)
        if rows is None:
            _warn_of_rows(group, shape, examples.size)
        size = shape[0] if rows is None else examples.size
        gate = gates.get((group.name, size))
        if gate is None:
            # The dtype is named, because a user can have set another default.
            gate = torch.ones(size, group.size, dtype=torch.float32, device=x.device, requires_grad=True)
            gates[group.name, size] = gate
        if rows is not None and len(set(rows)) == 1:  # as in most models: without copies of the gates
            x = x.unflatten(0, (size, rows[0]))
            ids = None if ids is None else ids.unflatten(0, (size, rows[0]))
        elif rows is not None:
            gate = gate.repeat_interleave(torch.tensor(rows, device=x.device), dim=0, output_size=shape[0])
        if ids is None:
            gate = gate.view(len(gate), *[1] * (x.dim() - 2), group.size)
        x = apply_gate(x, gate, ids).reshape(shape)
        return x.transpose(0, 1) if group.tokens_first else x

    with hooked(model, anatomy, gated), torch.enable_grad():
        loss = calibration_loss(model, batch, loss_fn, where)
        check_differentiable(loss, where)
        if not gates:
            raise CalibrationError(
                f"The loss of {where} runs none of the modules whose units are scored: `loss_fn` must call the model "
                f"that it gets."
            )
        grads = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    found = {key: grad.float() for key, grad in zip(gates, grads, strict=True) if grad is not None}
    result = {}
    for group in anatomy.groups:
        own = [grad for (name, _), grad in found.items() if name == group.name]
        if not all(grad.isfinite().all() for grad in own):
            raise not_finite(f"The gradient of {group.name!r} is not finite for {where}")
        result[group.name] = torch.cat(own) if own else group.zeros()[None]
    return result


def _warn_of_rows(group: Group, shape: torch.Size, examples: int) -> None:
    warnings.warn(
        f"The module {group.output!r} gets {shape[0]} rows for {examples} examples, and it is not known which rows "
        f"belong to which example. The units of {group.name!r} are scored as if every row came from another example.",
        stacklevel=2,
    )


def mean_over_examples(batch: Mapping[str, Any]) -> torch.Tensor:
    """The `Weighting` of a loss to which every example contributes the same."""
    return torch.ones(examples_in(batch), dtype=torch.float32, device="cpu")


def mean_over_labels(batch: Mapping[str, Any], first: int = 0) -> torch.Tensor:
    """The `Weighting` of a loss that is a mean over labeled tokens from position `first` on; -100 is no label.

    Without token labels, each example counts as one.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return mean_over_examples(batch)
    return (labels[:, first:] >= 0).flatten(1).sum(1).float().cpu()


# For causal language models: the labels are shifted by one, so the first has no prediction.
mean_over_next_labels = partial(mean_over_labels, first=1)
_DIVISIBLE = (torch.Tensor, bool, int, float, str, type(None))
_WEIGHTINGS: tuple[Weighting, ...] = (mean_over_examples, mean_over_labels, mean_over_next_labels)


def find_weighting(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Mapping[str, Any]], loss_fn: LossFn | None = None
) -> Weighting:
    """Finds out whether the loss of a batch is a mean over examples or over labels. This works for any `loss_fn`.

    Two small batches are run: the two examples `a` and `b` that differ most in their number of labels, and `a` twice.
    A batch that cannot be divided, or has images in its texts, is run as a whole: once with the labels of `a` and `b`
    only, and once with those of `a` only. If the loss is a mean over labels, the gradient of `a` in the first run is
    `n_a / (n_a + n_b)` of its own gradient, and in the second run a half or all of it. The ratio of the two gradients
    is compared with that of each weighting.

    If all examples have equally many labels, nothing is run, and the result is `mean_over_examples`. The result is the
    same if no weighting is within 5 % (as with a contrastive loss), or if gradients are zero or not finite. If
    `loss_fn` takes a mean over tokens whose labels are not in `labels`, longer examples count more in the scores.
    """
    # A list of the user's own, such as names for `loss_fn`, would keep the items of all examples.
    divisible = [batch for batch in batches if all(isinstance(v, _DIVISIBLE) for v in batch.values())]
    pairs = ((*_unequal_pair(batch), batch) for batch in divisible)
    contrast, rows, batch = max(pairs, key=lambda found: found[0], default=(0, [], {}))
    if not contrast:
        return mean_over_examples
    # With images, a tensor with one row for each example may still hold several images of one of them.
    if can_be_divided(batch) and not RowsOfExamples(model, batch).media:
        first, pair, alone = 0, examples_of(batch, rows), examples_of(batch, [rows[0], rows[0]])
    else:
        first, pair, alone = rows[0], _labeled_only(batch, rows), _labeled_only(batch, rows[:1])
    try:
        mixed, own = (_batch_gradients(model, anatomy, b, loss_fn, "two examples") for b in (pair, alone))
    except CalibrationError:
        return mean_over_examples
    # It may be unknown to which example the rows of a module belong.
    size = examples_in(pair)
    both = [(mixed[n][first].cpu().double(), o[first].cpu().double()) for n, o in own.items() if len(o) == size]
    product, square = sum(float(m @ o) for m, o in both), sum(float(o @ o) for _, o in both)
    if product <= 0:
        return mean_over_examples

    def error(weighting: Weighting) -> float:
        shares = [float(terms[first] / terms.sum()) for terms in map(weighting, (pair, alone))]
        return abs(math.log(product / square * shares[1] / shares[0]))

    best = min(_WEIGHTINGS, key=error)
    return best if error(best) < 0.05 else mean_over_examples


def _labeled_only(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """The batch without the labels of other examples than these."""
    labels = torch.full_like(batch["labels"], -100)
    labels[rows] = batch["labels"][rows]
    return {**batch, "labels": labels}


def _unequal_pair(batch: Mapping[str, Any]) -> tuple[float, list[int]]:
    """The two examples with the fewest (at least one) and the most labels; before them, the log of the ratio."""
    counts = mean_over_next_labels(batch)
    if len(counts) != examples_in(batch) or not counts.any():
        return 0.0, []
    rows = [int(torch.where(counts > 0, counts, math.inf).argmin()), int(counts.argmax())]
    return math.log(counts[rows[1]] / counts[rows[0]]), rows


def apply_gate(x: torch.Tensor, gate: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies each unit's part of `x` `[..., units * width]` by its gate `[..., units]`.

    If `ids` `[examples, ...]` are given, `x` `[examples, ..., hidden]` holds the tokens' vectors, and each is
    multiplied by the gate of its token. Gates are then `[tokens]` or `[examples, tokens]`.
    """
    if ids is not None:
        gate = gate[ids] if gate.dim() == 1 else gate.gather(1, ids.flatten(1)).view(ids.shape)
        return x * gate.to(x).unsqueeze(-1)
    return (x.unflatten(-1, (gate.shape[-1], -1)) * gate.to(x).unsqueeze(-1)).flatten(-2)


@contextmanager
def hooked(model: nn.Module, anatomy: Anatomy, gated: Any) -> Iterator[None]:
    """Inside the block, `gated(group, x, ids)` replaces each tensor `x` that gates act on. Only tokens have `ids`."""
    with ExitStack() as hooks:
        for group in anatomy.groups:
            module = model.get_submodule(group.output)
            if group.in_block:
                hook = module.register_forward_pre_hook(
                    lambda m, args, group=group: (gated(group, args[0], None), *args[1:])
                )
            else:
                hook = module.register_forward_hook(
                    lambda m, args, y, group=group: gated(group, y, args[0] if group.kind == "token" else None)
                )
            hooks.enter_context(hook)
        yield
