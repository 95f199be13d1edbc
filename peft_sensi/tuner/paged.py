"""Transformers' continuous batching is refused for models whose layers have fewer heads than their config says.

Its cache of keys and values takes the number of heads from the config, and has one number for all layers. In a trimmed
model, a thread would fail in the background: the user would get no output, and no error.
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


def hook_continuous_batching() -> None:
    """Wraps the method of Transformers that all kinds of continuous batching call. A second call changes nothing."""
    function = getattr(GenerationMixin, "init_continuous_batching", None)  # versions differ
    if function is not None and not hasattr(function, "sensi_refuses"):
        GenerationMixin.init_continuous_batching = _checked(function)  # type: ignore[method-assign]


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = getattr(self, "config", None)
        if layers_of(self) or hasattr(config, RECORD_KEY):
            expected = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
            if any(heads != expected for heads in _heads(self)):
                raise SensiError(
                    "Continuous batching (`generate_batch`) works only if each layer has the number of heads that the "
                    "config says, and heads of this model were trimmed. Call `generate`. Or wrap with "
                    "`widths='uniform'`, and use what `merge_and_unload()` returns: its config has the new number."
                )
        return function(self, *args, **kwargs)

    call.sensi_refuses = function  # type: ignore[attr-defined]
    return call


def _heads(model: nn.Module) -> list[int]:
    """The number of heads (of keys and values) that each layer of a model uses."""
    sizes = []
    for group in build_anatomy(model).groups:
        if group.kind == "head":
            layer = model.get_submodule(group.output)
            sizes.append(layer.units_in_use() if isinstance(layer, SensiLayer) else group.size)
    return sizes
