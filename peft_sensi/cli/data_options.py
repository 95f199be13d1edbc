"""The options about the data, which the commands share: one for each field of `tasks.options.DataOptions`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

from ..tasks.options import DataOptions
from ..utils.task_types import TYPE_OF_KIND
from .arguments import DATA, option, refuse


Kind = enum.StrEnum("Kind", {name: name for name in TYPE_OF_KIND})  # type: ignore[misc]
FORMATS = ("subset", "split", "encoding", "delimiter", "quotes")  # these have a panel of their own
_TWO_WAYS = ("quotes",)  # flags with a negative, which takes a column of the panel
_OF_VALIDATION = ("validation_share", "max_validation_rows")
_LIMITS: dict[str, dict[str, float]] = {
    "max_length": {"min": 2},
    "stride": {"min": 0},
    "max_answer_length": {"min": 1},
    "max_rows": {"min": 2},
    "validation_share": {"min": 0, "max": 0.9},
    "max_validation_rows": {"min": 1},
}
_TYPES = get_type_hints(DataOptions)


def data_option(field: Field, help: str | None = None, default: Any = ...) -> tuple[Any, Any]:
    """The annotation and the default of a command's option for a field, or with other ones than the field has."""
    name = field.name.replace("_", "-")
    negative = f"/--no-{name}" if field.name in _TWO_WAYS else ""
    entry = option(
        f"--{name}{negative}",
        field.metadata.get("metavar"),
        help or field.metadata["help"],
        "The format of the data" if field.name in FORMATS else DATA,
        **_LIMITS.get(field.name, {}),
    )
    return Annotated[_TYPES[field.name], entry], field.default if default is ... else default


LABELED = option(
    "--data", "FILE", "Labeled rows: a file, a folder of files, or a data set of the Hub. May be repeated.", DATA
)
DATA_OPTIONS: dict[str, tuple[Any, Any]] = {
    "task": (
        Annotated[Kind | None,
                  option("--task", "KIND", "text (a class or a number per row), words (a tag per word) or answers (to "
                         "questions about texts). Default: what the data is for.", DATA)],
        None,
    ),
    **{field.name: data_option(field) for field in fields(DataOptions) if field.name not in _OF_VALIDATION},
}  # fmt: skip
VALIDATION_OPTIONS: dict[str, tuple[Any, Any]] = {
    "validation": (
        Annotated[list[str] | None,
                  option("--validation", "FILE", "Validation rows, as for --data. Default: a part of the data.",
                         DATA)],
        None,
    ),
    **{field.name: data_option(field) for field in fields(DataOptions) if field.name in _OF_VALIDATION},
}  # fmt: skip


def places_of_rows(data: list[str], reading: Mapping[str, Any]) -> list[str]:
    """What --data and --validation name."""
    return [*data, *(reading["validation"] or [])]


def task_options(reading: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `tasks.kinds.read_task` from the values of the options."""
    if reading.get("validation"):
        refuse({"--validation-share": reading["validation_share"] is not None}, "holds out rows without --validation")
    options = dict(reading)
    task = options.pop("task")
    return {**options, "kind": task.value if task else None}
