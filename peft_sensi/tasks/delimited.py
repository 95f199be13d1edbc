"""The text of a table with delimiters goes in; its lines come out as lists of cells, with what was recognized."""

from __future__ import annotations

import csv
import io
import re
from typing import Any


DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}


def lines_of(
    text: str, delimiter: str, quotes: bool, limit: int | None = None, blank: bool = False
) -> list[tuple[int, list[str]]]:
    """The lines of a table: number of the (last) line, and its cells.

    Blank lines are left out, or have no cells with `blank`. Those at the start and the end are always left out.
    """
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    old = csv.field_size_limit(2**31 - 1)  # texts may be long: the tokenizer cuts them later
    try:
        found = _read(text, limit, blank, delimiter=delimiter, quoting=quoting)
        if quotes and _are_indented(found):
            found = _read(text, limit, blank, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
        return found
    finally:
        csv.field_size_limit(old)


def _read(text: str, limit: int | None, blank: bool, **form: Any) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), **form)
    found: list[tuple[int, list[str]]] = []
    for cells in reader:
        if cells or (blank and found):
            found.append((reader.line_num, cells))
        if limit is not None and len(found) >= limit:
            break
    while found and not found[-1][1]:
        found.pop()
    return found


def _are_indented(lines: list[tuple[int, list[str]]]) -> bool:
    """Whether there is a blank before the quotes of cells, as in `text, "label"`: in all rows of one column."""
    rows = [cells for _, cells in lines[1:] if cells]
    width = min(map(len, rows), default=0)
    return any(all(re.match(' +"', cells[column]) for cells in rows) for column in range(1, width))


def delimiter_of(text: str, expected: str) -> str:
    """The delimiter with which the first rows have as many cells as the header, and more than one.

    The delimiter of the file's suffix wins unless it gives one column or rows that do not fit.
    """
    best, most = expected, (0.0, 0)
    for delimiter in (expected, *(d for d in DELIMITERS if d != expected)):
        tables = [lines_of(text, delimiter, quotes, 200) for quotes in (False, True)]
        for rows in tables:
            width = len(rows[0][1]) if rows else 0
            fitting = sum(len(cells) == width for _, cells in rows) / max(1, len(rows))
            quality = (round(fitting, 2), min(width, 2))
            if width > 1 and quality > most:
                best, most = delimiter, quality
    return best


def has_quotes(text: str, delimiter: str) -> bool:
    """Whether double quotes enclose cells. In files with tabs they often are a part of the text, as in GLUE."""
    if '"' not in text:
        return True
    if delimiter != "\t":
        return True
    plain, quoted = (lines_of(text, delimiter, quotes) for quotes in (False, True))
    fits = [len({len(cells) for _, cells in rows}) == 1 for rows in (plain, quoted)]
    if fits[0] != fits[1]:
        return fits[1]
    cells = [cell for _, row in plain for cell in row if '"' in cell]
    whole = all(re.fullmatch('"([^"]|"")*"', cell) for cell in cells)
    # Cells that need no quotes have some in a file that was written with quotes around every text.
    escaped = any('""' in cell[1:-1] for cell in cells)
    header = all(cell.startswith('"') and cell.endswith('"') for cell in plain[0][1])
    return whole and (escaped or header)


def open_quote(text: str, delimiter: str) -> tuple[int, int] | None:
    """The first and last line of a row over several lines whose quotes are not closed where the cell ends.

    Such a row is hardly one: it has swallowed the lines up to the next quote, or up to the end of the text.
    """
    lines = io.StringIO(text, newline="")
    start, old = 0, csv.field_size_limit(2**31 - 1)
    try:
        while True:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            before = 0
            try:
                for _ in reader:
                    before = reader.line_num
                return None
            except csv.Error:
                if reader.line_num > before + 1:
                    return start + before + 1, start + reader.line_num
            start += reader.line_num  # a quote inside of a line does no harm
    finally:
        csv.field_size_limit(old)
