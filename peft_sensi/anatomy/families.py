"""The table of model families: which layouts a model has, by the `model_type` of its config."""

from __future__ import annotations

from typing import Any

from .decoders import DECODERS
from .encoders import ENCODERS
from .layouts import Family, Layouts


FAMILIES: dict[str, Family] = {**ENCODERS, **DECODERS}


def layouts_of(config: Any) -> Layouts:
    """The layouts for a model with this config. Unknown families have none."""
    entry = FAMILIES.get(getattr(config, "model_type", "") or "", ())
    return entry(config) if callable(entry) else entry
