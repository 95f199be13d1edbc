"""The readable reference of `gates.gate_gradients`: slow, and compared with it by the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.units import Anatomy, Group
from .calibration import LossFn, calibration_loss, examples_of
from .examples import examples_in
from .gates import hooked


def gate_gradients_reference(
    model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any], loss_fn: LossFn | None = None
) -> dict[str, torch.Tensor]:
    """The slow definition of `gate_gradients`: one pass per example, one gate vector per group, plain autograd."""
    size = examples_in(batch)
    rows: dict[str, list[torch.Tensor]] = {g.name: [] for g in anatomy.groups}
    for i in range(size):
        gates = {g.name: torch.ones(g.size, dtype=torch.float32, requires_grad=True) for g in anatomy.groups}

        def gated(
            group: Group, x: torch.Tensor, ids: torch.Tensor | None, gates: dict[str, torch.Tensor] = gates
        ) -> torch.Tensor:
            if ids is not None:
                return x * gates[group.name].to(x)[ids].unsqueeze(-1)
            return x * gates[group.name].to(x).repeat_interleave(x.shape[-1] // group.size)

        with hooked(model, anatomy, gated), torch.enable_grad():
            calibration_loss(model, examples_of(batch, [i]), loss_fn).backward()
        for name, gate in gates.items():
            rows[name].append(gate.grad if gate.grad is not None else torch.zeros_like(gate))
    return {name: torch.stack(values).float() for name, values in rows.items()}
