"""The linear map of which only a part is trained: some rows or columns, a low-rank term, or single values.

Forward is one matmul with a fused weight that holds trained and frozen values side by side. Backward computes the
gradients of the trained parts only, and keeps only the activations that these need: the whole input where rows, a
low-rank term or single values are trained, a contiguous copy of the trained columns' inputs where columns are, nothing
where nothing is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


Positions = int | torch.Tensor  # the first n positions, or an index


def take(x: torch.Tensor, dim: int, positions: Positions) -> torch.Tensor:
    return x.narrow(dim, 0, positions) if isinstance(positions, int) else x.index_select(dim, positions)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 would be ambiguous where a whole sublayer is gone


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dim: int,
    tuned: Positions,
    tuned_weight: torch.Tensor | None = None,
    tuned_bias: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, differentiable in `x` and in the trained parts that `weight` and `bias` already contain.

    Args:
        x: `[..., in]`, of `weight`'s dtype.
        weight: `[out, in]`, not differentiated. It must already hold `tuned_weight` at the positions `tuned` of
            dimension `dim`, and the sum of the other parts. A cache may be rewritten after the forward pass, as long
            as the trained parts stay the same: the backward pass checks that, as autograd does for any weight.
        bias: `[out]` or none, already holding `tuned_bias`.
        tuned_weight: `[n, in]` for `dim` 0, `[out, n]` for `dim` 1, in any float dtype.
        tuned_bias: `[n]` (the rows `tuned`) or `[out]`.
        down, up: `[r, in]` and `[out, r]`: the low-rank term `up @ down`. Its gradients `(grad @ up)^T x` and
            `grad^T (x @ down^T)` never form a matrix of the weight's size.
        values, places: `[n]` single values and their flat positions (int64) in `weight`.
    """
    return _FusedLinear.apply(x, weight, bias, tuned_weight, tuned_bias, down, up, values, places, dim, tuned)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tuned_weight: torch.Tensor | None,
        tuned_bias: torch.Tensor | None,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        values: torch.Tensor | None,
        places: torch.Tensor | None,
        dim: int,
        tuned: Positions,
    ) -> torch.Tensor:
        needs_x, _, _, needs_slice, _, needs_down, needs_up, needs_values, *_ = ctx.needs_input_grad
        needs_all = needs_down or needs_up or needs_values or (needs_slice and dim == 0)
        saved_x = None
        if needs_all:
            saved_x = x
        elif needs_slice:
            saved_x = take(x, -1, tuned).contiguous()
        ctx.sliced_x = needs_slice and not needs_all
        ctx.dim, ctx.tuned = dim, tuned
        ctx.bias_dtype = None if tuned_bias is None else tuned_bias.dtype
        ctx.whole_bias = tuned_bias is not None and len(tuned_bias) == weight.shape[0]
        parts = (tuned_weight, down, up, values)
        if not (needs_x or saved_x is not None):
            parts = (None,) * 4
        # The fused weight's storage is rewritten on every forward pass, with the same values as long as the trained
        # parts do not change; saving those lets autograd notice when they did.
        ctx.save_for_backward(weight if needs_x else None, saved_x, places if needs_values else None, *parts)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, _, _, needs_slice, needs_bias, needs_down, needs_up, needs_values, *_ = ctx.needs_input_grad
        weight, x, places, tuned_weight, down, up, values = ctx.saved_tensors
        result: list[torch.Tensor | None] = [None] * 11
        if needs_x:
            result[0] = grad @ weight
        grad = _rows(grad)
        if x is not None:
            x = _rows(x)
        if needs_slice:
            if ctx.dim == 0:
                gradient = take(grad, -1, ctx.tuned).t() @ x
            else:
                gradient = grad.t() @ (x if ctx.sliced_x else take(x, -1, ctx.tuned))
            result[3] = gradient.to(tuned_weight.dtype)
        if needs_bias:
            rows = grad if ctx.whole_bias else take(grad, -1, ctx.tuned)
            result[4] = rows.sum(0, dtype=ctx.bias_dtype)
        if needs_down:
            result[5] = ((grad @ up.to(grad.dtype)).t() @ x).to(down.dtype)
        if needs_up:
            result[6] = (grad.t() @ (x @ down.to(x.dtype).t())).to(up.dtype)
        if needs_values:
            columns = x.index_select(1, places % x.shape[1])
            rows = grad.index_select(1, places // x.shape[1])
            result[7] = (rows * columns).sum(0, dtype=values.dtype)
        return tuple(result)


def compose(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dim: int,
    tuned: Positions,
    tuned_weight: torch.Tensor | None = None,
    tuned_bias: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias from frozen values and trained parts (see `fused_linear`), in plain autograd.

    `mask` `[out, in]` multiplies the sum of everything else, so that what it removes stays removed.
    """
    weight = weight.detach()
    index = torch.arange(tuned, device=weight.device) if isinstance(tuned, int) else tuned
    if tuned_weight is not None:
        weight = weight.index_copy(dim, index, tuned_weight.to(weight.dtype))
    if down is not None and up is not None:
        weight = weight + (up @ down).to(weight.dtype)
    if values is not None and places is not None:
        weight = weight.flatten().index_add(0, places, values.to(weight.dtype)).view_as(weight)
    if mask is not None:
        weight = weight * mask.to(weight.dtype)
    bias = None if bias is None else bias.detach()
    if tuned_bias is not None:
        if bias is None or len(tuned_bias) == len(bias):
            bias = tuned_bias.to(weight.dtype)
        else:
            bias = bias.index_copy(0, index, tuned_bias.to(bias.dtype))
    return weight, bias


def fused_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **parts: Any
) -> torch.Tensor:
    """`fused_linear` in plain autograd, from frozen values alone: also what runs where a fused cache cannot be kept.

    That is under `torch.compile`, with sharded weights, and with a mask, whose gradients need the whole weight's.
    """
    return F.linear(x, *compose(weight, bias, **parts))
