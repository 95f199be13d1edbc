"""What a training has noted about its data, as the default of the options about other data for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..tasks.columns import usual_label_columns
from ..tasks.options import DataOptions, Options
from ..utils.errors import DataError
from ..utils.formatting import listed
from .data_options import DATA_OPTIONS, FORMATS, data_option


if TYPE_CHECKING:
    from ..tasks.sources import Purpose


LENGTHS = {
    "max_length": "Cut texts after this many tokens. Default: as in training.",
    "stride": "Tokens that neighboring windows share, for answers. Default: as in training.",
    "max_answer_length": "The longest answer, in tokens. Default: as in training, or 30.",
}
TRAINED_OPTIONS = DATA_OPTIONS | {
    field.name: data_option(field, LENGTHS[field.name], default=None)
    for field in fields(DataOptions)
    if field.name in LENGTHS
}


def read_as_trained(
    record: Mapping[str, Any],
    kind: str | None,
    data: list[str],
    named: dict[str, Any],
    purpose: Purpose = "training",
    beside: list[str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The data, and the options with which it becomes a task: those that are `named`, or else those of the training.

    Tables are read here: the columns of the training are an option only if the first row has them all. `beside` are
    other data that the options are about, too.
    """
    from ..tasks.sources import read_source

    trained = _values(record)
    if "max_length" in named:
        trained.pop("stride", None)  # it belongs to the windows of the training
    options = trained | named
    if kind != "text":
        return data, options
    labels = options.get("label_column") or record.get("label_columns")
    form = Options(label_column=labels, **{name: options[name] for name in FORMATS if name in options})
    source = read_source(data, "text", form, purpose, beside)
    first = source.train[0]
    columns = _columns(record, first.rows[0], labels=purpose != "prediction")
    before = [] if "label_column" in options or purpose == "prediction" else list(record.get("label_columns") or ())
    if before and "label_column" not in columns and not usual_label_columns(first.rows):
        otherwise = ", or use `peft-sensi predict`, which needs no labels" if purpose == "evaluation" else ""
        raise DataError(
            f"{first.name} has no column {listed(before)}, from which the training has read the labels: name their "
            f"column with --label-column{otherwise}."
        )
    if "text_column" in named:
        columns.pop("pair_column", None)  # of a model of pairs, one text only
    options = columns | options
    if len(options.get("label_column") or ()) > 1 and "label_separator" not in named:
        options.pop("label_separator", None)
    return source, options


def untrained_columns(record: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """A doubt, if the data lacks the text columns that the training has read, and the user names no others."""
    texts = record.get("text_columns")
    if not texts or "text_column" in options:
        return []
    return [f"the training has read {' + '.join(texts)}, which the data does not have (--text-column)"]


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options about lengths, and whether questions may get no answer."""
    names = (*LENGTHS, "silent")
    return {name: record[name] for name in names if isinstance(record.get(name), int)}


def _columns(record: Mapping[str, Any], row: Mapping[str, Any], labels: bool) -> dict[str, Any]:
    """The options about columns with the names of the training, if all of these columns are in the row."""
    texts = list(record.get("text_columns") or ())
    found: dict[str, Any] = {}
    if texts and all(name in row for name in texts):
        found = dict(zip(("text_column", "pair_column"), texts, strict=False))
    columns = list(record.get("label_columns") or ())
    if labels and columns and all(name in row for name in columns):
        found["label_column"] = columns
    if labels and (separator := record.get("label_separator")) is not None:
        found["label_separator"] = separator
    return found
