"""The state of all adapters on one Linear or embedding, and PEFT's calls on it: activate, merge, delete and so on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..anatomy.linears import bias_of, not_mergeable, oriented, select, unpack, update_features
from ..utils.errors import SensiError
from ..utils.replicas import new_parameters_are_empty
from .compression import PARTS, encode
from .functional import Pair
from .marks import LAYER_MARK, layer_marks, marks_are_written, warn_of_no_mark
from .masters import without_rounding
from .plain_states import check_plain_state, mark_of
from .slices import Slice, first_parts, master_dtype, positions_in, tensor_specs
from .updates import masked_count, pack_mask, top_mask, unpack_mask
from .weights import ComposedWeights
from .whole_modules import activate


class SensiLayer(ComposedWeights):
    """The tensors of all adapters on one Linear (or embedding): for each kind of tensor a dict by adapter name.

    `out` and `in` are the sides of the kept part of the weight, `t` is the number of tuned rows or columns.

    | tensor | dtype, shape | meaning |
    | --- | --- | --- |
    | `sensi_weight` | float32 `[t, in]` or `[out, t]` | tuned rows or columns: values, not differences |
    | `sensi_bias` | float32 `[t]` or `[out]` | trained bias: values, not differences |
    | `sensi_down`, `sensi_up` | float32 `[rank, in]`, `[out, rank]` | low-rank term, times `Slice.scale` |
    | `sensi_values` | float32 `[n]` | single values |
    | `sensi_scores` | float32 `[out, in]` | scores of a learned mask |
    | `sensi_places` | int32 `[n]` | flat positions of the single values in `[out, in]` |
    | `sensi_bits` | uint8 `[ceil(out * in / 8)]` | a mask |
    | `sensi_gate` | uint8 `[units]` | open units during cuts |
    | `sensi_codes` | bfloat16 or int8 `[c]` | compressed values, in place of the first five tensors |
    | `sensi_scales` | float32 `[s]` | scales of int8 codes |

    The first six tensors are trained. On a float64 base, `sensi_weight` and `sensi_bias` are float64. Units are in the
    adapter's order (see `Slice`). `slices.tensor_specs` says which tensors an adapter has.
    """

    adapter_layer_names = ("sensi_weight", "sensi_bias", "sensi_down", "sensi_up", "sensi_values", "sensi_scores")
    # All stored tensors, in the order of the table.
    tensor_names = (*adapter_layer_names, "sensi_places", "sensi_bits", "sensi_gate", "sensi_codes", "sensi_scales")
    other_param_names = (*tensor_names[len(adapter_layer_names) :], "sensi_slices", "sensi_plans", "sensi_frozen",
                         "sensi_integers")  # fmt: skip

    sensi_scores: nn.ParameterDict
    sensi_bits: nn.ParameterDict
    sensi_codes: nn.ParameterDict
    sensi_scales: nn.ParameterDict
    sensi_weight: nn.ParameterDict

    def update_layer(
        self,
        adapter_name: str,
        slice_: Slice,
        values: Pair | None = None,
        init_weights: bool = True,
        inference_mode: bool = False,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Sets up `adapter_name`. The other adapters do not change, and the same adapters stay active.

        `values` are refitted values in the order of `slice_.kept` (see `slices.first_parts`). `kept` are finished
        tensors by name, without `sensi_` (see `slices.kept_parts`). Gradients are required if the adapter is active
        and not in `inference_mode`.
        """
        self.discard_parts(adapter_name)
        self.sensi_slices[adapter_name] = slice_
        base = self.get_base_layer()
        specs = tensor_specs(slice_, master_dtype(base))
        if base.weight.is_meta or new_parameters_are_empty():
            start = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        else:
            start = {name: tensor.to(base.weight.device, copy=True) for name, tensor in (kept or {}).items()}
            if not specs.keys() <= start.keys():  # with all of them, the base may have been dropped
                # In inference mode, the positions of single values come from a file. To choose them would be slow.
                first = first_parts(base, replace(slice_, support="first") if inference_mode else slice_, values)
                start = first | start
        active = adapter_name in self.active_adapters and not inference_mode
        for name, spec in specs.items():
            tensor = start[name].detach().to(spec.dtype)
            if spec.trained and not init_weights and not tensor.is_meta and kept is None:
                scale = tensor.std() if tensor.numel() > 1 else tensor.new_zeros(())
                tensor = tensor + torch.randn_like(tensor) * scale.clamp_min(0.1)
            parameter = nn.Parameter(tensor.contiguous(), requires_grad=spec.trained and active)
            getattr(self, f"sensi_{name}")[adapter_name] = parameter
        self._freeze_parts()
        self.update_parents()

    def discard_parts(self, adapter_name: str) -> None:
        """Removes an adapter from this layer. Unlike `delete_adapter`, it never activates another adapter."""
        for name in (*self.tensor_names, "sensi_slices", "sensi_plans", "sensi_integers"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        self.sensi_unchecked.discard(adapter_name)
        self._sensi_fused.clear()
        self.update_parents()

    def drop_base(self, adapter_name: str) -> None:
        """Drops the base's rows or columns that this adapter does not need. The others get the adapter's order."""
        slice_, base = self.sensi_slices[adapter_name], self.get_base_layer()
        select(base, slice_.dim, slice_.kept[:0] if slice_.whole else slice_.kept)
        if slice_.whole:  # not `[out, 0]`, which FSDP2 cannot collect (see `replicas.check_columns`)
            base.weight.data = base.weight.new_empty(0, 0)
        self.sensi_base_dropped = True
        self._sensi_fused.clear()

    def reduce_base(self, adapter_name: str, slice_: Slice) -> None:
        """After `drop_base`: drops the rows or columns of the base of units that the new `slice_` does not keep."""
        old, base = self.sensi_slices[adapter_name], self.get_base_layer()
        if not old.whole:  # if it is, nothing of the base is left
            select(base, slice_.dim, positions_in(old.kept, slice_.kept))
        elif not len(slice_.kept):  # the base alone computes a sublayer without units, and needs its shape
            base.weight.data = oriented(base, base.weight.new_empty(slice_.kept_shape))
            update_features(base)

    def draw_mask(self, adapter_name: str, scores: torch.Tensor) -> None:
        """Sets the adapter's mask to the best `scores` `[out, in]` (in the base's order) at its sparsity."""
        slice_ = self.sensi_slices[adapter_name]
        assert slice_.sparsity is not None
        rank = slice_.kept.argsort().argsort().to(scores.device)  # place of each kept unit in ascending order
        mask = top_mask(scores.index_select(slice_.dim, rank), slice_.sparsity)
        with torch.no_grad():
            self.sensi_bits[adapter_name].copy_(pack_mask(mask))
        self.sensi_integers.pop(adapter_name, None)
        self._sensi_fused.clear()

    def is_masked(self, adapter_name: str) -> bool:
        """Whether the adapter's mask removes at least one weight. True if no mask is stored, or if none could."""
        if (bits := self.part("bits", adapter_name)) is None:
            return True
        slice_ = self.sensi_slices[adapter_name]
        removed = masked_count(slice_.kept_shape.numel(), slice_.sparsity or 0.0)
        return removed == 0 or not bool(unpack_mask(bits, slice_.kept_shape).all())

    def compress(self, adapter_name: str, kind: str) -> None:
        """Replaces the trained values by codes (see `compression`), or the scores of a mask by its bits."""
        if (slice_ := self.sensi_slices.get(adapter_name)) is None:
            return
        self._sensi_fused.clear()
        if kind == "bits":
            if (scores := self.part("scores", adapter_name)) is not None and slice_.sparsity is not None:
                bits = pack_mask(top_mask(scores, slice_.sparsity))
                del self.sensi_scores[adapter_name]
                self.sensi_bits[adapter_name] = nn.Parameter(bits, requires_grad=False)
                self.sensi_slices[adapter_name] = replace(slice_, learns_mask=False)
            return
        trained = {name: p for name in PARTS if (p := self.part(name, adapter_name)) is not None}
        base_values = self._base_values(slice_, trained)
        differences = {name: p.detach().float() - base_values.get(name, 0.0) for name, p in trained.items()}
        codes, scales = encode(differences, slice_.dim, kind)
        for name in trained:
            del getattr(self, f"sensi_{name}")[adapter_name]
        if trained:
            self.sensi_codes[adapter_name] = nn.Parameter(codes, requires_grad=False)
        if len(scales):
            self.sensi_scales[adapter_name] = nn.Parameter(scales, requires_grad=False)
        self.sensi_slices[adapter_name] = replace(slice_, compressed=kind)

    # -- PEFT's contract ----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_parts()
        self.update_parents()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_parts()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.sensi_base_dropped:
            raise base_is_dropped("disable the adapter")
        if not enabled and self.merged:  # now: some blocks read the sizes of all their Linears before one of them runs
            self.unmerge()
        super().enable_adapters(enabled)
        self.update_parents()
        self._update_saved_modules()

    def delete_adapter(self, adapter_name: str) -> None:
        if self.sensi_base_dropped and adapter_name in self.sensi_slices:
            raise base_is_dropped("delete the adapter")
        super().delete_adapter(adapter_name)
        self._sensi_fused.clear()
        self.update_parents()
        self._update_saved_modules()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replaces the weight and bias of the base layer by the adapter's. Trimmed units make the matrices smaller.

        Raises `SensiError` if the base is quantized or the adapters do not add up, and `ValueError` if `safe_merge` is
        set and the result has NaN or infinite values.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.sensi_slices]
        together = names + [n for n in self.merged_adapters if n not in names]
        if len(together) > 1:
            self.check_combination(together)
        base = self.get_base_layer()
        if names and self.sensi_coded:
            raise not_mergeable()
        for name in names:
            with torch.no_grad():
                together = [*self.merged_adapters, name]
                weight, bias = self._merged(name) if len(together) == 1 else self._combined(together)
            if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._sensi_unmerged.append((base.weight, bias_of(base)))
            dtype = base.weight.dtype
            shared = weight.data_ptr() in {t.data_ptr() for t in (base.weight, *self.own_parts(name).values())}
            weight = oriented(base, weight).to(dtype, copy=shared).contiguous()
            base.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
            update_features(base)
            self.merged_adapters.append(name)
        self.update_parents()

    def unmerge(self) -> None:
        """Puts the base's own tensors back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        base.weight, bias = self._sensi_unmerged[0]
        if hasattr(base, "bias"):
            base.bias = bias
        update_features(base)
        self._sensi_unmerged.clear()
        self.merged_adapters.clear()
        self.update_parents()

    def check_combination(self, adapter_names: list[str]) -> None:
        """Raises `SensiError` if the adapters cannot be active or merged at the same time."""
        slices = [self.sensi_slices[name] for name in adapter_names if name in self.sensi_slices]
        if len(adapter_names) > 1 and self.sensi_coded:
            raise SensiError("Only one adapter can be active on a quantized base: activate one at a time.")
        if self.sensi_base_dropped or any(slice_.trims or slice_.sparsity is not None for slice_ in slices):
            raise SensiError(
                f"The adapters {adapter_names} cannot be active or merged together: at least one of them trims units "
                f"or masks weights. Only adapters that remove nothing can be added. Activate one adapter at a time."
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype, which would round float32 values on a bfloat16 base.
        device = device or self.get_base_layer().weight.device
        if device.type == "meta":
            return  # the base is filled later, and what was loaded must not get lost
        for parameter in self.own_parts(adapter_name).values():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)

    def marks(self) -> dict[str, bytes]:
        return layer_marks(self.sensi_slices, self.sensi_plans, self.merged_adapters)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        mark = mark_of(self)
        unpack(self.get_base_layer())  # the base's own `state_dict` would do it, and lose the order of the scales
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if marks_are_written():
            destination[prefix + LAYER_MARK] = mark

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
    ) -> None:
        self._sensi_fused.clear()
        check_plain_state(self, state_dict, prefix)  # before PyTorch writes a value into this layer
        ours = next((key for key in state_dict if key.startswith(prefix + "sensi_")), None)
        if ours is not None and prefix + LAYER_MARK not in state_dict and marks_are_written():
            warn_of_no_mark(ours)
        self.sensi_integers.clear()  # others may come now
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)

    # -- internals ----------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:  # values that were written through `.data` do not show in a cache's key
            self._sensi_fused.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._sensi_fused.clear()
        codes = [*self.sensi_codes.values(), *self.sensi_scales.values()]
        masters = (p for name in self.tensor_names for p in getattr(self, name).values())
        with torch.no_grad():  # what `unmerge` puts back goes where the base goes
            tensors: list[Any] = [tensor for pair in self._sensi_unmerged for tensor in pair]
            tensors = [t if t is None else nn.Parameter(fn(t), t.requires_grad) for t in tensors]
        self._sensi_unmerged = list(zip(tensors[::2], tensors[1::2], strict=True))
        return super()._apply(without_rounding(fn, masters, codes), recurse)

    def _freeze_parts(self) -> None:
        for adapter_name, frozen in self.sensi_frozen.items():
            if frozen and adapter_name in self.sensi_weight:
                self.sensi_weight[adapter_name].requires_grad_(False)

    def _applied(self) -> list[str]:
        """The active adapters that the forward pass applies: none while adapters are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.sensi_slices]

    def in_use(self, count: int) -> int:
        """How many of the base's `count` heads or neurons come into this layer, which is their output projection."""
        names = self.merged_adapters[-1:] or self._applied()[:1]
        if not names:
            return count
        slice_ = self.sensi_slices[names[0]]  # its units may be heads, or the whole sublayer
        return count * len(slice_.kept) // slice_.base_shape[slice_.dim]

    def update_parents(self) -> None:
        """Sets attributes of parent modules, such as `num_attention_heads`, to the number of units in use."""
        for module, attribute, whole in self.sensi_attributes:
            setattr(module, attribute, self.in_use(whole))

    def _update_saved_modules(self) -> None:
        """Enables and activates the modules that are saved whole together with the layers of the same adapter.

        Transformers' `enable_adapters` does not reach them, and PEFT's `delete_adapter` does not activate those that
        the deleted adapter did not have.
        """
        for wrapper in self.sensi_saved_modules:
            if wrapper.disable_adapters != self.disable_adapters:
                wrapper.enable_adapters(not self.disable_adapters)
            activate(wrapper, self.active_adapters)

    def __repr__(self) -> str:
        return "sensi." + super().__repr__()


def base_is_dropped(action: str) -> SensiError:
    return SensiError(
        f"The base model was dropped with `keep_base=False`, so it is not possible to {action}. Load the base model "
        f"again, or wrap it with `keep_base=True`."
    )


def layers_of(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """The adapter layers of a model by name: all of them, or those that have a slice of one adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SensiLayer)}
    return {n: layer for n, layer in layers.items() if adapter_name is None or adapter_name in layer.sensi_slices}
