"""Outlier neurons and heads: model and calibration batches go in, the units that no plan should cut come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import unit_weights
from ..anatomy.units import Anatomy, Group
from ..utils import distributed
from .calibration import device_of, to_device, token_mask


OUTLIER_SHARE = 0.5


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

    @contextmanager
    def watching(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Inside the block, the model must run forward on `batch` once. Padding is left out."""
        energies: dict[str, torch.Tensor] = {}
        batch = to_device(batch, device_of(self.model))

        def before_output(group: Group, x: torch.Tensor) -> None:
            x = x.detach().float()
            columns = unit_weights(self.model, group, group.sides[-1])  # [units, width * out]
            if group.kind == "neuron":
                energies[group.name] = x.square() * columns.square().sum(1)
            else:  # `|W x|^2` of each head as `x^T (W W^T) x`: the matrix in parentheses is small
                weight = columns.view(group.size, group.sides[-1].width, -1)
                x = x.unflatten(-1, (group.size, -1))
                energies[group.name] = torch.einsum("...uw,uwv,...uv->...u", x, weight @ weight.mT, x)

        def at_sum(group: Group, total: torch.Tensor) -> None:
            energy = energies.pop(group.name, None)
            if energy is None or energy.shape[:-1].numel() != total.shape[:-1].numel():
                return
            energy = energy.reshape(*total.shape[:-1], -1)
            share = energy / total.detach().float().square().sum(-1, keepdim=True).clamp_min(1e-12)
            mask = token_mask(batch, share.shape[:-1])
            share = (share[mask] if mask is not None else share.flatten(0, -2)).amax(0).cpu()
            self.share[group.name] = torch.maximum(self.share[group.name], share)

        handles = []
        try:
            for group in self.groups:
                output = self.model.get_submodule(group.output)
                handles.append(
                    output.register_forward_pre_hook(lambda m, args, group=group: before_output(group, args[0]))
                )
                if group.norm:
                    norm = self.model.get_submodule(group.norm)
                    handle = norm.register_forward_pre_hook(lambda m, args, group=group: at_sum(group, args[0]))
                else:  # without such a norm, the layer returns the sum itself
                    layer = self.model.get_submodule(group.layer)
                    handle = layer.register_forward_hook(
                        lambda m, args, y, group=group: at_sum(group, y[0] if isinstance(y, tuple) else y)
                    )
                handles.append(handle)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> dict[str, torch.Tensor]:
        """A boolean for each unit, by group: whether it is an outlier for any token that any process has seen."""
        distributed.all_max(list(self.share.values()), "looking for outliers")
        return {name: share > OUTLIER_SHARE for name, share in self.share.items()}
