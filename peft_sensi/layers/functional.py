"""A linear map with a trained part: some rows or columns, a low-rank term, or single values.

The forward pass is one matrix product with a fused weight, which holds trained and frozen values. The backward pass
computes the gradients of the trained tensors only, and autograd saves only the activations that these gradients need:
the whole input if rows, a low-rank term or single values are trained, a contiguous copy of some input columns if only
columns are trained, and none if only a bias is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


Positions = int | torch.Tensor  # the first n positions, or an index (int64)
Pair = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias


def take(x: torch.Tensor, dim: int, positions: Positions) -> torch.Tensor:
    """The entries of `x` at some positions of one dimension: a view for the first n, a copy for an index."""
    return x.narrow(dim, 0, positions) if isinstance(positions, int) else x.index_select(dim, positions)


def cast(pair: Pair, dtype: torch.dtype) -> Pair:
    weight, bias = pair
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is ambiguous if `x` has no values


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
    """`x @ weight.T + bias`, differentiable in `x` and in the trained tensors.

    `weight` and `bias` must already contain the trained tensors. They get no gradients of their own.

    Args:
        x: `[..., in]`, of the dtype of `weight`.
        weight: `[out, in]`. It holds `tuned_weight` at the positions `tuned` of dimension `dim`, plus `up @ down`,
            plus `values` at `places`. A cache may be rewritten after the forward pass, but only with the same values.
        bias: `[out]` or `None`. It holds `tuned_bias`.
        dim: 0 if the tuned positions are rows of `weight`, 1 if they are columns.
        tuned: The tuned positions.
        tuned_weight: `[n, in]` for `dim` 0, `[out, n]` for `dim` 1, of any float dtype.
        tuned_bias: `[n]` (bias of the rows `tuned`) or `[out]`, of any float dtype.
        down, up: `[r, in]` and `[out, r]`: the low-rank term `up @ down`. Its gradients `(grad @ up)^T x` and
            `grad^T (x @ down^T)` are computed without a matrix of the size of `weight`.
        values, places: `[n]` single values and their flat positions (int64) in `weight`.

    Raises:
        RuntimeError: From the backward pass, if a trained tensor has changed since the forward pass, or if second
            derivatives are requested.
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
        # The fused weight is rewritten on every forward pass through `.data`, which autograd does not see. The trained
        # tensors are saved so that autograd notices if they have changed.
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
) -> Pair:
    """Weight and bias from frozen values and trained tensors, in plain autograd.

    The arguments are those of `fused_linear`, but `weight` and `bias` hold frozen values. `mask` is `[out, in]`, or
    `[in]` for the same mask in every row. It multiplies the sum of everything else, so that a masked weight is zero.
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
    """The same as `fused_linear` in plain autograd; `weight` and `bias` hold frozen values (see `compose`).

    It is also used where no fused weight can be cached: under `torch.compile` and with sharded weights. And it is used
    with a mask, whose gradient needs the gradient of the whole weight.
    """
    return F.linear(x, *compose(weight, bias, **parts))
