"""Keeps positions and masks as they are where something takes them for weights, and averages them.

They are integer parameters of a layer, so that every loader and wrapper of PyTorch sees them. A moving average of all
parameters (`AveragedModel`, EMA) computes `0.9999 * x + 0.0001 * x` as a float, and cuts it off: a fifth of the
integers would become smaller by 1, and the copy would compute with wrong weights.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from .values import version_of


INTEGERS = ("places", "bits")

# For each tensor by its name: what tells that it was written to, and a copy.
Noted: TypeAlias = "dict[str, tuple[tuple[int, int], torch.Tensor]]"


def keep_integers(layer: Any, adapter_name: str) -> None:
    """Undoes what averages have done to the integers of an adapter on a `SensiLayer` (see `_is_cut_off`).

    Other changes come from loaders, and stay. Tensors that were not written to since the last call are not looked at.
    """
    parts = {name: p for name in INTEGERS if (p := layer.part(name, adapter_name)) is not None}
    if not parts or any(type(p) is not nn.Parameter or p.is_meta for p in parts.values()):
        return
    noted = layer.sensi_integers.get(adapter_name, {})
    if noted.keys() == parts.keys() and all(version_of(parts[name]) == noted[name][0] for name in noted):
        return
    for name, now in parts.items():
        copy = noted[name][1].to(now.device) if name in noted and noted[name][1].shape == now.shape else now
        if _is_cut_off(now.detach().long(), copy.long()):
            with torch.no_grad():
                now.copy_(copy)
    layer.sensi_integers[adapter_name] = {name: (version_of(p), p.detach().clone()) for name, p in parts.items()}


def _is_cut_off(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether one of the integers (int64) has changed, and all of them by no more than averages do.

    An average changes a small integer by 1. A position of six digits or more becomes smaller with each average, until
    the average of `now` and `before` adds what the float32 sum loses: a share of up to `2^-23 / (1 - decay)`. This is
    0.1 % for a decay of 0.9999.
    """
    changes = (now - before).abs()
    return bool(changes.any() and (changes <= (before // 64).clamp_min(1)).all())
