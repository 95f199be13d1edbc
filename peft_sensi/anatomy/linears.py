"""One view of every kind of linear map: weight `[out, in]`, bias `[out]`; of embeddings `[tokens, hidden]`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.errors import AnatomyError, SensiError


# What can be targeted: `torch.nn.Linear`, and GPT-2's `Conv1D`, a Linear whose weight is stored as `[in, out]`.
LINEARS = (nn.Linear, Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes `x @ weight.T + bias` and nothing else, which a subclass of Linear need not do."""
    inherited = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    coded = isinstance(module, nn.Linear) and is_quantized(module)
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
    """The weight as `[out, in]`, sharing its storage unless it is quantized."""
    return dequantized(linear) if is_quantized(linear) else oriented(linear, linear.weight)


def features(linear: Any) -> tuple[int, int]:
    """Number of outputs and of inputs; of an embedding its tokens and its width."""
    if isinstance(linear, nn.Embedding):
        return linear.num_embeddings, linear.embedding_dim
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def bias_of(linear: nn.Module) -> torch.Tensor | None:
    return getattr(linear, "bias", None)  # embeddings have none


def update_features(linear: Any) -> None:
    """Sets the module's own numbers of outputs and inputs to those of its weight."""
    if isinstance(linear, nn.Embedding):
        return  # no token ever leaves
    out, into = matrix(linear).shape
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = out, into
    else:
        linear.out_features, linear.in_features = out, into


def is_quantized(linear: Any) -> bool:
    """Whether a Linear's weight is stored in codes."""
    weight = getattr(linear, "weight", None)
    return hasattr(linear, "W_q") or (weight is not None and has_codes(weight))


def has_codes(weight: torch.Tensor) -> bool:
    kind = type(weight)
    if kind is nn.Parameter or kind is torch.Tensor:
        return False  # the usual case, which `torch.compile` can follow
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def dequantized(linear: Any) -> torch.Tensor:
    """The weight `[out, in]` that the codes stand for, as a new tensor in a float dtype."""
    unpack(linear)
    with torch.no_grad():
        if get_bnb_param_type(linear.weight):
            # Not `dequantize_module_weight`: on the CPU that loses the scales of 8-bit weights that ran before.
            weight = dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None))
        else:
            weight = dequantize_module_weight(linear)
    return weight.detach().reshape(linear.out_features, linear.in_features)


def unpack(linear: Any) -> None:
    """Undoes the layout into which bitsandbytes brings 4-bit codes when a CPU evaluates a model.

    It has no gradients, and `dequantize_4bit` does not know it. Saving undoes it; there is no other public way.
    """
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        linear.state_dict()


def count(parameter: torch.Tensor) -> int:
    """Number of weights: 4-bit codes are packed, two in a byte of whatever type."""
    if type(parameter).__name__ != "Params4bit":
        return parameter.numel()
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else 2 * parameter.numel() * parameter.element_size()


def check_quantized(linears: Iterable[nn.Module], update: str, sparsity: float | None, keep_base: bool) -> None:
    """Refuses what needs the values of a quantized base. Raises `SensiError`."""
    if not any(is_quantized(linear) for linear in linears):
        return
    way_out = "Load the base model without quantization for that."
    if update == "mask" or sparsity is not None:
        raise SensiError(f"The base model is quantized: its weights cannot be masked. {way_out}")
    if not keep_base:
        raise SensiError(f"The base model is quantized: `keep_base=False` would have to cut its codes. {way_out}")


def not_trimmable(model: nn.Module) -> AnatomyError:
    return AnatomyError(
        f"{type(model).__name__} is quantized: codes are stored in blocks with common scales, so heads and neurons "
        f"cannot be cut out of them. Load the base model without quantization to trim it (and quantize the merged "
        f"model), or set only a `trainable` limit, which trims nothing."
    )


def not_mergeable() -> SensiError:
    return SensiError(
        "The base model is quantized, and rounding the merged weights to its codes would lose what was trained. Load "
        "the adapter on the base model without quantization, and merge it there."
    )
