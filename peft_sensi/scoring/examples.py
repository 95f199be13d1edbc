"""Which rows of a tensor inside of a model belong to which example of a batch: shapes go in, numbers of rows come out.

Most modules get one row for each example. Some get several: one for each choice (multiple choice), token (OPT's FFN),
tile or patch of its images. The rows of one example are neighbors, and the examples keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


_MEDIA = (("image_token_id", "pixel_values"), ("video_token_id", "pixel_values_videos"))


def examples_in(batch: Mapping[str, Any]) -> int:
    """The number of examples of a batch: the first dimension of its texts or labels.

    Without these, it is the largest first dimension of its tensors. Images can have more rows than there are examples,
    because some models get the tiles or patches of all images as one list.
    """
    sizes = {name: len(value) for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels"):
        if name in sizes:
            return sizes[name]
    return max(sizes.values(), default=1)


class RowsOfExamples:
    """The numbers of rows of the examples of one batch."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()]
        self.size = examples_in(batch)
        self.shapes = [tensor.shape for tensor in tensors if len(tensor) == self.size]
        ids, config = batch.get("input_ids"), getattr(model, "config", None)
        self.tokens = ids.shape if isinstance(ids, torch.Tensor) else torch.Size()
        # For images and for videos: the length of the tensor that holds them, and the number of tokens of each example
        # in whose place they come.
        self.media: list[tuple[int, list[int]]] = []
        for name, pixels in _MEDIA:
            token, held = getattr(config, name, None), batch.get(pixels)
            if isinstance(ids, torch.Tensor) and ids.dim() > 1 and isinstance(token, int):
                places = (ids == token).flatten(1).sum(1).tolist()
                if any(places):
                    self.media.append((0 if held is None else len(held), places))

    def of(self, shape: torch.Size) -> list[int] | None:
        """How many of the rows of a tensor `[rows, ..., features]` each example has; `None` if that is unknown."""
        rows, one_each = shape[0], [1] * self.size
        if rows == self.size and (not self.media or shape[:2] == self.tokens):
            return one_each
        # With images and videos in one batch, the model gets them one after the other.
        media = [counts for length, counts in self.media if len(self.media) == 1 or length == rows]
        # Every image token stands for the same number of patches, or every tile has the same number of tokens.
        fitting = [counts for counts in media if all(rows * count % sum(counts) == 0 for count in counts)]
        found = [[rows * count // sum(counts) for count in counts] for counts in fitting]
        if found:
            return found[0] if found[0] == found[-1] else None
        # Models flatten the first dimensions of an input such as `[examples, choices, tokens]`, and OPT's FFN gets the
        # tokens of all examples as one list.
        flattened = any(math.prod(known[:dims]) == rows for known in self.shapes for dims in range(1, len(known) + 1))
        if rows % self.size == 0 and (flattened or (len(shape) == 2 and not self.media)):
            return [rows // self.size] * self.size
        return None
