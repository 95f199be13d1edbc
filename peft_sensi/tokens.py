"""Which rows of the input embeddings are worth training: those of tokens that the calibration data has.

Fine-tuning trains the whole table, although a task shows the model a small part of the vocabulary. The rows of the
tokens that it does show have a small part of the table's optimizer state and bytes; what training them gains is in
`docs/quality.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .anatomy import base_of, embedding_of
from .linears import is_plain_embedding
from .units import Anatomy
from .utils import distributed


def input_embedding(model: nn.Module) -> str | None:
    """Name of the table in which input tokens are looked up; `None` where other modules share it or depend on it."""
    table = embedding_of(model, "input")
    if table is None or not is_plain_embedding(table := base_of(table)) or is_shared(model, table):
        return None
    return next((name for name, module in model.named_modules() if base_of(module) is table), None)


def is_shared(model: nn.Module, table: nn.Module) -> bool:
    """Whether another module, such as a language model's output layer, has the same weight."""
    others = {id(m): m for m in map(base_of, model.modules()) if m is not table}
    return any(getattr(other, "weight", None) is table.weight for other in others.values())


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
