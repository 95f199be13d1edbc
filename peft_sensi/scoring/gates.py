"""Gates on units: one factor a unit, fixed at 1, on the input of an output projection (or the output of a Linear).

The gate of a token acts on its vector, wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy.units import Anatomy, Group
from ..utils.errors import CalibrationError
from .calibration import LossFn, calibration_loss, examples_in


def gate_gradients(
    model: nn.Module,
    anatomy: Anatomy,
    batch: Mapping[str, Any],
    loss_fn: LossFn | None = None,
    where: str = "a calibration batch",
) -> dict[str, torch.Tensor]:
    """Derivatives of each example's loss with respect to each unit's gate: `{group: [examples, units]}`, float32.

    One forward and one backward pass: every example has its own row of gates, and where the batch's loss is a mean
    over examples, its gradient times the batch size is the example's own. (Where it is a mean over tokens, examples
    weigh by their length.) No weight is differentiated.
    """
    gates: dict[str, torch.Tensor] = {}

    examples = examples_in(batch)

    def gated(group: Group, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        shape = x.shape
        if ids is not None:
            gates.setdefault(group.name, torch.ones(len(ids), group.size, device=x.device, requires_grad=True))
            return apply_gate(x, gates[group.name], ids)
        if x.dim() == 2 and shape[0] % examples == 0:  # OPT runs its FFN on all tokens of the batch in one row
            x = x.reshape(examples, -1, shape[-1])
        if group.name not in gates:
            gates[group.name] = torch.ones(x.shape[0], group.size, device=x.device, requires_grad=True)
        return apply_gate(x, gates[group.name].view(x.shape[0], *[1] * (x.dim() - 2), group.size)).reshape(shape)

    with hooked(model, anatomy, gated), torch.enable_grad():
        loss = calibration_loss(model, batch, loss_fn, where)
        grads = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    found = dict(zip(gates, grads, strict=True))
    result = {}
    for group in anatomy.groups:
        grad = found.get(group.name)
        if grad is not None and not torch.isfinite(grad).all():
            raise CalibrationError(f"The gradient of {group.name!r} is not finite for {where}.")
        result[group.name] = group.zeros()[None] if grad is None else grad.float() * grad.shape[0]
    return result


def apply_gate(x: torch.Tensor, gate: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies each unit's part of `x` `[..., units * width]` by its gate `[..., units]`.

    With `ids` `[examples, ...]`, the vectors `x` `[examples, ..., hidden]` by those of their tokens, the gates being
    `[tokens]` or `[examples, tokens]`.
    """
    if ids is not None:
        gate = gate[ids] if gate.dim() == 1 else gate.gather(1, ids.flatten(1)).view(ids.shape)
        return x * gate.to(x.dtype).unsqueeze(-1)
    return (x.unflatten(-1, (gate.shape[-1], -1)) * gate.to(x.dtype).unsqueeze(-1)).flatten(-2)


def gate_gradients_reference(
    model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any], loss_fn: LossFn | None = None
) -> dict[str, torch.Tensor]:
    """The definition, slowly: each example alone, one shared gate vector a group, plain autograd."""
    size = examples_in(batch)
    rows: dict[str, list[torch.Tensor]] = {g.name: [] for g in anatomy.groups}
    for i in range(size):
        gates = {g.name: torch.ones(g.size, requires_grad=True) for g in anatomy.groups}

        def gated(
            group: Group, x: torch.Tensor, ids: torch.Tensor | None, gates: dict[str, torch.Tensor] = gates
        ) -> torch.Tensor:
            if ids is not None:
                return x * gates[group.name].to(x)[ids].unsqueeze(-1)
            return x * gates[group.name].to(x).repeat_interleave(x.shape[-1] // group.size)

        example = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with hooked(model, anatomy, gated), torch.enable_grad():
            calibration_loss(model, example, loss_fn).backward()
        for name, gate in gates.items():
            rows[name].append(gate.grad if gate.grad is not None else torch.zeros_like(gate))
    return {name: torch.stack(values).float() for name, values in rows.items()}


@contextmanager
def hooked(model: nn.Module, anatomy: Anatomy, gated: Any) -> Iterator[None]:
    """Inside the block `gated(group, x, ids)` replaces what the gates act on; `ids` are given for tokens only."""
    handles = []
    try:
        for group in anatomy.groups:
            module = model.get_submodule(group.output)
            if not group.in_block:
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, y, group=group: gated(group, y, args[0] if group.kind == "token" else None)
                    )
                )
            else:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, group=group: (gated(group, args[0], None), *args[1:])
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()
