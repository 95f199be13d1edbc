"""What all pictures share: two styles, the figure, labels of blocks, and saving.

The states differ in lightness first (tuned is dark, trimmed is pale), so that black and white prints show them.
Their hues come from the palette of Okabe and Ito, which color-blind readers can tell apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import SensiError, how_to_install
from ..utils.files import write_atomically, writing
from ..utils.formatting import short_names, shortened
from ..utils.states import FROZEN, TRIMMED, TUNED, UPDATED


STYLES: dict[str, dict[str, Any]] = {
    "light": {
        "background": "#ffffff",
        "ink": "#1a1a1a",
        "soft": "#767676",
        "line": "#c8c8c8",
        "fill": "#ececec",
        "map": "cividis_r",
        "states": {TUNED: "#0072b2", UPDATED: "#2ba782", FROZEN: "#efb54a", TRIMMED: "#f4f4f4"},
        "methods": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a67c00", "#1a1a1a"),
    },
    "dark": {
        "background": "#14181d",
        "ink": "#f0f0f0",
        "soft": "#a8b0b8",
        "line": "#4a525a",
        "fill": "#252b32",
        "map": "cividis",
        "states": {TUNED: "#7cc8f5", UPDATED: "#22a07a", FROZEN: "#845a12", TRIMMED: "#1d2329"},
        "methods": ("#56b4e9", "#f08a3c", "#2fc79a", "#e39bc6", "#f0e442", "#f0f0f0"),
    },
}
WIDTH = 7.2  # inches: the width of a page's text
LEFT, RIGHT = 0.08, 0.972  # margins, as shares of the width


def look_of(style: str) -> dict[str, Any]:
    """The colors of a style."""
    if style not in STYLES:
        raise SensiError(f"`style` must be one of {', '.join(STYLES)}, got {style!r}.")
    return STYLES[style]


def new_figure(height: float, look: Mapping[str, Any], headline: str = "") -> Any:
    """A figure of `height` inches. Without pyplot, it needs no window system and changes no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SensiError(f"Pictures need matplotlib: {how_to_install('plots')}") from None
    figure = Figure(figsize=(WIDTH, height), facecolor=look["background"])
    figure.text(LEFT, 1 - 0.16 / height, headline, color=look["ink"], weight="bold", va="top", size=9)
    return figure


def panel_height(lines: int) -> float:
    """Height in inches of a panel with one line for each block."""
    return max(1.1, lines * float(np.clip(4.2 / lines, 0.085, 0.24)))


def add_panels(
    figure: Any, place: Any, panels: Mapping[str, tuple[str, Sequence[str], Sequence[str]]], look: Mapping[str, Any]
) -> list[Any]:
    """Adds axes that lie side by side, with one line for each group of units and the first group on top.

    Args:
        place: A cell of a grid, which the axes share.
        panels: For each kind of units, the title, and the name and the block of each group.
    """
    labels = [block_labels(names, blocks) for _, names, blocks in panels.values()]
    widths = [1.0 if kind == "head" and len(panels) > 1 else 1.7 for kind in panels]  # heads need less room
    longest = max((len(label) for panel in labels[1:] for label in panel), default=0)
    grid = place.subgridspec(1, len(panels), width_ratios=widths, wspace=max(0.16, 0.08 + 0.024 * longest))
    all_axes = [figure.add_subplot(grid[i]) for i in range(len(panels))]
    for axes, names, (title, *_) in zip(all_axes, labels, panels.values(), strict=True):
        style_axes(axes, look, title)
        step = max(1, -(-len(names) // 26))  # at most 26 labels are legible
        axes.set_yticks(range(0, len(names), step), names[::step], size=6.5)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
    all_axes[0].set_ylabel("block", color=look["soft"])
    return all_axes


def style_axes(axes: Any, look: Mapping[str, Any], title: str = "", pad: float = 4) -> None:
    """Plain axes: only the left and bottom lines, small labels, and the title on the left."""
    axes.set_facecolor(look["background"])
    axes.tick_params(colors=look["soft"], labelsize=7, length=2, width=0.6)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.label.set_size(7.5)
    axes.yaxis.label.set_size(7.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(look["line"])
    axes.set_title(title, loc="left", color=look["ink"], size=8, pad=pad)


def count_ticks(axes: Any, most: int) -> None:
    """Ticks from 0 to `most`, at quarters, thirds or the half where these are whole numbers."""
    parts = next(n for n in (4, 3, 2, 1) if most % n == 0)
    ticks = [most * i // parts for i in range(parts + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(0, most)


def log_ticks(low: float, high: float, most: int = 5) -> tuple[list[float], list[str]]:
    """At most `most` ticks between two positive numbers on a logarithmic axis, and their labels.

    Matplotlib labels all multiples of a power of ten if there are few powers, and prints them over each other.
    """
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [float(tick) for tick in np.geomspace(low, high, 3)]
    ticks = ticks[:: -(-len(ticks) // most)]
    for digits in range(2, 9):
        labels = [f"{float(f'{tick:.{digits}g}'):g}" for tick in ticks]
        if len(set(labels)) == len(ticks):
            break
    return ticks, labels


def block_labels(names: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """A short label for each group: its block's name, or its own name if the block has several groups."""
    short = short_names(blocks if len(set(blocks)) == len(blocks) else names)
    return [shortened(short[b if b in short else n], 24) for n, b in zip(names, blocks, strict=True)]


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Writes the picture. The file's ending says the format. An unknown format is a `SensiError`."""
    from matplotlib.transforms import Bbox

    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise SensiError(f"{path}: pictures are written as {', '.join(sorted(known))}, not as {kind or 'nothing'!r}.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The sheet grows where a label would be cut off.
    sheet = Bbox.from_bounds(0, 0, *figure.get_size_inches())
    whole = Bbox.union([sheet, figure.get_tightbbox().padded(0.06)])
    write_atomically(path, lambda name: figure.savefig(name, format=kind, dpi=200, bbox_inches=whole))
