"""Records with predictions go in; a CSV, TSV or JSON Lines file comes out."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import json_text
from .terminal import stdout_for_programs


SUFFIXES = (".csv", ".tsv", ".jsonl")


def write_records(
    path: Path | None,
    suffix: str,
    records: Iterable[Mapping[str, Any]],
    separator: str = " ",
    columns: Sequence[str] = (),
) -> None:
    """Writes the records in UTF-8, one after the other as they come. `path` is `None` for stdout.

    In tables, texts in a list are joined by the separator, and a dict becomes one column for each of its keys. Other
    lists, those with the separator in a text, and lists and dicts in `columns` (of the user's file) are written as
    JSON. All records have the same keys.
    """
    stream = stdout_for_programs() if path is None else path.open("w", encoding="utf-8", newline="")
    with contextlib.nullcontext(stream) if path is None else stream as file:
        if suffix == ".jsonl":
            file.writelines(json_text(record) + "\n" for record in records)
            return
        delimiter = "\t" if suffix == ".tsv" else ","
        for number, record in enumerate(records):
            row = _flat(record, separator, columns)
            if number == 0:
                file.write(_line(row, delimiter))
            file.write(_line(row.values(), delimiter))


def unused_name(name: str, value: Any, taken: Collection[str]) -> str:
    """The name of a column for a prediction, with `predicted_` before it as often as needed: none is taken.

    A dict needs a column for each of its keys (see `write_records`).
    """
    keys = value if isinstance(value, Mapping) else ()
    while any(column in taken for column in (name, *(f"{name}_{key}" for key in keys))):
        name = f"predicted_{name}"
    return name


def _line(cells: Iterable[Any], delimiter: str) -> str:
    """A line of a table. The lines of `csv` end in both kinds of line breaks, so that cells with either are quoted."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _flat(record: Mapping[str, Any], separator: str, columns: Sequence[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list | Mapping) and name in columns:
            flat[name] = json_text(value)
        elif isinstance(value, Mapping):
            flat |= {f"{name}_{key}": part for key, part in value.items()}
        elif isinstance(value, list):
            joins = all(isinstance(part, str) and separator not in part for part in value)
            flat[name] = separator.join(value) if joins else json_text(value)
        else:
            flat[name] = value
    return flat
