"""Makes PEFT know the method.

`peft.utils.register_peft_method` accepts only members of PEFT's own enum, and there is no entry point for plugins, so
the mappings are written directly.
"""

from __future__ import annotations

from typing import Any

from peft import mapping

from .reporting.hub import hook_cards
from .tuner.config import SensiConfig, SensiPeftType
from .tuner.model import SensiModel
from .utils.errors import SensiError


def register() -> None:
    """Idempotent. Raises `SensiError` when another package has taken the name."""
    name = SensiPeftType.SENSI
    entries: tuple[tuple[dict[Any, Any], Any], ...] = (
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SensiConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, SensiModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, SensiModel.prefix),
    )
    for table, value in entries:
        taken = table.get(name)
        if taken is not None and taken is not value:
            raise SensiError(f"Another package has already registered a PEFT method called {name.value!r}: {taken!r}.")
    for table, value in entries:
        table[name] = value
    hook_cards()
