"""A linear map with a trained part: some rows or columns, a low-rank term, or single values.

The forward pass is one matrix product with a fused weight, which holds trained and frozen values. The backward pass
computes the gradients of the trained tensors only, and autograd saves only the activations that these gradients need:
the whole input if rows, a low-rank term or single values are trained, a contiguous copy of some input columns if only
columns are trained, and none if only a bias is trained. An input that can be computed from what autograd has saved
already is not saved (see `sources`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..utils.errors import SensiError
from .sources import Source, source_of


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


def fused_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: Parts, again: Source | None = None
) -> torch.Tensor:
    """`x @ (weight + up @ down).T + bias`, differentiable in `x` and in the trained tensors.

    `x` is `[..., in]`; it is cast to the dtype of `weight`. `weight` and `bias` must already contain the other trained
    tensors, and get no gradients of their own. `parts.mask` must be `None`. A cache of `weight` and `bias` may be
    rewritten after the forward pass, but only with the same values.

    The weight is saved for the backward pass, unless `again` says how to compute it again. The input is saved if a
    gradient needs it, or what it can be computed from (see `sources`). The gradients of `down` and `up`, `(grad @
    up)^T x` and `grad^T (x @ down^T)`, are computed without a matrix of the size of `weight`.

    The backward pass raises `RuntimeError` if a trained tensor has changed since the forward pass, and `SensiError` if
    second derivatives are requested (`create_graph=True`).
    """
    if again is None and all(part is None for part in parts[:6]):
        return F.linear(x.to(weight.dtype), weight, bias)  # also inside the transforms of `torch.func`
    source = source_of(x) if torch.is_grad_enabled() else None
    return _FusedLinear.apply(x.to(weight.dtype), weight, bias, source, again, *parts[:-1])


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        source: Source | None,
        again: Source | None,
        *parts: Any,
    ) -> torch.Tensor:
        tuned_weight, tuned_bias, down, up, values, places, dim, tuned, _ = Parts(*parts)
        needs_x, _, _, _, _, needs_slice, _, needs_down, needs_up, needs_values, *_ = ctx.needs_input_grad
        needs_all = needs_down or needs_up or needs_values or (needs_slice and dim == 0)
        if source and not (needs_all or source.by_columns):  # to save some columns is cheaper than to compute all
            source = None
        inputs: tuple[torch.Tensor | None, ...] = ()
        if needs_all or needs_slice:
            saved_x = x if needs_all or source else take(x, -1, tuned).contiguous()
            inputs = source.operands if source else (saved_x,)
        weights: tuple[torch.Tensor | None, ...] = ()
        if needs_x:
            weights = again.operands if again else (weight,)
        ctx.compute_x, ctx.compute_weight = source and source.compute, again and again.compute
        ctx.sliced_x, ctx.input_count = needs_slice and not needs_all, len(inputs)
        ctx.dim, ctx.tuned, ctx.dtype = dim, tuned, x.dtype
        ctx.bias_dtype = None if tuned_bias is None else tuned_bias.dtype
        ctx.whole_bias = tuned_bias is not None and len(tuned_bias) == weight.shape[0]
        # The fused weight is rewritten on every forward pass through `.data`, which autograd does not see. The trained
        # tensors are saved so that autograd notices if they have changed.
        trained = (tuned_weight, down, up, values) if inputs or weights else (None,) * 4
        ctx.save_for_backward(places if needs_values else None, *trained, *inputs, *weights)
        if down is not None and up is not None:
            weight = torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype))
        result = F.linear(x, weight, bias)
        # For inputs `[..., in]` PyTorch returns a view, and autograd forbids models (DeBERTa, Longformer) to change a
        # view from here in place. This is the same tensor, which autograd does not take for a view.
        return torch.ops.aten._unsafe_view(result, result.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not `once_differentiable`: `torch.autograd.grad` leaves its error out, and returns wrong values.
            raise SensiError(
                "Second derivatives (`create_graph=True`) need activations that the layers of the adapter do not "
                "save. Call the model with copies of its parameters, for which they do: "
                "`torch.func.functional_call(model, {n: p.clone() for n, p in model.named_parameters()}, ...)`."
            )
        needs_x, _, _, _, _, needs_slice, needs_bias, needs_down, needs_up, needs_values, *_ = ctx.needs_input_grad
        places, tuned_weight, down, up, values, *saved = ctx.saved_tensors
        inputs, weights = saved[: ctx.input_count], saved[ctx.input_count :]
        shape, grad = grad.shape, _rows(grad)
        result: list[torch.Tensor | None] = [None] * 13
        x: Any = _saved_input(ctx, inputs) if inputs else None
        if needs_slice:
            if ctx.dim == 0:
                gradient = take(grad, -1, ctx.tuned).t() @ x
            else:
                gradient = grad.t() @ (x if ctx.sliced_x else take(x, -1, ctx.tuned))
            result[5] = gradient.to(tuned_weight.dtype)
        if needs_bias:
            rows = grad if ctx.whole_bias else take(grad, -1, ctx.tuned)
            result[6] = rows.sum(0, dtype=ctx.bias_dtype)
        # The products of low rank have the tokens in the second dimension: on a CPU this is up to seven times faster.
        through_up = None
        if up is not None and (needs_down or needs_x):
            through_up = up.to(grad.dtype).t() @ grad.t()
        if needs_down:
            result[7] = (through_up @ x).to(down.dtype)
        if needs_up:
            result[8] = (down.to(x.dtype) @ x.t() @ grad).t().to(up.dtype)
        if needs_values:
            columns = x.index_select(1, places % x.shape[1])
            rows = grad.index_select(1, places // x.shape[1])
            result[9] = (rows * columns).sum(0, dtype=values.dtype)
        del x  # before the gradient of the input, which is as large
        if needs_x:
            gradient = grad @ (ctx.compute_weight(*weights) if ctx.compute_weight else weights[0])
            if through_up is not None:
                gradient.addmm_(through_up.t(), down.to(grad.dtype))
            result[0] = gradient.view(*shape[:-1], gradient.shape[-1])
        return tuple(result)


def _saved_input(ctx: Any, operands: list[torch.Tensor]) -> torch.Tensor:
    """The input `[tokens, in]` of the forward pass, or its tuned columns."""
    if ctx.compute_x is None:
        return _rows(operands[0])
    if ctx.sliced_x:
        operands = [operand if operand.shape[-1] == 1 else take(operand, -1, ctx.tuned) for operand in operands]
    return _rows(ctx.compute_x(*operands).to(ctx.dtype))


def fuse(
    weight: torch.Tensor,
    kept: torch.Tensor | None,
    tuned_weight: torch.Tensor | None,
    values: torch.Tensor | None,
    places: torch.Tensor | None,
    *,
    dim: int,
    tuned: Positions,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight that `fused_linear` needs, in `dtype`, without autograd.

    `weight` `[out, in]` is the base's; `kept` are the rows (`dim` 0) or columns (1) that are kept (int64), `None` for
    all; the others are as in `Parts`. The result shares the storage of `weight` only if nothing differs from it. A
    bias is fused in the same way, as a weight of one dimension.
    """
    fused = weight if kept is None else weight.index_select(dim, kept)
    fused = fused.to(dtype, copy=tuned_weight is not None and fused is weight)
    return overwrite(fused, tuned_weight, values, places, dim, tuned)


def overwrite(
    weight: torch.Tensor,
    tuned_weight: torch.Tensor | None,
    values: torch.Tensor | None,
    places: torch.Tensor | None,
    dim: int,
    tuned: Positions,
) -> torch.Tensor:
    """Writes the tuned rows or columns into `weight` itself. Single values are added to a copy, which is returned."""
    if tuned_weight is not None:
        if isinstance(tuned, int):
            weight.narrow(dim, 0, tuned).copy_(tuned_weight.detach())
        else:
            weight.index_copy_(dim, tuned, tuned_weight.detach().to(weight.dtype))
    if values is not None and places is not None:
        weight = weight.flatten().index_add(0, places, values.detach().to(weight.dtype)).view_as(weight)
    return weight


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
