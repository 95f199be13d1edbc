"""Records with predictions go in; a CSV, TSV or JSON Lines file comes out."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


SUFFIXES = (".csv", ".tsv", ".jsonl")


def write_records(path: Path | None, suffix: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes the records, one after the other as they come. `path` is `None` for stdout.

    In tables, lists are joined by blanks, and a dict becomes one column for each of its keys. The columns are those of
    the first record, and of tables that lack some of them, all others are empty.
    """
    with contextlib.nullcontext(sys.stdout) if path is None else path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            return
        rows = (_flat(record) for record in records)
        first = next(rows, None)
        if first is None:
            return
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(first), delimiter=delimiter, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in itertools.chain([first], rows):
            writer.writerow(row)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{key}": part for key, part in value.items()}
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            flat[name] = " ".join(value)
        elif isinstance(value, list):
            flat[name] = json.dumps(value, ensure_ascii=False)
        else:
            flat[name] = value
    return flat
