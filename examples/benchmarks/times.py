"""Results of trainings go in; how long each method took beside full fine-tuning comes out."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def relative_times(results: Iterable[Mapping[str, Any]], full: str) -> dict[str, str]:
    """For each method, its seconds divided by those of the method `full`; a dash where this was not measured.

    The seconds are those of the wrap or trim and of all steps. Each run is compared with the median of `full` for the
    same model and task, and the median over all runs counts, because other work disturbs single times.
    """
    seconds: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for result in results:
        values = seconds[result.get("model"), result["task"], result["method"]]
        if spent := _seconds(result):
            values.append(spent)
    ratios: dict[str, list[float]] = defaultdict(list)
    for (model, task, method), values in seconds.items():
        ratios[method]  # so that each method has an entry
        if whole := seconds.get((model, task, full)):
            ratios[method] += [value / statistics.median(whole) for value in values]
    return {method: f"{statistics.median(values):.2f}" if values else "-" for method, values in ratios.items()}


def _seconds(result: Mapping[str, Any]) -> float:
    """Those of a run; 0 if it was not timed."""
    steps = result.get("steps", 0) * result.get("step_seconds", 0.0)
    return float(result.get("seconds", result.get("wrap_seconds", 0.0) + steps))
