"""The linear map of which only some output rows or input columns are trained.

Forward is one matmul with a fused weight that holds trained and frozen values side by side. Backward computes the
gradient of the trained slice only, and keeps only the activations that this gradient needs: the whole input where rows
are trained, a contiguous copy of the trained columns' inputs where columns are, nothing where nothing is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


Positions = int | torch.Tensor  # the first n positions, or an index


def take(x: torch.Tensor, dim: int, positions: Positions) -> torch.Tensor:
    return x.narrow(dim, 0, positions) if isinstance(positions, int) else x.index_select(dim, positions)


def sliced_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tuned_weight: torch.Tensor | None,
    tuned_bias: torch.Tensor | None,
    dim: int,
    tuned: Positions,
) -> torch.Tensor:
    """`x @ weight.T + bias`, differentiable in `x`, `tuned_weight` and `tuned_bias`.

    Args:
        x: `[..., in]`, of `weight`'s dtype.
        weight: `[out, in]`, already holding `tuned_weight` at the positions `tuned` of dimension `dim`; not
            differentiated. It may be overwritten with other trained values later: the backward pass of a forward pass
            checks that `tuned_weight` is still the same, as autograd does for any weight.
        bias: `[out]` or none, already holding `tuned_bias` (all of it for `dim` 1, the rows `tuned` for `dim` 0).
        tuned_weight: `[n, in]` for `dim` 0, `[out, n]` for `dim` 1, in any float dtype.
    """
    return _SlicedLinear.apply(x, weight, bias, tuned_weight, tuned_bias, dim, tuned)


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tuned_weight: torch.Tensor | None,
        tuned_bias: torch.Tensor | None,
        dim: int,
        tuned: Positions,
    ) -> torch.Tensor:
        needs_x, _, _, needs_weight, _, _, _ = ctx.needs_input_grad
        saved_x = None
        if needs_weight:
            saved_x = x if dim == 0 else take(x, -1, tuned).contiguous()
        # The fused weight's storage is rewritten on every forward pass, with the same values as long as the trained
        # tensor does not change; saving that tensor lets autograd notice when it did.
        ctx.save_for_backward(weight if needs_x else None, saved_x, tuned_weight if needs_x or needs_weight else None)
        ctx.dim, ctx.tuned = dim, tuned
        ctx.dtypes = [t.dtype if t is not None else None for t in (tuned_weight, tuned_bias)]
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, _, _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        weight, x, _ = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = grad @ weight
        if needs_weight or needs_bias:
            sliced = take(grad, -1, ctx.tuned) if ctx.dim == 0 else grad
            sliced = sliced.reshape(-1, sliced.shape[-1])
            if needs_weight:
                grad_weight = (sliced.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
            if needs_bias:
                grad_bias = sliced.sum(0, dtype=ctx.dtypes[1])
        return grad_x, None, None, grad_weight, grad_bias, None, None


def sliced_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tuned_weight: torch.Tensor | None,
    tuned_bias: torch.Tensor | None,
    dim: int,
    tuned: Positions,
) -> torch.Tensor:
    """The same map in plain autograd, without a fused cache: also what `torch.compile` and sharded weights use."""
    weight = weight.detach()
    index = torch.arange(tuned, device=weight.device) if isinstance(tuned, int) else tuned
    if tuned_weight is not None:
        weight = weight.index_copy(dim, index, tuned_weight.to(weight.dtype))
    if tuned_bias is not None:
        bias = tuned_bias.to(weight.dtype) if dim == 1 else bias.detach().index_copy(0, index, tuned_bias.to(bias.dtype))
    return F.linear(x, weight, bias)
