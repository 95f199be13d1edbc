"""A file in; its rows out, and notes about what was recognized: compression, encoding, delimiter and quotes.

`read_rows` reads tables: .tsv, .csv and .txt with any delimiter, .json, .jsonl, .parquet and .arrow, also compressed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.errors import DataError
from ..utils.formatting import counted, listed
from .cells import with_lists
from .delimited import DELIMITERS, delimiter_of, has_quotes, lines_of, open_quote
from .encodings import OFFICE, OFFICE_SUFFIXES, TEXT_SUFFIXES, read_text, suffix_of, unpacked


SUFFIXES = (*TEXT_SUFFIXES, ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".conll", ".iob", ".bio")


@dataclass(frozen=True)
class Format:
    """What the user says about a file. `None` means that it is recognized."""

    encoding: str | None = None
    delimiter: str | None = None
    quotes: bool | None = None


@dataclass
class Table:
    """The rows of a file, as dicts from columns to values, and sentences about what was recognized and left out."""

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def read_rows(path: str | Path, form: Format | None = None, as_is: bool = False) -> Table:
    """The rows of a table or of JSON objects.

    Cells of text files stay strings: a text such as "1984", "null" or "NA" is not read as a number or a missing value.
    Objects inside of JSON rows become columns such as "meta.label". Unless rows stay `as_is`, columns of lists that a
    program has written as texts are read as lists (`with_lists`), and rows of empty cells are left out.

    Raises:
        DataError: The file has another form, is empty, or its rows do not fit the header.
    """
    path, form = Path(path), form or Format()
    kind = suffix_of(path)
    if kind in OFFICE_SUFFIXES:
        raise DataError(f"{path} is {OFFICE}.")
    if kind not in SUFFIXES:
        raise DataError(
            f"{path} cannot be read: data files end in {', '.join(SUFFIXES[:8])}, and may be compressed (.gz)."
        )
    notes: list[str] = []
    try:
        if kind in (".parquet", ".arrow", ".feather"):
            rows = _read_arrow(path, kind)
        else:
            text = read_text(path, notes, form.encoding)
            is_table = kind in TEXT_SUFFIXES
            rows = _read_table(path, text, kind, form, notes, as_is) if is_table else json_rows(path, parse_json(text))
            if is_table and not as_is:
                rows, found = with_lists(rows)
                notes += [f"{path.name}: the cells in {listed(found)} are read as lists or objects"] * bool(found)
    except (UnicodeError, csv.Error, ValueError, RecursionError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as {kind}: {str(error).rstrip('.')}.") from None
    if not rows:
        raise DataError(f"{path} has no rows.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is not an object with named values: {row!r:.60}.")
    return Table(flat_rows(rows), notes)


# -- tables -----------------------------------------------------------------------------------------------------------


def _read_table(path: Path, text: str, kind: str, form: Format, notes: list[str], as_is: bool) -> list[dict[str, Any]]:
    given = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(form.delimiter or "", form.delimiter)
    if given is not None and len(given) != 1:
        raise DataError(f"--delimiter {form.delimiter}: give one character, or tab.")
    if _is_json(text):
        raise DataError(f"{path} contains JSON: let its name end in .json, or in .jsonl if each line is an object.")
    if (first := re.match(r"sep=(.)\r?\n", text)) is not None:  # Excel writes and reads this line
        text, given = "\n" + text[first.end() :], given or first[1]
    expected = "," if kind == ".csv" else "\t"
    delimiter = given or delimiter_of(text, expected)
    quotes = form.quotes if form.quotes is not None else has_quotes(text, delimiter)
    if given is None and delimiter != expected:
        notes.append(f"{path.name}: columns are separated by {DELIMITERS[delimiter]} (--delimiter)")
    if '"' in text and delimiter == "\t":
        part = "enclose cells" if quotes else "are part of the text"
        notes.append(f"{path.name}: double quotes {part} (--{'no-' if quotes else ''}quotes for the other way)")
    if quotes and (open_at := open_quote(text, delimiter)) is not None:
        raise DataError(
            f"{path}: a double quote in line {open_at[0]} opens a cell that is not closed, so that the lines up to "
            f"{open_at[1]} become one row. Close it, or give --no-quotes if quotes are part of the texts."
        )
    header, *lines = lines_of(text, delimiter, quotes, blank=True) or [(1, [])]
    names = [name.strip() for name in header[1]]
    names, lines = _without_blank_columns(names, lines)
    check_names(path, names)
    rows: list[dict[str, Any]] = []
    empty: list[int] = []
    heights: list[int] = []
    repeated, before = 0, header[0]
    for line, cells in lines:
        heights.append(line - before)
        before = line
        plain = [cell.strip().removeprefix("\ufeff") for cell in cells]  # a file may have been joined to another
        if plain == names and not (as_is and len(names) == 1):  # the latter may be a text
            repeated += 1
        elif not any(cell.strip() for cell in cells) and not (as_is and len(cells) == len(names)):
            empty.append(line)
        elif len(cells) != len(names):
            other = "" if given else " Perhaps the columns are separated otherwise: see --delimiter and --quotes."
            raise DataError(
                f"{path}: row {len(rows) + 1} (it ends in line {line}) has {counted(len(cells), 'cell')}, and the "
                f"header has {len(names)} ({listed(names, 6)}).{other}"
            )
        else:
            rows.append(dict(zip(names, cells, strict=True)))
    if repeated:
        notes.append(f"{path.name}: left out {counted(repeated, 'repeated header')}")
    if empty:
        shown = ", ".join(map(str, empty[:3])) + ", ..." * (len(empty) > 3)
        several = "s" * (len(empty) > 1)
        notes.append(f"{path.name}: left out {counted(len(empty), 'empty row')} (line{several} {shown})")
    if high := sum(height > 1 for height in heights):
        notes.append(
            f"{path.name}: {counted(high, 'row')} with line breaks inside of quotes, up to {max(heights):,} lines "
            f"(--no-quotes if each line is a row)"
        )
    return rows


def _without_blank_columns(
    names: list[str], lines: list[tuple[int, list[str]]]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Without the columns that have neither a name nor values: spreadsheets write their delimiters."""
    used = {i for _, cells in lines for i, cell in enumerate(cells) if cell.strip()}
    blank = {i for i, name in enumerate(names) if not name and i not in used}
    width = max(len(names), max(used, default=0) + 1)  # delimiters beyond the header are blank columns, too
    if len(blank) == len(names):
        return names, lines
    kept = [(line, [cell for i, cell in enumerate(cells[:width]) if i not in blank]) for line, cells in lines]
    return [name for i, name in enumerate(names) if i not in blank], kept


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    with suppress(ValueError, RecursionError):
        parse_json(text)
        return True
    return False


# -- JSON and Arrow ---------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """The value of a JSON text, or the list of the values of JSON Lines. A blank text has no values."""
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as whole:
        # Not splitlines(): it also splits at characters such as U+2028, which JSON strings may contain.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if len(lines) < 2 and not text.lstrip().startswith("{"):
            raise
        value = []
        for number, line in lines:
            try:
                value.append(json.loads(line))
            except json.JSONDecodeError as error:
                reason = f"line {number}: {error.msg} (column {error.colno})" if value else str(whole)
                raise ValueError(f"{reason}. In JSON Lines, each line is a whole value") from None
    return _with_whole_characters(value) if re.search(r"\\u[dD][89a-fA-F]", text) else value


def _with_whole_characters(value: Any) -> Any:
    """The value with U+FFFD for halves of characters, such as a cut emoji: no tokenizer and no file takes them."""
    if isinstance(value, dict):
        return {_with_whole_characters(name): _with_whole_characters(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_characters(item) for item in value]
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def json_rows(path: Path, value: Any) -> list[Any]:
    """The list of rows in a JSON value: the value itself, the only list of objects inside, or columns of values.

    All forms that pandas writes are known, except bare lists of values, which have no names of columns. In JSON Lines,
    an object with lists is one row, such as a sentence.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{path} has no list of rows.")
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data", "index_names", "column_names"}:
        names, cells = value["columns"], value["data"]  # pandas' form "split" or "tight"
        if isinstance(cells, list) and all(isinstance(row, list) and len(row) == len(names) for row in cells):
            check_names(path, list(map(str, names)))
            return [dict(zip(map(str, names), row, strict=True)) for row in cells]
    if suffix_of(path) == ".json" and value and all(isinstance(column, list) for column in value.values()):
        columns: dict[str, Sequence[Any]] = value
        lists = [name for name, column in columns.items() if column and all(isinstance(x, dict) for x in column)]
        if len(lists) == 1 and len(columns) == 1:
            return list(columns[lists[0]])
        if not lists and len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if isinstance(value.get("schema"), dict) and "fields" in value["schema"]:  # pandas' form "table"
        value = {name: item for name, item in value.items() if name != "schema"}
    found = _lists_of_objects(value)
    if len(found) == 1:
        return found[0][1]
    if not found:
        return _rows_by_name(value, guess=suffix_of(path) == ".json") or [value]  # JSON Lines with one line
    names = ", ".join(name for name, _ in found)
    raise DataError(f"{path} has several lists of rows ({names}): write the right one to a file of its own.")


def _rows_by_name(value: dict[str, Any], guess: bool) -> list[Any]:
    """The rows of an object of objects: columns with a value for each row, or rows with a value for each column.

    With `guess`, also if neither has numbers as names: there are more rows than columns. Empty for another value.
    """
    inner = list(value.values())
    if len(inner) < 2 or not all(isinstance(item, dict) and item for item in inner):
        return []
    names = list(inner[0])
    same, columns = all(list(item) == names for item in inner), {name for item in inner for name in item}
    numbered, inner_numbered = (all(map(str.isdecimal, keys)) for keys in (value, names))
    if same and (inner_numbered or (guess and not numbered and len(names) > len(value))):
        return [{name: column[row] for name, column in value.items()} for row in names]
    return inner if numbered or (guess and len(value) > len(columns)) else []


def _lists_of_objects(value: dict[str, Any], above: str = "") -> list[tuple[str, list[Any]]]:
    found = []
    for name, item in value.items():
        if isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
            found.append((above + name, item))
        elif isinstance(item, dict):
            found += _lists_of_objects(item, f"{above}{name}.")
    return found


def flat_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without objects inside (see `flat`), all with the same columns. What a row lacks is `None`."""
    return same_columns([flat(row) for row in rows])


def same_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with all columns that any of them has. What a row lacks is `None`."""
    names = dict.fromkeys(name for row in rows for name in row)
    if all(len(row) == len(names) for row in rows):
        return rows
    return [{name: row.get(name) for name in names} for row in rows]


def flat(row: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A row without objects inside: {"meta": {"label": 1}} becomes {"meta.label": 1}."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found


def with_texts(value: Any) -> Any:
    """The value with texts instead of bytes that are UTF-8: many programs write texts as binary columns."""
    if isinstance(value, dict):
        return {name: with_texts(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item) for item in value]
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    return value


def _read_arrow(path: Path, kind: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    content = io.BytesIO(unpacked(path))
    try:
        if kind == ".parquet":
            table = pyarrow.parquet.read_table(content)
        else:
            try:
                table = pyarrow.ipc.open_stream(content).read_all()
            except pyarrow.ArrowInvalid:
                content.seek(0)
                table = pyarrow.ipc.open_file(content).read_all()
        check_names(path, table.column_names)
        return [with_texts(row) for row in table.to_pylist()]
    except (pyarrow.ArrowException, OverflowError) as error:  # dates that Python cannot hold
        raise ValueError(str(error)) from None


def check_names(path: Path, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        what = f"two columns {twice[0]!r}: rename or remove one of them" if twice[0] else "two columns without a name"
        raise DataError(f"{path} has {what}.")
