"""The forward pass of an embedding with adapters. Token ids go in, their rows come out."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..anatomy.linears import check_weight
from .layer import SensiLayer
from .masters import warn_of_unfrozen


class SensiEmbedding(SensiLayer):
    """`SensiLayer` on a `torch.nn.Embedding`: the adapter's rows replace the base's rows of the tuned tokens.

    Every token is looked up in both tables. So the backward pass needs no gradient of the size of the base's table.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._applied()
        if not active:
            return self.base_layer(ids)
        check_weight(self.base_layer, ids)
        if len(active) > 1:
            self.check_combination(active)
            return F.embedding(ids, self._combined(active)[0].to(self.base_layer.weight.dtype))
        self.check_loaded(active[0])
        slice_ = self.sensi_slices[active[0]]
        rows, base = self._trained(active[0], slice_).get("weight"), self.base_layer.weight
        if rows is None:
            return self.base_layer(ids)
        if self.training and torch.is_grad_enabled():
            warn_of_unfrozen(self.base_layer)
        if slice_.whole:
            return F.embedding(ids, rows.to(base.dtype))
        tokens = slice_.tuned_positions.to(ids.device)  # ascending, because an embedding keeps its own order
        slots = torch.searchsorted(tokens, ids).clamp_(max=len(tokens) - 1)
        is_tuned = (tokens[slots] == ids).unsqueeze(-1)
        return torch.where(is_tuned, F.embedding(slots, rows).to(base.dtype), F.embedding(ids, base.detach()))

    @property
    def weight(self) -> torch.Tensor:
        """The table in effect: some models multiply with it, without calling the layer (the output of DeBERTa)."""
        active, base = self._applied(), self.base_layer.weight
        return self._combined(active)[0].to(base.dtype) if active else base
