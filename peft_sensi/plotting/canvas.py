"""What all pictures share: two styles, a sheet, axes, files.

Three states are told apart by lightness first (dark is tuned, pale is gone), then by hues of Okabe and Ito's
color-blind safe palette, so that a print in black and white says the same. Methods differ in color, marker and dash.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import SensiError
from ..utils.formatting import short_names, shortened
from ..utils.states import FROZEN, TRIMMED, TUNED


STYLES: dict[str, dict[str, Any]] = {
    "light": {
        "background": "#ffffff",
        "ink": "#1a1a1a",
        "soft": "#767676",
        "line": "#c8c8c8",
        "fill": "#ececec",
        "map": "cividis_r",
        "states": {TUNED: "#0072b2", FROZEN: "#efb54a", TRIMMED: "#f4f4f4"},
        "methods": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a67c00", "#1a1a1a"),
    },
    "dark": {
        "background": "#14181d",
        "ink": "#f0f0f0",
        "soft": "#a8b0b8",
        "line": "#4a525a",
        "fill": "#252b32",
        "map": "cividis",
        "states": {TUNED: "#7cc8f5", FROZEN: "#a8741a", TRIMMED: "#1d2329"},
        "methods": ("#56b4e9", "#f08a3c", "#2fc79a", "#e39bc6", "#f0e442", "#f0f0f0"),
    },
}
WIDTH = 7.2  # inches: the width of a page's text


def look_of(style: str) -> dict[str, Any]:
    if style not in STYLES:
        raise SensiError(f"`style` must be one of {', '.join(STYLES)}, got {style!r}.")
    return STYLES[style]


def new_figure(height: float, look: Mapping[str, Any]) -> Any:
    """A figure of its own, outside pyplot: nothing of the user's is changed, and no window system is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SensiError("Pictures need matplotlib: `pip install 'peft-sensi[plots]'`.") from None
    return Figure(figsize=(WIDTH, height), facecolor=look["background"])


def style_axes(axes: Any, look: Mapping[str, Any]) -> None:
    axes.set_facecolor(look["background"])
    axes.tick_params(colors=look["soft"], labelsize=7, length=2, width=0.6)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.label.set_size(7.5)
    axes.yaxis.label.set_size(7.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(look["line"])


def count_ticks(axes: Any, most: int) -> None:
    """Whole quarters where they are whole, so that the full width has its number."""
    parts = next(n for n in (4, 3, 2, 1) if most % n == 0)
    places = [most * i // parts for i in range(parts + 1)]
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xlim(0, most)


def block_labels(names: list[str], blocks: list[str]) -> list[str]:
    """Short names of blocks; of groups, where a block has several."""
    shown = short_names(blocks) if len(set(blocks)) == len(blocks) else short_names(names)
    return [shortened(shown[b if b in shown else n], 24) for n, b in zip(names, blocks, strict=True)]


def room_between(parts: list[list[str]]) -> float:
    """The space between panels, in widths of a panel, that the labels of all but the first need."""
    longest = max((len(label) for labels in parts[1:] for label in labels), default=0)
    return max(0.16, 0.08 + 0.024 * longest)


def block_ticks(axes: Any, names: list[str], blocks: list[str]) -> None:
    """The first block on top, with its short name; only some of the names where there are many."""
    labels = block_labels(names, blocks)
    step = max(1, -(-len(labels) // 26))
    axes.set_yticks(range(0, len(labels), step), labels[::step], size=6.5)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Writes the file under a temporary name first. Raises `SensiError` for a format that matplotlib does not have."""
    from matplotlib.transforms import Bbox

    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise SensiError(f"{path}: pictures are written as {', '.join(sorted(known))}, not as {kind or 'nothing'!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{kind}")
    try:
        # The sheet grows where a label would be cut off.
        sheet = Bbox.from_bounds(0, 0, *figure.get_size_inches())
        whole = Bbox.union([sheet, figure.get_tightbbox().padded(0.06)])
        figure.savefig(unfinished, format=kind, dpi=200, bbox_inches=whole)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
