"""Pictures of scores and of benchmarks. They need matplotlib (`pip install 'peft-sensi[plots]'`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .plotting.canvas import (
    look_of,
    new_figure,
    save_figure,
    style_axes,
)
from .utils.errors import SensiError


MARKERS, DASHES = "os^Dv*", ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 1)))


def plot_budgets(
    results: str | os.PathLike | Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    x: str = "budget",
    y: str = "accuracy",
    method: str = "method",
    reference: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    style: str = "light",
) -> None:
    """Accuracy over budget: a line a method, through the means over runs, with the range of the runs.

    Args:
        results: Records (one run each) or a JSON file with a list of them. A name with dots, such as
            `validation.accuracy`, looks into nested records. Records without `x` are drawn as horizontal lines, which
            is how full fine-tuning comes in.
        x, y, method: Names of the fields.
        reference: The method that the others are compared with, drawn first and in neutral ink.

    Raises:
        SensiError: No record has the fields, or matplotlib is missing.
    """
    look = look_of(style)
    groups = _grouped(results, x, y, method)
    if reference is not None and reference not in groups:
        raise SensiError(f"There is no method {reference!r} in the results; there are {', '.join(groups)}.")
    figure = new_figure(3.6, look)
    axes = figure.add_axes((0.095, 0.135, 0.66, 0.755))
    style_axes(axes, look)
    axes.grid(axis="y", color=look["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    points = [point for runs in groups.values() for point in runs if point is not None]
    handles: list[tuple[float, Any]] = []
    names = sorted(groups, key=lambda name: name != reference)
    colors = iter(look["methods"] * (1 + len(names) // 6))
    # Beside each other, or the ranges of several methods at one budget would hide each other.
    shift = 0.008 * (max(points) - min(points)) if points else 0.0
    for index, name in enumerate(names):
        color = look["ink"] if name == reference else next(colors)
        dash, marker = line_style(index)
        aside = shift * (index - (len(names) - 1) / 2)
        for place in sorted(groups[name], key=lambda p: (p is None, p)):
            runs = groups[name][place]
            if place is None:
                line = axes.axhline(float(np.mean(runs)), color=color, linestyle=dash, linewidth=1.2, label=name)
                handles.append((float(np.mean(runs)), line))
            elif len(runs) > 1:
                axes.plot([place + aside] * 2, [min(runs), max(runs)], color=color, linewidth=1.0, alpha=0.7)
        places = sorted(p for p in groups[name] if p is not None)
        if places:
            means = [float(np.mean(groups[name][p])) for p in places]
            (line,) = axes.plot(
                [place + aside for place in places],
                means,
                color=color,
                linestyle=dash,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                label=name,
            )
            handles.append((float(np.mean(means)), line))
    axes.set_xlabel(xlabel or x, color=look["ink"])
    axes.set_ylabel(ylabel or y, color=look["ink"])
    if points and max(points) <= 1:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value >= 0.095 else f"{value:.3g}")
    # In the order of the lines, best on top: the eye need not go back and forth.
    handles.sort(key=lambda pair: -pair[0])
    axes.legend(
        handles=[line for _, line in handles],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=7.5,
        labelcolor=look["ink"],
        handlelength=3.4,
        labelspacing=0.9,
    )
    figure.text(
        0.095, 0.975, title or f"{ylabel or y} over {xlabel or x}", color=look["ink"], weight="bold", va="top", size=9
    )
    save_figure(figure, path)


def line_style(index: int) -> tuple[Any, str]:
    """Dash and marker of a method by its place: a color that comes again comes with another of both."""
    turn = index // len(DASHES)
    return DASHES[(index + turn) % len(DASHES)], MARKERS[(index + 2 * turn) % len(MARKERS)]


def _grouped(results: Any, x: str, y: str, method: str) -> dict[str, dict[float | None, list[float]]]:
    """Values of `y` by method and place on the x axis, in the order of the records."""
    if isinstance(results, (str, os.PathLike)):
        try:
            results = json.loads(Path(results).read_text(encoding="utf-8"))
        except ValueError as error:
            raise SensiError(f"{results} is not JSON: {error}.") from None
    if isinstance(results, Mapping):
        results = [results]
    groups: dict[str, dict[float | None, list[float]]] = {}
    for record in results:
        value, place, name = (_field(record, key) for key in (y, x, method))
        if isinstance(value, (int, float)) and name is not None:
            number = float(place) if isinstance(place, (int, float)) else None
            groups.setdefault(str(name), {}).setdefault(number, []).append(float(value))
    if not groups:
        raise SensiError(f"No record has both {method!r} and a number called {y!r}.")
    return groups


def _field(record: Any, name: str) -> Any:
    for part in name.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record
