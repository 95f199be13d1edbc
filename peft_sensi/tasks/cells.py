"""Cells of a table in which a program wrote a list or an object as text go in; the lists and objects come out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


# NumPy writes ['O' 'B-person'], without commas, and inside of other objects array(['O'], dtype=object).
_TEXT = r"""'[^'\\]*'|"[^"\\]*\""""
_ITEM = rf"(?:{_TEXT}|[-+]?\d+\.?\d*(?:e[-+]?\d+)?|True|False)"
_ARRAY = re.compile(rf"\[\s*{_ITEM}(?:\s+{_ITEM})*\s*\]")
_JOINED = re.compile(r"""['"]\s+['"]""")  # Python would join these texts
_INNER = re.compile(r"\barray\((\[.*?\])(?:, dtype=\w+)?\)", re.DOTALL)


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
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if _ARRAY.fullmatch(text):
        text = "[" + ",".join(re.findall(_ITEM, text)) + "]"
    elif _JOINED.search(_INNER.sub("", text)):
        return None
    with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = ast.literal_eval(_INNER.sub(r"\1", text))
        return sorted(value, key=str) if isinstance(value, set) else value if isinstance(value, list | dict) else None
    return None
