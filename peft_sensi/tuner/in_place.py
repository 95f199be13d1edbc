"""Merges an adapter into its base layers temporarily, so that the trained model can be scored like a plain one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..layers.layer import layers_of
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
        if layer.active_adapters != [adapter_name] or layer.disable_adapters:
            raise SensiError(
                f"The adapter {adapter_name!r} must be the only active one, and enabled, to be scored: call "
                f"`set_adapter({adapter_name!r})` first."
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
