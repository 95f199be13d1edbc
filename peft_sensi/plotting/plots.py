"""The pictures of a plan (a map of the model, and the ranking with its cut lines) and of scores (a heat map)."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.errors import SensiError
from ..utils.states import KINDS, STATES, TRIMMED, TUNED, UPDATED, Row, shown_states
from . import canvas


@dataclass(frozen=True)
class Ranking:
    """What the score curve shows. The three arrays have one entry for each unit, in any order.

    Attributes:
        scores: Score of each unit, divided by the unit's cost.
        costs: Cost of each unit.
        states: State of each unit (uint8), as in `Row`.
        cost: What the costs count, `parameter` or `FLOP`.
        part: Which units are shown, `prunable` or `targeted` ones.
    """

    scores: np.ndarray
    costs: np.ndarray
    states: np.ndarray
    cost: str
    part: str


def plot_plan(
    rows: Sequence[Row],
    path: str | os.PathLike,
    headline: str = "What the adapter does with each unit",
    ranking: Ranking | None = None,
    style: str = "light",
    note: str = "",
) -> None:
    """Draws a map of the model, with one line for each block: a square for each head, a bar for the neurons.

    `rows` are the groups of units, and the `note` says what they leave out. Below the map comes the `ranking` of all
    units with the cut lines, if there is one. `Plan.plot` has the other arguments and the errors.
    """
    look = canvas.look_of(style)
    if not any(row.size for row in rows):
        raise SensiError("The plan has no units, so there is nothing to draw.")
    panels: dict[str, list[Row]] = {"head": [], "neuron": [], "other": []}
    for row in rows:
        panels[row.kind if row.kind in panels else "other"].append(row)
    panels = {kind: panel for kind, panel in panels.items() if panel}
    heights = [canvas.panel_height(max(map(len, panels.values())))]
    around, below, between = 1.2, 0.36, 0.0  # inches
    if ranking is not None:
        heights.append(1.5)
        around, below, between = 1.95, 0.58, 0.75
    size = sum(heights) + around
    figure = canvas.new_figure(size, look, headline)
    margins = {"left": canvas.LEFT, "right": canvas.RIGHT, "top": 1 - 0.82 / size, "bottom": below / size}
    space = between / np.mean(heights)
    grid = figure.add_gridspec(len(heights), height_ratios=heights, hspace=space, **margins)
    texts = {kind: (_counts(p), [row.name for row in p], [row.block for row in p]) for kind, p in panels.items()}
    for axes, (kind, panel) in zip(canvas.add_panels(figure, grid[0], texts, look), panels.items(), strict=True):
        draw = _draw_squares if kind == "head" and max(row.size for row in panel) <= 64 else _draw_bars
        draw(axes, panel, look)
        axes.spines[["left", "bottom"]].set_visible(False)
    if ranking is not None:
        _draw_ranking(figure.add_subplot(grid[1]), ranking, look)
    _add_legend(figure, rows, look, note)
    canvas.save_figure(figure, path)


def _counts(rows: Sequence[Row]) -> str:
    """The title of a panel: how many units there are, are kept and are tuned."""
    size, kept, tuned, updated = (
        sum(counts) for counts in zip(*((r.size, r.kept, r.count(TUNED), r.count(UPDATED)) for r in rows), strict=True)
    )
    counts = [f"{kept:,} kept"] if kept < size or tuned == kept else []
    counts += [f"{updated:,} {shown_states(rows)[UPDATED].partition(',')[0]}"] if updated else []
    counts += [f"{tuned:,} tuned"] if 0 < tuned < kept else []
    kind = rows[0].kind if len({row.kind for row in rows}) == 1 else "row"
    return f"{size:,} {KINDS[kind]}: {', '.join(counts) or 'all frozen'}"


def _draw_squares(axes: Any, rows: Sequence[Row], look: Mapping[str, Any]) -> None:
    """One square for each unit, in the order of the model."""
    from matplotlib.patches import Rectangle

    for line, row in enumerate(rows):
        for unit, state in enumerate(row.states):
            edge = look["line" if state == TRIMMED else "background"]
            color = look["states"][int(state)]
            axes.add_patch(Rectangle((unit - 0.5, line - 0.5), 1, 1, facecolor=color, edgecolor=edge, linewidth=0.8))
    axes.set_xlim(-0.5, max(row.size for row in rows) - 0.5)
    axes.set_xticks([])


def _draw_bars(axes: Any, rows: Sequence[Row], look: Mapping[str, Any]) -> None:
    """One bar for each group, with a section for each state."""
    start = np.zeros(len(rows))
    for state in STATES:
        widths = np.array([row.count(state) for row in rows])
        color = look["states"][state]
        edge = look["line"] if state == TRIMMED else color
        axes.barh(range(len(rows)), widths, left=start, height=0.82, color=color, edgecolor=edge, linewidth=0.5)
        start += widths
    canvas.count_ticks(axes, max(row.size for row in rows))


def _draw_ranking(axes: Any, ranking: Ranking, look: Mapping[str, Any]) -> None:
    """The scores of all units from best to worst, a strip with the states in this order, and the two cut lines."""
    order = np.argsort(-ranking.scores, kind="stable")
    scores, states = ranking.scores[order], ranking.states[order]
    shares = ranking.costs[order] / ranking.costs.sum()
    edges = np.append(0.0, np.cumsum(shares))
    canvas.style_axes(axes, look, f"The ranking of {len(scores):,} {ranking.part} units and its cuts", pad=13)
    positive = scores[scores > 0]
    if len(positive):
        lowest = positive.min()
        curve = np.maximum(scores, lowest)
        axes.stairs(curve, edges, baseline=lowest / 2, fill=True, color=look["fill"], linewidth=0)
        axes.stairs(curve, edges, baseline=None, color=look["ink"], linewidth=1.1)
        axes.set_yscale("log")
        # A few units far below the others must not flatten the rest of the curve.
        limits = float(np.quantile(positive, 0.002)) / 2, float(positive.max()) * 3
        axes.set_ylim(limits)
        axes.set_yticks(*canvas.log_ticks(*limits))
        axes.minorticks_off()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel(f"score per {ranking.cost}", color=look["soft"])
    xlabel = f"share of the {ranking.part} {ranking.cost}s, most sensitive units first"
    axes.set_xlabel(xlabel, color=look["soft"], labelpad=2)
    _draw_strip(axes, edges, states, look)
    cuts = {"tuned": shares[states == TUNED].sum(), "kept": shares[states != TRIMMED].sum()}
    if not 0 < cuts["tuned"] < cuts["kept"]:
        del cuts["tuned"]  # there is one cut only: either all kept units are tuned or none is
    # Dashed vertical lines with their names. Labels of lines that are close are moved apart.
    cuts = {name: x for name, x in cuts.items() if x < 0.9995}
    first = next(iter(cuts.values()), 0.0)
    crowded = len(cuts) == 2 and cuts["kept"] - cuts["tuned"] < 0.14
    for i, (name, x) in enumerate(cuts.items()):
        axes.axvline(x, color=look["ink"], linestyle=(0, (4, 2)), linewidth=1.0)
        on_the_left = x > 0.85 or (crowded and i == 0 and x > 0.14)
        raised = crowded and i == 1 and first <= 0.14
        axes.annotate(
            f"{x:.1%} {name}",
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-2 if on_the_left else 2, 10 if raised else 3),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            color=look["ink"],
            size=7,
        )


def _draw_strip(axes: Any, edges: np.ndarray, states: np.ndarray, look: Mapping[str, Any]) -> None:
    """A thin strip under the curve: the states of the units at each place of the ranking.

    States can mix near a cut line, because some units are kept in steps or as a minimum.
    """
    strip = axes.inset_axes((0, -0.13, 1, 0.1))
    bins = np.linspace(0, 1, 181)
    below = np.zeros(180)
    for state in STATES:
        # The units of this state up to each edge, as a share of all. The differences say how far they fill each bin.
        up_to = np.append(0.0, np.cumsum(np.diff(edges) * (states == state)))
        filled = np.diff(np.interp(bins, edges, up_to)) * 180
        color = look["states"][state]
        strip.bar(bins[:-1], filled, width=1 / 180, align="edge", bottom=below, color=color, linewidth=0)
        below += filled
    strip.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    strip.spines[:].set(color=look["line"], linewidth=0.5)
    axes.tick_params(axis="x", pad=15, length=0)


def _add_legend(figure: Any, rows: Sequence[Row], look: Mapping[str, Any], note: str) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=look["states"][state], edgecolor=look["line"], linewidth=0.6, label=name)
        for state, name in shown_states(rows).items()
    ]
    if note:
        handles.append(Patch(facecolor="none", edgecolor="none", label=note))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(canvas.LEFT, 1 - 0.34 / figure.get_figheight()),
        ncols=5,
        frameon=False,
        fontsize=7.5,
        labelcolor=look["ink"],
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        borderaxespad=0,
        borderpad=0,
    )


def plot_scores(
    scores: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    headline: str,
    outliers: Collection[str] = (),
    style: str = "light",
) -> None:
    """Draws a heat map of the scores on a logarithmic scale: one line for each block, its best unit on the left.

    `scores` has one number for each unit of each group. Groups outside of blocks (rows of single Linears) are left
    out if there are blocks, and the headline says so. The groups in `outliers` have an outlier unit and get a mark.
    `Scores.plot` has the other arguments and the errors.
    """
    look = canvas.look_of(style)
    sorted_scores = {name: np.sort(values)[::-1] for name, values in scores.items() if len(values)}
    if not sorted_scores:
        raise SensiError("There are no scores to draw.")
    panels = {
        kind: [name for name in sorted_scores if name.endswith((f".{KINDS[kind]}", f"_{KINDS[kind]}"))]
        for kind in ("head", "neuron")
    }
    panels = {kind: names for kind, names in panels.items() if names} or {"": list(sorted_scores)}
    drawn = {kind: sum(len(sorted_scores[name]) for name in names) for kind, names in panels.items()}
    if left_out := sum(map(len, sorted_scores.values())) - sum(drawn.values()):
        headline += f"; {left_out:,} units outside of blocks are not drawn"
    size = canvas.panel_height(max(map(len, panels.values()))) + 1.4
    figure = canvas.new_figure(size, look, headline)
    grid = figure.add_gridspec(left=canvas.LEFT, right=canvas.RIGHT, top=1 - 0.6 / size, bottom=0.8 / size)
    titles = {kind: f"{drawn[kind]:,} {KINDS.get(kind, 'units')}, each block's best on the left" for kind in panels}
    texts = {kind: (titles[kind], names, [n.rpartition(".")[0] for n in names]) for kind, names in panels.items()}
    for axes, names in zip(canvas.add_panels(figure, grid[0], texts, look), panels.values(), strict=True):
        marked = [line for line, name in enumerate(names) if name in outliers]
        _draw_heat(axes, [sorted_scores[name] for name in names], marked, look)
    canvas.save_figure(figure, path)


def _draw_heat(axes: Any, lines: Sequence[np.ndarray], marked: Sequence[int], look: Mapping[str, Any]) -> None:
    """Means of neighboring scores as colors, in at most 200 columns; marks on some lines; a color bar below."""
    from matplotlib.colors import LogNorm

    widest = max(map(len, lines))
    columns = np.array_split(np.arange(widest), min(200, widest))
    parts = [[values[units[0] : units[-1] + 1] for units in columns] for values in lines]
    image = np.array([[part.mean() if len(part) else np.nan for part in line] for line in parts])
    positive = image[image > 0]
    low, high = (np.quantile(positive, 0.003), positive.max()) if len(positive) else (0.5, 1.0)
    drawn = axes.imshow(
        np.maximum(image, low),
        aspect="auto",
        cmap=look["map"],
        norm=LogNorm(low, max(high, low * 1.0001), clip=True),
        interpolation="nearest",
        extent=(0, widest, len(lines) - 0.5, -0.5),
    )
    for line in marked:
        axes.annotate(
            "▸",
            (0, line),
            xytext=(-1, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            size=7,
            color=look["ink"],
            annotation_clip=False,
        )
    if marked:
        axes.tick_params(axis="y", pad=7)
    canvas.count_ticks(axes, widest)
    inch = 1 / (axes.get_position().height * axes.figure.get_figheight())
    below = axes.inset_axes((0, -0.42 * inch, 1, 0.09 * inch))
    bar = axes.figure.colorbar(drawn, cax=below, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=look["soft"], length=2)
    ticks, labels = canvas.log_ticks(*drawn.get_clim(), most=4)
    bar.set_ticks(ticks, labels=labels)
    bar.ax.minorticks_off()
    note = "score; ▸ marks an outlier unit, which is always kept" if marked else "score"
    bar.ax.set_xlabel(note, color=look["soft"], size=7.5, labelpad=2)
