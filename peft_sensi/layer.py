"""The Linear of which units are tuned, frozen or trimmed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from .errors import SensiError
from .functional import Positions, sliced_linear, sliced_linear_reference


@dataclass(frozen=True, eq=False)
class Slice:
    """What one adapter does with one Linear, whose base weight is `[out, in]`.

    `kept` lists the base positions (int64, CPU) along `dim` (0 = rows, 1 = columns) that stay, in the order in which the
    adapter computes them: tuned first, then frozen, the same on both sides of a group, so that the tuned slice is
    contiguous and no output permutation is needed. A lone Linear keeps its own order instead, and `tuned` is then an
    index into `kept` rather than a number.
    """

    dim: int
    size: int
    kept: torch.Tensor
    tuned: Positions
    units: int
    train_bias: bool = False

    @property
    def trims(self) -> bool:
        return len(self.kept) < self.size

    @property
    def tuned_count(self) -> int:
        return self.tuned if isinstance(self.tuned, int) else len(self.tuned)

    @cached_property
    def whole(self) -> bool:
        """Everything that is kept is tuned."""
        return self.tuned_count == len(self.kept)

    @cached_property
    def natural(self) -> bool:
        """Nothing is trimmed or moved."""
        return torch.equal(self.kept, torch.arange(self.size))

    @property
    def tuned_positions(self) -> torch.Tensor:
        """Base positions (int64) of the trained rows or columns, in the order of the trained tensor."""
        return self.kept[: self.tuned] if isinstance(self.tuned, int) else self.kept[self.tuned]


class SensiLayer(BaseTunerLayer):
    """The adapter's state on one Linear.

    `sensi_weight[adapter]` holds the trained rows `[n, in]` or columns `[out, n]`, `sensi_bias[adapter]` the trained bias
    entries, both as values (not differences), in float32 whatever the base's dtype.
    """

    adapter_layer_names = ("sensi_weight", "sensi_bias")
    other_param_names = ("sensi_slices",)

    def __init__(self, base_layer: nn.Linear) -> None:
        self.base_layer = base_layer
        self.sensi_weight = nn.ParameterDict({})
        self.sensi_bias = nn.ParameterDict({})
        self.sensi_slices: dict[str, Slice] = {}
        # `(module, attribute, value per unit)`: what parent modules must know about the number of units. A plain list,
        # because Transformers' own `set_adapter` and `disable_adapters` reach only the layers, not the tuner.
        self.sensi_attributes: list[tuple[nn.Module, str, int]] = []
        self.sensi_units = 0
        self.sensi_base_dropped = False
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Neither a parameter nor a buffer: DDP would broadcast it on every forward pass, FSDP would shard it.
        self._sensi_fused: dict[str, tuple[Any, torch.Tensor, torch.Tensor | None]] = {}
        self._sensi_unmerged: list[tuple[nn.Parameter, nn.Parameter | None]] = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(
        self,
        adapter_name: str,
        piece: Slice,
        values: tuple[torch.Tensor, torch.Tensor] | None = None,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Sets up `adapter_name`, starting from the base's values or from refitted ones in the order of `piece.kept`."""
        base = self.get_base_layer()
        master = torch.promote_types(base.weight.dtype, torch.float32)
        bias = values[1] if values is not None else base.bias
        for parameters in (self.sensi_weight, self.sensi_bias):
            if adapter_name in parameters:
                del parameters[adapter_name]
        self._sensi_fused.clear()
        self.sensi_slices[adapter_name] = piece
        on_meta = _new_parameters_are_empty()
        if piece.tuned_count:
            if on_meta:
                shape = [*base.weight.shape]
                shape[piece.dim] = piece.tuned_count
                weight = torch.empty(shape, dtype=master, device="meta")
            elif values is not None:
                weight = values[0]
            else:
                weight = base.weight.detach().index_select(piece.dim, piece.tuned_positions.to(base.weight.device))
            self.sensi_weight[adapter_name] = _master(weight, master, init_weights)
        if bias is not None and (piece.train_bias or (piece.dim == 0 and piece.tuned_count)):
            index = piece.tuned_positions.to(bias.device) if piece.dim == 0 else None
            start = bias.detach() if index is None else bias.detach().index_select(0, index)
            self.sensi_bias[adapter_name] = _master(start, master, init_weights)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def drop_base(self, adapter_name: str) -> None:
        """Keeps of the base only what this adapter needs: the kept slices in its order, nothing where all are tuned."""
        piece, base = self.sensi_slices[adapter_name], self.get_base_layer()
        kept = piece.kept[:0] if piece.whole else piece.kept
        kept = kept.to(base.weight.device)
        base.weight = nn.Parameter(base.weight.detach().index_select(piece.dim, kept), requires_grad=False)
        if base.bias is not None and piece.dim == 0:
            base.bias = nn.Parameter(base.bias.detach().index_select(0, kept), requires_grad=False)
        base.out_features, base.in_features = base.weight.shape
        self.sensi_base_dropped = True
        self._sensi_fused.clear()

    def assembled(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias that a plain Linear needs to do what this adapter does, units in the base's order."""
        piece, base = self.sensi_slices[adapter_name], self.get_base_layer()
        weight, bias = self._kept_base(piece)
        weight, bias = self._with_tuned(adapter_name, weight.clone(), None if bias is None else bias.clone())
        order = piece.kept.argsort().to(weight.device)
        weight = weight.index_select(piece.dim, order)
        if bias is not None and piece.dim == 0:
            bias = bias.index_select(0, order)
        return weight.to(base.weight.dtype), None if bias is None else bias.to(base.weight.dtype)

    # -- PEFT's contract ----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._tell_parents()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.sensi_base_dropped:
            raise base_is_dropped("disable the adapter")
        super().enable_adapters(enabled)
        self._tell_parents()

    def delete_adapter(self, adapter_name: str) -> None:
        if self.sensi_base_dropped and adapter_name in self.sensi_slices:
            raise base_is_dropped("delete the adapter")
        super().delete_adapter(adapter_name)
        self._sensi_fused.clear()
        self._tell_parents()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapter's weights into the base layer, with smaller matrices where units are trimmed.

        Raises `SensiError` when several adapters are to be merged and one of them trims.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.sensi_slices]
        together = names + [n for n in self.merged_adapters if n not in names]
        if len(together) > 1:
            self.check_combination(together)
        base = self.get_base_layer()
        for name in names:
            if not self.merged_adapters:
                weight, bias = self.assembled(name)
            else:
                weight, bias = self._added(name, base.weight.detach(), base.bias, *self._sensi_unmerged[0])
            if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._sensi_unmerged.append((base.weight, base.bias))
            base.weight = nn.Parameter(weight, requires_grad=False)
            base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            base.out_features, base.in_features = weight.shape
            self.merged_adapters.append(name)
        self._tell_parents()

    def unmerge(self) -> None:
        """Puts the base's own tensors back, exactly."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        base = self.get_base_layer()
        base.weight, base.bias = self._sensi_unmerged[0]
        base.out_features, base.in_features = base.weight.shape
        self._sensi_unmerged.clear()
        self.merged_adapters.clear()
        self._tell_parents()

    def check_combination(self, adapter_names: list[str]) -> None:
        if self.sensi_base_dropped or any(self.sensi_slices[n].trims for n in adapter_names if n in self.sensi_slices):
            raise SensiError(
                f"The adapters {adapter_names} cannot be active or merged together: at least one of them trims units, "
                f"and only adapters that trim nothing can be added up. Activate one at a time."
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype, which would round the float32 masters of a bf16 base.
        device = device or self.get_base_layer().weight.device
        for parameters in (self.sensi_weight, self.sensi_bias):
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    # -- internals ----------------------------------------------------------------------------------------------------

    def _working_adapter(self) -> str | None:
        """The one adapter whose widths the layer has now."""
        if self.merged_adapters:
            return self.merged_adapters[-1]
        active = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.sensi_slices]
        return active[0] if active else None

    def _tell_parents(self) -> None:
        name = self._working_adapter()
        units = self.sensi_units if name is None else self.sensi_slices[name].units
        for module, attribute, per_unit in self.sensi_attributes:
            setattr(module, attribute, units * per_unit)

    def _kept_base(self, piece: Slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's values at the kept positions, in the adapter's order; tuned positions hold anything."""
        base = self.get_base_layer()
        weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
        if not self.sensi_base_dropped:
            if piece.natural:
                return weight, bias
            kept = piece.kept.to(weight.device)
            weight = weight.index_select(piece.dim, kept)
            bias = bias.index_select(0, kept) if bias is not None and piece.dim == 0 else bias
        elif piece.whole:
            shape = [*weight.shape]
            shape[piece.dim] = len(piece.kept)
            weight = weight.new_empty(shape)
            bias = bias.new_empty(len(piece.kept)) if bias is not None and piece.dim == 0 else bias
        return weight, bias

    @torch.no_grad()
    def _with_tuned(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Writes the trained values into (fresh) tensors in the adapter's order."""
        piece = self.sensi_slices[name]
        if name in self.sensi_weight:
            _write(weight, piece.dim, piece.tuned, self.sensi_weight[name])
        if name in self.sensi_bias:
            if bias is None:
                bias = self.sensi_bias[name].detach().to(weight.dtype)
            elif piece.dim == 0:
                _write(bias, 0, piece.tuned, self.sensi_bias[name])
            else:
                bias = self.sensi_bias[name].detach().to(bias.dtype)
        return weight, bias

    def _fused(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The cached weight in the adapter's order, with the trained values copied in."""
        base = self.get_base_layer()
        key = (dtype, base.weight.data_ptr(), base.weight._version, base.weight.device)
        with torch.inference_mode(False), torch.no_grad():
            cached = self._sensi_fused.get(name)
            if cached is None or cached[0] != key:
                weight, bias = self._kept_base(self.sensi_slices[name])
                if weight.data_ptr() == base.weight.data_ptr() and self.sensi_slices[name].tuned_count == 0:
                    cached = (key, weight.to(dtype), None if bias is None else bias.to(dtype))
                else:
                    cached = (key, weight.to(dtype, copy=True), None if bias is None else bias.to(dtype, copy=True))
                self._sensi_fused[name] = cached
            # `.data`: the cache is rewritten with the values it has, and backward passes may still hold it.
            return self._with_tuned(name, cached[1].data, None if cached[2] is None else cached[2].data)

    def _added(
        self,
        name: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        base_weight: torch.Tensor,
        base_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`weight` and `bias` in the base's order plus this adapter's differences from the base; differentiable."""
        piece = self.sensi_slices[name]
        index = piece.tuned_positions.to(weight.device)
        if name in self.sensi_weight:
            difference = self.sensi_weight[name].to(weight.dtype) - base_weight.index_select(piece.dim, index)
            weight = weight.index_add(piece.dim, index, difference)
        if name in self.sensi_bias:
            trained = self.sensi_bias[name].to(weight.dtype)
            if base_bias is None:
                bias = trained if bias is None else bias + trained
            elif piece.dim == 0:
                bias = bias.index_add(0, index, trained - base_bias.index_select(0, index))
            else:
                bias = bias + trained - base_bias
        return weight, bias


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
        if len(active) > 1:
            return self._forward_several(x, active)
        return self._forward_one(x, active[0])

    def _forward_one(self, x: torch.Tensor, name: str) -> torch.Tensor:
        piece = self.sensi_slices[name]
        tuned_weight = self.sensi_weight[name] if name in self.sensi_weight else None
        tuned_bias = self.sensi_bias[name] if name in self.sensi_bias else None
        base = self.get_base_layer()
        if tuned_weight is None and tuned_bias is None and piece.natural:
            return self.base_layer(x)
        dtype = base.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if piece.whole and tuned_weight is not None:
            bias = tuned_bias if tuned_bias is not None else base.bias
            return F.linear(x, tuned_weight.to(dtype), None if bias is None else bias.to(dtype))
        if torch.compiler.is_compiling() or _is_sharded(tuned_weight):
            weight, bias = self._kept_base(piece)
            return sliced_linear_reference(
                x, weight.to(dtype), None if bias is None else bias.to(dtype), tuned_weight, tuned_bias, piece.dim,
                piece.tuned,
            )  # fmt: skip
        weight, bias = self._fused(name, dtype)
        tuned = piece.tuned if isinstance(piece.tuned, int) else piece.tuned.to(x.device)
        return sliced_linear(x, weight, bias, tuned_weight, tuned_bias, piece.dim, tuned)

    def _forward_several(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        self.check_combination(names)
        base = self.get_base_layer()
        weight, bias = base.weight, base.bias
        for name in names:
            weight, bias = self._added(name, weight, bias, base.weight, base.bias)
        return F.linear(x.to(weight.dtype), weight, bias)

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


def base_is_dropped(action: str) -> SensiError:
    return SensiError(
        f"The base model was dropped with `keep_base=False`, so it is not possible to {action}. Load the base model "
        f"again, or wrap it with `keep_base=True`."
    )


def _master(start: torch.Tensor, dtype: torch.dtype, exact: bool) -> nn.Parameter:
    start = start.detach().to(dtype, copy=True)
    if not exact and not start.is_meta:
        scale = start.std() if start.numel() > 1 else start.new_ones(())
        start += torch.randn_like(start) * scale.clamp_min(0.1)
    return nn.Parameter(start.contiguous())


def _write(target: torch.Tensor, dim: int, positions: Positions, source: torch.Tensor) -> None:
    if isinstance(positions, int):
        target.narrow(dim, 0, positions).copy_(source.detach())
    else:
        target.index_copy_(dim, positions.to(target.device), source.detach().to(target.dtype))


def _is_sharded(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and type(tensor) not in (torch.Tensor, nn.Parameter)


def _new_parameters_are_empty() -> bool:
    # Under `low_cpu_mem_usage` PEFT builds the tuner in Accelerate's `init_empty_weights`, and tells nobody: a fresh
    # parameter shows it.
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))  # unlike a Linear, it draws no random numbers
    return probe.probe.is_meta
