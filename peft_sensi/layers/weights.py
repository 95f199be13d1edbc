"""The base's values and an adapter's tensors go in; the weight and bias that a layer computes with come out."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..anatomy.linears import bias_of, features, has_codes, is_quantized, matrix, oriented, quantized_later
from ..utils.errors import SensiLoadError
from .compression import PARTS, decode
from .functional import Pair, Parts, cast, compose, fuse, overwrite, take
from .integers import Noted, keep_integers, note_integers
from .marks import Mark
from .slices import Slice, tensor_specs
from .sources import Source
from .updates import learned_mask, unpack_mask
from .values import WEIGHTS, check_content, check_finite
from .versions import version_of, writes


class ComposedWeights(nn.Module, BaseTunerLayer):
    """The part of `SensiLayer` that holds the state of the adapters and computes weights."""

    tensor_names: tuple[str, ...]
    cast_input_dtype_enabled = False  # inputs are never cast; `peft.helpers.disable_input_dtype_casting` reads it

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer  # an embedding, or a Linear of any kind (see `anatomy.linears`)
        for name in self.tensor_names:
            setattr(self, name, nn.ParameterDict({}))
        self.sensi_slices: dict[str, Slice] = {}
        # The mark of each adapter's plan (see `marks`).
        self.sensi_plans: dict[str, bytes] = {}
        self.sensi_integers: dict[str, Noted] = {}
        self.plan_mark = Mark()
        self.register_load_state_dict_post_hook(note_integers)
        # `(module, attribute, value in the base)`: attributes of parent modules that depend on the number of units.
        # The layer holds them because Transformers' own `set_adapter` and `disable_adapters` call only the layers.
        self.sensi_attributes: list[tuple[nn.Module, str, int]] = []
        # `(module, attribute, value)`: the values of attributes that `wrapping` has set to 0 (see `_SHORTCUTS` there).
        self.sensi_shortcuts: list[tuple[nn.Module, str, Any]] = []
        # PEFT's wrappers of modules that are saved whole, for the same reason (see `_update_saved_modules`).
        self.sensi_saved_modules: list[AuxiliaryTrainingWrapper] = []
        self.sensi_in_block = False
        self.sensi_base_dropped = False
        # Adapters whose loaded values have not been checked yet (see `check_loaded`).
        self.sensi_unchecked: set[str] = set()
        # All layers of the model by name, while values that no hook has seen are unchecked.
        self.sensi_peers: dict[str, Any] = {}
        # Whether a schedule has frozen `sensi_weight`, by adapter.
        self.sensi_frozen: dict[str, bool] = {}
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Cached weights. They are no buffers, which DDP broadcasts on every forward pass, and no parameters, which
        # FSDP shards.
        self._sensi_fused: dict[str, tuple[Any, ...]] = {}
        self._sensi_unmerged: list[Pair] = []
        self.out_features, self.in_features = features(base_layer)
        self.sensi_coded = is_quantized(base_layer)  # stored, because `torch.compile` cannot trace the function

    def get_base_layer(self) -> Any:
        return super().get_base_layer()

    def part(self, name: str, adapter_name: str) -> nn.Parameter | None:
        """The tensor `sensi_<name>` of an adapter, if it has one."""
        parameters = getattr(self, f"sensi_{name}")
        return parameters[adapter_name] if adapter_name in parameters else None

    def own_parts(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """All tensors of an adapter, by name without `sensi_`."""
        names = [name for name in self.tensor_names if adapter_name in getattr(self, name)]
        return {name.removeprefix("sensi_"): getattr(self, name)[adapter_name] for name in names}

    def check_loaded(self, adapter_name: str) -> None:
        """Checks values from a file, once, if no hook of this package has checked them. Raises `SensiLoadError`."""
        if adapter_name in self.sensi_unchecked:
            self._check_complete(adapter_name)
            numel = self.sensi_slices[adapter_name].kept_shape.numel()
            for name, tensor in self.own_parts(adapter_name).items():
                check_content(f"sensi_{name}.{adapter_name}", tensor.detach(), numel)
            self.sensi_unchecked.discard(adapter_name)

    def note_start(self, adapter_name: str, layers: dict[str, Any]) -> None:
        """Marks the tensors as they are before a loader fills them. `layers` are all layers of the model by name."""
        self.sensi_peers = layers
        for parameter in self.own_parts(adapter_name).values():
            parameter._sensi_start = writes(parameter)  # type: ignore[attr-defined]
        for wrapper in self.sensi_saved_modules:
            if adapter_name in wrapper.modules_to_save:  # type: ignore[operator]
                for parameter in wrapper.modules_to_save[adapter_name].parameters():  # type: ignore[index]
                    parameter._sensi_start = writes(parameter)  # type: ignore[attr-defined]

    def _check_complete(self, adapter_name: str) -> None:
        """Raises if a loader has filled only a part of the adapter, or if a module that is saved whole has NaN.

        If nothing was filled, the adapter is a fresh one that was made from the config of a file.
        """
        tensors = {
            f"{name}.sensi_{part}": parameter
            for name, layer in self.sensi_peers.items()
            for part, parameter in layer.own_parts(adapter_name).items()
        }
        for wrapper in self.sensi_saved_modules if self.sensi_peers else ():
            if adapter_name in wrapper.modules_to_save:  # type: ignore[operator]
                whole = wrapper.modules_to_save[adapter_name].named_parameters()  # type: ignore[index]
                tensors |= {f"{name} of a {type(wrapper.original_module).__name__}": p for name, p in whole}
        missing = [name for name, parameter in tensors.items() if untouched(parameter)]
        if 0 < len(missing) < len(tensors):
            raise SensiLoadError(
                f"The weights that were loaded lack {missing[0]!r} ({len(missing)} tensors missing). The file is "
                f"incomplete, or its names are not those of this model: use another copy of the file, or "
                f"`PeftModel.from_pretrained`."
            )
        for name, parameter in tensors.items():
            if ".sensi_" not in name and parameter.is_floating_point():
                check_finite(name, parameter.detach(), WEIGHTS)
        for layer in self.sensi_peers.values():
            if layer is not self:
                layer.sensi_peers = {}
        self.sensi_peers = {}

    def get_adapted_weight(self, adapter_name: str, masked: bool = True) -> Pair:
        """Weight `[out, in]` and bias `[out]` with which a plain Linear computes the same as this adapter.

        Only kept units are there, in the base's order. The result is differentiable in the trained tensors and has
        their dtype. Without `masked`, masks and gates have no influence.
        """
        self.check_loaded(adapter_name)
        slice_ = self.sensi_slices[adapter_name]
        return in_base_order(slice_, self._composed(adapter_name, masked))

    def get_original_weight(self, adapter_name: str) -> torch.Tensor:
        """The base's weight `[out, in]`, restricted to the kept units like `get_adapted_weight`."""
        slice_ = self.sensi_slices[adapter_name]
        return in_base_order(slice_, (self._kept_base(slice_)[0], None))[0]

    def _base(self) -> Pair:
        """The base's weight `[out, in]` and bias as they are without merged adapters, detached."""
        base = self.get_base_layer()
        weight, bias = self._sensi_unmerged[0] if self._sensi_unmerged else (base.weight, bias_of(base))
        if not self.sensi_coded and not torch.compiler.is_compiling() and has_codes(weight):
            raise quantized_later(weight)
        weight = matrix(base) if self.sensi_coded else oriented(base, weight)
        return weight.detach(), None if bias is None else bias.detach()

    def _kept_base(self, slice_: Slice) -> Pair:
        """The base's weight and bias at the kept positions, in the adapter's order. They may share its storage."""
        weight, bias = self._base()
        dim, kept = slice_.dim, slice_.kept.to(weight.device)
        if not self.sensi_base_dropped:
            if slice_.natural:
                return weight, bias
            return weight.index_select(dim, kept), bias if bias is None or dim == 1 else bias.index_select(0, kept)
        if slice_.whole:  # nothing of the base is left, and the adapter overwrites every value
            weight = weight.new_empty(slice_.kept_shape)
            bias = bias if bias is None or dim == 1 else bias.new_empty(len(kept))
        return weight, bias

    def _parts(self, name: str, slice_: Slice) -> Parts:
        device = self.get_base_layer().weight.device
        if not torch.compiler.is_compiling():
            keep_integers(self, name)
        places, bits, scores = (self.part(part, name) for part in ("places", "bits", "scores"))
        mask = None
        if scores is not None and slice_.sparsity is not None:
            mask = learned_mask(scores, slice_.sparsity)
        elif bits is not None:
            mask = unpack_mask(bits, slice_.kept_shape)
        if (gate := self.part("gate", name)) is not None:
            # The gate has the units in the base's order, the columns may have another.
            mask = gate.repeat_interleave(len(slice_.kept) // slice_.units)
            mask = mask if slice_.natural else mask[slice_.kept.to(device)]
        trained = self._trained(name, slice_)
        return Parts(
            tuned_weight=trained.pop("weight", None),
            tuned_bias=trained.pop("bias", None),
            **trained,
            places=None if places is None else places.long(),
            dim=slice_.dim,
            tuned=slice_.tuned_on(device),
            mask=mask,
        )

    def _base_values(self, slice_: Slice, names: Container[str]) -> dict[str, torch.Tensor]:
        """The base's values (float32) at the positions of the trained weight and bias, as far as `names` has them."""
        weight, bias = self._kept_base(slice_)
        index = slice_.tuned_on(weight.device)
        values = {}
        if "weight" in names:
            values["weight"] = take(weight, slice_.dim, index).float()
        if "bias" in names and bias is not None:
            values["bias"] = (bias if slice_.train_bias else take(bias, 0, index)).float()
        return values

    def _trained(self, name: str, slice_: Slice) -> dict[str, torch.Tensor]:
        """The trained tensors that `compression` knows, as values: codes are decoded, and `up` is scaled."""
        parts: dict[str, torch.Tensor] = {**self.own_parts(name)}
        if "codes" in parts:
            shapes = {part: spec.shape for part, spec in tensor_specs(slice_, decoded=True).items() if part in PARTS}
            differences = decode(parts["codes"], parts.get("scales"), shapes, slice_.dim)
            base_values = self._base_values(slice_, differences)
            parts = {part: base_values.get(part, 0.0) + difference for part, difference in differences.items()}
        if "up" in parts and slice_.scale != 1:
            parts["up"] = parts["up"] * slice_.scale
        return {part: parts[part] for part in PARTS if part in parts}

    def __getstate__(self) -> dict[str, Any]:
        for name in self.sensi_slices:  # the copy may become one of averages
            keep_integers(self, name)
        return {**super().__getstate__(), "_sensi_fused": {}}

    def _composed(self, name: str, masked: bool = True) -> Pair:
        """Weight and bias in the adapter's order and the dtype of the trained tensors, in plain autograd."""
        slice_ = self.sensi_slices[name]
        frozen = self._kept_base(slice_)
        parts = self._parts(name, slice_)
        parts = parts if masked else parts._replace(mask=None)
        return compose(*cast(frozen, torch.promote_types(frozen[0].dtype, torch.float32)), parts)

    def _merged(self, name: str) -> Pair:
        """`get_adapted_weight` in the base's dtype, without autograd and with fewer copies."""
        self.check_loaded(name)
        slice_ = self.sensi_slices[name]
        dtype = self.get_base_layer().weight.dtype
        parts = self._parts(name, slice_)
        if parts.down is not None or parts.values is not None or parts.mask is not None:
            return cast(self.get_adapted_weight(name), dtype)  # sums are rounded only once
        if slice_.whole:
            assert parts.tuned_weight is not None
            bias = self._base()[1] if parts.tuned_bias is None else parts.tuned_bias
            return in_base_order(slice_, cast((parts.tuned_weight.detach(), bias), dtype))
        weight, bias, _ = self._fused_again(name, dtype, parts)
        return in_base_order(slice_, (weight, bias))

    def _cached(self, name: str, key: Any, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, Any]:
        """The first two results of `make` for this adapter, cached. `make` is called again when the key changes.

        All further results are only held: tensors whose addresses are in the key, so that no others can get these.
        """
        cached = self._sensi_fused.get(name)
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                cached = self._sensi_fused[name] = (key, *make())
        return cached[1], cached[2]

    def _decoded(self, name: str, dtype: torch.dtype) -> Pair:
        """Weight and bias of a compressed adapter. They are cached until a code changes."""
        key = dtype, *self._base_key(), *map(version_of, self.own_parts(name).values())
        return self._cached(name, key, lambda: (*cast(self._composed(name), dtype), self._held_base()))

    def _base_key(self) -> tuple[Any, ...]:
        """A key that changes when the base's weight or bias is replaced, moved or written into.

        The key contains addresses of memory. It is reliable only while the tensors of `_held_base` are kept:
        otherwise, other tensors could get the same addresses.
        """
        base = self.get_base_layer()
        return base.weight.device, version_of(base.weight), version_of(bias_of(base))

    def _held_base(self) -> list[torch.Tensor]:
        base = self.get_base_layer()
        return [tensor.detach() for tensor in (base.weight, bias_of(base)) if tensor is not None]

    def _fused(self, name: str, dtype: torch.dtype, parts: Parts) -> Pair:
        """Weight (without the low-rank term) and bias in the adapter's order. The frozen values are cached."""
        slice_, base = self.sensi_slices[name], self.get_base_layer().weight

        def frozen() -> tuple[Any, ...]:
            weight, bias = self._kept_base(slice_)
            # The cache shares the base's own tensors if nothing is written into it.
            copy = slice_.tuned_count > 0 and weight.data_ptr() == base.data_ptr()
            bias = None if bias is None else bias.to(dtype, copy=copy)
            return weight.to(dtype, copy=copy), bias, self._held_base()

        with torch.inference_mode(False), torch.no_grad():
            if self._owns_base(dtype):
                weight, bias = self._kept_base(slice_)
            else:
                weight, bias = self._cached(name, (dtype, *self._base_key()), frozen)
            # `.data`: autograd must not notice that the cache is rewritten with the same values, because a backward
            # pass may still need it.
            weight, bias = weight.data, None if bias is None else bias.data
            weight = overwrite(weight, parts.tuned_weight, parts.values, parts.places, slice_.dim, parts.tuned)
            if bias is None or (parts.tuned_bias is not None and len(parts.tuned_bias) == len(bias)):
                bias = None if parts.tuned_bias is None else parts.tuned_bias.detach().to(dtype)
            else:
                bias = overwrite(bias, parts.tuned_bias, None, None, 0, parts.tuned)
            return weight, bias

    def _fused_again(self, name: str, dtype: torch.dtype, parts: Parts) -> tuple[Any, Any, Source]:
        """The same as `_fused` without a cache, and how the backward pass computes the weight again."""
        slice_ = self.sensi_slices[name]
        with torch.no_grad():
            weight, bias = self._base()
            kept = None
            if not (slice_.natural or self.sensi_base_dropped):  # the index takes the place of cached weights
                kept, _ = self._cached(name, weight.device, lambda: (slice_.kept.to(weight.device), None))
            else:
                self._sensi_fused.pop(name, None)
            compute = partial(fuse, dim=slice_.dim, tuned=parts.tuned, dtype=dtype)
            operands = weight, kept, parts.tuned_weight, parts.values, parts.places
            if bias is None or (parts.tuned_bias is not None and len(parts.tuned_bias) == slice_.kept_shape[0]):
                bias = None if parts.tuned_bias is None else parts.tuned_bias.detach().to(dtype)
            else:
                rows = kept if slice_.dim == 0 else None
                bias = fuse(bias, rows, parts.tuned_bias, None, None, dim=0, tuned=parts.tuned, dtype=dtype)
            return compute(*operands), bias, Source(compute, operands)

    def _owns_base(self, dtype: torch.dtype) -> bool:
        """Whether trained values can be written into the base itself.

        If the base was dropped, its rest belongs to one adapter alone, and its values at trained positions are never
        read.
        """
        return self.sensi_base_dropped and dtype == self.get_base_layer().weight.dtype

    def _combined(self, names: list[str]) -> Pair:
        """Weight and bias of one adapter, or the base plus the differences of several adapters; differentiable."""
        weight, bias = self.get_adapted_weight(names[0])
        for name in names[1:]:
            base_weight, base_bias = self._base()
            other_weight, other_bias = self.get_adapted_weight(name)
            weight = weight + (other_weight - base_weight)
            if other_bias is not None:
                difference = other_bias if base_bias is None else other_bias - base_bias
                bias = difference if bias is None else bias + difference
        return weight, bias


def in_base_order(slice_: Slice, pair: Pair) -> Pair:
    """A weight and a bias of the kept units, from the adapter's order to the base's."""
    weight, bias = pair
    if not slice_.natural:
        order = slice_.kept.argsort().to(weight.device)
        weight = weight.index_select(slice_.dim, order)
        bias = bias if bias is None or slice_.dim == 1 else bias.index_select(0, order)
    return weight, bias


def untouched(parameter: torch.Tensor) -> bool:
    """Whether a loader has left a tensor as it was at `ComposedWeights.note_start`. Unknown tensors are not."""
    return not parameter.is_inference() and getattr(parameter, "_sensi_start", None) == writes(parameter)
