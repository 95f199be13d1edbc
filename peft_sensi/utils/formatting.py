"""Numbers, module paths, tables and objects as short text for terminals, notebooks, pictures and messages."""

from __future__ import annotations

import difflib
import html
import re
import reprlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from .errors import SensiError


def human(number: float) -> str:
    """A count with three digits and a unit, such as `84.9 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"
    return f"{number:,.0f}"


def size_of(count: float) -> str:
    """A number of bytes with a unit, in powers of ten, such as `1.20 MB`."""
    return f"{human(count)}{'B' if count >= 1000 else ' B'}"


def counted(count: int, what: str) -> str:
    """A number of things: `1 row`, `1,200 rows`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def listed(names: Sequence[Any], most: int = 12) -> str:
    """Names of classes or columns in one line, at most so many. Those with commas, quotes or odd blanks are quoted."""
    shown = [
        name if re.fullmatch(r"[^\s,\"']+( [^\s,\"']+)*", name) else repr(name) for name in map(str, names[:most])
    ]
    return ", ".join(shown) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def metric_text(value: float | None) -> str:
    """A metric with four digits, or six in all if it is large. `None` is one that is undefined."""
    return "undefined" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def interval_text(bounds: Sequence[float] | None) -> str:
    """The lower and the upper bound of a metric, with three digits; empty if it has no interval."""
    if bounds is None:
        return ""
    low, high = (f"{bound:.3f}" if abs(bound) < 1000 else f"{bound:.4g}" for bound in bounds)
    return f"{low} to {high}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The parts in which paths differ from each other.

    `bert.encoder.layer.0` becomes `0` among the layers of BERT. `encoder.block.0` becomes `encoder 0` beside
    `decoder.block.0` and `encoder.block.1`. A single path becomes its last number, or its last part.
    """
    paths = list(dict.fromkeys(paths))
    parts = [path.split(".") for path in paths]
    if len(paths) == 1:
        return {paths[0]: next((part for part in reversed(parts[0]) if part.isdecimal()), parts[0][-1])}
    if len({len(p) for p in parts}) == 1:
        keep = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        return {path: " ".join(p[i] for i in keep) for path, p in zip(paths, parts, strict=True)}
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    return {path: " ".join(p[common:]) or p[-1] for path, p in zip(paths, parts, strict=True)}


def shortened(label: str, width: int) -> str:
    """Shortens a label to `width` characters. The first word, a number after it (the block) and the end stay."""
    first = re.match(r"\S*(?: \d+(?= ))?", label)[0][: width // 2]  # type: ignore[index]
    return label if len(label) <= width else f"{first} …{label[len(first) + 2 - width :]}"


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = 60) -> list[str]:
    """The lines of a table: the first column on the left, the others on the right of their cells.

    Labels in the first column are shortened (not below 12 characters), so that no line is longer than `width`.
    """
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], max(12, width - sum(widths[1:]) - 2 * len(widths) + 2))
    return [
        f"{shortened(line[0], widths[0]):<{widths[0]}}"
        + "".join(f"  {cell:>{size}}" for cell, size in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """The same table in HTML, for notebooks."""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<p>{html.escape(caption)}</p><table><tr>{header}</tr>{body}</table>"


def wrapped(lines: Iterable[str]) -> str:
    """Lines of text, where those that are longer than 80 characters are continued on an indented line."""
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ", break_long_words=False) for line in lines)


def data_frame(records: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas DataFrame with one row for each record. Raises `SensiError` if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise SensiError("`to_frame` needs pandas: pip install pandas") from None
    return pandas.DataFrame.from_records(list(records))


def find_name(name: str, names: Iterable[str], where: str) -> str:
    """The name that is equal to `name`, or else the only one that ends with it. Raises `SensiError`."""
    names = list(names)
    found = [n for n in names if n == name] or [n for n in names if n.endswith(f".{name}")]
    if len(found) != 1:
        near = found or difflib.get_close_matches(str(name), names, cutoff=0.0)
        raise SensiError(
            f"The {where} has {'several groups' if found else 'no group'} {name!r}. Similar names: {near[:3]}."
        )
    return found[0]


def short_repr(value: Any) -> str:
    """A dataclass as one line, with the fields that differ from their defaults. Long values are cut."""
    parts = []
    for field in fields(value):
        own = getattr(value, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.repr and (own is not default and type(own) is not type(default) or own != default):
            parts.append(f"{field.name}={_SHORT.repr(own)}")
    return f"{type(value).__name__}({', '.join(parts)})"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxset, _SHORT.maxtuple = 1, 3, 3, 2, 3
_SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 80, 80, 300
