"""Bases whose weights are stored in 8 or 4 bits (bitsandbytes, torchao, HQQ): what PEFT's backend helpers can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn

from .utils.errors import AnatomyError, SensiError


def is_quantised(linear: Any) -> bool:
    """Whether a Linear's weight is stored in codes."""
    weight = getattr(linear, "weight", None)
    return hasattr(linear, "W_q") or (weight is not None and has_codes(weight))


def has_codes(weight: torch.Tensor) -> bool:
    kind = type(weight)
    if kind is nn.Parameter or kind is torch.Tensor:
        return False  # the usual case, which `torch.compile` can follow
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def dequantised(linear: Any) -> torch.Tensor:
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


def check_quantised(linears: Iterable[nn.Module], update: str, sparsity: float | None, keep_base: bool) -> None:
    """Refuses what needs the values of a quantised base. Raises `SensiError`."""
    if not any(is_quantised(linear) for linear in linears):
        return
    way_out = "Load the base model without quantisation for that."
    if update == "mask" or sparsity is not None:
        raise SensiError(f"The base model is quantised: its weights cannot be masked. {way_out}")
    if not keep_base:
        raise SensiError(f"The base model is quantised: `keep_base=False` would have to cut its codes. {way_out}")


def not_trimmable(model: nn.Module) -> AnatomyError:
    return AnatomyError(
        f"{type(model).__name__} is quantised: codes are stored in blocks with common scales, so heads and neurons "
        f"cannot be cut out of them. Load the base model without quantisation to trim it (and quantise the merged "
        f"model), or set only a `trainable` limit, which trims nothing."
    )


def not_mergeable() -> SensiError:
    return SensiError(
        "The base model is quantised, and rounding the merged weights to its codes would lose what was trained. Load "
        "the adapter on the base model without quantisation, and merge it there."
    )
