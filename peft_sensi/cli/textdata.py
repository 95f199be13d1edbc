"""A file of labeled texts goes in; tokenized rows, the labels and a classifier for them come out.

Columns and labels are recognized automatically if there is no doubt. `TextTask.line` says what was recognized.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from ..reporting.saved import load_pretrained
from ..utils.errors import SensiError


LABEL_COLUMNS = ("label", "labels", "target", "class", "score")


class DataError(SensiError):
    """A data file cannot be read, or does not contain what the options say."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a TSV, CSV, JSON (a list of objects) or JSON Lines file, as dicts from columns to values.

    Cells of TSV and CSV files stay strings: a text such as "1984", "null" or "NA" is not read as a number or a missing
    value. Double quotes in TSV files are part of the text, as in the files of GLUE.

    Raises:
        DataError: The file has another form, is empty, or its rows do not fit the header.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".json", ".jsonl"):
        raise DataError(f"{path} cannot be read: data files end in .tsv, .csv, .json or .jsonl.")
    try:
        if kind in (".tsv", ".csv"):
            dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            limit = csv.field_size_limit(2**31 - 1)  # texts may be long: the tokenizer cuts them later
            try:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    reader = csv.DictReader(file, **dialect)
                    header = reader.fieldnames or []
                    rows: list[dict[str, Any]] = list(reader)
            finally:
                csv.field_size_limit(limit)
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{path} has two columns {twice[0]!r}.")
        else:
            text = path.read_text(encoding="utf-8-sig")
            # Not splitlines(): it also splits at characters such as U+2028, which JSON strings may contain.
            lines = [line for line in text.split("\n") if line.strip()]
            rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (UnicodeError, csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}.") from None
    if not rows:
        raise DataError(f"{path} has no rows.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is not an object with named values: {row!r:.60}.")
        if None in row or (kind in (".tsv", ".csv") and None in row.values()):
            raise DataError(f"{path}: row {number} has more or fewer cells than the header.")
    return rows


@dataclass
class Labels:
    """The labels of a task.

    Attributes:
        names: Names of the classes, in the order of their numbers. Empty for a regression.
        encode: Turns a value of the label column into the number that the model predicts. Raises `KeyError`,
            `ValueError` or `TypeError` for a value that is not a label of this task.
    """

    names: list[str]
    encode: Callable[[Any], int | float]

    @property
    def regression(self) -> bool:
        return not self.names


def find_labels(values: Sequence[Any], regression: bool | None = None) -> Labels:
    """Decides whether the values of a label column are classes or numbers to predict.

    Whole numbers ("1") are classes, and numbers with a fraction ("3.8") are numbers to predict, unless `regression`
    says otherwise. Raises `TypeError` or `ValueError` for values that are neither.
    """
    whole = all(str(value).strip().lstrip("+-").isdecimal() for value in values)
    if regression is None:
        regression = not whole and all(_is_number(value) for value in values)
    if regression:
        return Labels([], _finite)
    # Numbers are sorted as numbers: 2 comes before 10.
    names = sorted({str(value) for value in values}, key=int if whole else None)
    index = {name: i for i, name in enumerate(names)}
    return Labels(names, lambda value: index[str(value)])


@dataclass
class TextTask:
    """A data file as a text classification (or regression) task.

    The one or two `columns` hold the texts. Rows are tokenized; those in `validation` are not trained on.
    """

    tokenizer: Any
    labels: Labels
    columns: tuple[str, ...]
    label_column: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @property
    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)

    @property
    def line(self) -> str:
        """What was recognized, in one line for the user."""
        kind = "numbers" if self.labels.regression else f"{len(self.labels.names)} classes"
        rows = f"{len(self.train):,} rows" + (f" and {len(self.validation):,} held out" if self.validation else "")
        return f"{rows}; text in {' + '.join(self.columns)}, {kind} in {self.label_column}"

    def batches(self, batch_size: int, seed: int) -> DataLoader:
        """Batches of the training rows in a random order that depends on `seed` only."""
        order = list(self.train)
        random.Random(seed).shuffle(order)
        return DataLoader(order, batch_size=batch_size, collate_fn=self.collator)  # type: ignore[arg-type]


def read_task(
    model: str,
    data: str | Path,
    validation: str | Path | None = None,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    max_length: int = 128,
    max_rows: int | None = None,
    regression: bool | None = None,
    hold_out: float = 0.0,
    seed: int = 0,
    trained_head: Sequence[str] | None = None,
    config: Any = None,
) -> TextTask:
    """Reads a file of training rows, and another of validation rows if there is one, for a model's tokenizer.

    Columns without a name are recognized, if there is no doubt. Texts are cut after `max_length` tokens, or at the
    model's own limit. `max_rows` training rows are chosen at random, and `hold_out` is the share of them that is used
    for validation if there is no file for it. For `regression`, see `find_labels`. `trained_head` has the names of the
    classes of a trained head; the labels then get the same order. It is empty for a regressor. `config` is the model's
    own, if `model` is the folder of an adapter, which has none.
    """
    rows = read_rows(data)
    label, columns = _columns(data, rows, text_column, pair_column, label_column)
    random.Random(seed).shuffle(rows)
    rows = rows[:max_rows]
    held: list[dict[str, Any]] = []
    if validation is not None:
        held = read_rows(validation)
        if missing := [name for name in (*columns, label) if name not in held[0]]:
            raise DataError(f"{validation} has no column {missing[0]!r}; it has {', '.join(held[0])}.")
    labels = _labels(data, rows, label, regression)
    if trained_head is not None:
        labels = _labels_of_head(data, labels, list(trained_head))
    if hold_out and validation is None:
        held, rows = _hold_out(rows, label, hold_out, labels)
    tokenizer = load_pretrained(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    max_length = min(max_length, tokenizer.model_max_length)
    if tokenizer.model_max_length > 10**6:  # a placeholder: the tokenizer does not know the model's limit
        text_config = (config or load_pretrained(AutoConfig, model)).get_text_config()
        max_length = min(max_length, getattr(text_config, "max_position_embeddings", None) or max_length)
    parts = [
        _encode(part, name, columns, label, labels, tokenizer, max_length)
        for part, name in ((rows, data), (held, validation or data))
    ]
    return TextTask(tokenizer, labels, columns, label, *parts)


def _labels(data: str | Path, rows: list[dict[str, Any]], column: str, regression: bool | None) -> Labels:
    """`find_labels` for a column of a file, with checks that the labels can be learned."""
    values = [row.get(column) for row in rows]
    numbers = any(_is_number(value) for value in values)
    if any(_is_missing(value, numbers) for value in values):
        raise DataError(f"{data}: a row has no label in {column!r}.")
    try:
        labels = find_labels(values, regression)
    except (TypeError, ValueError):
        raise DataError(f"{data}: the labels in {column!r} are neither names nor numbers.") from None
    if regression and not all(_is_number(value) for value in values):
        raise DataError(f"{data}: not all labels in {column!r} are numbers, as a regression needs.")
    if len(labels.names) == 1:
        raise DataError(f"All rows of {data} have the label {labels.names[0]!r}: there is nothing to learn.")
    if len(labels.names) > max(2, len(rows) // 2):
        raise DataError(
            f"{data}: {column!r} has {len(labels.names):,} different labels in {len(rows):,} rows, so it is probably "
            f"not the label: name the right column with --label-column."
        )
    return labels


def _hold_out(
    rows: list[dict[str, Any]], label: str, share: float, labels: Labels
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Splits rows into validation rows, `share` of them, and training rows. Each class keeps a training row."""
    count, left = round(len(rows) * share), Counter(str(row[label]) for row in rows)
    if not 0 < count < len(rows):
        raise DataError(f"{len(rows)} rows are too few to validate on {share:.0%} of them: give a validation file.")
    held: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for row in rows:
        name = str(row[label])
        if len(held) < count and (labels.regression or left[name] > 1):
            left[name] -= 1
            held.append(row)
        else:
            kept.append(row)
    return held, kept


def _labels_of_head(data: str | Path, labels: Labels, head: list[str]) -> Labels:
    """The labels of the file in the order that the head of a trained model has them."""
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in head)  # then both have the order of the numbers
    if labels.regression == bool(head) or (unnamed and len(labels.names) != len(head)):
        found = f"{len(labels.names)} classes" if labels.names else "numbers"
        raise DataError(f"{data} has {found} as labels, but the model's head has {len(head) or 1} outputs.")
    if unnamed:
        return labels
    if unknown := [name for name in labels.names if name not in head]:
        raise DataError(f"{data} has the label {unknown[0]!r}, but the model's labels are {', '.join(head)}.")
    numbers = {name: number for number, name in enumerate(head)}
    return Labels(head, lambda value: numbers[labels.names[int(labels.encode(value))]])


def load_classifier(model: str, labels: Labels | None = None, tokenizer: Any = None) -> Any:
    """The base model in float32, with a fresh head for the labels. Without labels, the checkpoint's head is kept."""
    heads: dict[str, Any] = {}
    if labels is not None and labels.regression:
        heads = {"num_labels": 1, "problem_type": "regression"}
    elif labels is not None:
        names = dict(enumerate(labels.names))
        heads = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    # The checkpoint may have a head for other labels, which is replaced.
    base = load_pretrained(AutoModelForSequenceClassification, model, ignore_mismatched_sizes=True, **heads).float()
    config = base.config.get_text_config()
    if config.pad_token_id is None and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last token that is not padding
    return base


def _columns(
    data: str | Path, rows: list[dict[str, Any]], text: str | None, pair: str | None, label: str | None
) -> tuple[str, tuple[str, ...]]:
    """The names of the label column and of the text columns: those that were given, or the only possible ones."""
    names = list(rows[0])
    known = ", ".join(map(str, names))
    for name in filter(None, (text, pair, label)):
        if name not in names:
            raise DataError(f"{data} has no column {name!r}; it has {known}.")
    if label is not None and label in (text, pair):
        raise DataError(f"{label!r} cannot be both the text and the label.")
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in names), None)
        if label is None:
            raise DataError(f"{data}: name the column that holds the labels with --label-column; there are {known}.")
    if text is not None:
        return label, (text,) if pair is None else (text, pair)
    sample = rows[:100]
    texts = [
        name
        for name in names
        if name not in (label, pair)
        and all(isinstance(row.get(name), str) for row in sample)
        and not all(_is_number(row[name]) for row in sample)
    ]
    if len(texts) not in ((1,) if pair else (1, 2)):
        raise DataError(f"{data}: name the column that holds the text with --text-column; there are {known}.")
    return label, (*texts, pair) if pair else tuple(texts)


def _encode(
    rows: list[dict[str, Any]],
    name: Any,
    columns: tuple[str, ...],
    label: str,
    labels: Labels,
    tokenizer: Any,
    max_length: int,
) -> list[dict[str, Any]]:
    if not rows:
        return []
    targets = []
    for row in rows:
        if wrong := [c for c in columns if not isinstance(row.get(c), str)]:
            raise DataError(f"{name}: a row has no text in {wrong[0]!r}: {row!r:.80}.")
        try:
            targets.append(labels.encode(row[label]))
        except (KeyError, ValueError, TypeError):
            known = "a number" if labels.regression else f"one of {', '.join(labels.names[:8])}"
            raise DataError(f"{name}: the label {row.get(label)!r} is not {known}, as in training.") from None
    texts = ([row[column] for row in rows] for column in columns)
    inputs: Mapping[str, list] = tokenizer(*texts, truncation=True, max_length=max_length)
    return [{key: values[i] for key, values in inputs.items()} | {"labels": y} for i, y in enumerate(targets)]


def _is_number(value: Any) -> bool:
    try:
        _finite(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def _finite(value: Any) -> float:
    """`float(value)`. Raises `ValueError` for NaN and infinity too, because a loss cannot be computed from them."""
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r} is not finite")
    return number


def _is_missing(value: Any, numbers: bool) -> bool:
    """Whether a label is missing. Among numbers, the text "nan" stands for a missing label, too."""
    nan = isinstance(value, float) or (numbers and isinstance(value, str) and value.strip().lower() == "nan")
    return value is None or value == "" or (nan and not math.isfinite(float(value)))
