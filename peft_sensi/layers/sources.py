"""Where the input of a Linear comes from, if autograd has already saved what the input can be computed from.

The gradient of a weight needs the input. Often the input is the result of a cheap operation, such as an activation
function or LayerNorm, that has saved its own operands for the backward pass. Then it is enough to save the same
operands again, which costs nothing, and to repeat the cheap operation in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


class Source(NamedTuple):
    """`compute(*operands)` gives a tensor again. The operands are there anyway, so to save them costs no memory."""

    compute: Callable[..., torch.Tensor]
    operands: tuple[torch.Tensor | None, ...]


def source_of(x: torch.Tensor) -> Source | None:
    """The source of `x`, or `None` if its producer has saved nothing that `x` can be computed from at low cost.

    The last dimension of each operand is that of `x`, or has size 1; no operand is `None`.

    It is also `None` if hooks have packed what was saved (gradient checkpointing, offloading): to read it would run
    the hooks. LayerNorm's result can differ in the last digit, because its mean and variance are not computed again.
    """
    node = x.grad_fn
    rule = None if node is None or x.output_nr != 0 else _RULES.get(node.name())
    if rule is None:
        return None
    names, make = rule
    saved = [getattr(node, f"_raw_saved_{name}", None) for name in names]
    # `unpack_hook` exists since PyTorch 2.8. Without it, hooks cannot be seen.
    if any(getattr(value, "unpack_hook", True) is not None for value in saved):
        return None
    operands = [getattr(node, f"_saved_{name}") for name in names]
    if not all(isinstance(operand, torch.Tensor) and operand.dim() for operand in operands):
        return None
    if (compute := make(node)) is None:
        return None
    return Source(compute, tuple(operand.detach() for operand in operands))


def _layer_norm(
    x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch.addcmul(bias, (x - mean).mul_(rstd), weight)


def _rule_of_layer_norm(node: Any) -> Callable[..., torch.Tensor] | None:
    # On the CPU, LayerNorm in 16 bits saves a mean and a variance of 16 bits, which are too coarse.
    return _layer_norm if node._saved_result1.dtype in (torch.float32, torch.float64) else None


# Name of autograd's node -> names of its operands, and a function from the node to what computes the result. An
# operation that saves its result (ReLU) needs no rule: to save the same tensor again costs nothing.
_RULES: dict[str, tuple[tuple[str, ...], Callable[[Any], Callable[..., torch.Tensor] | None]]] = {
    "GeluBackward0": (("self",), lambda node: partial(F.gelu, approximate=node._saved_approximate)),
    "SiluBackward0": (("self",), lambda node: F.silu),
    "MulBackward0": (("self", "other"), lambda node: torch.mul),  # also gated FFNs
    "NativeLayerNormBackward0": (("input", "result1", "result2", "weight", "bias"), _rule_of_layer_norm),
}
