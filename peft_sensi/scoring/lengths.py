"""The length of the inputs in tokens, on which the FLOPs of a model depend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.units import Anatomy, Group
from ..utils import distributed
from .calibration import LossFn, device_of, observing, run_forward, to_device


OBSERVED_BATCHES = 8


def mean_length(
    model: nn.Module, anatomy: Anatomy, batches: list[Mapping[str, Any]], loss_fn: LossFn | None = None
) -> int | None:
    """Mean padded length of the batches of all processes in tokens, rounded; `None` if it is unknown.

    Images and sounds become tokens inside of the model. Such tokens are counted at the first attention or FFN, in a
    forward pass of up to 8 batches; so are those of batches which only `loss_fn` understands. The caller must be
    inside `calibration.preserved`, because this puts the model into evaluation mode.
    """
    # The tokens' dimension is the last, or the one before the hidden size. Multiple-choice inputs have three.
    lengths = [
        batch[key].shape[dim]
        for batch in batches
        for key, dim in (("input_ids", -1), ("inputs_embeds", -2), ("decoder_input_ids", -1))
        if isinstance(batch.get(key), torch.Tensor) and batch[key].dim() >= 2
    ]
    length = _mean(lengths)
    if length is None and any(group.in_block for group in anatomy.groups):
        length = _mean(_observed(model, anatomy, batches[:OBSERVED_BATCHES], loss_fn))
    return length


def _mean(lengths: list[int]) -> int | None:
    pooled = distributed.gather("measuring lengths", (sum(lengths), len(lengths)))
    total, number = (sum(values) for values in zip(*pooled, strict=True))
    return round(total / number) if number else None


def _observed(
    model: nn.Module, anatomy: Anatomy, batches: list[Mapping[str, Any]], loss_fn: LossFn | None
) -> list[int]:
    """How many tokens the first sublayer gets that runs for a batch, for each of these batches."""
    found, seen, device = list[int](), list[int](), device_of(model)
    groups = [group for group in anatomy.groups if group.in_block]
    model.eval()

    def observe(group: Group, z: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
        seen.append(z.shape[0 if group.tokens_first else -2])

    with torch.no_grad(), observing(model, groups, observe):
        for index, batch in enumerate(batches):
            seen.clear()
            run_forward(model, to_device(batch, device), loss_fn, f"calibration batch {index}")
            found += seen[:1]
    return found
