"""A linear map with a trained part: some rows or columns, a low-rank term, or single values.

The forward pass is one matrix product with a fused weight, which holds trained and frozen values. The backward pass
computes the gradients of the trained tensors only, and autograd saves only the activations that these gradients need:
the whole input if rows, a low-rank term or single values are trained, a contiguous copy of some input columns if only
columns are trained, and none if only a bias is trained.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


Positions = int | torch.Tensor  # the first n positions, or an index (int64)
Pair = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias


class Parts(NamedTuple):
    """What changes a frozen weight `[out, in]` and bias. Trained tensors may have any float dtype.

    The tuned positions `tuned` are rows of the weight if `dim` is 0, and columns if it is 1.
    """

    tuned_weight: torch.Tensor | None = None  # `[n, in]` for `dim` 0, `[out, n]` for `dim` 1
    tuned_bias: torch.Tensor | None = None  # `[n]`, the bias of the rows `tuned`, or `[out]`
    down: torch.Tensor | None = None  # `[r, in]`; `up @ down` is added to the weight
    up: torch.Tensor | None = None  # `[out, r]`
    values: torch.Tensor | None = None  # `[n]`, added at the flat positions `places` (int64)
    places: torch.Tensor | None = None
    dim: int = 0
    tuned: Positions = 0
    # `[out, in]`, or `[in]` for the same mask in every row. It multiplies the whole weight: masked weights are zero.
    mask: torch.Tensor | None = None


def take(x: torch.Tensor, dim: int, positions: Positions) -> torch.Tensor:
    """The entries of `x` at some positions of one dimension: a view for the first n, a copy for an index."""
    return x.narrow(dim, 0, positions) if isinstance(positions, int) else x.index_select(dim, positions)


def cast(pair: Pair, dtype: torch.dtype) -> Pair:
    weight, bias = pair
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is ambiguous if `x` has no values


def fused_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: Parts) -> torch.Tensor:
    """`x @ weight.T + bias`, differentiable in `x` and in the trained tensors; `parts.mask` must be `None`.

    `x` is `[..., in]`, of the dtype of `weight`. `weight` and `bias` must already contain the trained tensors, and get
    no gradients of their own. A cache of them may be rewritten after the forward pass, but only with the same values.
    The gradients of `down` and `up`, `(grad @ up)^T x` and `grad^T (x @ down^T)`, are computed without a matrix of the
    size of `weight`. The backward pass raises `RuntimeError` if a trained tensor has changed since the forward pass,
    or if second derivatives are requested.
    """
    return _FusedLinear.apply(x, weight, bias, *parts[:-1])


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *parts: Any
    ) -> torch.Tensor:
        tuned_weight, tuned_bias, down, up, values, places, dim, tuned, _ = Parts(*parts)
        needs_x, _, _, needs_slice, _, needs_down, needs_up, needs_values, *_ = ctx.needs_input_grad
        needs_all = needs_down or needs_up or needs_values or (needs_slice and dim == 0)
        saved_x = x if needs_all else take(x, -1, tuned).contiguous() if needs_slice else None
        ctx.sliced_x = needs_slice and not needs_all
        ctx.dim, ctx.tuned = dim, tuned
        ctx.bias_dtype = None if tuned_bias is None else tuned_bias.dtype
        ctx.whole_bias = tuned_bias is not None and len(tuned_bias) == weight.shape[0]
        # The fused weight is rewritten on every forward pass through `.data`, which autograd does not see. The trained
        # tensors are saved so that autograd notices if they have changed.
        trained = (tuned_weight, down, up, values) if needs_x or saved_x is not None else (None,) * 4
        ctx.save_for_backward(weight if needs_x else None, saved_x, places if needs_values else None, *trained)
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


def compose(weight: torch.Tensor, bias: torch.Tensor | None, parts: Parts) -> Pair:
    """Weight and bias from frozen values and trained tensors, in plain autograd."""
    weight, tuned = weight.detach(), parts.tuned
    index = torch.arange(tuned, device=weight.device) if isinstance(tuned, int) else tuned
    if parts.tuned_weight is not None:
        weight = weight.index_copy(parts.dim, index, parts.tuned_weight.to(weight.dtype))
    if parts.down is not None and parts.up is not None:
        weight = weight + (parts.up @ parts.down).to(weight.dtype)
    if parts.values is not None and parts.places is not None:
        weight = weight.flatten().index_add(0, parts.places, parts.values.to(weight.dtype)).view_as(weight)
    if parts.mask is not None:
        weight = weight * parts.mask.to(weight.dtype)
    bias = None if bias is None else bias.detach()
    if (tuned_bias := parts.tuned_bias) is not None:
        if bias is None or len(tuned_bias) == len(bias):
            bias = tuned_bias.to(weight.dtype)
        else:
            bias = bias.index_copy(0, index, tuned_bias.to(bias.dtype))
    return weight, bias
