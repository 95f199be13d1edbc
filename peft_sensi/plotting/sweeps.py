"""The picture of a sweep: a metric over the size of models, and over their measured time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from . import canvas


def plot_sweep(
    path: str | os.PathLike,
    metric: str,
    values: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    names: Sequence[str],
    sizes: Mapping[str, Sequence[float]],
) -> None:
    """Draws a metric with its intervals over each of the `sizes`, side by side.

    Args:
        path: The picture; the ending says the format.
        metric: The name of the metric.
        values: The metric of each model.
        intervals: The lower and the upper bound of each value, or `None`.
        names: A short name of each model, written beside its point.
        sizes: For each panel, the label of its horizontal axis, and the share of the base that each model has.

    Raises:
        SensiError: matplotlib is not installed, or the format is unknown.
    """
    look = canvas.STYLES["light"]
    height = 2.9
    figure = canvas.new_figure(height, look, f"{metric} under each budget, with 95 % intervals")
    color = look["methods"][0]
    for number, (label, shares) in enumerate(sizes.items()):
        axes = figure.add_subplot(1, len(sizes), number + 1)
        canvas.style_axes(axes, look)
        order = sorted(range(len(values)), key=lambda i: shares[i])
        xs, ys = [shares[i] for i in order], [values[i] for i in order]
        for i in order:
            if (bounds := intervals[i]) is not None:
                axes.plot([shares[i]] * 2, list(bounds), color=look["line"], linewidth=2.5, solid_capstyle="round")
        axes.plot(xs, ys, color=color, linewidth=1, marker="o", markersize=4)
        for i in order:
            axes.annotate(names[i], (shares[i], values[i]), xytext=(5, -9), textcoords="offset points", size=7,
                          color=look["ink"])  # fmt: skip
        axes.set_xlim(0, max(1.05, 1.05 * max(shares)))
        axes.set_xlabel(label, color=look["soft"])
        if number == 0:
            axes.set_ylabel(metric, color=look["soft"])
    figure.subplots_adjust(left=canvas.LEFT + 0.02, right=canvas.RIGHT, bottom=0.18, top=0.86, wspace=0.18)
    canvas.save_figure(figure, path)
