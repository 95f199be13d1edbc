"""What an adapter keeps of its base's config: names of the labels, problem type, pad token."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..utils.checks import PROBLEM_TYPES, label_names


def head_settings(model: nn.Module) -> dict[str, Any] | None:
    """`SensiConfig.head_settings` of a base model; `None` if its config says nothing that a fresh one does not."""
    config: Any = getattr(model, "config", None)
    settings: dict[str, Any] = {}
    if names := label_names(getattr(config, "id2label", None)):
        settings["labels"] = names
    if (problem := getattr(config, "problem_type", None)) in PROBLEM_TYPES:  # not a user's own
        settings["problem_type"] = problem
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if type(pad := getattr(text, "pad_token_id", None)) is int:
        settings["pad_token_id"] = pad
    return settings or None
