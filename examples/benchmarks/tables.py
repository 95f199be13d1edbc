"""Results as Markdown tables: means over seeds with their standard errors, and where a row loses to its control."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from methods import Method
from tasks import TASKS


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds (NaN for a single one)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def systems_table(results: list[dict[str, Any]], methods: Mapping[str, Method]) -> str:
    by_method: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    latest: dict[str, dict[str, Any]] = {}
    for result in results:
        by_method[result["method"]][result["task"]].append(result["dev"])
        latest[result["method"]] = result
    tasks = [name for name in TASKS if any(name in scores for scores in by_method.values())]
    header = ["method", *tasks, "trained values", "parameters", "FLOPs", "zeros", "bytes", "note"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, method in methods.items():
        if name not in latest:
            continue
        scores, figures = by_method[name], latest[name]
        control = by_method.get(method.control, {})
        worse = [
            task
            for task in tasks
            if scores.get(task)
            and control.get(task)
            and statistics.fmean(scores[task]) < statistics.fmean(control[task])
        ]
        note = f"below {method.control} on {', '.join(worse)}" if worse else ""
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    *(cell(scores.get(task, [])) for task in tasks),
                    f"{figures['trained_values']:,}",
                    f"{figures['params_share']:.0%}",
                    f"{figures['flops_share']:.0%}",
                    f"{figures['zeros_share']:.0%}",
                    f"{figures['bytes']:,}",
                    note,
                ]
            )
            + " |"
        )
    return "\n".join(lines)
