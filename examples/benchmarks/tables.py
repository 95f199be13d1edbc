"""Results as Markdown tables: means over seeds with standard errors, and the differences from controls."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from methods import Method
from tasks import TASKS
from times import relative_times


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error over seeds (NaN for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def cell(values: list[float], form: str = ".3f") -> str:
    if not values:
        return "-"
    return with_error(*mean_and_error(values), form)


def with_error(mean: float, error: float, form: str) -> str:
    return f"{mean:{form}}" if math.isnan(error) else f"{mean:{form}} ± {error:{form.lstrip('+')}}"


def over_tasks(parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The mean over tasks of means over seeds, and its standard error, from these two numbers of each task.

    Tasks differ by more than seeds do, and have different numbers of seeds. So runs are not pooled.
    """
    means, errors = zip(*parts, strict=True)
    return statistics.fmean(means), math.sqrt(sum(error**2 for error in errors)) / len(errors)


def task_mean(values: Mapping[str, list[float]]) -> str:
    """The mean over tasks with its standard error over seeds, in percent, from the values of each task's runs."""
    if not values:
        return "-"
    return with_error(*over_tasks(map(mean_and_error, values.values())), ".1%")


def systems_table(results: list[dict[str, Any]], methods: Mapping[str, Method]) -> str:
    """One line for each method, at its best rate; the last column compares it with its control, seed by seed."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    latest: dict[str, dict[str, Any]] = {}
    rates: dict[str, set[float]] = defaultdict(set)
    best = at_best_rates(results)
    times = relative_times(best, "full fine-tuning")
    for result in best:
        found[result["method"]][result["task"]][result["seed"]] = result["dev"]
        latest[result["method"]] = result
        rates[result["method"]].add(result["rate"])
    tasks = [name for name in TASKS if any(name in scores for scores in found.values())]
    header = ["method", *tasks, "trained values", "parameters", "FLOPs", "zeros", "bytes", "time",
              "rates", "points above its control"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, method in methods.items():
        if name not in latest:
            continue
        scores, figures = found[name], latest[name]
        cells = [
            name,
            *(cell(list(scores.get(task, {}).values())) for task in tasks),
            f"{figures['trained_values']:,}",
            f"{figures['params_share']:.0%}",
            f"{figures['flops_share']:.0%}",
            f"{figures['zeros_share']:.0%}",
            f"{figures['bytes']:,}",
            times[name],
            ", ".join(f"{rate:g}" for rate in sorted(rates[name])),
            points_above(scores, found[method.control], method.control) if method.control in latest else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def points_above(
    scores: Mapping[str, Mapping[int, float]], control: Mapping[str, Mapping[int, float]], name: str
) -> str:
    """For each task, the mean of the differences between runs with the same seed, and its standard error."""
    parts = []
    for task in TASKS:
        seeds = scores.get(task, {}).keys() & control.get(task, {}).keys()
        if seeds:
            points = [100 * (scores[task][seed] - control[task][seed]) for seed in seeds]
            parts.append(f"{task} {cell(points, '+.1f')}")
    return f"{', '.join(parts)} ({name})"


def best_rates(results: list[dict[str, Any]], task: str, methods: Mapping[str, Any]) -> dict[str, float]:
    """For each method, the learning rate with the best metric on the held-out training rows, with seed 0."""
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        name = result["method"]
        if result["task"] == task and result["seed"] == 0 and name in methods:
            if name not in best or result["held_out"] > best[name]["held_out"]:
                best[name] = result
    return {name: result["rate"] for name, result in best.items()}


def at_best_rates(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the chosen learning rate of their method and task."""
    rates = {task: best_rates(results, task, {r["method"]: None for r in results}) for task in TASKS}
    return [r for r in results if rates[r["task"]].get(r["method"]) == r["rate"]]


def retentions(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `retention = (metric - m0) / (full - m0)` to each run; `m0` is `Task.constant`, `full` full fine-tuning.

    Where full fine-tuning was run with a started head too, with three seeds or more, the better start counts.
    """
    chosen = at_best_rates(results)
    full = {}
    for task in TASKS:
        fresh, started = (
            [r["dev"] for r in chosen if r["task"] == task and r["method"] == name]
            for name in ("full", "full, head started")
        )
        if fresh:
            full[task] = max(
                statistics.fmean(scores) for scores in (fresh, started) if scores is fresh or len(scores) > 2
            )
    constant = {task: TASKS[task].constant for task in full}
    return [
        r | {"retention": (r["dev"] - constant[r["task"]]) / (full[r["task"]] - constant[r["task"]])}
        for r in chosen
        if r["task"] in full
    ]


def deciding_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs on tasks that are not noisy (see `Task`)."""
    return [run for run in runs if not TASKS[run["task"]].noisy]


def budgets_series(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records for `plots.plot_budgets`: retention of each trimming run over its budget, of full fine-tuning and LoRA.

    Only rows with all tasks of `ours` are used, because means over different tasks cannot be compared. Full
    fine-tuning and LoRA keep the whole model, so their records have no budget.
    """
    whole = {"full": "full fine-tuning", "tune 0.01 LoRA": "LoRA, 1% trained"}
    runs = deciding_runs(retentions(results))
    tasks: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        tasks[run["method"]].add(run["task"])
    records = []
    for run in runs:
        kind, _, rest = run["method"].partition(" ")
        budget, _, name = rest.partition(" ")
        if kind == "trim" and tasks[run["method"]] >= tasks[f"trim {budget} ours"]:
            label = name.replace("ours", "peft_sensi")
            records.append({"budget": float(budget), "method": label, "retention": run["retention"]})
        elif run["method"] in whole and tasks[run["method"]] == tasks["full"]:
            records.append({"method": whole[run["method"]], "retention": run["retention"]})
    return records


def front_series(results: list[dict[str, Any]], names: Mapping[str, str]) -> dict[str, list[tuple[float, ...]]]:
    """Points for `plots.plot_front`: `(share of the FLOPs, metric, its standard error)` of each row, by shown name.

    The metric is the mean over the tasks of the means over seeds. Only rows with all tasks are used.

    Args:
        names: The shown name for each row's name without its budget (`trim 0.5 ours` is `trim ours`).
    """
    runs = at_best_rates(results)
    tasks = {run["task"] for run in runs}
    series: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for row in sorted({run["method"] for run in runs}, key=_by_kind_and_budget):
        kind, _, name = row.partition(" ")
        shown = names.get(f"{kind} {name.partition(' ')[2]}".strip())
        mine = [run for run in runs if run["method"] == row]
        if shown is None or {run["task"] for run in mine} != tasks:
            continue
        mean, error = over_tasks(mean_and_error([r["dev"] for r in mine if r["task"] == task]) for task in tasks)
        series[shown].append((statistics.fmean(run["flops_share"] for run in mine), mean, error))
    return dict(series)


def quality_table(results: list[dict[str, Any]]) -> str:
    """The metric per task, and the mean retention over tasks in percent, with its standard error over seeds.

    `behind ours` is how much more `ours` retains at the same budget, on the same tasks and seeds. Retention and
    `behind ours` leave out noisy tasks (see `Task`).
    """
    runs = retentions(results)
    deciding = deciding_runs(runs)
    tasks = [name for name in TASKS if any(run["task"] == name for run in runs)]
    names = sorted({run["method"] for run in runs}, key=_by_kind_and_budget)
    times = relative_times(runs, "full")
    header = ["method", *tasks, "retention", "behind ours", "time", "rates", "runs"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name in names:
        mine = [run for run in runs if run["method"] == name]
        scores = [cell([run["dev"] for run in mine if run["task"] == task]) for task in tasks]
        rates = sorted({f"{run['rate']:g}" for run in mine})
        kept = task_mean(_by_task((run["task"], run["retention"]) for run in deciding_runs(mine)))
        behind = task_mean(_behind_ours(name, deciding))
        cells = [name, *scores, kept, behind, times[name], ", ".join(rates), str(len(mine))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ways_table(results: list[dict[str, Any]]) -> str:
    """A line for each row, a column for each model and task: the dev metric, its share of full fine-tuning's gain with
    the same seeds, and the number of seeds."""
    columns = list(dict.fromkeys((r["model"], r["task"]) for r in sorted(results, key=lambda r: r["model"])))
    found = {(r["model"], r["task"], r["method"], r["seed"]): r["dev"] for r in results}
    kept = kept_by_way(results, "dev")
    times = relative_times(results, "full")
    lines = ["| way | time | " + " | ".join(f"{model}, {task}" for model, task in columns) + " |"]
    lines.append("| --- " * (2 + len(columns)) + "|")
    for row in sorted({r["method"] for r in results}):
        cells = []
        for column in columns:
            seeds = [seed for *place, seed in found if place == [*column, row]]
            values = [found[*column, row, seed] for seed in seeds]
            text = cell(values)
            if column in kept.get(row, {}):
                text += f" ({kept[row][column][0]:.0%} of {len(values)})"
            elif values and all((*column, "full", seed) in found for seed in seeds):
                text += " (full learns nothing)"
            cells.append(text)
        lines.append("| " + " | ".join([row, times[row], *cells]) + " |")
    return "\n".join(lines)


def ways_summary(results: list[dict[str, Any]]) -> str:
    """How much of full fine-tuning's gain each way keeps: the mean over models and tasks, with its standard error over
    seeds, for the tasks that are not noisy together and for each noisy one, on the development and the held-out rows.

    A model and task count where full fine-tuning and the way have the same three seeds or more. The number of them is
    in brackets. The thorough way also has a row with each task's own number of epochs, as the command trains.
    """
    results = [*results, *_with_as_many_epochs(results)]
    exact, noisy = exact_and_noisy_tasks()
    groups = {" + ".join(exact): exact} | {name: [name] for name in noisy}
    splits = {"dev": "dev", "held_out": "held-out"}
    kept = {split: kept_by_way(results, split, least=3) for split in splits}
    found = {task for way, columns in kept["dev"].items() if way != "full" for _, task in columns}
    columns = [(group, split) for group, tasks in groups.items() if found & set(tasks) for split in splits]
    lines = ["| way | " + " | ".join(f"{group}, {splits[split]}" for group, split in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for way in sorted({r["method"] for r in results}):
        cells = []
        for group, split in columns:
            parts = [part for (_, task), part in kept[split].get(way, {}).items() if task in groups[group]]
            cells.append("{:.1%} ± {:.1%} ({})".format(*over_tasks(parts), len(parts)) if parts else "-")
        if way != "full" and set(cells) != {"-"}:
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


WAYS = {
    "fine-tune, then trim": "fine-tuned, trimmed to {}",
    "fine-tune, then trim random units": "fine-tuned, random units trimmed to {}",
    "late": "late to {}",
    "thorough, as many epochs after": "thorough to {}, as many epochs after",
    "fast": "fast to {}",
    "fast, twice the epochs": "fast to {}, twice as long",
}


def shares_table(results: list[dict[str, Any]]) -> str:
    """How much of full fine-tuning's gain each way of `WAYS` keeps on the development rows, with three seeds or more.

    A cell has the percentages of all tasks that are not noisy, in the order of the header, or that of a noisy one.
    """
    results = [*results, *_with_as_many_epochs(results)]
    kept = kept_by_way(results, "dev", least=3)
    exact, noisy = exact_and_noisy_tasks()
    places = [(budget, exact) for budget in (0.5, 0.25, 0.1)]
    places += [(budget, [task]) for task in noisy for budget in (0.5, 0.25)]
    header = ["model", "way", *(f"{' / '.join(tasks)} at {budget:.0%}" for budget, tasks in places)]
    lines = []
    for model in sorted({r["model"] for r in results}):
        for shown, way in WAYS.items():
            rows = [(kept.get(way.format(f"{budget:g}"), {}), tasks) for budget, tasks in places]
            parts = [[f"{row[model, t][0]:.0%}" if (model, t) in row else "-" for t in tasks] for row, tasks in rows]
            cells = [" / ".join(part) if set(part) != {"-"} else "-" for part in parts]
            if set(cells) != {"-"}:
                lines.append([model, shown, *cells])
    used = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    rule = ["---", "---", *["---:"] * len(places)]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in [header, rule, *lines])


def exact_and_noisy_tasks() -> tuple[list[str], list[str]]:
    """The names of the tasks with a small error, and of those with a large one (see `Task`)."""
    noisy = [name for name, task in TASKS.items() if task.noisy]
    return [name for name in TASKS if name not in noisy], noisy


def _with_as_many_epochs(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the thorough way that trained as long after the trim as before it, under a name without a number."""
    ends = {name: f", {task.epochs} epochs after" for name, task in TASKS.items()}
    thorough = [r for r in results if r["method"].startswith("thorough") and r["method"].endswith(ends[r["task"]])]
    return [{**r, "method": r["method"].removesuffix(ends[r["task"]]) + ", as many epochs after"} for r in thorough]


def kept_by_way(
    results: list[dict[str, Any]], split: str, least: int = 1
) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
    """For each way, model and task, the share of full fine-tuning's gain on these rows that is kept, and its error.

    The share is 1 + the mean of the differences from full fine-tuning with the same seed / its mean gain over
    the constant answer (`Task.constant_on`). A way "at <rate>" is compared with full fine-tuning at this rate, if
    that was run with the same seeds, and otherwise at its usual rate. The share is left out if there are fewer than
    `least` seeds, if full fine-tuning lacks one of them, and if it learns nothing.
    """
    scores: dict[str, dict[tuple[str, str], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in results:
        scores[r["method"]][r["model"], r["task"]][r["seed"]] = r[split]
    kept: dict[str, dict[tuple[str, str], tuple[float, float]]] = defaultdict(dict)
    for way, columns in scores.items():
        rate = way.rpartition(" at ")[2]
        same_rate = scores.get(f"full at {rate}", {}) if not way.startswith("full") else {}
        for column, own in columns.items():
            reference = same_rate.get(column, {})
            if own.keys() - reference.keys():
                reference = scores.get("full", {}).get(column, {})
            full = {seed: score for seed, score in reference.items() if seed in own}
            if len(full) < least or len(own) > len(full):
                continue
            gain = statistics.fmean(full.values()) - TASKS[column[1]].constant_on(split)
            if gain > 0:
                kept[way][column] = mean_and_error([1 + (own[seed] - full[seed]) / gain for seed in full])
    return kept


def _by_task(values: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for task, value in values:
        found[task].append(value)
    return found


def _behind_ours(name: str, runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """How much more `ours` retains than this row, for each task the differences of the seeds that both have."""
    budget = " ".join(name.split(" ")[:2])
    if name in ("full", f"{budget} ours"):
        return {}
    mine = {(r["task"], r["seed"]): r["retention"] for r in runs if r["method"] == name}
    ours = {(r["task"], r["seed"]): r["retention"] for r in runs if r["method"] == f"{budget} ours"}
    return _by_task((key[0], ours[key] - mine[key]) for key in sorted(mine.keys() & ours.keys()))


def _by_kind_and_budget(name: str) -> tuple[str, float, str]:
    kind, _, rest = name.partition(" ")
    budget, _, method = rest.partition(" ")
    return (kind, -float(budget), method) if kind in ("trim", "tune") else ("", 0.0, name)
