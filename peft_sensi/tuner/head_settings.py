"""What an adapter keeps of its base's config: names of the labels, problem type, pad token."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def head_settings(model: nn.Module) -> dict[str, Any] | None:
    """`SensiConfig.head_settings` of a base model; `None` if its config says nothing that a fresh one does not.

    The names `LABEL_0` and so on are not kept: they are what a config without names has.
    """
    config: Any = getattr(model, "config", None)
    names = getattr(config, "id2label", None) or {}
    settings: dict[str, Any] = {}
    if set(names) == set(range(len(names))) and not all(re.fullmatch(r"LABEL_\d+", str(n)) for n in names.values()):
        settings["labels"] = [str(names[i]) for i in range(len(names))]
    if (problem := getattr(config, "problem_type", None)) is not None:
        settings["problem_type"] = problem
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if type(pad := getattr(text, "pad_token_id", None)) is int:
        settings["pad_token_id"] = pad
    return settings or None
