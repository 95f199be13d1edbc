"""The options about the data, in one table: the commands and the example scripts have the same options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


# Unless the user says otherwise:
MAX_LENGTH = {"text": 128, "words": 128, "answers": 384}  # tokens of an input or window
MAX_ANSWER_LENGTH = 30  # tokens
VALIDATION_SHARE = 0.1


def _option(metavar: str | None, help: str, default: Any = None) -> Any:
    """A field with its help text. The keys of the metadata are those of argparse, which the examples hand on to it."""
    return field(default=default, metadata={"help": help} | ({"metavar": metavar} if metavar else {}))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a user can say about the data. The help texts are the documentation of the attributes.

    `peft_sensi.cli.data_options` makes an option of the command of each field.
    """

    text_column: str | None = _option(
        "NAME",
        "The column with the text. Default: the one or two columns of texts. In files of words: the column of the "
        "words; without a header its number, counted from 0 (-1 is the last one).",
    )
    pair_column: str | None = _option("NAME", "The column with the second text, if rows have two texts.")
    label_column: list[str] | None = _option(
        "NAME",
        "The column with the label. Default: label, or a similar name. Repeated: columns of 0 and 1, one for each "
        "label.",
    )
    label_separator: str | None = _option("TEXT", "Rows can have several labels, with this text between them.")
    regression: bool | None = _option(None, "Predict the labels as numbers, not as classes. Default: recognized.")
    skip_unlabeled: bool = _option(None, "Leave out rows without a label, instead of an error.", default=False)
    max_length: int | None = _option(
        "N", "Cut texts after this many tokens. Default: 128, and windows of 384 for answers."
    )
    stride: int | None = _option(
        "N", "Tokens that neighboring windows share, for answers. Default: 128, or a third of a short window."
    )
    max_answer_length: int = _option("N", "The longest answer, in tokens.", default=MAX_ANSWER_LENGTH)
    max_rows: int | None = _option("N", "Use this many rows, chosen at random. Default: all.")
    subset: str | None = _option("NAME", "The subset of a data set of the Hub. Default: its own one.")
    split: str | None = _option("NAME", "The split of a data set. Default: train.")
    encoding: str | None = _option("NAME", "The encoding of text files. Default: recognized.")
    delimiter: str | None = _option("TEXT", "Between the cells: one character, or tab. Default: recognized.")
    quotes: bool | None = _option(None, "Whether double quotes enclose cells. Default: recognized.")
    validation_share: float | None = _option(
        "SHARE", "The part of the data that is held out, if there are no validation rows. Default: 0.1."
    )
    max_validation_rows: int | None = _option("N", "Use this many validation rows, chosen at random. Default: all.")


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """The options about the data, and what the caller decides.

    Attributes:
        label_column: One name, or several.
        allow_unknown: Whether classes of texts that a trained head does not know are wrong predictions, as in an
            evaluation; otherwise they are an error.
        silent: Whether a question may get no answer. `None`: if some questions of the training rows have none.
        seed: The seed of all random choices.
    """

    label_column: str | Sequence[str] | None = None  # type: ignore[assignment]
    allow_unknown: bool = False
    silent: bool | None = None
    seed: int = 0

    def label_columns(self) -> list[str]:
        if self.label_column is None:
            return []
        return [self.label_column] if isinstance(self.label_column, str) else list(self.label_column)


def stride_of(options: Options, window: int) -> int:
    """How many tokens neighboring windows of so many tokens share: 128, or a third of a short window, by default."""
    return min(128, window // 3) if options.stride is None else options.stride
