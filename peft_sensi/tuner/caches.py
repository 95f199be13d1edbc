"""Caches of Transformers that take the number of heads from the config, for models whose layers have fewer heads.

Continuous batching has one number for all layers and is refused. In a trimmed model, a thread would fail in the
background: the user would get no output, and no error. A static cache with `prefill_chunk_size` is made before the
first forward pass. Without the shape, Transformers makes it layer by layer in that pass, as without chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationMixin

from ..anatomy.build import build_anatomy
from ..anatomy.widths import RECORD_KEY
from ..layers.layer import SensiLayer, layers_of
from ..utils.errors import SensiError


def hook_caches() -> None:
    """Wraps the methods of Transformers that make these caches. A second call changes nothing."""
    hooks = {"init_continuous_batching": _refuse, "_get_static_cache_init_shape": lambda: None}
    for name, instead in hooks.items():
        function = getattr(GenerationMixin, name, None)  # versions differ
        if function is not None and not hasattr(function, "sensi_original"):
            setattr(GenerationMixin, name, _with_all_heads(function, instead))


def _with_all_heads(function: Callable[..., Any], instead: Callable[[], Any]) -> Callable[..., Any]:
    """The function. For a model whose layers have other numbers of heads than its config, `instead` is called."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = getattr(self, "config", None)
        if layers_of(self) or hasattr(config, RECORD_KEY):
            expected = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
            if any(heads != expected for heads in _heads(self)):
                return instead()
        return function(self, *args, **kwargs)

    call.sensi_original = function  # type: ignore[attr-defined]
    return call


def _refuse() -> None:
    raise SensiError(
        "Continuous batching (`generate_batch`) works only if each layer has the number of heads that the config "
        "says, and heads of this model were trimmed. Call `generate`. Or wrap with `widths='uniform'`, and use what "
        "`merge_and_unload()` returns: its config has the new number."
    )


def _heads(model: nn.Module) -> list[int]:
    """The number of heads (of keys and values) that each layer of a model uses."""
    sizes = []
    for group in build_anatomy(model).groups:
        if group.kind == "head":
            layer = model.get_submodule(group.output)
            sizes.append(layer.in_use(group.size) if isinstance(layer, SensiLayer) else group.size)
    return sizes
