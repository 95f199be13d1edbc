"""What an adapter keeps of its base's config: names of the labels, problem type, pad token."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..utils.heads import PROBLEM_TYPES, label_names


def head_settings(model: nn.Module) -> dict[str, Any] | None:
    """`SensiConfig.head_settings` of a base model; `None` if its config says nothing that a fresh one does not."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    values = (getattr(config, "id2label", None), getattr(config, "problem_type", None))
    return settings_of(*values, getattr(text, "pad_token_id", None)) or None


def settings_of(id2label: Any, problem: Any, pad: Any) -> dict[str, Any]:
    """The settings from three values of a config. Only plain values are used: a file cannot choose what is built."""
    settings: dict[str, Any] = {}
    if names := label_names(id2label):
        settings["labels"] = names
    if problem in PROBLEM_TYPES:  # not a user's own
        settings["problem_type"] = problem
    if type(pad) is int:
        settings["pad_token_id"] = pad
    return settings
