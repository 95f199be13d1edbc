"""The forward pass of a Linear with adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..anatomy.linears import bias_of, check_weight, oriented, unpack
from ..utils.replicas import check_columns, is_spread
from .functional import Pair, Parts, cast, compose, fused_linear
from .layer import SensiLayer
from .masters import warn_of_lost_gradients, warn_of_merged, warn_of_short, warn_of_unfrozen
from .sources import Source
from .versions import version_of, writes


# From this number of tokens in a call, a fused weight is made for the call and again for its backward pass. For fewer
# tokens, the frozen values are cached, which costs a copy of the weights. Making the weight moves about two values
# through memory for each weight, and the product takes one multiplication for each weight and token. So with 1,024
# tokens on a CPU, making the weight twice takes 4 % of the time of the products. Compared with its memory, a GPU
# multiplies faster.
_MANY_TOKENS = {"cpu": 1024}
_MANY_ELSEWHERE = 8192


class SensiLinear(SensiLayer):
    """`SensiLayer` on a `torch.nn.Linear`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._applied()
        if not active:
            if self.merged and self.training and torch.is_grad_enabled():
                warn_of_merged()
            return self.base_layer(x, *args, **kwargs)
        check_weight(self.base_layer, x)
        dtype = x.dtype if self.sensi_coded else self.base_layer.weight.dtype
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if len(active) > 1:
            self.check_combination(active)
            return F.linear(x.to(dtype), *cast(self._combined(active), dtype))
        name, slice_ = active[0], self.sensi_slices[active[0]]
        self.check_loaded(name)
        if self.sensi_coded and not slice_.whole:
            return self._forward_beside(x.to(dtype), name)
        own = self.own_parts(name).values()
        # During the forward pass FSDP2 replaces sharded parameters by whole ones. Only a flag of the module shows it.
        sharded = getattr(self, "_is_fsdp_managed_module", False) or any(
            type(p) is not nn.Parameter for p in (self.base_layer.weight, *own)
        )
        # A cache would keep the whole weights that ZeRO-3 spreads over the processes.
        spread = sharded or is_spread(self.base_layer.weight)
        plain = spread or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.training and sharded:
            check_columns((self.base_layer.weight, *own))
        if self.training and not sharded and torch.is_grad_enabled():
            warn_of_short(own)
            warn_of_unfrozen(self.base_layer)
        if slice_.whole:
            weight, bias = self.sensi_weight[name], self.part("bias", name)
            pair = weight, self.base_layer.bias if bias is None else bias
            if plain:
                return F.linear(x.to(dtype), *cast(pair, dtype))
            with torch.no_grad():
                pair = cast(pair, dtype)
            parts = Parts(tuned_weight=weight, tuned_bias=bias, tuned=len(weight))
            return fused_linear(x, *pair, parts, Source(partial(torch.Tensor.to, dtype=dtype), (weight,)))
        if slice_.compressed is not None and not plain:
            return F.linear(x.to(dtype), *self._decoded(name, dtype))
        parts = self._parts(name, slice_)
        if not plain and self._is_open(name):
            parts = parts._replace(mask=None)
        if plain or parts.mask is not None:  # the gradient of a mask needs the gradient of the whole weight
            return F.linear(x.to(dtype), *compose(*cast(self._kept_base(slice_), dtype), parts))
        tokens = x.shape[:-1].numel()
        if (
            torch.is_grad_enabled()
            and tokens >= _MANY_TOKENS.get(x.device.type, _MANY_ELSEWHERE)
            and not self._owns_base(dtype)
        ):
            weight, bias, again = self._fused_again(name, dtype, parts)
            return fused_linear(x, weight, bias, parts, again)
        return fused_linear(x, *self._fused(name, dtype, parts), parts)

    def _is_open(self, name: str) -> bool:
        """Whether the adapter has gates, and all are open: before the first cut, they would only cost time.

        Their values are read once, and again after something has written to them, because a GPU would have to wait.
        """
        gate = self.part("gate", name)
        if gate is None or gate.is_meta or writes(gate) < 0:
            return False
        # No adapter has this name, because names have no dots.
        is_open, _ = self._cached(f"{name}.gate", version_of(gate), lambda: (bool(gate.all()), gate))
        return bool(is_open)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert this layer: it keeps all units, and its change is low-rank.

        PEFT would take the largest singular values of any other change, which is too rough.
        """
        slice_ = self.sensi_slices.get(adapter_name)
        return slice_ is None or (not slice_.trims and set(self.own_parts(adapter_name)) == {"down", "up"})

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's change of the base's weight, in its orientation: `[out, in]`, or `[in, out]` of a `Conv1D`.

        It is float32, and zero in layers that the adapter does not have. `peft.convert_to_lora` calls this.
        """
        if adapter_name not in self.sensi_slices:
            return oriented(self.base_layer, torch.zeros_like(self._base()[0], dtype=torch.float32))
        change = self.get_adapted_weight(adapter_name)[0].float() - self.get_original_weight(adapter_name).float()
        return oriented(self.base_layer, change)

    def _forward_beside(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The forward pass on a quantized base: the output of the base's own kernel plus the adapter's changes."""
        slice_, base = self.sensi_slices[name], self.base_layer
        if self.training or x.requires_grad:
            unpack(base)
        y, parts = base(x), self._parts(name, slice_)
        if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            warn_of_lost_gradients(base)
        trained = {"weight": parts.tuned_weight, "bias": parts.tuned_bias}
        replaced = [part for part, value in trained.items() if value is not None]
        key = id(base.weight), base.weight.device, version_of(bias_of(base))
        base_values, _ = self._cached(name, key, lambda: (self._base_values(slice_, replaced), base.weight))
        index = slice_.tuned_index.to(x.device)
        if parts.tuned_weight is not None:
            change = (parts.tuned_weight - base_values["weight"]).to(x.dtype)
            if slice_.dim == 1:
                y = y + F.linear(x.index_select(-1, index), change)
            else:
                y = y.index_add(-1, index, F.linear(x, change).to(y.dtype))
        if parts.tuned_bias is not None:
            change = (parts.tuned_bias - base_values["bias"]).to(y.dtype)
            if len(change) < y.shape[-1]:
                change = change.new_zeros(y.shape[-1]).index_add(0, index, change)
            y = y + change
        if parts.down is not None and parts.up is not None:
            y = y + F.linear(F.linear(x, parts.down.to(x.dtype)), parts.up.to(x.dtype))
        if parts.values is not None and parts.places is not None:
            single = parts.values.new_zeros(self.out_features * self.in_features)
            single = single.index_add(0, parts.places, parts.values).view(self.out_features, self.in_features)
            y = y + F.linear(x, single.to(x.dtype))
        return y

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight. Outside known blocks, the adapted weight: some models (Mamba) do not call `forward`."""
        return self._in_effect()[0]

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]  # PEFT forgets Linears without one
        """The base's bias, or the adapted one, as for `weight`."""
        return self._in_effect()[1]

    def _in_effect(self) -> Pair:
        base = self.base_layer
        active = self._applied()
        if self.sensi_in_block or not active or self.sensi_coded:
            return base.weight, base.bias
        weight, bias = self._combined(active)
        return cast((oriented(base, weight), bias), base.weight.dtype)
