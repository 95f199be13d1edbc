"""Outlier neurons and heads: model and calibration batches go in, the units that no plan should cut come out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import residual_factor, unit_weights
from ..anatomy.units import Anatomy, Group
from ..utils import distributed
from .calibration import LossFn, device_of, observing, run_forward, to_device
from .padding import seen_by, without_padding


OUTLIER_SHARE = 0.5


def find_outliers(
    model: nn.Module, anatomy: Anatomy, batches: list[Mapping[str, Any]], loss_fn: LossFn | None = None
) -> dict[str, torch.Tensor]:
    """What `OutlierFinder` finds in a forward pass of each batch, for scores whose own passes it does not watch."""
    finder, device = OutlierFinder(model, anatomy), device_of(model)
    if not finder.groups:
        return {}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for index, batch in enumerate(to_device(batch, device) for batch in batches):
            with finder.watching(batch):
                run_forward(model, batch, loss_fn, f"calibration batch {index}")
    return finder.found()


class OutlierFinder:
    """Finds units whose output makes up more than half of a token's residual sum (before the LayerNorm).

    Both are measured by their squared norms. One neuron that is active only on [CLS] can make up 80 to 97 % of a
    layer's output there, while its average score is small. Cutting it ruins the layer, and refitting the layer without
    it ruins all other tokens.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model = model
        self.groups = [g for g in anatomy.trimmable if g.layer]
        self.share = {g.name: g.zeros() for g in self.groups}

    def watching(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Inside the block, the model must run forward on `batch` once. Padding is left out."""

        def observe(group: Group, x: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
            x = x.detach().float()
            side = group.sides[-1]
            weight = unit_weights(self.model, group, side).view(group.size, side.width, -1)  # [units, width, out]
            weight = weight * residual_factor(self.model, group)
            if side.width == 1:
                energy = x.square() * weight.square().sum((1, 2))
            else:  # `|W x|^2` of each head or sublayer as `x^T (W W^T) x`: the matrix in parentheses is small
                x = x.unflatten(-1, (group.size, -1))
                energy = torch.einsum("...uw,uwv,...uv->...u", x, weight @ weight.mT, x)
            share = energy / total.detach().float().square().sum(-1, keepdim=True).clamp_min(1e-12)
            seen = seen_by(group.layer, self.model, batch, group.tokens_first)
            if len(tokens := without_padding(seen, share)):
                self.share[group.name] = torch.maximum(self.share[group.name], tokens.amax(0).cpu())

        return observing(self.model, self.groups, observe)

    def found(self) -> dict[str, torch.Tensor]:
        """A boolean for each unit, by group: whether it is an outlier for any token that any process has seen."""
        distributed.all_max(list(self.share.values()), "looking for outliers")
        return {name: share > OUTLIER_SHARE for name, share in self.share.items()}
