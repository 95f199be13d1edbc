"""A batch and the values of its tokens go in; the values without those of padding come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def seen_by(layer: str, model: nn.Module, batch: Mapping[str, Any], tokens_first: bool = False) -> Mapping[str, Any]:
    """The batch with the mask of the tokens that this layer sees, in the order of the layer's hidden states.

    These are `[batch, tokens, features]`, or `[tokens, batch, features]` with `tokens_first`.

    The decoder of a model with encoder and decoder sees other tokens than the encoder: their mask is
    `decoder_attention_mask`. Without it, Transformers makes the decoder's tokens from the labels, shifted by one, and
    those for labels below 0 are padding.
    """
    mask = batch.get("attention_mask")
    if tokens_first and isinstance(mask, torch.Tensor) and mask.dim() in (2, 3):
        return {**batch, "attention_mask": mask.flatten(0, -2).T}
    find_decoder: Any = getattr(model, "get_decoder", None)
    if find_decoder is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    decoder, module = find_decoder(), model.get_submodule(layer)
    if not isinstance(decoder, nn.Module) or all(part is not module for part in decoder.modules()):
        return batch
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if mask is None and isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        mask = labels >= 0
    # Otherwise BART's classifiers give the encoder's tokens to the decoder, too.
    return batch if mask is None and "decoder_input_ids" not in batch else {**batch, "attention_mask": mask}


def without_padding(batch: Mapping[str, Any], values: torch.Tensor) -> torch.Tensor:
    """The values of all tokens, `[tokens, features]`. Those of padding are left out, if the batch's mask fits.

    `values` are `[batch, tokens, features]` or `[batch * tokens, features]`, or have the tokens first like the mask.
    They may be on another device than the batch, if a model is spread over several. Multiple-choice models get
    `[batch, choices, tokens]` and run it as `[batch * choices, tokens]`.
    """
    mask, shape = batch.get("attention_mask"), values.shape[:-1]
    if isinstance(mask, torch.Tensor) and mask.dim() in (2, 3):
        mask = mask.flatten(0, -2)
        if shape in (mask.shape, (mask.numel(),)):
            return values[mask.bool().view(shape).to(values.device)]
    return values.flatten(0, -2)
