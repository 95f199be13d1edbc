"""What a layer adds to a plain state dict, and the checks of a plain state dict before a value of it is written."""

from __future__ import annotations

from typing import Any

import torch

from .integers import check_integers, keep_integers
from .marks import LAYER_MARK, check_marks, marks_to_tensor
from .values import round_integers


def mark_of(layer: Any) -> torch.Tensor:
    """The entry of a `SensiLayer` in a state dict (see `marks`). Repairs integers that were averaged in place."""
    noted = {name: keep_integers(layer, name) for name in layer.sensi_slices}
    return marks_to_tensor(layer.marks(), {name: one.digest for name, one in noted.items() if one is not None})


def check_plain_state(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Checks what a plain state dict has for a `SensiLayer`. Raises `SensiLoadError`.

    Integers that something has made floats, or has averaged, are repaired in place of the dict.
    """
    own = {f"{prefix}sensi_{part}.{name}": (name, p) for name in layer.sensi_slices
           for part, p in layer.own_parts(name).items()}  # fmt: skip
    digests = {}
    if (key := prefix + LAYER_MARK) in state_dict:
        digests = check_marks(state_dict[key], layer.marks(), key, {own[k][0] for k in own.keys() & state_dict.keys()})
    round_integers(state_dict, {key: parameter for key, (_, parameter) in own.items()})
    check_integers(layer, state_dict, prefix, digests)
