"""The names and values of a table's columns go in; which column holds the text, the second text and the label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import DataError
from ..utils.formatting import listed
from .encodings import TEXT_SUFFIXES, suffix_of
from .labels import is_tag, reads_as_number


LABEL_COLUMNS = (
    "label", "labels", "target", "class", "category", "sentiment", "score", "y", "gold_label", "similarity",
    "similarity_score", "relatedness_score", "entailment_label", "entailment_judgment", "quality", "rating", "stars",
)  # fmt: skip
TEXT_COLUMNS = ("text", "sentence", "content", "review", "body", "comment", "tweet", "message", "document", "question")
WRITTEN = "Models that write texts are trained in Python, with SensiConfig, not by this command."
_ID = re.compile(
    r"(^|[_\W])(id|idx|index|uuid|guid|key|url|uri|link|date|time|timestamp|file|filename|path|split)$", re.IGNORECASE
)
_CAMEL_ID = re.compile(r"[a-z](Id|ID)$")


def usual_label_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns with usual names of labels, the most usual one first."""
    names = list(rows[0])
    # A label inside of an object ("meta.label") has the name of its last part, too.
    usual = {column.strip().lower().rpartition(".")[2]: column for column in reversed(names)}
    usual |= {column.strip().lower(): column for column in reversed(names)}
    return list(dict.fromkeys(usual[column] for column in LABEL_COLUMNS if column in usual))


def other_label_columns(rows: Sequence[dict[str, Any]], given: Sequence[str], chosen: str) -> list[str]:
    """Columns that could hold the labels as well as the chosen one. None, if that was given or has a sure name."""
    if given or chosen.strip().lower() in LABEL_COLUMNS[:2]:
        return []
    return [column for column in usual_label_columns(rows) if column != chosen]


def label_columns(name: Any, rows: Sequence[dict[str, Any]], given: Sequence[str]) -> list[str]:
    """The label columns: those that were given, or the only one with a usual name."""
    names = list(rows[0])
    check_known(name, names, given, "--label-column")
    if len(set(given)) < len(given):
        raise DataError(f"--label-column names {listed(given)}: give each column once.")
    if given:
        return list(given)
    found = usual_label_columns(rows)
    if not found:
        hint = " If the file has no header, write one." if suffix_of(Path(str(name))) in TEXT_SUFFIXES else ""
        if any(all(is_tag(row[column]) for row in rows[:100]) for column in names):
            hint += " For words with tags, give --task words."
        raise DataError(
            f"{name}: name the column that holds the labels with --label-column (several times for columns of 0 and "
            f"1); the columns are {listed(names)}.{hint} {WRITTEN}"
        )
    return found[:1]


def text_columns(
    name: Any, rows: Sequence[dict[str, Any]], labels: Sequence[str], text: str | None, pair: str | None
) -> tuple[tuple[str, ...], list[str]]:
    """The one or two columns of texts, and doubts about this choice.

    Columns of numbers, of names of rows (ids), of one repeated word and of a few categories are not texts.
    """
    names = list(rows[0])
    check_known(name, names, [text] if text else [], "--text-column")
    check_known(name, names, [pair] if pair else [], "--pair-column")
    if both := [column for column in labels if column in (text, pair)]:
        raise DataError(f"{both[0]!r} cannot be both the text and the label: see --text-column and --label-column.")
    if text is not None and text == pair:
        raise DataError(f"{text!r} cannot be both texts of a pair: see --text-column and --pair-column.")
    if text is not None:
        return ((text,) if pair is None else (text, pair)), []
    sample = rows[:1000]
    others = [column for column in names if column not in (*labels, pair)]
    found = [column for column in others if _is_text(column, [row.get(column) for row in sample])]
    if not found:
        # A column of single words is a text if there is no other.
        found = [c for c in others if _is_text(c, [row.get(c) for row in sample], words=True)]
    room = 1 if pair else 2
    usual = [column for column in found if column.strip().lower().rpartition(".")[2] in TEXT_COLUMNS]
    # Beside a text, a short one (an author, a place) is hardly a part of the question.
    is_short = [column for column in found if _mean_words([row.get(column) for row in sample]) < 4]
    if len(found) > room or (len(usual) == 1 and len(found) > 1 and is_short == [c for c in found if c not in usual]):
        if len(usual) != 1:
            raise DataError(
                f"{name}: name the column that holds the text with --text-column (and a second one with "
                f"--pair-column); the columns are {listed(names)}."
            )
        left_out = listed([column for column in found if column not in usual])
        doubt = [f"{name}: not read are the texts in {left_out} (--text-column, --pair-column)"]
        return (usual[0], pair) if pair else (usual[0],), doubt
    if not found:
        raise DataError(
            f"{name}: name the column that holds the text with --text-column; the columns are {listed(names)}. Empty "
            f"columns, numbers and ids are not taken for texts."
        )
    columns = (*found, pair) if pair else tuple(found)
    if len(found) == 2:
        return columns, [f"both {found[0]} and {found[1]} are read, as a pair (--text-column NAME for one only)"]
    return columns, []


def _mean_words(values: Sequence[Any]) -> float:
    counts = [len(value.split()) for value in values if isinstance(value, str) and value.strip()]
    return sum(counts) / max(1, len(counts))


def _is_text(column: str, values: Sequence[Any], words: bool = False) -> bool:
    """Whether the values are texts of several words, or of any number of words with `words`."""
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    others = sum(not isinstance(value, str) for value in values if value is not None)
    if len(texts) <= others:  # a few wrong rows are named later
        return False
    if _ID.search(column) or _CAMEL_ID.search(column) or all(reads_as_number(text) for text in texts):
        return False
    if sum(any(letter.isalpha() for letter in text) for text in texts) * 2 < len(texts):  # dates, phone numbers
        return False
    if words:
        return True
    spaced = sum(len(text.split()) > 1 for text in texts)
    # Languages without spaces have long words.
    long = sum(len(text) > 20 and "/" not in text for text in texts)
    categories = len(texts) >= 20 and len(set(texts)) <= 3 and column.strip().lower() not in TEXT_COLUMNS
    return max(spaced, long) * 4 >= len(texts) and not categories


def check_known(name: Any, names: Sequence[str], given: Sequence[str], option: str) -> None:
    for column in given:
        if column not in names:
            raise DataError(f"{name} has no column {column!r}; it has {listed(names)}. See {option}.")
