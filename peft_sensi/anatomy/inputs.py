"""A model goes in; how long its inputs are: positions, tokens of an image, and the usual length."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn


def image_tokens(model: nn.Module) -> int | None:
    """How many tokens an image model has per image: patches and special tokens. `None` if this is not known.

    Position embeddings, a parameter `[1, tokens, hidden]` or the table `[tokens, hidden]` of an embedding, exist for
    all tokens except registers (as in DINOv2 with registers). Models without such embeddings are BEiT and DINOv3.
    """
    if getattr(model, "main_input_name", "") != "pixel_values":
        return None
    endings = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")
    parameters = dict(model.named_parameters())
    registers = _count(parameters, "register_tokens")
    for name, parameter in parameters.items():
        if name.endswith(endings) and parameter.dim() in (2, 3):
            return parameter.shape[-2] + registers
    sizes = [getattr(getattr(model, "config", None), name, None) for name in ("image_size", "patch_size")]
    image, patch = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    if not all(isinstance(size, int) for size in (*image, *patch)):
        return None
    return (image[0] // patch[0]) * (image[1] // patch[1]) + _count(parameters, "cls_token") + registers


def _count(parameters: Mapping[str, nn.Parameter], name: str) -> int:
    """How many special tokens `[1, tokens, hidden]` have this name."""
    return next((p.shape[-2] for path, p in parameters.items() if path.endswith(f"embeddings.{name}")), 0)


# The last parts of the names that tables of positions have in Transformers.
_POSITIONS = re.compile(r"(.*\.)?(position_embeddings?|wpe|embed_positions)")


def positions_of(model: nn.Module) -> tuple[str, int] | None:
    """Name of the table of learned positions, and the longest input in tokens. `None` if the model has no such table.

    Some families do not use the first rows: OPT and BART two of them (`offset`), RoBERTa those up to its padding.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
            first = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            return name, module.weight.shape[0] - first
    return None


def usual_length(model: nn.Module, decode: bool = False) -> int:
    """The tokens of the sequences that are measured by default: 128, or as many as the table of positions has."""
    longest = longest_to_measure(model, decode)
    return 128 if longest is None else min(128, longest)


def longest_to_measure(model: nn.Module, decode: bool = False) -> int | None:
    """The most tokens for which the table of positions is large enough; `None` without a table.

    A decoding step (`decode`) needs a position more than the cached tokens before it.
    """
    table = positions_of(model)
    return table[1] - decode if table else None
