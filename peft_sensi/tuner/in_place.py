"""Merges an adapter into its base layers temporarily, to score and refit the trained model like a plain one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..layers.layer import layers_of
from ..planning.plan import Plan
from ..planning.refit import Refitted, refit
from ..planning.trimmed import kept_values
from ..scoring.calibration import LossFn
from ..utils.errors import SensiError


@contextmanager
def merged_in_place(root: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inside the block, the base layers of `root` hold the adapter's trained weights, and the forward pass uses them.

    So `linear_of(root, name).weight` is the weight that the adapted model computes with, in the dtype of the base: a
    16-bit base rounds it. Its kept units are in the base's order. Columns behind a closed gate are zero. For modules
    that PEFT saves whole, the forward pass uses the adapter's copies as always. Afterwards every layer has its own
    tensor objects again; layers that were merged before stay merged. The block needs memory for a second copy of
    the weights. `adapter_name` must be the only active adapter, and the base must not be quantized.
    """
    layers = layers_of(root, adapter_name).values()
    for layer in layers:
        if layer.active_adapters != [adapter_name]:
            raise SensiError(
                f"The adapter {adapter_name!r} must be the only active one to be scored: call "
                f"`set_adapter({adapter_name!r})` first."
            )
        if layer.disable_adapters:
            raise SensiError(
                "The adapters are disabled, so what they compute cannot be scored: call `enable_adapter_layers()` of "
                "the tuner (`model.base_model`), or leave the block of `disable_adapter()`."
            )
        if layer.merged and layer.merged_adapters != [adapter_name]:
            raise SensiError(f"The adapters {layer.merged_adapters} are merged: call `unmerge_adapter()` first.")
    unmerged = [layer for layer in layers if not layer.merged]
    try:
        for layer in unmerged:
            layer.merge(adapter_names=[adapter_name])
        yield
    finally:
        for layer in unmerged:
            if layer.merged:  # not all of them are, if merging failed
                layer.unmerge()


def refit_changes(
    root: nn.Module,
    plan: Plan,
    batches: list[Mapping[str, Any]],
    loss_fn: LossFn | None,
    progress: bool,
    rounds: int = 0,
    joint: Sequence[Mapping[str, Any]] = (),
) -> Refitted:
    """`refit` inside `merged_in_place`, as changes of the adapted weights: float32, of the kept units in base order.

    A change can be added to the trained weight whatever else the adapter adds to it, such as a low-rank term. A mask
    would undo a part of the change, so masked layers are left out.
    """
    changes: Refitted = {}
    for name, (weight, bias) in refit(root, plan, batches, loss_fn, progress, rounds, joint).items():
        layer: Any = root.get_submodule(name)
        if layer.sensi_slices[layer.merged_adapters[-1]].sparsity is not None:
            continue
        base = layer.get_base_layer()
        group = next(group for group in plan.anatomy.trimmable if name in group.modules)
        before, bias_before = kept_values(base, name, group, plan)
        bias = None if bias is None or bias_before is None else bias - bias_before.float()
        changes[name] = weight - before.float(), bias
    return changes
