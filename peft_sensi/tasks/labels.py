"""The values of a label column go in; the labels of a task come out: classes, several labels per row, or numbers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..utils.errors import DataError
from ..utils.formatting import listed
from ..utils.heads import is_regressor, label_names


OUTSIDE = "O"  # the tag of a word that is in no entity
FEW = 20  # whole numbers that are written with a fraction (4.0) are classes if there are at most so many of them


@dataclass(frozen=True)
class Labels:
    """The labels of a task.

    Attributes:
        names: Names of the classes, in the order of their numbers. Empty for numbers.
        several: Whether a row can have several of the classes, or none (multi-label).
        separator: The text between the labels of a cell, if a row can have several.
        unknown: Further classes of a file, which a trained head cannot predict. Their numbers come after the others.
        numbered: Whether a file has the numbers of the classes, counted from 0, where a trained head has names.
        guessed: Whether a trained head has no names, and the names of the file are in their own order.
    """

    names: list[str]
    several: bool = False
    separator: str | None = None
    unknown: tuple[str, ...] = ()
    numbered: bool = False
    guessed: bool = False

    @property
    def in_data(self) -> list[str]:
        """The names of all classes that rows can have."""
        return [*self.names, *self.unknown]

    @property
    def regression(self) -> bool:
        return not self.names

    @property
    def problem_type(self) -> str:
        """The problem type of a Transformers config."""
        if self.regression:
            return "regression"
        return "multi_label_classification" if self.several else "single_label_classification"

    def encode(self, value: Any) -> int | float | list[float]:
        """The number that the model predicts for a value of the label column; for several labels, a list of 0 and 1.

        Raises `KeyError`, `ValueError` or `TypeError` for a value that is not a label of this task.
        """
        if self.regression:
            return finite(value)
        if not self.several:
            return self._number(value)
        chosen = {self._number(part) for part in parts_of(value, self.separator)}
        return [float(i in chosen) for i in range(len(self.names) + len(self.unknown))]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        if self.numbered:
            return {str(number): number for number in range(len(self.names))}
        # As `name_of` spells the values of a file, unless two classes would then have one name.
        by_name = {name_of(name): number for number, name in enumerate(self.in_data)}
        return by_name if len(by_name) == len(self.in_data) else {n: i for i, n in enumerate(self.in_data)}

    def _number(self, value: Any) -> int:
        return self._numbers[name_of(value)]


def labels_of_head(names: Sequence[str], problem_type: str | None = None) -> Labels:
    """The labels of a trained head: the names of its classes (empty for a regressor) and its config's problem type."""
    return Labels(list(names), problem_type == "multi_label_classification")


def labels_of_config(kind: str | None, config: Any) -> Labels:
    """The labels of a trained head, from its model's config: none for answers, and for a regressor."""
    if kind == "answers" or (kind != "words" and is_regressor(config.problem_type, config.num_labels)):
        return Labels([])
    return labels_of_head([str(config.id2label[i]) for i in range(config.num_labels)], config.problem_type)


def find_labels(values: Sequence[Any], regression: bool | None = None) -> Labels:
    """Decides whether the values of a label column are classes or numbers to predict.

    Numbers with a fraction ("3.8") are numbers to predict. Whole numbers ("1") are classes; those that are written
    with a fraction ("1.0") are classes if there are few of them. `regression` overrides this. Raises `TypeError` or
    `ValueError` for values that are neither.
    """
    numeric = all(reads_as_number(value) for value in values)
    whole = numeric and all(finite(value).is_integer() for value in values)
    names = {name_of(value) for value in values}
    if regression is None:
        floats = any("." in str(value) or "e" in str(value).lower() for value in values)
        regression = numeric and (not whole or (floats and len(names) > FEW))
    if regression:
        for value in values:
            finite(value)
        return Labels([])
    # Numbers are sorted as numbers: 2 comes before 10. "01" and "1" are two names of one number.
    return Labels(sorted(names, key=(lambda name: (float(name), name)) if whole else None))


def find_several(values: Sequence[Any], separator: str | None) -> Labels:
    """The classes of rows that can have several labels, in one cell (with a separator) or in a list."""
    names = {name_of(part) for value in values for part in parts_of(value, separator)}
    return Labels(sorted(names), several=True, separator=separator)


def order_of_head(labels: Labels, head: Sequence[str], data: Any, allow_unknown: bool = False) -> Labels:
    """The labels of a file, in the order that the head of a trained model has them. `head` is empty for a regressor.

    A file may have numbers from 0 on where the head has names, as many public data sets do.

    Raises:
        DataError: The file has labels that the head does not know (only such labels, with `allow_unknown`), or numbers
            where the head has classes.
    """
    unnamed = not label_names(dict(enumerate(head)))  # then both have the order of the numbers
    if (labels.regression and not labels.several) == bool(head) or (unnamed and len(labels.names) > len(head)):
        found = f"{len(labels.names)} classes" if labels.names else "numbers"
        raise DataError(f"{data} has {found} as labels, but the model's head has {len(head) or 1} outputs.")
    if unnamed:
        usual = [f"LABEL_{i}" for i in range(len(head))]  # what Transformers, and so its predictions, call the classes
        if labels.names and set(labels.names) <= set(usual):
            return Labels(usual, labels.several, labels.separator)
        whole = _count_from_0(labels.names, len(head))
        if not whole and len(labels.names) != len(head):
            raise DataError(
                f"{data} has {len(labels.names)} classes as labels, but the model's head has {len(head)} outputs."
            )
        names = [str(i) for i in range(len(head))] if whole else labels.names
        return Labels(names if head else [], labels.several, labels.separator, guessed=bool(head) and not whole)
    known = {*head, *map(name_of, head)}  # the names of a file have no blanks around them, and no ".0"
    unknown = [name for name in labels.names if name not in known]
    if unknown and len(unknown) == len(labels.names) and _count_from_0(labels.names, len(head)):
        return Labels(list(head), labels.several, labels.separator, numbered=True)
    if unknown and not (allow_unknown and len(unknown) < len(labels.names)):
        numbers = "" if OUTSIDE in head else ", or numbers that start at 0"  # tags of words are read by name only
        raise DataError(
            f"{data} has the label {unknown[0]!r}, but the model's labels are {listed(head)}. Write these "
            f"names{numbers}."
        )
    return Labels(list(head), labels.several, labels.separator, tuple(unknown))


def _count_from_0(names: Sequence[str], count: int) -> bool:
    """Whether these are numbers of `count` classes. Without a 0, they could count from 0 or from 1."""
    return "0" in names and all(name.isdecimal() and int(name) < count for name in names)


def name_of(value: Any) -> str:
    """The name of a class: without blanks around it, and without the fraction of a whole number (1.0 and 1. are 1).

    Raises `TypeError` for a value that names nothing, such as a list or bytes.
    """
    if isinstance(value, list | tuple | set | dict | bytes):
        raise TypeError(f"{value!r:.60} is not the name of a class")
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+\.0*", text):
        return text.partition(".")[0]
    return text


def parts_of(value: Any, separator: str | None) -> list[Any]:
    """The labels of one row: the items of a list, or the parts of a text. Empty items, and an empty text, are none."""
    if isinstance(value, list | tuple | set):
        return [part for part in value if not is_missing(part, numbers=False)]
    text = "" if value is None else str(value)
    parts = text.split(separator) if separator else [text]
    return [part.strip() for part in parts if part.strip()]


def reads_as_number(value: Any) -> bool:
    """Whether this is a finite number, or a text that says one."""
    try:
        finite(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def finite(value: Any) -> float:
    """`float(value)`. Raises `ValueError` for NaN and infinity too, because a loss cannot be computed from them."""
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def is_missing(value: Any, numbers: bool) -> bool:
    """Whether a label is missing. Among numbers, the text "nan" stands for a missing label, too."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    nan = isinstance(value, float) or (numbers and isinstance(value, str) and value.strip().lower() == "nan")
    return nan and not math.isfinite(float(value))


def is_hidden(value: Any) -> bool:
    """Whether this is what public test sets have in each row instead of its label: -1, as a number or as a text."""
    return str(value).strip() in ("-1", "-1.0")


def is_tag(tag: Any) -> bool:
    """Whether a value is the tag of a word: O, or a type of entities after a letter for the place in the entity."""
    prefix, dash, kind = str(tag).partition("-")
    return tag == OUTSIDE or (prefix in "BIESLU" and len(prefix) == 1 and bool(dash and kind))


def look(name: str) -> str:
    """What a name looks like, so that names which differ only in capitals, blanks or the code of accents are equal."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(c for c in plain if unicodedata.category(c) != "Cf").split())


def separator_of(names: Sequence[str]) -> str | None:
    """The text that seems to separate several labels in the names of classes, as in "fun|long" beside "fun"."""
    for separator in "|;,/+&":
        joined = [name for name in names if separator in name.strip(separator)]
        parts = {part.strip() for name in names for part in name.split(separator)}
        if len(joined) > 1 and len(parts) < len(names):
            return separator
    return None


def counts_of(labels: Labels, encoded: Iterable[Any]) -> Counter[str]:
    """How many rows have each class, by its name."""
    names = labels.in_data
    counts = Counter(dict.fromkeys(names, 0))
    for value in encoded:
        numbers = [i for i, chosen in enumerate(value) if chosen] if labels.several else [value]
        counts.update(names[number] for number in numbers)
    return counts
