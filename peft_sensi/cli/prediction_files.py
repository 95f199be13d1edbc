"""Records with predictions go in; a CSV, TSV or JSON Lines file comes out."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    lists, those with the separator in a text, and those in `columns` (of the user's file) are written as JSON. All
    records have the same keys.
    """
    stream = stdout_for_programs() if path is None else path.open("w", encoding="utf-8", newline="")
    with contextlib.nullcontext(stream) if path is None else stream as file:
        if suffix == ".jsonl":
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            return
        rows = (_flat(record, separator, columns) for record in records)
        first = next(rows, None)
        if first is None:
            return
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(first), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain([first], rows):
            writer.writerow(row)


def _flat(record: Mapping[str, Any], separator: str, columns: Sequence[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{key}": part for key, part in value.items()}
        elif (
            isinstance(value, list)
            and name not in columns
            and all(isinstance(part, str) and separator not in part for part in value)
        ):
            flat[name] = separator.join(value)
        elif isinstance(value, list):
            flat[name] = json.dumps(value, ensure_ascii=False)
        else:
            flat[name] = value
    return flat
