"""Tables for a terminal, and the same figures as plain JSON values. They need rich (`pip install 'peft-sensi[cli]'`).

Nothing relies on color: the three states have characters of their own, so a pipe or `NO_COLOR` loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..planning.plan import Plan, drawn_rows, rows_of
from ..utils.errors import SensiError
from ..utils.formatting import human, short_names, shortened
from ..utils.states import FROZEN, KINDS, TRIMMED, TUNED, Row


if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


GLYPHS = {TUNED: ("█", "blue"), FROZEN: ("▒", "yellow"), TRIMMED: ("·", "bright_black")}
ASCII = {TUNED: "#", FROZEN: "=", TRIMMED: "."}
LEGEND = {TUNED: "tuned", FROZEN: "frozen", TRIMMED: "trimmed"}
WIDTH = 80  # what every terminal has
MIN_BAR, MAX_BAR = 4, 16


def plan_table(plan: Plan | Mapping[str, Any], ascii_only: bool = False) -> RenderableType:
    """A line a block: how many heads and neurons stay, how many of them are tuned, and a bar of the three states."""
    table, rows = _table(), drawn_rows(plan)
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    both = any(row.count(FROZEN) for row in rows) and any(row.count(TUNED) for row in rows)
    lines = _lines(rows)

    def cells(line: Mapping[str, Row], kind: str) -> list[str]:
        if kind not in line:
            return ["", ""][: 1 + both]
        row = line[kind]
        return [f"{row.count(TUNED, FROZEN):,}/{row.size:,}", *([f"{row.count(TUNED):,}"] if both else [])]

    headers = {kind: [f"{KINDS[kind]} kept", *(["tuned"] if both else [])] for kind in kinds}
    columns = [
        [header, *(cells(line, kind)[i] for _, line in lines)]
        for kind in kinds
        for i, header in enumerate(headers[kind])
    ]
    taken = max(len(label) for label in ("block", *(label for label, _ in lines))) + sum(
        max(map(len, column)) for column in columns
    )
    room = (WIDTH - taken - 3 * (1 + len(columns) + len(kinds))) // max(1, len(kinds))
    bar = max(MIN_BAR, min(MAX_BAR, room))
    table.add_column("block", no_wrap=True)
    for kind in kinds:
        for header in headers[kind]:
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for label, line in lines:
        parts: list[Any] = [label]
        for kind in kinds:
            parts += [*cells(line, kind), _bar(line[kind], ascii_only, bar) if kind in line else ""]
        table.add_row(*parts)
    return table


def legend(plan: Plan | Mapping[str, Any], ascii_only: bool = False) -> Text:
    text = _text()
    rows = drawn_rows(plan)
    for state, name in LEGEND.items():
        if any(row.count(state) for row in rows):
            glyph, color = GLYPHS[state]
            text.append((ASCII[state] if ascii_only else glyph) * 2, color)
            text.append(f" {name}   ")
    return text


def facts_table(facts: Mapping[str, str]) -> RenderableType:
    """Names and values in two columns."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _text(value))
    return table


def plan_facts(plan: Plan) -> dict[str, str]:
    """What the budget speaks about, in human units."""
    facts = {}
    anatomy = plan.anatomy
    if anatomy.trimmable:
        flops = 2 * anatomy.prunable_macs(plan.sequence_length)
        facts["prunable parameters kept"] = (
            f"{human(plan.kept_params)} of {human(anatomy.prunable_params)} ({plan.params_share:.2%})"
        )
        facts["prunable FLOPs kept"] = (
            f"{human(plan.kept_flops)} of {human(flops)} ({plan.flops_share:.2%}, {plan.sequence_length} tokens)"
        )
    facts["base parameters kept"] = (
        f"{plan.model_params_share:.2%} of {human(anatomy.total_params)}, embeddings included"
    )
    for row in rows_of(plan):
        if row.kind == "token":
            facts["tokens trained"] = f"{row.count(TUNED):,} of {row.size:,}"
    facts["trained values"] = (
        f"{human(plan.trainable_params)} ({plan.trainable_share:.2%} of the base), beside the task head"
    )
    return facts


def plan_figures(plan: Plan) -> dict[str, Any]:
    """A JSON value with the figures of `plan_facts` and the counts of every group."""
    return {
        "params_kept": plan.kept_params,
        "params_prunable": plan.anatomy.prunable_params,
        "params_share": plan.params_share,
        "flops_kept": plan.kept_flops,
        "flops_share": plan.flops_share,
        "sequence_length": plan.sequence_length,
        "base_params": plan.anatomy.total_params,
        "base_params_share": plan.model_params_share,
        "trainable_params": plan.trainable_params,
        "trainable_share": plan.trainable_share,
        "groups": group_counts(plan),
    }


def group_counts(plan: Plan | Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": r.name, "kind": r.kind, "size": r.size, **{LEGEND[s]: r.count(s) for s in LEGEND}}
        for r in rows_of(plan)
    ]


def records_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """A plain table of strings; the last column wraps."""
    table = _table()
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i + 1 < len(columns), overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _lines(rows: Sequence[Row]) -> list[tuple[str, dict[str, Row]]]:
    """The rows of a block on one line; a second attention of the same block gets a line of its own."""
    names = short_names(row.block for row in rows)
    lines: list[tuple[str, dict[str, Row]]] = []
    open_line: dict[str, dict[str, Row]] = {}
    for row in rows:
        line = open_line.get(row.block)
        if line is None or row.kind in line:
            second = line is not None
            line = open_line[row.block] = {}
            label = names[row.block] + (f" {row.name.rpartition('.')[2]}" if second else "")
            lines.append((shortened(label, 36 if len({row.kind for row in rows}) == 1 else 20), line))
        line[row.kind] = row
    return lines


def _bar(row: Row, ascii_only: bool, width: int) -> Text:
    """A state that occurs gets at least one character, and a state that is all gets all."""
    text = _text()
    exact = {state: row.count(state) * width / max(1, row.size) for state in GLYPHS}
    whole = {state: max(int(cells), int(cells > 0)) for state, cells in exact.items()}
    while sum(whole.values()) > width:
        whole[max(whole, key=lambda state: whole[state])] -= 1
    while 0 < sum(whole.values()) < width:
        whole[max(whole, key=lambda state: exact[state] - whole[state])] += 1
    for state, (glyph, color) in GLYPHS.items():
        text.append((ASCII[state] if ascii_only else glyph) * whole[state], color)
    return text


def _table() -> Any:
    try:
        from rich import box
        from rich.table import Table
    except ImportError:
        raise SensiError("Tables need rich: `pip install 'peft-sensi[cli]'`.") from None
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _text(content: str = "") -> Text:
    from rich.text import Text

    return Text(content)
