"""The forward pass of a Linear with adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .functional import fused_linear, fused_linear_reference
from .layer import SensiLayer


class SensiLinear(nn.Module, SensiLayer):
    """`SensiLayer` on a `torch.nn.Linear`."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str) -> None:
        super().__init__()
        SensiLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [n for n in self.active_adapters if n in self.sensi_slices]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        dtype = self.base_layer.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if len(active) > 1:
            self.check_combination(active)
            weight, bias = self._combined(active)
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return self._forward_one(x, active[0], dtype)

    def _forward_one(self, x: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        piece = self.sensi_slices[name]
        if piece.whole:
            weight, bias = self.sensi_weight[name], self.part("bias", name)
            bias = self.bias if bias is None else bias
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        sharded = any(type(p) is not nn.Parameter for p in (self.weight, *self._own_parameters(name)))
        if piece.narrow is not None and not sharded and not torch.compiler.is_compiling():
            return F.linear(x, *self._decoded(name, dtype))
        parts = self._parts(name, piece)
        if parts["mask"] is not None or sharded or torch.compiler.is_compiling():
            frozen, bias = self._kept_base(piece)
            return fused_linear_reference(x, frozen.to(dtype), None if bias is None else bias.to(dtype), **parts)
        del parts["mask"]
        weight, bias = self._fused(name, dtype, parts)
        return fused_linear(x, weight, bias, **parts)

    def _apply(self, fn: Any, recurse: bool = True) -> SensiLinear:
        self._sensi_fused.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._sensi_fused.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sensi_fused": {}}

    def __repr__(self) -> str:
        return "sensi." + super().__repr__()
