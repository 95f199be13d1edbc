"""The picture of a plan: a map of the model, and the ranking with its cuts.

It needs matplotlib (`pip install 'peft-sensi[plots]'`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..planning.plan import Plan, drawn_rows
from ..scoring.scores import Scores
from ..utils.errors import SensiError
from ..utils.formatting import human
from ..utils.states import FROZEN, KINDS, STATES, TRIMMED, TUNED, Row
from .canvas import block_labels, block_ticks, count_ticks, look_of, new_figure, room_between, save_figure, style_axes


if TYPE_CHECKING:
    from ..scoring.scores import Scores


def plot_plan(
    plan: Plan | Mapping[str, Any],
    path: str | os.PathLike,
    scores: Scores | None = None,
    style: str = "light",
    cost: str = "params",
    title: str = "",
) -> None:
    """A map of the model: a line a block, a square a head, a bar for the neurons; below it the ranking and its cuts.

    Args:
        plan: A plan, or the dict in an adapter's config (without costs, so without the ranking).
        path: `.png`, `.svg` or `.pdf`.
        scores: What the plan was made from. Without them there is no ranking to show.
        style: `light` or `dark`.
        cost: By which cost scores are divided in the ranking, `params` or `flops`: the one that was limited.

    Raises:
        SensiError: Matplotlib is missing, or an argument is unknown.
    """
    look = look_of(style)
    if cost not in ("params", "flops"):
        raise SensiError(f"`cost` must be 'params' or 'flops', got {cost!r}.")
    rows = drawn_rows(plan)
    ranked = scores is not None and isinstance(plan, Plan)
    maps = [[row for row in rows if row.kind == kind] for kind in ("head", "neuron")]
    maps.append([row for row in rows if row.kind not in ("head", "neuron")])
    maps = [part for part in maps if part]
    lines = max(len(part) for part in maps)
    height = max(1.1, lines * float(np.clip(4.2 / lines, 0.085, 0.24)))
    heights = [height, 1.5] if ranked else [height]
    figure = new_figure(sum(heights) + 1.2 + 0.75 * ranked, look)
    top = 1 - 0.82 / figure.get_figheight()
    bottom = (0.58 if ranked else 0.36) / figure.get_figheight()
    grid = figure.add_gridspec(
        len(heights),
        1,
        height_ratios=heights,
        left=0.08,
        right=0.972,
        top=top,
        bottom=bottom,
        hspace=1.5 / np.mean(heights) / 2 if ranked else 0,
    )
    widths = [1.0 if part[0].kind == "head" and len(maps) > 1 else 1.7 for part in maps]
    labels = [block_labels([row.name for row in part], [row.block for row in part]) for part in maps]
    upper = grid[0].subgridspec(1, len(maps), width_ratios=widths, wspace=room_between(labels))
    for i, part in enumerate(maps):
        axes = figure.add_subplot(upper[i])
        if part[0].kind == "head" and max(row.size for row in part) <= 64:
            _draw_squares(axes, part, look)
        else:
            _draw_bars(axes, part, look)
        if i == 0:
            axes.set_ylabel("block", color=look["soft"])
    if isinstance(plan, Plan) and scores is not None:
        _draw_ranking(figure.add_subplot(grid[1]), plan, scores, cost, look)
    figure.text(
        0.08,
        1 - 0.16 / figure.get_figheight(),
        title or _headline(plan),
        color=look["ink"],
        weight="bold",
        va="top",
        size=9,
    )
    _state_legend(figure, rows, look)
    save_figure(figure, path)


def _draw_squares(axes: Any, rows: list[Row], look: Mapping[str, Any]) -> None:
    """Every head at its own place; the order within a block is the model's."""
    from matplotlib.patches import Rectangle

    for line, row in enumerate(rows):
        for unit, state in enumerate(row.states):
            axes.add_patch(
                Rectangle(
                    (unit - 0.5, line - 0.5),
                    1,
                    1,
                    facecolor=look["states"][int(state)],
                    edgecolor=look["background" if state != TRIMMED else "line"],
                    linewidth=0.8,
                )
            )
    axes.set_xlim(-0.5, max(row.size for row in rows) - 0.5)
    _finish_map(axes, rows, look)
    axes.set_xticks([])


def _draw_bars(axes: Any, rows: list[Row], look: Mapping[str, Any]) -> None:
    for line, row in enumerate(rows):
        start = 0
        for state in (TUNED, FROZEN, TRIMMED):
            width = row.count(state)
            axes.barh(
                line,
                width,
                left=start,
                height=0.82,
                color=look["states"][state],
                linewidth=0.5,
                edgecolor=look["line"] if state == TRIMMED else look["states"][state],
            )
            start += width
    count_ticks(axes, max(row.size for row in rows))
    _finish_map(axes, rows, look)


def _finish_map(axes: Any, rows: list[Row], look: Mapping[str, Any]) -> None:
    tuned, frozen, trimmed = (sum(row.count(state) for row in rows) for state in (TUNED, FROZEN, TRIMMED))
    counts = [f"{tuned + frozen:,} kept"] if trimmed or not frozen else []
    counts += [f"{tuned:,} tuned"] if frozen else []
    kind = rows[0].kind if len({row.kind for row in rows}) == 1 else "row"
    style_axes(axes, look)
    axes.set_title(
        f"{tuned + frozen + trimmed:,} {KINDS[kind]}: {', '.join(counts)}",
        loc="left",
        color=look["ink"],
        size=8,
        pad=4,
    )
    block_ticks(axes, [row.name for row in rows], [row.block for row in rows])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_ranking(axes: Any, plan: Plan, scores: Scores, cost: str, look: Mapping[str, Any]) -> None:
    """All units by score per cost; below the curve the states in this order, and the places of the two cuts."""
    groups = [g for g in plan.anatomy.groups if g.name in scores.values and g.kind != "token"]
    groups = [g for g in groups if g.trimmable] or groups
    if not groups or any(scores.values[g.name].numel() != g.size for g in groups):
        raise SensiError("These scores are not of the model that the plan is of.")
    costs = [g.unit_params if cost == "params" else 2 * g.unit_macs(plan.sequence_length) for g in groups]
    prices = np.concatenate([np.full(g.size, c, dtype=float) for g, c in zip(groups, costs, strict=True)])
    values = np.concatenate([scores.values[g.name].double().numpy() for g in groups]) / prices
    states = np.concatenate([plan.of(g) for g in groups])
    order = np.argsort(-values, kind="stable")
    prices, values, states = prices[order], values[order], states[order]
    ends = np.cumsum(prices) / prices.sum()
    positive = values[values > 0]
    style_axes(axes, look)
    if len(positive):
        drawn = np.maximum(values, positive.min())
        axes.step(
            np.concatenate(([0.0], ends)), np.append(drawn, drawn[-1]), where="post", color=look["ink"], linewidth=1.1
        )
        axes.fill_between(
            np.concatenate(([0.0], ends)),
            np.append(drawn, drawn[-1]),
            positive.min() / 2,
            step="post",
            color=look["fill"],
            linewidth=0,
        )
        axes.set_yscale("log")
        # A few units far below the others must not flatten the rest of the curve.
        low, high = np.quantile(positive, 0.002) / 2, positive.max() * 3
        axes.set_ylim(low, high)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel(f"score per {'parameter' if cost == 'params' else 'FLOP'}", color=look["soft"])
    what = "prunable" if groups[0].trimmable else "targeted"
    axes.set_xlabel(
        f"share of the {what} {'parameters' if cost == 'params' else 'FLOPs'}, most sensitive units first",
        color=look["soft"],
        labelpad=2,
    )
    axes.set_title("The ranking and its cuts", loc="left", color=look["ink"], size=8, pad=13)
    _draw_strip(axes, ends, prices / prices.sum(), states, look)
    tuned, kept = float(prices[states == TUNED].sum()), float(prices[states != TRIMMED].sum())
    cuts = {"tuned": tuned / prices.sum(), "kept": kept / prices.sum()}
    if not (states == FROZEN).any() or not (states == TUNED).any():
        del cuts["tuned"]  # one cut: everything that is kept is tuned, or nothing is
    places = [(name, place) for name, place in cuts.items() if place < 0.9995]
    for i, (name, place) in enumerate(places):
        axes.axvline(place, color=look["ink"], linestyle=(0, (4, 2)), linewidth=1.0)
        crowded = len(places) == 2 and places[1][1] - places[0][1] < 0.14
        side = "right" if place > 0.85 or (crowded and i == 0 and place > 0.14) else "left"
        above = 10 if crowded and i == 1 and places[0][1] <= 0.14 else 3
        axes.annotate(
            f"{place:.1%} {name}",
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-2 if side == "right" else 2, above),
            textcoords="offset points",
            ha=side,
            color=look["ink"],
            size=7,
        )


def _draw_strip(axes: Any, ends: np.ndarray, shares: np.ndarray, states: np.ndarray, look: Mapping[str, Any]) -> None:
    """What became of the units at each place of the ranking: a plain cut, but for steps and minima."""
    strip = axes.inset_axes((0, -0.13, 1, 0.1))
    bins = np.linspace(0, 1, 181)
    starts = ends - shares
    below = np.zeros(180)
    for state in (TUNED, FROZEN, TRIMMED):
        mine = states == state
        # The share of the units of this state that lies below each bin's edges, spread evenly over a unit's width.
        inside = np.array([np.clip((edge - starts[mine]) / shares[mine], 0, 1) @ shares[mine] for edge in bins])
        heights = np.diff(inside) * 180
        strip.bar(
            bins[:-1], heights, width=1 / 180, align="edge", bottom=below, color=look["states"][state], linewidth=0
        )
        below += heights
    strip.set_xlim(0, 1)
    strip.set_ylim(0, 1)
    strip.set_xticks([])
    strip.set_yticks([])
    for spine in strip.spines.values():
        spine.set_color(look["line"])
        spine.set_linewidth(0.5)
    axes.tick_params(axis="x", pad=15, length=0)


def _state_legend(figure: Any, rows: list[Row], look: Mapping[str, Any]) -> None:
    from matplotlib.patches import Patch

    present = [state for state in STATES if any(row.count(state) for row in rows)]
    handles = [
        Patch(facecolor=look["states"][s], edgecolor=look["line"], linewidth=0.6, label=STATES[s]) for s in present
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.08, 1 - 0.34 / figure.get_figheight()),
        ncols=3,
        frameon=False,
        fontsize=7.5,
        labelcolor=look["ink"],
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        borderaxespad=0,
        borderpad=0,
    )


def _headline(plan: Plan | Mapping[str, Any]) -> str:
    if not isinstance(plan, Plan):
        return "What the adapter does with each unit"
    parts = []
    if plan.trims:
        parts.append(f"{plan.params_share:.1%} of prunable parameters and {plan.flops_share:.1%} of their FLOPs kept")
    parts.append(f"{human(plan.trainable_params)} values trained")
    return "; ".join(parts)


def plot_scores(scores: Scores, path: str | os.PathLike, style: str = "light") -> None:
    """The scores of all units on a logarithmic scale: a line a block, each block's units from best to worst.

    Units outside blocks (rows of single Linears) are left out when there are blocks. Raises `SensiError`.
    """
    look = look_of(style)
    values = {name: np.sort(t.double().numpy())[::-1] for name, t in scores.values.items() if t.numel()}
    if not values:
        raise SensiError("There are no scores to draw.")
    parts = {
        kind: [n for n in values if n.endswith(f".{kind}") or n.endswith(f"_{kind}")] for kind in ("heads", "neurons")
    }
    parts = {kind: names for kind, names in parts.items() if names} or {"units": list(values)}
    lines = max(len(names) for names in parts.values())
    height = max(1.1, lines * float(np.clip(4.2 / lines, 0.085, 0.24)))
    figure = new_figure(height + 1.4, look)
    size = figure.get_figheight()
    grid = figure.add_gridspec(
        1,
        len(parts),
        left=0.08,
        right=0.972,
        top=1 - 0.6 / size,
        bottom=0.8 / size,
        wspace=room_between([block_labels(names, blocks_of(names)) for names in parts.values()]),
        width_ratios=[1.0 if kind == "heads" and len(parts) > 1 else 1.7 for kind in parts],
    )
    for i, (kind, names) in enumerate(parts.items()):
        axes = figure.add_subplot(grid[i])
        _draw_heat(figure, axes, [(name, values[name]) for name in names], kind, scores, look)
        if i == 0:
            axes.set_ylabel("block", color=look["soft"])
    figure.text(
        0.08,
        1 - 0.16 / size,
        f"Sensitivity of every unit, score = {scores.method}",
        color=look["ink"],
        weight="bold",
        va="top",
        size=9,
    )
    save_figure(figure, path)


def blocks_of(names: list[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names]


def _draw_heat(
    figure: Any, axes: Any, rows: list[tuple[str, np.ndarray]], kind: str, scores: Scores, look: Mapping[str, Any]
) -> None:
    from matplotlib.colors import LogNorm

    columns = min(200, max(len(values) for _, values in rows))
    image = np.full((len(rows), columns), np.nan)
    widest = max(len(values) for _, values in rows)
    for line, (_, values) in enumerate(rows):
        for column, part in enumerate(np.array_split(np.arange(widest), columns)):
            inside = part[part < len(values)]
            if len(inside):
                image[line, column] = values[inside].mean()
    positive = image[image > 0]
    low, high = (np.quantile(positive, 0.003), positive.max()) if len(positive) else (0.5, 1.0)
    norm = LogNorm(low, high if high > low else low * 1.0001, clip=True)
    drawn = axes.imshow(
        np.maximum(image, low),
        aspect="auto",
        cmap=look["map"],
        norm=norm,
        interpolation="nearest",
        extent=(0, widest, len(rows) - 0.5, -0.5),
    )
    with_outliers = [
        line for line, (name, _) in enumerate(rows) if name in scores.protected and scores.protected[name].any()
    ]
    for line in with_outliers:
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
    style_axes(axes, look)
    names = [name for name, _ in rows]
    block_ticks(axes, names, blocks_of(names))
    if with_outliers:
        axes.tick_params(axis="y", pad=7)
    count_ticks(axes, widest)
    axes.set_title(f"{kind}, each block's best on the left", loc="left", color=look["ink"], size=8, pad=4)
    inch = 1 / (axes.get_position().height * figure.get_figheight())
    bar = figure.colorbar(drawn, cax=axes.inset_axes((0, -0.42 * inch, 1, 0.09 * inch)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=look["soft"], length=2)
    bar.ax.minorticks_off()
    note = "score; ▸ has a spike, kept whatever its score" if with_outliers else "score"
    bar.ax.set_xlabel(note, color=look["soft"], size=7.5, labelpad=2)
