"""TODO docstring."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..utils.checks import shown
from ..utils.errors import SensiLoadError


def unpack_states(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """States (uint8) of each group's units, from `Plan.to_dict`, without a model. Raises `SensiLoadError`."""
    check_plan_dict(values)
    states = {}
    for name, entry in values["groups"].items():
        if entry["size"] > 2**24:  # a file must not decide how much memory is allocated
            raise SensiLoadError(f"The plan's group {name!r} claims {entry['size']:,} units.")
        kept, tuned = (_unpack(entry[key], entry["size"], f"{name}.{key}") for key in ("kept", "tuned"))
        states[name] = kept.astype(np.uint8) + (kept & tuned).astype(np.uint8)
    return states


def _pack(mask: np.ndarray) -> str:
    if mask.all():
        return "all"
    return base64.b64encode(np.packbits(mask).tobytes()).decode() if mask.any() else "none"


def _unpack(text: str, size: int, where: str) -> np.ndarray:
    if text in ("all", "none"):
        return np.full(size, text == "all")
    if len(text) != -(-size // 24) * 4:  # before it is unpacked
        raise SensiLoadError(
            f"The plan's mask {where!r} has {len(text)} characters, expected {-(-size // 24) * 4} for {size} units."
        )
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    except ValueError as error:
        raise SensiLoadError(f"The plan's mask {where!r} is not base64: {error}.") from None
    if len(bits) != -(-size // 8) * 8 or bits[size:].any():
        raise SensiLoadError(
            f"The plan's mask {where!r} holds {len(bits)} bits where {size} units need another number."
        )
    return bits[:size].astype(bool)


def check_plan_dict(values: Any) -> None:
    """Checks everything about a plan from outside that can be checked without a model. Raises `SensiLoadError`."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48

    keys = {"sequence_length", "always_trained", "groups"}
    if not isinstance(values, Mapping) or set(values) != keys:
        found = sorted(map(str, values)) if isinstance(values, Mapping) else values
        raise SensiLoadError(f"A `plan` must have exactly the keys {sorted(keys)}, got {shown(found)}.")
    for name in ("sequence_length", "always_trained"):
        if not is_count(values[name]):
            raise SensiLoadError(f"The plan's `{name}` must be a whole number, got {shown(values[name])}.")
    if not isinstance(values["groups"], Mapping):
        raise SensiLoadError("The plan's groups must be a mapping from group names.")
    for name, entry in values["groups"].items():
        good = isinstance(entry, Mapping) and set(entry) == {"size", "kept", "tuned"} and is_count(entry["size"])
        if not good or not all(isinstance(entry[key], str) for key in ("kept", "tuned")):
            raise SensiLoadError(
                f"The plan's group {shown(name)} must have a size and two masks, kept and tuned, got {shown(entry)}."
            )
