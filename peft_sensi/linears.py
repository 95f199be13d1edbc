"""One view of every kind of linear map: weight `[out, in]`, bias `[out]`; of embeddings `[tokens, hidden]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .quantised import dequantised, is_quantised


# What can be targeted: `torch.nn.Linear`, and GPT-2's `Conv1D`, a Linear whose weight is stored as `[in, out]`.
LINEARS = (nn.Linear, Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes `x @ weight.T + bias` and nothing else, which a subclass of Linear need not do."""
    inherited = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    coded = isinstance(module, nn.Linear) and is_quantised(module)
    return inherited or coded or type(module) is Conv1D or type(module).__name__ in _ALSO_PLAIN


_ALSO_PLAIN = ("FalconLinear",)  # it adds its bias in a step of its own


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether the module looks up rows of its weight and does nothing else."""
    plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return plain and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


def oriented(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A view of `linear`'s own `weight` as `[out, in]`, or the other way round: the function is its own inverse."""
    return weight.t() if isinstance(linear, Conv1D) else weight


def matrix(linear: Any) -> torch.Tensor:
    """The weight as `[out, in]`, sharing its storage unless it is quantised."""
    return dequantised(linear) if is_quantised(linear) else oriented(linear, linear.weight)


def features(linear: Any) -> tuple[int, int]:
    """Number of outputs and of inputs; of an embedding its tokens and its width."""
    if isinstance(linear, nn.Embedding):
        return linear.num_embeddings, linear.embedding_dim
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def bias_of(linear: nn.Module) -> torch.Tensor | None:
    return getattr(linear, "bias", None)  # embeddings have none


def tell_features(linear: Any) -> None:
    """Sets the module's own numbers of outputs and inputs to those of its weight."""
    if isinstance(linear, nn.Embedding):
        return  # no token ever leaves
    out, into = matrix(linear).shape
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = out, into
    else:
        linear.out_features, linear.in_features = out, into
