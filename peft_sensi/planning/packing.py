"""The compact text form of a plan: masks of units as base64 text, which is checked and unpacked without a model."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..anatomy.units import Group
from ..utils.checks import shown
from ..utils.errors import SensiError, SensiLoadError
from ..utils.states import FROZEN, TRIMMED


PLAN_DAMAGED = "The plan is damaged or was edited: take its file from its source again."
OTHER_BASE = "Load the base model that the plan was made for."
MOST_IN_GROUP, MOST_IN_PLAN = 2**24, 2**28


def other_group(name: str, of_plan: bool) -> SensiLoadError:
    """The error about a group that only the plan has (`of_plan`), or only the model."""
    found = f"names the group {name!r}, which this base model does not have"
    if not of_plan:
        found = f"says nothing about {name!r}, which this base model has"
    advice = OTHER_BASE
    if name.endswith(".tokens"):
        advice = "It trains no rows of embeddings: wrap the model without `calibration`, too."
        if of_plan:
            advice = (
                "It trains rows of an embedding, and this model was wrapped without `calibration`, which says which "
                "rows those are: wrap it with the same batches."
            )
    return SensiLoadError(f"The plan {found}. {advice}")


def pack_mask(mask: np.ndarray) -> str:
    """A boolean mask as text: `"all"`, `"none"`, or its bits in base64, the first unit in the highest bit."""
    if mask.all():
        return "all"
    return base64.b64encode(np.packbits(mask).tobytes()).decode() if mask.any() else "none"


def unpack_group(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """The states of a group's units (uint8, `[size]`) from its entry in a checked dict. Raises `SensiLoadError`."""
    kept, tuned = (_unpack_mask(entry[key], entry["size"], f"{name}.{key}") for key in ("kept", "tuned"))
    if (tuned & ~kept).any():
        raise SensiLoadError(f"The plan tunes units of {name!r} that it also trims. {PLAN_DAMAGED}")
    return kept.astype(np.uint8) + tuned.astype(np.uint8)


def unpack_states(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The states of each group's units from a plan dict, without the model. Raises `SensiLoadError`."""
    check_plan_dict(values)
    return {name: unpack_group(name, entry) for name, entry in values["groups"].items()}


def _unpack_mask(text: str, size: int, where: str) -> np.ndarray:
    if text in ("all", "none"):
        return np.full(size, text == "all")
    length = -(-size // 24) * 4
    if len(text) != length:  # checked first, so that a long text is never decoded
        raise SensiLoadError(
            f"The plan's mask {where!r} has {len(text)} characters, but {size} units need {length}. {PLAN_DAMAGED}"
        )
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    except ValueError as error:
        raise SensiLoadError(f"The plan's mask {where!r} is not base64: {error}. {PLAN_DAMAGED}") from None
    if len(bits) != -(-size // 8) * 8 or bits[size:].any():
        raise SensiLoadError(
            f"The plan's mask {where!r} does not hold exactly one bit for each of {size} units. {PLAN_DAMAGED}"
        )
    return bits[:size].astype(bool)


def check_plan_dict(values: Any) -> None:
    """Checks the keys and types of a plan dict that came from a file. Raises `SensiLoadError`."""

    def is_amount(value: Any, least: int = 0) -> bool:  # unlike a count, it may need more than 32 bits
        return type(value) is int and least <= value < 2**48

    keys = {"sequence_length", "always_trained", "groups"}
    if not isinstance(values, Mapping):
        raise SensiLoadError(f"`plan` must be a `Plan` or its dict (`plan.to_dict()`), got {shown(values)}.")
    if set(values) != keys:
        found = sorted(map(str, values))
        raise SensiLoadError(f"A `plan` must have exactly the keys {sorted(keys)}, got {shown(found)}. {PLAN_DAMAGED}")
    for name, least in (("sequence_length", 1), ("always_trained", 0)):
        if not is_amount(values[name], least):
            raise SensiLoadError(
                f"The plan's `{name}` must be a whole number of at least {least}, got {shown(values[name])}. "
                f"{PLAN_DAMAGED}"
            )
    if not isinstance(values["groups"], Mapping):
        raise SensiLoadError(
            f"The plan's groups must be a mapping from names, got {shown(values['groups'])}. {PLAN_DAMAGED}"
        )
    for name, entry in values["groups"].items():
        good = isinstance(entry, Mapping) and set(entry) == {"size", "kept", "tuned"} and is_amount(entry["size"])
        if not good or not all(isinstance(entry[key], str) for key in ("kept", "tuned")):
            raise SensiLoadError(
                f"The plan's group {shown(name)} must have a size and two masks, kept and tuned, got {shown(entry)}. "
                f"{PLAN_DAMAGED}"
            )
    # A file must not decide how much memory is allocated: a unit needs a byte, also if the text is only "all".
    sizes = [entry["size"] for entry in values["groups"].values()]
    largest, total = max(sizes, default=0), sum(sizes)
    if largest > MOST_IN_GROUP or total > MOST_IN_PLAN:
        raise SensiLoadError(
            f"The plan claims {largest:,} units in a group, and {total:,} in all groups, more than any model has. "
            f"{PLAN_DAMAGED}"
        )


def check_least(group: Group, kept: int, argument: str) -> None:
    """Raises `SensiError` if an argument would leave a group fewer units than its layer needs to run."""
    if kept < group.least:
        raise SensiError(
            f"{argument} would leave {kept} units of {group.name!r}, which cannot run with fewer than {group.least}: "
            f"let at least {group.least} of its units stay."
        )


def states_for(group: Group, entry: Mapping[str, Any]) -> np.ndarray:
    """The states of a model's group, uint8 of shape `[units]`, from its entry in a plan's dict.

    Raises `SensiLoadError` if the entry does not fit the group.
    """
    if entry["size"] != group.size and group.kind != "token":
        raise SensiLoadError(
            f"The plan has {entry['size']} units in {group.name!r}, this base model has {group.size}. {OTHER_BASE}"
        )
    state = unpack_group(group.name, entry)
    if len(state) != group.size:  # a vocabulary that was resized: tokens are known by their number
        if (state[group.size :] != FROZEN).any():
            raise SensiLoadError(
                f"The plan tunes the token {group.size + np.argmax(state[group.size :] != FROZEN)} of "
                f"{group.name!r}, but this base model has only {group.size} tokens. {OTHER_BASE}"
            )
        state = np.pad(state[: group.size], (0, max(0, group.size - len(state))), constant_values=FROZEN)
    kept = state != TRIMMED
    if not group.trimmable and not kept.all():
        reason = f"only heads and neurons can be trimmed. {PLAN_DAMAGED}"
        if group.fixed:
            reason = f"this group cannot be trimmed in this model (is it quantized?). {OTHER_BASE}"
        raise SensiLoadError(f"The plan trims units of {group.name!r}, but {reason}")
    if kept.sum() < group.least:
        raise SensiLoadError(
            f"The plan keeps {int(kept.sum())} units of {group.name!r}, which cannot run with fewer than "
            f"{group.least}. {OTHER_BASE}"
        )
    return state
