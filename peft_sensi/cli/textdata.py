"""Labeled texts from files, as the command reads them: columns, labels, tokens, a classifier that fits.

The five kinds of file are those that people have; nothing is guessed silently: `TextTask.line` says what was found.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from ..reporting.saved import found
from ..utils.errors import SensiError


LABEL_COLUMNS = ("label", "labels", "target", "class", "score")


class DataError(SensiError):
    """A data file, or what was said about it, is wrong."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a TSV, CSV, JSON (a list of objects) or JSON Lines file. Raises `DataError`.

    Cells of TSV and CSV files stay strings: a sentence such as "1984", "null" or "NA" must not turn into a number or
    a hole. TSV files are read without quoting, as the GLUE files need: a lone double quote there is text.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".json", ".jsonl"):
        raise DataError(f"{path}: data is read from .tsv, .csv, .json and .jsonl files.")
    try:
        if kind in (".tsv", ".csv"):
            dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            limit = csv.field_size_limit(2**31 - 1)  # texts may be long; they are cut later
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
            # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
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
    """What the label column holds. `names` of the classes are empty for regression."""

    names: list[str]
    encode: Callable[[Any], int | float]

    @property
    def regression(self) -> bool:
        return not self.names


def find_labels(values: Sequence[Any], regression: bool | None = None) -> Labels:
    """Classes, or that the labels are amounts. Files give strings: "1" is a class, "3.8" is an amount."""
    whole = all(_is_integer(value) for value in values)
    if regression is None:
        regression = not whole and all(_is_number(value) for value in values)
    if regression:
        return Labels([], _amount)
    # 2 comes before 10 where every label is a number.
    names = sorted({str(value) for value in values}, key=int if whole else None)
    index = {name: i for i, name in enumerate(names)}
    return Labels(names, lambda value: index[str(value)])


@dataclass
class TextTask:
    """Tokenized rows with labels, and all that is needed to train and name them."""

    tokenizer: Any
    labels: Labels
    columns: tuple[str, ...]
    label_column: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]] = field(default_factory=list)

    @property
    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)

    @property
    def line(self) -> str:
        kind = "amounts" if self.labels.regression else f"{len(self.labels.names)} classes"
        rows = f"{len(self.train):,} rows" + (f" and {len(self.validation):,} held out" if self.validation else "")
        return f"{rows}; text in {' + '.join(self.columns)}, {kind} in {self.label_column}"

    def batches(self, batch_size: int, seed: int) -> DataLoader:
        """Mixed training batches with a seed of their own."""
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
) -> TextTask:
    """Reads and tokenizes labeled texts for `model`. Raises `DataError`, `SensiError`.

    Args:
        validation: A second file; without it the share `hold_out` of the rows is held out.
        text_column, pair_column, label_column: Found from the header and the values where there is no doubt.
        max_rows: A random choice of so many rows.
        regression: Whether labels are amounts; found from the labels if not given.
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
    values = [row.get(label) for row in rows]
    numbers = any(_is_number(value) for value in values)
    if any(_is_hole(value, numbers) for value in values):
        raise DataError(f"{data}: a row has no label in {label!r}.")
    try:
        labels = find_labels(values, regression or None)
    except (TypeError, ValueError):
        raise DataError(f"{data}: the labels in {label!r} are neither names nor numbers.") from None
    if regression and not all(_is_number(value) for value in values):
        raise DataError(f"{data}: not all labels in {label!r} are numbers, as a regression needs.")
    if len(labels.names) == 1:
        raise DataError(f"All rows of {data} have the label {labels.names[0]!r}: there is nothing to learn.")
    if len(labels.names) > max(2, len(rows) // 2):
        raise DataError(f"{data}: {len(labels.names):,} different labels in {len(rows):,} rows: is it {label!r}?")
    if hold_out and validation is None:
        held, rows = _hold_out(rows, label, hold_out, labels)
    tokenizer = load_tokenizer(model)
    max_length = min(max_length, tokenizer.model_max_length)
    if tokenizer.model_max_length > 10**6:  # it does not know
        positions = getattr(found(AutoConfig, model).get_text_config(), "max_position_embeddings", None)
        max_length = min(max_length, positions or max_length)
    parts = [
        _encode(part, name, columns, label, labels, tokenizer, max_length)
        for part, name in ((rows, data), (held, validation or data))
    ]
    return TextTask(tokenizer, labels, columns, label, *parts)


def _hold_out(
    rows: list[dict[str, Any]], label: str, share: float, labels: Labels
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first rows, as many as asked for, but the last row of a class stays for training; and the others."""
    count, left = round(len(rows) * share), Counter(str(row[label]) for row in rows)
    if not 0 < count < len(rows):
        raise DataError(f"{len(rows)} rows are too few to hold out {share:.0%} of them: give a validation file.")
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


def load_tokenizer(model: str) -> Any:
    tokenizer = found(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(model: str, labels: Labels | None = None, tokenizer: Any = None) -> Any:
    """The base model with a fresh head for these labels, in float32."""
    heads: dict[str, Any] = {}
    if labels is not None and labels.regression:
        heads = {"num_labels": 1, "problem_type": "regression"}
    elif labels is not None:
        names = dict(enumerate(labels.names))
        heads = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    # A head for other labels, which the checkpoint may have, is replaced by a fresh one.
    base = found(AutoModelForSequenceClassification, model, ignore_mismatched_sizes=True, **heads).float()
    if base.config.get_text_config().pad_token_id is None and tokenizer is not None:
        base.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # decoders look for the last real token
    return base


def quality(predictions: Any, labels: Any, regression: bool) -> dict[str, float | None]:
    """Accuracy and macro F1, or Pearson's and Spearman's correlation, of logits `[rows, classes]`.

    `None` where it is undefined: the correlation with amounts that are all the same.
    """
    import numpy as np

    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    if regression:
        from scipy.stats import pearsonr, spearmanr

        values = np.asarray(predictions, dtype=float).reshape(-1)
        measures = {"pearson": pearsonr, "spearman": spearmanr}
        varied = all(len(np.unique(column)) > 1 for column in (labels, values))
        return {
            name: float(measure(labels, values).statistic) if varied else None for name, measure in measures.items()
        }
    predicted, labels = np.argmax(predictions, axis=-1), np.asarray(labels)
    f1 = []
    for label in np.union1d(labels, predicted):
        hits = ((predicted == label) & (labels == label)).sum()
        f1.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()))
    return {"accuracy": float((predicted == labels).mean()), "f1_macro": float(np.mean(f1))}


def _columns(
    data: str | Path, rows: list[dict[str, Any]], text: str | None, pair: str | None, label: str | None
) -> tuple[str, tuple[str, ...]]:
    names = list(rows[0])
    for name in filter(None, (text, pair, label)):
        if name not in names:
            raise DataError(f"{data} has no column {name!r}; it has {', '.join(map(str, names))}.")
    if label is not None and label in (text, pair):
        raise DataError(f"{label!r} cannot be the text and the label.")
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in names), None)
        if label is None:
            raise DataError(f"{data}: say which column holds the labels; there are {', '.join(map(str, names))}.")
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
        raise DataError(f"{data}: say which column holds the text; there are {', '.join(map(str, names))}.")
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
    encoded: list[dict[str, Any]] = []
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for row in part:
            if wrong := [c for c in columns if not isinstance(row.get(c), str)]:
                raise DataError(f"{name}: a row has no text in {wrong[0]!r}: {row!r:.80}.")
        texts = [[row[column] for row in part] for column in columns]
        inputs: Mapping[str, list] = tokenizer(*texts, truncation=True, max_length=max_length)
        for i, row in enumerate(part):
            try:
                value = labels.encode(row[label])
            except (KeyError, ValueError, TypeError):
                known = "an amount" if labels.regression else f"one of {', '.join(labels.names[:8])}"
                raise DataError(f"{name}: the label {row.get(label)!r} is not {known}, as in training.") from None
            encoded.append({key: values[i] for key, values in inputs.items()} | {"labels": value})
    return encoded


def _is_integer(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lstrip("+-").isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        _amount(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def _amount(value: Any) -> float:
    """Raises `ValueError` for NaN and infinity, too: no loss can be made of them."""
    if not math.isfinite(amount := float(value)):
        raise ValueError(f"{value!r} is no amount")
    return amount


def _is_hole(value: Any, numbers: bool) -> bool:
    """Whether a label is missing; between numbers the text nan is, too."""
    nan = isinstance(value, float) or (numbers and isinstance(value, str) and value.strip().lower() == "nan")
    return value is None or value == "" or (nan and not math.isfinite(float(value)))
