"""Where the input of a Linear comes from, if autograd has already saved what the input can be computed from.

The gradient of a weight needs the input. Often the input is the result of a cheap operation, such as an activation
function, LayerNorm or the last product of attention, that has saved its own operands for the backward pass. Then it is
enough to save the same operands again, which costs nothing, and to repeat the cheap operation in the backward pass.
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
    # Whether some columns of the result need the same columns of the operands only. The last dimension of each operand
    # is then that of the result, or has size 1, and no operand is `None`.
    by_columns: bool = True


def source_of(x: torch.Tensor) -> Source | None:
    """The source of `x`, or `None` if its producer has saved nothing that `x` can be computed from at low cost.

    It is also `None` if hooks have packed what was saved (gradient checkpointing, offloading): to read it would run
    the hooks. And it is `None` if something has written into `x` under `torch.no_grad()`, such as a hook that edits
    activations: autograd does not know of that. LayerNorm's result can differ in the last digit, because its mean and
    variance are not computed again.
    """
    node = x.grad_fn
    if node is None or x.output_nr != 0 or x._version != 0:
        return None
    if (rule := _RULES.get(node.name())) is not None:
        operands = _saved(node, rule[0])
        compute = None if operands is None else rule[1](node)
        return None if operands is None or compute is None else Source(compute, operands)
    return _source_of_product(x)


def _saved(node: Any, names: tuple[str, ...]) -> tuple[torch.Tensor, ...] | None:
    """The tensors that a node of autograd has saved under these names, if they are all there and not packed."""
    saved = [getattr(node, f"_raw_saved_{name}", None) for name in names]
    # `unpack_hook` exists since PyTorch 2.8. Without it, hooks cannot be seen.
    if any(getattr(value, "unpack_hook", True) is not None for value in saved):
        return None
    operands = [getattr(node, f"_saved_{name}") for name in names]
    if not all(isinstance(operand, torch.Tensor) and operand.dim() for operand in operands):
        return None
    return tuple(operand.detach() for operand in operands)


def _source_of_product(x: torch.Tensor) -> Source | None:
    """The source of the output of attention: a batched product whose result was transposed, reshaped or copied.

    Kernels that never hold the weights of attention (FlashAttention) save their output, so they need no source.
    """
    node: Any = x.grad_fn
    shape = list(x.shape)
    views: list[Callable[[torch.Tensor], torch.Tensor]] = []
    while node is not None and (name := node.name()) in _VIEWS:
        if name == "TransposeBackward0":
            # Autograd keeps negative dimensions as large unsigned numbers.
            first, second = (dim - 2**64 if dim >= 2**63 else dim for dim in (node._saved_dim0, node._saved_dim1))
            views.append(partial(torch.transpose, dim0=first, dim1=second))
            shape[first], shape[second] = shape[second], shape[first]
        elif name != "CloneBackward0":
            views.append(partial(torch.reshape, shape=tuple(shape)))
            shape = list(node._saved_self_sym_sizes)
        node = node.next_functions[0][0]
    if node is None or node.name() != "BmmBackward0" or (operands := _saved(node, ("self", "mat2"))) is None:
        return None
    # With at most this many keys, the product takes no more multiplications than a square Linear on `x`.
    if operands[0].shape[-1] > x.shape[-1]:
        return None
    return Source(partial(_product, views=views[::-1]), operands, by_columns=False)


def _product(a: torch.Tensor, b: torch.Tensor, views: list[Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    result = torch.bmm(a, b)
    for view in views:
        result = view(result)
    return result


def _layer_norm(
    x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch.addcmul(bias, (x - mean).mul_(rstd), weight)


def _rule_of_layer_norm(node: Any) -> Callable[..., torch.Tensor] | None:
    # On the CPU, LayerNorm in 16 bits saves a mean and a variance of 16 bits, which are too coarse.
    return _layer_norm if node._saved_result1.dtype in (torch.float32, torch.float64) else None


_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0", "CloneBackward0")

# Name of autograd's node -> names of its operands, and a function from the node to what computes the result. An
# operation that saves its result (ReLU) needs no rule: to save the same tensor again costs nothing.
_RULES: dict[str, tuple[tuple[str, ...], Callable[[Any], Callable[..., torch.Tensor] | None]]] = {
    "GeluBackward0": (("self",), lambda node: partial(F.gelu, approximate=node._saved_approximate)),
    "SiluBackward0": (("self",), lambda node: F.silu),
    "MulBackward0": (("self", "other"), lambda node: torch.mul),  # also gated FFNs
    "NativeLayerNormBackward0": (("input", "result1", "result2", "weight", "bias"), _rule_of_layer_norm),
}
