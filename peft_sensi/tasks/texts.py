"""Rows with one or two texts and a label go in; inputs of a classifier or regressor, its metrics and labels out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from ..utils.errors import DataError
from ..utils.formatting import counted, listed
from . import metrics
from .class_order import check_order
from .columns import WRITTEN
from .labels import (
    Labels,
    counts_of,
    find_labels,
    find_several,
    is_hidden,
    is_missing,
    look,
    name_of,
    parts_of,
    reads_as_number,
    separator_of,
)
from .metrics import Quality
from .options import Options
from .task import Rows, check_room


MANY = 25  # a table of so many classes is cut
_AMOUNT = re.compile(r"[^\w\s]?\s?[+-]?\d[\d.,]*\s?[^\w\s]?")  # such as 12% and $1,000.00


def to_raw(
    name: Any, rows: Sequence[dict[str, Any]], columns: Sequence[str], labels: Sequence[str], options: Options
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with `text`, `pair` (for two texts) and `label`, and notes about rows that were left out.

    Raises:
        DataError: Names the first row without a label, or with something else than a text.
    """
    found: list[dict[str, Any]] = []
    missing, notes = [], []
    values = [[row.get(column) for column in labels] for row in rows]
    numbers = any(reads_as_number(value) for row in values for value in row)
    for number, (row, cells) in enumerate(zip(rows, values, strict=True), start=1):
        texts = [row.get(column) for column in columns]
        for column, text in zip(columns, texts, strict=True):
            if text is not None and not isinstance(text, str):
                raise DataError(f"{name}: row {number} has no text in {column!r}, but {text!r:.60} (--text-column).")
        raw: dict[str, Any] = {"row": number, **dict(zip(("text", "pair"), [t or "" for t in texts], strict=False))}
        if labels:
            empty_is_none = options.label_separator is not None and len(labels) == 1
            if any(is_missing(value, numbers) for value in cells) and not (empty_is_none and cells[0] is not None):
                missing.append(number)
                continue
            for column, cell in zip(labels, cells, strict=True):
                _check_label(name, number, column, cell)
            raw["label"] = _several_of(name, number, labels, cells) if len(labels) > 1 else cells[0]
        found.append(raw)
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        if not options.skip_unlabeled:
            separator = separator_of(sorted({str(raw["label"]) for raw in found})) if len(labels) == 1 else None
            several = f" If rows can have several labels or none, give --label-separator {separator!r}."
            raise DataError(
                f"{name}: row {missing[0]}{more} has no label in {', '.join(map(repr, labels))}. Fill it in"
                f"{' (0 or 1)' if len(labels) > 1 else ''}, or leave such rows out with --skip-unlabeled."
                f"{several if separator else ''}"
            )
        notes.append(f"left out {len(missing):,} rows without a label, the first is row {missing[0]}")
    if not found:
        raise DataError(f"{name}: no row has a label in {', '.join(map(repr, labels))} (--label-column).")
    return found, notes


def _check_label(name: Any, number: int, column: str, cell: Any) -> None:
    """Raises `DataError` if a cell holds neither a name or number nor a list of them, such as bytes of a picture."""
    try:
        for part in parts_of(cell, None) if isinstance(cell, list) else [cell]:
            name_of(part)
    except TypeError:
        raise DataError(
            f"{name}: row {number} has no label in {column!r}, but {cell!r:.60} (--label-column)."
        ) from None


def _several_of(name: Any, number: int, columns: Sequence[str], cells: Sequence[Any]) -> list[str]:
    """The names of the columns that are 1 in a row."""
    chosen = []
    for column, cell in zip(columns, cells, strict=True):
        text = "" if isinstance(cell, list) else name_of(cell).lower()
        if text not in ("0", "1", "true", "false"):
            raise DataError(f"{name}: row {number} has {cell!r} in {column!r}; several --label-column need 0 or 1.")
        if text in ("1", "true"):
            chosen.append(column)
    return chosen


def check_not_hidden(name: Any, raw: Sequence[dict[str, Any]]) -> None:
    """Raises `DataError` if the labels are those of a public test set that keeps them secret: all are -1."""
    if raw and all(is_hidden(row["label"]) for row in raw):
        raise DataError(
            f"All labels of {name} are -1, which public test sets have instead of their labels: use rows with labels, "
            f"or `peft-sensi predict`, which needs none."
        )


def labels_of(name: Any, raw: Sequence[dict[str, Any]], columns: Sequence[str], options: Options) -> Labels:
    """The labels of training rows. Raises `DataError` if they cannot be learned."""
    values = [row["label"] for row in raw]
    shown = ", ".join(map(repr, columns))
    if len(columns) > 1:
        return Labels(list(columns), several=True)
    check_no_vectors(name, raw, columns)
    if options.label_separator is not None or any(isinstance(value, list | tuple) for value in values):
        if options.regression:
            raise DataError(f"{name}: the cells in {shown} are lists, and --regression predicts one number.")
        labels = find_several(values, options.label_separator)
        if not labels.names:
            raise DataError(f"{name}: no row has a label in {shown} (--label-column).")
        if len(labels.names) > max(2, len(raw)):
            raise DataError(
                f"{name}: {shown} has {len(labels.names):,} different labels in {len(raw):,} rows, so they are "
                f"probably not labels: name the right column with --label-column."
            )
        return labels
    if options.regression:
        check_numbers(name, raw, "as --regression needs")
    try:
        labels = find_labels(values, options.regression)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{name}: the labels in {shown} are neither names nor numbers.") from None
    if labels.regression and len({float(value) for value in values}) == 1:
        raise DataError(f"All rows of {name} have the label {values[0]!r}: there is nothing to learn.")
    if len(labels.names) == 1:
        raise DataError(f"All rows of {name} have the label {labels.names[0]!r}: there is nothing to learn.")
    if len(labels.names) > 2 and all(re.fullmatch(r"[+-]?\d+(,\d+)+", label) for label in labels.names):
        raise DataError(
            f"{name}: the labels in {shown} are numbers with commas, such as {labels.names[0]!r}: write decimals with "
            f"a point, and nothing between thousands. If they are several labels, give --label-separator ','."
        )
    if len(labels.names) > max(2, len(raw) // 2):
        strange = [label for label in labels.names if not reads_as_number(label)]
        numbers = ", or predict numbers with --regression" if 2 * len(strange) < len(labels.names) else ""
        if numbers and strange:
            numbers += f" ({listed(strange[:1])} is not a finite number: correct it, or leave it empty)"
        raise DataError(
            f"{name}: {shown} has {len(labels.names):,} different labels in {len(raw):,} rows, so it is probably "
            f"not the label: name the right column with --label-column{numbers}. {WRITTEN}"
        )
    return labels


def check_numbers(name: Any, raw: Sequence[dict[str, Any]], why: str) -> None:
    """Raises `DataError` for the first row whose label is not a number."""
    if (wrong := next((row for row in raw if not reads_as_number(row["label"])), None)) is not None:
        raise DataError(
            f"{name}: the label {wrong['label']!r} of row {wrong['row']} is not a number, {why}. Write "
            f"numbers as 1234.5, and leave the label empty (--skip-unlabeled) where there is none."
        )


def check_no_vectors(name: Any, raw: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Raises `DataError` if the labels are vectors of 0 and 1: they would be taken for the labels "0" and "1"."""
    if _are_vectors(values := [row["label"] for row in raw]):
        raise DataError(
            f"{name}: the cells in {', '.join(map(repr, columns))} have a 0 or 1 for each label, such as "
            f"{values[0]!r:.60}. Write the names of a row's labels into the cell, or a column of 0 and 1 for each "
            "label (several --label-column)."
        )


def _are_vectors(values: Sequence[Any]) -> bool:
    """Whether all values are equally many 0 and 1, in lists or in texts such as "0 1 1".

    A list of numbers of classes repeats none of them.
    """
    lists = [re.split(r"[\s,;|]+", value.strip()) if isinstance(value, str) else value for value in values]
    same = all(isinstance(value, list | tuple) for value in lists) and len({len(value) for value in lists}) == 1
    return (
        same
        and all(part in (0, 1, "0", "1") for value in lists for part in value)
        and any(len({*value}) < len(value) for value in lists)
    )


def encode(
    name: Any, raw: Sequence[dict[str, Any]], labels: Labels | None, tokenizer: Any, max_length: int
) -> tuple[Rows, int, int]:
    """Tokenized rows, the longest text in tokens, and the number of texts that were cut.

    Raises:
        DataError: A row has a label that is not one of `labels`.
    """
    if not raw:
        return Rows([], []), 0, 0
    pairs = [row.get("pair") for row in raw] if "pair" in raw[0] else None
    check_room(tokenizer, max_length, pairs is not None)
    texts = [row["text"] for row in raw]
    encoded = tokenizer(texts, pairs, truncation=False, verbose=False)
    inputs = [{key: values[i] for key, values in encoded.items()} for i in range(len(raw))]
    lengths = [len(row["input_ids"]) for row in inputs]
    for i in [i for i, length in enumerate(lengths) if length > max_length]:
        inputs[i] = dict(tokenizer(texts[i], pairs and pairs[i], truncation=True, max_length=max_length))
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    start = next((token for token in known if token is not None), 0)
    for i in [i for i, length in enumerate(lengths) if not length]:  # no model takes a text without any token
        inputs[i] = dict.fromkeys(inputs[i], [0]) | {"input_ids": [start], "attention_mask": [1]}
    for row, values in zip(raw, inputs, strict=True):
        if labels is None or "label" not in row:
            continue
        try:
            values["labels"] = labels.encode(row["label"])
        except (KeyError, ValueError, TypeError):
            one = "a number" if labels.regression else f"one of {listed(labels.names)}"
            are_amounts = reads_as_number(row["label"]) and labels.names and all(map(reads_as_number, labels.names))
            advice = " If the labels are amounts, train with --regression." if are_amounts else ""
            raise DataError(
                f"{name}: the label {row['label']!r} of row {row['row']} is not {one}, as in training.{advice}"
            ) from None
    return Rows(inputs, list(raw)), max(lengths), sum(length > max_length for length in lengths)


def describe(labels: Labels, raw: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """A line about the classes and how many rows each has, and doubts about the labels."""
    values = [row["label"] for row in raw]
    doubts: list[str] = []
    if labels.regression:
        found = [float(value) for value in values]
        if all(re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", str(value).strip()) for value in values):
            doubts.append(f"labels such as {values[0]} are read as decimals; write no points between thousands")
        if np.std(found) > 100:
            doubts.append("the labels differ so much that they are learned slowly: divide them, or use a logarithm")
        return [f"labels: numbers from {min(found):g} to {max(found):g}, mean {np.mean(found):.4g}"], doubts
    counts = counts_of(labels, (labels.encode(value) for value in values))
    shown = ", ".join(f"{listed([label])} ({count:,})" for label, count in list(counts.items())[:MANY])
    more = f", and {len(counts) - MANY:,} more" if len(counts) > MANY else ""
    what = "labels, a row can have several" if labels.several else "classes"
    if labels.several:
        none = sum(not any(labels.encode(value)) for value in values)  # type: ignore[arg-type]
        more += f"; {counted(none, 'row')} without a label"
    if labels.unknown:
        how = "missed" if labels.several else "wrong"
        known = listed(labels.names)
        doubts.append(f"the model knows {known}, and not {listed(labels.unknown)}: such labels count as {how}")
    if not labels.several and all(reads_as_number(label) for label in labels.names) and len(labels.names) > 2:
        doubts.append(f"the numbers {labels.names[0]} to {labels.names[-1]} are classes (--regression for amounts)")
    separator = separator_of(labels.in_data)
    if not labels.several and (odd := _not_a_number(labels.names)) is not None:
        several = "" if separator is None else f"; for several labels, give --label-separator {separator!r}"
        doubts.append(
            f"all labels are classes, because {odd!r} is not a number; for amounts, write plain numbers, such as "
            f"1234.5, and leave missing ones empty{several}"
        )
    elif separator is not None:
        joined = next(label for label in labels.in_data if separator in label)
        doubts.append(f"{joined!r} is read as one label; for several labels, give --label-separator {separator!r}")
    if stray := sum(isinstance(value, str) and value != value.strip() for value in values):
        doubts.append(f"removed the blanks around {counted(stray, 'label')}")
    looks = Counter(look(label) for label in labels.in_data)
    if same := [label for label in labels.in_data if looks[look(label)] > 1]:
        doubts.append(f"the classes {', '.join(map(ascii, same[:4]))} look alike: are they the same?")
    found_for: dict[Any, set[str]] = {}
    for row in raw:
        found_for.setdefault((row["text"], row.get("pair")), set()).add(str(labels.encode(row["label"])))
    if unsure := sum(len(found) > 1 for found in found_for.values()):
        doubts.append(f"{unsure:,} text{'s have' if unsure > 1 else ' has'} different labels in different rows")
    rare = [label for label, count in counts.items() if count == 1]
    if rare and len(rare) < len(labels.names):
        classes = f"{len(rare):,} classes have" if len(rare) > 1 else "1 class has"
        doubts.append(f"{classes} one row only, such as {rare[0]!r}")
    return [f"{len(labels.in_data)} {what}: {shown}{more}"], doubts


def _not_a_number(names: Sequence[str]) -> str | None:
    """The first name because of which labels are classes, though they look like numbers to predict.

    That is one of amounts, such as 12% or 1,5, or of a few other names beside numbers with a fraction.
    """
    others = [name for name in names if not reads_as_number(name)]
    numbers = [float(name) for name in names if reads_as_number(name)]
    amounts = all(map(_AMOUNT.fullmatch, names))
    measured = len(numbers) > len(others) and not all(map(float.is_integer, numbers))
    return others[0] if others and len(names) > 2 and (amounts or measured) else None


def measure(labels: Labels, outputs: Any, rows: Rows, train: Rows | None) -> Quality:
    """The quality of logits `[rows, classes]`, or of numbers `[rows, 1]`."""
    logits = np.asarray(logits_in(outputs), dtype=float)
    expected = np.array([row["labels"] for row in rows.inputs])
    trained = [row["labels"] for row in train.inputs] if train is not None and len(train) else list(expected)
    remarks = []
    if labels.regression:
        predicted, constant = logits.reshape(-1), np.full(len(expected), np.mean(trained))
        function: Any = metrics.numbers
        fast: Any = None
    elif labels.several:
        # A class that the model does not know is never predicted.
        predicted, expected = np.pad(logits > 0, ((0, 0), (0, len(labels.unknown)))), expected > 0.5
        constant = np.broadcast_to(np.mean(np.array(trained), 0) > 0.5, expected.shape)
        function, fast = metrics.several_classes, metrics.counted_several_classes
    else:
        predicted, function, fast = logits.argmax(-1), metrics.classes, metrics.counted_classes
        constant = np.full(len(expected), Counter(trained).most_common(1)[0][0])
        if len(set(expected.tolist())) == 1:
            remarks.append(
                f"All {len(expected):,} validation rows have the class {labels.in_data[int(expected[0])]!r}, so the "
                f"metrics say nothing about the other classes: give more rows, or --validation."
            )
    if not labels.regression:
        check_order(labels, predicted, expected)
    shares = {} if labels.regression else {"accuracy": len(expected)}
    values, intervals = metrics.measured(
        lambda i: function(predicted[i], expected[i]), len(expected), shares,
        fast=fast and (lambda i: fast(predicted[i], expected[i])),
    )  # fmt: skip
    return Quality(values, function(constant, expected), intervals, remarks)


def decode(labels: Labels, outputs: Any, rows: Rows) -> list[dict[str, Any]]:
    """For each row, `label` and `scores` (one per class); `labels` for several; `value` for numbers."""
    logits = np.asarray(logits_in(outputs), dtype=float)
    found: list[dict[str, Any]] = []
    for row in logits.reshape(len(rows), -1):
        if labels.regression:
            found.append({"value": float(row[0])})
            continue
        scores = expit(row) if labels.several else softmax(row)
        by_name = dict(zip(labels.names, scores.tolist(), strict=True))
        if labels.several:
            found.append({"labels": [name for name, score in by_name.items() if score > 0.5], "scores": by_name})
        else:
            found.append({"label": labels.names[int(row.argmax())], "score": float(scores.max()), "scores": by_name})
    return found


def logits_in(outputs: Any) -> Any:
    """The logits in what Trainer returns for a model: them alone, or a tuple that starts with them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
