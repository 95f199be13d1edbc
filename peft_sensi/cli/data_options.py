"""The options about the data, which the commands share. The example scripts have options of the same names."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any

from ..tasks.task import KINDS, MAX_ANSWER_LENGTH
from .arguments import DATA, option, refuse


Kind = enum.StrEnum("Kind", {name: name for name in KINDS})  # type: ignore[misc]
FORMAT = "The format of the data"

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
    "text_column": (
        Annotated[str | None,
                  option("--text-column", "NAME", "The column with the text. Default: the one or two columns of "
                         "texts. In files of words: a number, counted from 0.", DATA)],
        None,
    ),
    "pair_column": (
        Annotated[str | None,
                  option("--pair-column", "NAME", "The column with the second text, if rows have two texts.", DATA)],
        None,
    ),
    "label_column": (
        Annotated[list[str] | None,
                  option("--label-column", "NAME", "The column with the label. Default: label, or a similar name. "
                         "Repeated: columns of 0 and 1, one for each label.", DATA)],
        None,
    ),
    "label_separator": (
        Annotated[str | None,
                  option("--label-separator", "TEXT", "Rows can have several labels, with this text between them.",
                         DATA)],
        None,
    ),
    "regression": (
        Annotated[bool,
                  option("--regression", None, "Predict the labels as numbers, not as classes. Default: recognized.",
                         DATA)],
        False,
    ),
    "skip_unlabeled": (
        Annotated[bool, option("--skip-unlabeled", None, "Leave out rows without a label.", DATA)], False
    ),
    "max_length": (
        Annotated[int | None,
                  option("--max-length", "N", "Cut texts after this many tokens. Default: 128, and windows of 384 for "
                         "answers.", DATA, min=2)],
        None,
    ),
    "stride": (
        Annotated[int | None,
                  option("--stride", "N", "Tokens that neighboring windows share, for answers. Default: 128, or a "
                         "third of a short window.", DATA, min=0)],
        None,
    ),
    "max_answer_length": (
        Annotated[int, option("--max-answer-length", "N", "The longest answer, in tokens.", DATA, min=1)],
        MAX_ANSWER_LENGTH,
    ),
    "max_rows": (
        Annotated[int | None,
                  option("--max-rows", "N", "Use this many rows, chosen at random. Default: all.", DATA, min=2)],
        None,
    ),
    "subset": (
        Annotated[str | None,
                  option("--subset", "NAME", "The subset of a data set of the Hub. Default: its own one.", FORMAT)],
        None,
    ),
    "split": (
        Annotated[str | None, option("--split", "NAME", "The split of a data set. Default: train.", FORMAT)], None
    ),
    "encoding": (
        Annotated[str | None, option("--encoding", "NAME", "The encoding of text files. Default: recognized.",
                  FORMAT)],
        None,
    ),
    "delimiter": (
        Annotated[str | None,
                  option("--delimiter", "TEXT", "Between the cells: one character, or tab. Default: recognized.",
                         FORMAT)],
        None,
    ),
    "quotes": (
        Annotated[bool | None,
                  option("--quotes/--no-quotes", None, "Whether double quotes enclose cells. Default: recognized.",
                         FORMAT)],
        None,
    ),
}  # fmt: skip
VALIDATION_OPTIONS: dict[str, tuple[Any, Any]] = {
    "validation": (
        Annotated[list[str] | None,
                  option("--validation", "FILE", "Validation rows, as for --data. Default: a part of the data.",
                         DATA)],
        None,
    ),
    "validation_share": (
        Annotated[float | None,
                  option("--validation-share", "SHARE", "The part of the data that is held out without --validation. "
                         "Default: 0.1.", DATA, min=0, max=0.9)],
        None,
    ),
    "max_validation_rows": (
        Annotated[int | None,
                  option("--max-validation-rows", "N", "Use this many validation rows, chosen at random. "
                         "Default: all.", DATA, min=1)],
        None,
    ),
}  # fmt: skip


def places_of_rows(data: list[str], reading: Mapping[str, Any]) -> list[str]:
    """What --data and --validation name."""
    return [*data, *(reading["validation"] or [])]


def task_options(reading: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `tasks.kinds.read_task` from the values of the options."""
    options = {name: value for name, value in reading.items() if name != "validation_share" or value is not None}
    if options.get("validation"):
        refuse(
            {"--validation-share": options.get("validation_share") is not None}, "holds out rows without --validation"
        )
    task = options.pop("task")
    return {**options, "kind": task.value if task else None, "regression": options["regression"] or None}
