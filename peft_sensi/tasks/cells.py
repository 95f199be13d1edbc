"""Cells of a table in which a program wrote a list or an object as text go in; the lists and objects come out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any


_NUMPY = re.compile(r"['\"]\s+['\"]")  # arrays are written without commas; Python would join their texts


def with_lists(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the names of the columns whose cells are lists or objects now.

    pandas writes a column of lists into a CSV file as `['O', 'B-person']`. A column is read so if all of its cells
    that are not blank have this form, in Python or in JSON. Otherwise it stays as it is.
    """
    found: dict[str, list[Any]] = {}
    for name in rows[0] if rows else ():
        cells = [row[name] for row in rows]
        values = [None if not cell.strip() else _value_of(cell.strip()) for cell in cells]
        if any(cell.strip() for cell in cells) and all(
            value is not None or not cell.strip() for cell, value in zip(cells, values, strict=True)
        ):
            found[name] = values
    return [row | {name: values[i] for name, values in found.items()} for i, row in enumerate(rows)], list(found)


def _value_of(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text is the form of; `None` if it is something else."""
    if (text[0], text[-1]) not in (("[", "]"), ("{", "}")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _NUMPY.search(text):
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    return value if isinstance(value, list | dict) else None
