"""What the parts of an adapter and the base's values make together: the weight and bias that a layer computes with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..anatomy.linears import bias_of, matrix, oriented
from .compression import PARTS, decode
from .functional import Positions, compose, take
from .slices import Slice, trained_shapes
from .updates import learned_mask, unpack_mask
from .values import check_content


class ComposedWeights(BaseTunerLayer):
    """Reads what `SensiLayer` sets up."""

    base_layer: Any  # a Linear of any kind (see `linears`), or an embedding
    tensor_names: tuple[str, ...] = ()
    sensi_unchecked: set[str]
    out_features: int
    in_features: int
    sensi_slices: dict[str, Slice]
    sensi_coded: bool
    sensi_base_dropped: bool
    # Neither a parameter nor a buffer: DDP would broadcast it on every forward pass, FSDP would shard it.
    _sensi_fused: dict[str, tuple[Any, Any, Any]]
    _sensi_unmerged: list[tuple[torch.Tensor, torch.Tensor | None]]

    def get_base_layer(self) -> Any:
        return super().get_base_layer()

    def part(self, name: str, adapter_name: str) -> nn.Parameter | None:
        """The tensor `sensi_<name>` of an adapter, if it has one."""
        parameters = getattr(self, f"sensi_{name}")
        return parameters[adapter_name] if adapter_name in parameters else None

    def kept_numel(self, adapter_name: str) -> int:
        """Number of weights that the adapter keeps."""
        shape = torch.Size((self.out_features, self.in_features))
        return self.sensi_slices[adapter_name].kept_shape(shape).numel()

    def check_loaded(self, adapter_name: str) -> None:
        """Checks, once, what a loader that passes none of our hooks has put here. Raises `SensiLoadError`."""
        if adapter_name in self.sensi_unchecked:
            room = self.kept_numel(adapter_name)
            for name in self.tensor_names:
                if (tensor := self.part(name.removeprefix("sensi_"), adapter_name)) is not None:
                    check_content(f"{name}.{adapter_name}", tensor.detach(), room)
            self.sensi_unchecked.discard(adapter_name)

    def get_adapted_weight(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with which a plain Linear does what this adapter does, units in the base's order.

        Differentiable in the trained parts; in their dtype.
        """
        self.check_loaded(adapter_name)
        slice_ = self.sensi_slices[adapter_name]
        weight, bias = self._composed(adapter_name)
        order = slice_.kept.argsort().to(weight.device)
        weight = weight.index_select(slice_.dim, order)
        if bias is not None and slice_.dim == 0:
            bias = bias.index_select(0, order)
        return weight, bias

    def get_original_weight(self, adapter_name: str) -> torch.Tensor:
        """The base's weight `[out, in]`, of the kept units in the base's order, as `get_adapted_weight` has them."""
        slice_ = self.sensi_slices[adapter_name]
        weight, _ = self._kept_base(slice_)
        return weight.index_select(slice_.dim, slice_.kept.argsort().to(weight.device))

    def _kept_base(self, slice_: Slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's values at the kept positions, in the adapter's order; possibly the base's own tensors."""
        base = self.get_base_layer()
        weight, bias = self._sensi_unmerged[0] if self._sensi_unmerged else (base.weight, bias_of(base))
        weight = matrix(base) if self.sensi_coded else oriented(base, weight)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if not self.sensi_base_dropped:
            if slice_.natural:
                return weight, bias
            kept = slice_.kept.to(weight.device)
            weight = weight.index_select(slice_.dim, kept)
            bias = bias.index_select(0, kept) if bias is not None and slice_.dim == 0 else bias
        elif slice_.whole:  # nothing of the base is left here, and every value will be overwritten
            weight = weight.new_empty(slice_.kept_shape(weight.shape))
            bias = bias.new_empty(len(slice_.kept)) if bias is not None and slice_.dim == 0 else bias
        return weight, bias

    def _parts(self, name: str, slice_: Slice) -> dict[str, Any]:
        """The arguments of `functional.compose`."""
        device = self.get_base_layer().weight.device
        places, bits, scores = (self.part(part, name) for part in ("places", "bits", "scores"))
        mask = None
        if scores is not None and slice_.sparsity is not None:
            mask = learned_mask(scores, slice_.sparsity)
        elif bits is not None:
            mask = unpack_mask(bits, slice_.kept_shape(torch.Size((self.out_features, self.in_features))))
        if (gate := self.part("gate", name)) is not None:
            mask = gate.repeat_interleave(len(slice_.kept) // slice_.units)  # [columns], the same for every row
        trained = self._trained(name, slice_)
        return {
            "dim": slice_.dim,
            "tuned": slice_.tuned if isinstance(slice_.tuned, int) else slice_.tuned.to(device),
            "tuned_weight": trained["weight"],
            "tuned_bias": trained["bias"],
            "down": trained["down"],
            "up": trained["up"],
            "values": trained["values"],
            "places": None if places is None else places.long(),
            "mask": mask,
        }

    def _original_parts(self, slice_: Slice, names: Iterable[str]) -> dict[str, torch.Tensor | float]:
        """From what the trained parts differ: the base's values at their positions, in float32, or zero."""
        weight, bias = self._kept_base(slice_)
        index = slice_.tuned if isinstance(slice_.tuned, int) else slice_.tuned.to(weight.device)
        origins: dict[str, torch.Tensor | float] = dict.fromkeys(names, 0.0)
        if "weight" in origins:
            origins["weight"] = take(weight, slice_.dim, index).float()
        if "bias" in origins and bias is not None:
            origins["bias"] = (bias if slice_.train_bias else take(bias, 0, index)).float()
        return origins

    def _trained(self, name: str, slice_: Slice) -> dict[str, torch.Tensor | None]:
        """All trained parts as values, decoded if they are compressed."""
        if slice_.compressed is None:
            return {part: self.part(part, name) for part in PARTS}
        codes, scales = self.part("codes", name), self.part("scales", name)
        found: dict[str, torch.Tensor | None] = dict.fromkeys(PARTS)
        if codes is not None:
            shapes = trained_shapes(
                self.out_features, self.in_features, bias_of(self.get_base_layer()) is not None, slice_
            )
            differences = decode(codes, scales, shapes, slice_.dim)
            origins = self._original_parts(slice_, shapes)
            found |= {part: origins[part] + difference for part, difference in differences.items()}
        return found

    def _composed(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in the adapter's order and the trained parts' dtype, in plain autograd."""
        slice_ = self.sensi_slices[name]
        weight, bias = self._kept_base(slice_)
        master = torch.promote_types(weight.dtype, torch.float32)
        return compose(weight.to(master), None if bias is None else bias.to(master), **self._parts(name, slice_))

    def _decoded(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a compressed adapter computes with, from a cache as long as no code changes."""
        base = self.get_base_layer().weight
        tensors = (base, *self._own_parameters(name))
        key = (dtype, base.device, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        cached = self._sensi_fused.get(name)
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = self._composed(name)
                cached = self._sensi_fused[name] = (key, weight.to(dtype), None if bias is None else bias.to(dtype))
        return cached[1], cached[2]

    def _own_parameters(self, name: str) -> list[torch.Tensor]:
        parts = (self.part(part.removeprefix("sensi_"), name) for part in self.tensor_names)
        return [parameter for parameter in parts if parameter is not None]

    def _fused(self, name: str, dtype: torch.dtype, parts: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in the adapter's order that hold all trained parts; the frozen values come from a cache."""
        slice_, base = self.sensi_slices[name], self.get_base_layer()
        key = (dtype, base.weight.data_ptr(), base.weight._version, base.weight.device)
        with torch.inference_mode(False), torch.no_grad():
            cached = self._sensi_fused.get(name)
            if self.sensi_base_dropped and dtype == base.weight.dtype:
                # What is left of the base is this adapter's alone, and what it holds at trained positions is never
                # read: no second copy of the weight is needed.
                frozen, bias = self._kept_base(slice_)
                cached = (key, frozen, bias)
            elif cached is None or cached[0] != key:
                frozen, bias = self._kept_base(slice_)
                # The base's own tensors are shared as long as nothing is written into the cache.
                writes = slice_.tuned_count > 0
                own = writes and frozen.data_ptr() == base.weight.data_ptr()
                frozen = frozen.to(dtype, copy=own)
                bias = None if bias is None else bias.to(dtype, copy=own)
                cached = self._sensi_fused[name] = (key, frozen, bias)
            # `.data`: the cache is rewritten with the values it has, while backward passes may still hold it.
            weight, bias = cached[1].data, None if cached[2] is None else cached[2].data
            tuned, tuned_weight, tuned_bias = parts["tuned"], parts["tuned_weight"], parts["tuned_bias"]
            if tuned_weight is not None:
                _write(weight, slice_.dim, tuned, tuned_weight)
            if tuned_bias is not None:
                if bias is None or len(tuned_bias) == len(bias):
                    bias = tuned_bias.detach().to(dtype)
                else:
                    _write(bias, 0, tuned, tuned_bias)
            if parts["down"] is not None:
                weight = torch.addmm(weight, parts["up"].to(dtype), parts["down"].to(dtype))
            if parts["values"] is not None:
                weight = weight.flatten().index_add(0, parts["places"], parts["values"].to(dtype)).view_as(weight)
            return weight, bias

    def _combined(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One adapter's effective weight, or the base plus the differences of several; differentiable."""
        weight, bias = self.get_adapted_weight(names[0])
        if len(names) > 1:
            base = self.get_base_layer()
            base_weight, base_bias = self._sensi_unmerged[0] if self._sensi_unmerged else (base.weight, bias_of(base))
            base_weight = oriented(base, base_weight)
            for name in names[1:]:
                other_weight, other_bias = self.get_adapted_weight(name)
                weight = weight + (other_weight - base_weight.detach())
                if other_bias is not None:
                    difference = other_bias if base_bias is None else other_bias - base_bias.detach()
                    bias = difference if bias is None else bias + difference
        return weight, bias


def _write(target: torch.Tensor, dim: int, positions: Positions, source: torch.Tensor) -> None:
    if isinstance(positions, int):
        target.narrow(dim, 0, positions).copy_(source.detach())
    else:
        target.index_copy_(dim, positions, source.detach().to(target.dtype))
