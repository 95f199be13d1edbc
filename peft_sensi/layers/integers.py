"""Keeps positions and masks as they are where something takes them for weights, and averages them.

They are integer parameters of a layer, so that every loader and wrapper of PyTorch sees them. A moving average of all
parameters (`AveragedModel`, EMA) computes `0.9999 * x + 0.0001 * x` as a float, and cuts it off: a fifth of the
integers would become smaller by 1, and the copy would compute with wrong weights. What can be recognized as that is
undone, and so is a conversion to floats, in which large positions would be rounded. Other changes in place come from
loaders, and stay. In a state dict, integers that are not what they were when it was made are an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..utils.errors import SensiError, SensiLoadError
from ..utils.replicas import is_partitioned
from .versions import version_of


INTEGERS = ("places", "bits", "codes")


class Noted(NamedTuple):
    """Integers of an adapter as they were: for each by its name what tells that it was written to, and a copy."""

    versions: dict[str, tuple[int, int] | None]
    copies: dict[str, torch.Tensor]

    @property
    def digest(self) -> bytes:
        return _digest(self.copies)


def keep_integers(layer: Any, adapter_name: str) -> Noted | None:
    """Undoes what averages have done to the integers of an adapter on a `SensiLayer` (see `_is_truncated`).

    Also undoes a conversion to another dtype, as of all frozen parameters of a model (`p.data = p.data.half()`).
    Returns the integers; `None` if there are none, or only shards of them; those of the last forward pass while
    DeepSpeed ZeRO-3 has partitioned them. Tensors that were not written to since the last call are not looked at.
    Other changes come from loaders, and stay. `SensiError` is raised if a mask that a schedule draws later has changed
    before, and for floats that may have lost digits.
    """
    gate = layer.part("gate", adapter_name)
    if gate is not None and gate.is_floating_point() and not is_partitioned(gate):
        gate.data = gate.data.to(torch.uint8)  # zeros and ones are the same in every dtype
    parts = {name: p for name in INTEGERS if (p := layer.part(name, adapter_name)) is not None}
    if layer.sensi_slices[adapter_name].compressed == "bfloat16":
        parts.pop("codes", None)
    if not parts or any(type(p) is not nn.Parameter or p.is_meta for p in parts.values()):
        return None
    noted: Noted | None = layer.sensi_integers.get(adapter_name)
    if any(map(is_partitioned, parts.values())):
        return noted
    if noted is not None and noted.copies.keys() != parts.keys():
        noted = None
    if noted is not None and all(
        noted.versions[name] == version_of(p) and noted.copies[name].dtype == p.dtype for name, p in parts.items()
    ):
        return noted
    for name, before in {} if noted is None else noted.copies.items():
        now, copy = parts[name], before.to(parts[name].device)
        if now.shape == copy.shape and now.dtype == copy.dtype and torch.equal(now, copy):
            continue
        if now.shape == copy.shape and (torch.equal(now, copy.to(now.dtype)) or _is_truncated(now.detach(), copy)):
            with torch.no_grad():
                if now.dtype == copy.dtype:
                    now.copy_(copy)
                else:
                    now.data = copy.clone()
        elif name == "bits" and layer.sensi_slices[adapter_name].drawn_later:
            raise SensiError(
                f"Something has written into the mask of the adapter {adapter_name!r}, which a schedule draws later. "
                f"If this is a copy with averaged weights (EMA), make a new copy after the mask is drawn: masks have "
                f"no average."
            )
        else:
            noted = None
    if short := [p for p in parts.values() if p.is_floating_point()]:
        raise SensiError(
            f"Positions, masks or codes of the adapter {adapter_name!r} were converted to {short[0].dtype}, which may "
            f"not hold them. Convert parameters of float dtypes only, or the whole model: `model.to(dtype)`."
        )
    versions = {name: version_of(p) for name, p in parts.items()}
    copies = {name: p.detach().clone() for name, p in parts.items()} if noted is None else noted.copies
    layer.sensi_integers[adapter_name] = noted = Noted(versions, copies)
    return noted


def note_integers(layer: Any, *_: Any) -> None:
    """Notes the integers of a `SensiLayer` as they are, but not those that a loader may not have filled yet."""
    for name in layer.sensi_slices:
        if name not in layer.sensi_unchecked:
            keep_integers(layer, name)


def check_integers(layer: Any, state_dict: dict[str, Any], prefix: str, digests: Mapping[str, bytes]) -> None:
    """Compares the integers in a plain state dict with the digests that were saved beside them.

    Integers that were averaged and truncated become those of the layer again, in place of the dict, if the digest says
    that they were the same. Raises `SensiLoadError` if they are others, also if DeepSpeed left them out.
    """
    for adapter_name, digest in digests.items():
        keys = {name: f"{prefix}sensi_{name}.{adapter_name}" for name in INTEGERS}
        found = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        if any(type(t) not in (torch.Tensor, nn.Parameter) or t.is_meta for t in found.values()):
            continue
        found = {name: tensor for name, tensor in found.items() if not tensor.is_floating_point()}
        if found and is_close(_digest(found), digest):
            continue
        if not found and not any(f"{prefix}{name}.{adapter_name}" in state_dict for name in layer.tensor_names):
            continue  # nothing of this adapter is loaded
        own = keep_integers(layer, adapter_name)
        same = own is not None and is_close(own.digest, digest)
        if not found or any(map(is_partitioned, layer.own_parts(adapter_name).values())):  # left out, or no values
            if same:
                continue
            raise SensiLoadError(
                f"The state dict has values of the adapter {adapter_name!r}, but not the integers (positions or a "
                f"mask) that belong to them, and this model has others. DeepSpeed leaves out what is not trained. To "
                f"go on from its checkpoint, load the adapter in the same folder, and make a new optimizer: "
                f"`PeftModel.from_pretrained(base, folder, is_trainable=True)`."
            )
        if own is None or not same or own.copies.keys() != found.keys():
            raise SensiLoadError(
                f"{next(iter(keys.values()))!r} or another integer in the state dict is not what it was when the "
                f"state dict was made. Average or convert only floats, and copy integers as they are."
            )
        state_dict.update({keys[name]: copy.clone() for name, copy in own.copies.items()})


def is_close(found: bytes, expected: bytes) -> bool:
    """Whether two hashes are the same, up to a difference of 1 in each byte, as an average can leave it."""
    return len(found) == len(expected) and all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


def _digest(parts: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of the names and values."""
    result = hashlib.sha256()
    for name, tensor in sorted(parts.items()):
        result.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return result.digest()


def _is_truncated(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether `now` are the integers `before` after averages with the same integers.

    An average changes a small integer by 1. A position of six digits or more becomes smaller with each average, until
    the average of `now` and `before` adds what the float32 sum loses: a share of up to `2^-23 / (1 - decay)`. This is
    0.1 % for a decay of 0.9999. Equal integers become equal ones, which tells a mask from an average of two masks.
    """
    now, before = now.round().long(), before.long()
    if not bool(((now - before).abs() <= (before // 64).clamp_min(1)).all()):
        return False
    values, index = before.unique(return_inverse=True)
    result = now.new_empty(len(values))
    result[index.flatten()] = now.flatten()
    return torch.equal(result[index], now)
