"""The pictures of accuracy over budget, and of accuracy over FLOPs. They need matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_sensi import SensiError
from peft_sensi.plotting.canvas import look_of, new_figure, save_figure, style_axes
from peft_sensi.utils.files import read_json


MARKERS, DASHES = "os^Dv*", ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 1)))
FRONT_TEXT = 13  # points: legible where the README is 400 pixels wide, as on a phone


def plot_budgets(
    results: str | os.PathLike | Iterable[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    x: str = "budget",
    y: str = "accuracy",
    reference: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    runs: str = "runs",
) -> None:
    """Draws accuracy over budget: one line a method, through the means over its runs.

    A bar at a mean is one standard error of this mean long, up and down. A mean of a single run has no bar.

    Args:
        results: One record for each run, or a JSON file with a list of records. A record names its `method`. A record
            without a number `x`, such as full fine-tuning, is drawn as a horizontal line, with its bar on the right.
        path: A file that ends in `.png`, `.svg` or `.pdf`.
        x, y: Names of the fields with the budget and with the measured value. A name with dots, such as
            `validation.accuracy`, looks into nested records.
        reference: The method that the others are compared with. It comes first, in the color of the text.
        runs: What the runs of a mean are, for the note about the bars.

    Raises:
        SensiError: No record has the fields, no method is called `reference`, the file is not JSON, or matplotlib is
            missing.
    """
    look = look_of("light")
    methods = _values_by_method(read_json(results) if isinstance(results, (str, os.PathLike)) else results, x, y)
    if reference is not None and reference not in methods:
        raise SensiError(f"There is no method {reference!r} in the results; there are {', '.join(methods)}.")
    figure = new_figure(3.6, look)
    axes = figure.add_axes((0.095, 0.135, 0.66, 0.73))
    style_axes(axes, look)
    axes.grid(axis="y", color=look["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    budgets = [budget for by_budget in methods.values() for budget in by_budget if budget is not None]
    # Methods lie side by side at each budget, so that their bars do not hide each other. Single runs have no bars.
    several = any(len(values) > 1 for by_budget in methods.values() for values in by_budget.values())
    gap = 0.008 * (max(budgets) - min(budgets)) if budgets and several else 0.0
    right = max(budgets, default=1.0) + 5 * gap
    names = sorted(methods, key=lambda name: name != reference)
    colors = iter(look["methods"] * (1 + len(names) // len(look["methods"])))
    handles: list[tuple[float, Any]] = []
    has_bars = False
    for index, name in enumerate(names):
        by_budget = methods[name]
        dash, marker = line_style(index)
        options = {"color": look["ink"] if name == reference else next(colors), "linestyle": dash, "label": name}
        aside = gap * (index - (len(names) - 1) / 2)
        for budget, values in by_budget.items():
            place, mean, error = right if budget is None else budget, float(np.mean(values)), standard_error(values)
            if error:
                ends = [mean - error, mean + error]
                axes.plot([place + aside] * 2, ends, color=options["color"], linewidth=1.0, alpha=0.7)
                has_bars = True
        if None in by_budget:
            mean = float(np.mean(by_budget.pop(None)))
            handles.append((mean, axes.axhline(mean, linewidth=1.2, **options)))
        if by_budget:
            means = {budget: float(np.mean(values)) for budget, values in sorted(by_budget.items())}
            places = [budget + aside for budget in means]
            (line,) = axes.plot(places, list(means.values()), marker=marker, markersize=5, linewidth=1.4, **options)
            handles.append((float(np.mean(list(means.values()))), line))
    axes.set_xlabel(xlabel or x, color=look["ink"])
    axes.set_ylabel(ylabel or y, color=look["ink"])
    if budgets and max(budgets) <= 1:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value >= 0.095 else f"{value:.3g}")
    handles.sort(key=lambda pair: -pair[0])  # the legend has the order of the lines, the best on top
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
    title = f"{ylabel or y} over {xlabel or x}"
    figure.text(0.095, 0.975, title, color=look["ink"], weight="bold", va="top", size=9)
    if has_bars:
        note = f"Bars: one standard error of the mean over {runs}, up and down."
        figure.text(0.095, 0.915, note, color=look["soft"], va="top", size=7)
    save_figure(figure, path)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; 0 for a single one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def plot_front(
    series: Mapping[str, Iterable[tuple[float, ...]]],
    path: str | os.PathLike,
    reference: str,
    *,
    xlabel: str,
    ylabel: str,
    style: str = "light",
) -> None:
    """Draws a measured value over the share of the FLOPs, with standard errors: one line for each method, by name.

    Args:
        series: For each method its points `(share of the FLOPs, value, standard error)`.
        path: A file that ends in `.png`, `.svg` or `.pdf`.
        reference: The method whose value is also drawn as a horizontal line.
        style: `light` or `dark`.
    """
    look = look_of(style)
    figure = new_figure(3.9, look)
    axes = figure.add_axes((0.095, 0.155, 0.875, 0.755))
    style_axes(axes, look)
    axes.tick_params(labelsize=FRONT_TEXT)
    axes.grid(axis="y", color=look["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    names = sorted(series, key=lambda name: name == reference)
    for index, name in enumerate(names):
        x, values, errors = zip(*sorted(series[name]), strict=True)
        color = look["ink"] if name == reference else look["methods"][index % len(look["methods"])]
        dash, marker = line_style(index)
        axes.errorbar(x, values, errors, color=color, linestyle=dash, marker=marker, markersize=8, elinewidth=1.5)
        if name == reference:
            axes.axhline(values[0], color=color, linewidth=0.8, linestyle=":")
        side = {"xytext": (12, -6), "ha": "left"} if x[0] < 0.8 else {"xytext": (-12, -14), "ha": "right"}
        axes.annotate(name, (x[0], values[0]), **side, textcoords="offset points", color=color, size=FRONT_TEXT + 1)
    axes.set_xlim(0, 1.04)
    axes.set_xlabel(xlabel, color=look["ink"], size=FRONT_TEXT)
    axes.set_title(ylabel, loc="left", color=look["ink"], size=FRONT_TEXT, pad=10)  # read without turning the head
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")
    save_figure(figure, path)


def line_style(index: int) -> tuple[Any, str]:
    """Dash and marker of a method. Where colors repeat, both the dash and the marker differ."""
    turn = index // len(DASHES)
    return DASHES[(index + turn) % len(DASHES)], MARKERS[(index + 2 * turn) % len(MARKERS)]


def _values_by_method(records: Iterable[Any], x: str, y: str) -> dict[str, dict[float | None, list[float]]]:
    """The values of `y` by method and budget, in the order of the records. The budget is `None` if there is no `x`."""
    methods: dict[str, dict[float | None, list[float]]] = {}
    for record in records:
        value, budget, name = (_field(record, key) for key in (y, x, "method"))
        if isinstance(value, (int, float)) and name is not None:
            number = float(budget) if isinstance(budget, (int, float)) else None
            methods.setdefault(str(name), {}).setdefault(number, []).append(float(value))
    if not methods:
        raise SensiError(f"No record has both a 'method' and a number called {y!r}.")
    return methods


def _field(record: Any, name: str) -> Any:
    for part in name.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record
