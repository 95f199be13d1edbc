"""Which rows of the input embeddings are worth training: those of tokens that the calibration data has.

Fine-tuning trains the whole table, although a task shows the model a small part of the vocabulary. The rows of the
tokens that it does show have a small part of the table's optimizer state and bytes; what training them gains is in
`docs/quality.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .anatomy.units import Anatomy
from .utils import distributed


def only_seen(
    anatomy: Anatomy, values: Mapping[str, torch.Tensor], batches: Iterable[Mapping[str, Any]] | None
) -> dict[str, torch.Tensor]:
    """`values` with zero for tokens that are nowhere in the batches (of all processes), padding left out.

    For scores that do not come from gradients: those are zero by themselves. Without batches everything counts as
    seen.
    """
    groups = [group for group in anatomy.groups if group.kind == "token"]
    if not groups or batches is None:
        return dict(values)
    seen = [group.zeros() for group in groups]
    for batch in batches:
        for name, ids in batch.items():
            if name.endswith("input_ids") and isinstance(ids, torch.Tensor):
                mask = batch.get(name.replace("input_ids", "attention_mask"))
                if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
                    ids = ids[mask.bool()]
                for group, counts in zip(groups, seen, strict=True):
                    known = ids[(ids >= 0) & (ids < group.size)]
                    counts[known.reshape(-1).cpu().unique().long()] = 1.0
    distributed.maximum(seen, "looking for tokens")
    masks = {g.name: mask for g, mask in zip(groups, seen, strict=True)}
    return {name: value * masks[name] if name in masks else value for name, value in values.items()}
