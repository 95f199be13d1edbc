"""A plan or a list of facts goes in; tables for a terminal, drawn by rich, come out.

Each of the states has its own character, so nothing is lost without color (`NO_COLOR`, pipes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..planning.plan import Plan
from ..planning.rows import drawn_rows, kind_names
from ..utils.formatting import human, short_names, shortened
from ..utils.states import FROZEN, KINDS, STATES, TRIMMED, TUNED, UPDATED, Row, shown_states


# Characters with and without Unicode, and the color.
GLYPHS = {
    TUNED: ("█", "#", "blue"), UPDATED: ("▓", "+", "green"), FROZEN: ("▒", "=", "yellow"),
    TRIMMED: ("·", ".", "bright_black"),
}  # fmt: skip


@dataclass
class Bar:
    """The shares of a group's states, as a bar of 4 to 16 characters. rich chooses the width."""

    row: Row
    ascii_only: bool = False

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, 16)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.text(options.max_width) if options.max_width >= 4 else Text()  # too narrow for all states

    def text(self, width: int) -> Text:
        """Each state that occurs gets at least one character."""
        exact = {state: self.row.count(state) * width / max(1, self.row.size) for state in STATES}
        cells = {state: max(int(share), int(share > 0)) for state, share in exact.items()}
        while sum(cells.values()) > width:
            cells[max(cells, key=lambda state: cells[state])] -= 1
        while 0 < sum(cells.values()) < width:
            cells[max(cells, key=lambda state: exact[state] - cells[state])] += 1
        return Text.assemble(*(_characters(state, cells[state], self.ascii_only) for state in STATES))


def _characters(state: int, count: int, ascii_only: bool) -> tuple[str, str]:
    glyph, plain, color = GLYPHS[state]
    return (plain if ascii_only else glyph) * count, color


def plan_table(plan: Plan | Mapping[str, Any], ascii_only: bool = False) -> Table:
    """A table with one line for each block: its numbers of kept and tuned units, and a bar of the states.

    `plan` is a `Plan`, or the dict in an adapter's config. The column of tuned units is left out if all kept units are
    tuned, or none.
    """
    table, rows = _table(), drawn_rows(plan)
    kinds, names = [kind for kind in KINDS if any(row.kind == kind for row in rows)], kind_names(rows)
    both = any(row.count(FROZEN, UPDATED) for row in rows) and any(row.count(TUNED) for row in rows)
    table.add_column("block", no_wrap=True)
    for kind in kinds:
        for header in [f"{names[kind]} kept", "tuned"][: 1 + both]:
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column()  # the bars: rich narrows only columns that may wrap
    for label, line in _lines(rows):
        cells: list[Any] = [Text(label)]
        for kind in kinds:
            row = line.get(kind)
            counts = [f"{row.kept:,}/{row.size:,}", f"{row.count(TUNED):,}"] if row else ["", ""]
            cells += [*counts[: 1 + both], Bar(row, ascii_only) if row else ""]
        table.add_row(*cells)
    return table


def legend(plan: Plan | Mapping[str, Any], ascii_only: bool = False) -> Text:
    """The characters of the states that occur in the plan, and their names."""
    text, rows = Text(), drawn_rows(plan)
    for state, name in shown_states(rows).items():
        text.append(*_characters(state, 2, ascii_only)).append(f" {name}   ")
    return text


def facts_table(facts: Mapping[str, str]) -> Table:
    """Labels and values in two columns."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def plan_renderables(plan: Plan, ascii_only: bool = False) -> list[Any]:
    """What a terminal shows of a plan: the table of its units, the legend, and its figures."""
    return [plan_table(plan, ascii_only), legend(plan, ascii_only), facts_table(plan.facts(human))]


def records_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of strings. Only the last column wraps."""
    table = _table()
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i + 1 < len(columns), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _lines(rows: Sequence[Row]) -> list[tuple[str, dict[str, Row]]]:
    """Labels of the table's lines, and the row of each kind on the line.

    The rows of a block share a line. A block's second row of the same kind (a second attention) gets its own line.
    """
    names = short_names(row.block for row in rows)
    width = 36 if len({row.kind for row in rows}) == 1 else 20
    lines: list[tuple[str, dict[str, Row]]] = []
    last_line: dict[str, dict[str, Row]] = {}
    for row in rows:
        line = last_line.get(row.block)
        if line is None or row.kind in line:
            second = row.name.rpartition(".")[2].removesuffix(KINDS[row.kind]).strip("_") or KINDS[row.kind]
            label = names[row.block] if line is None else f"{names[row.block]} {second}"
            line = last_line[row.block] = {}
            lines.append((shortened(label, width), line))
        line[row.kind] = row
    return lines
