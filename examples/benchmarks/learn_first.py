"""Trim first, or learn first? Compares the two ways to the same budget on real tasks, also without training after.

    python examples/benchmarks/learn_first.py run --model minilm=FOLDER --data FOLDER --tasks cola trec6 --seeds 0 1 2
    python examples/benchmarks/learn_first.py table --page docs/quality.md

For each model, task and seed, one after the other:

- `full`: full fine-tuning, and `full, twice as long`: with twice the epochs.
- `fast`: `SensiConfig(budget=...)` on the pretrained model, then as many epochs as full fine-tuning.
- `fine-tuned, trimmed`: the fully fine-tuned model wrapped with `SensiConfig(budget=...)`, no training after.
- `thorough`: `SensiConfig(budget=1.0)` is trained like full fine-tuning; then `trim(...)`; then no training
  (`0 epochs`), one epoch, or as many epochs as before.

Each row has its own JSON file. Finished rows are not repeated; `--data` has the folders that `quality.py` describes.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from grid import fit, fresh_base, score, slug
from methods import task_type
from pages import write_part
from peft import get_peft_model
from tables import cell, read_results
from tasks import TASKS, Data, load_task
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from peft_sensi import SensiConfig

from common import write_json


RESULTS = Path(__file__).resolve().parent / "results" / "learn_first"
RATE, FAST_RATE = 5e-5, 1e-4  # of the whole model, and of a model that was trimmed before it had learned


class Rows:
    """Writes one file per row, and skips the work of rows that have one."""

    def __init__(self, folder: Path, common: dict[str, Any], data: Data) -> None:
        self.folder, self.common, self.data = folder, common, data

    def path(self, row: str) -> Path:
        return self.folder / self.common["task"] / f"{self.common['model']}-{slug(row)}-{self.common['seed']}.json"

    def missing(self, *rows: str) -> bool:
        return any(not self.path(row).exists() for row in rows)

    def add(self, row: str, model: nn.Module, seconds: float) -> None:
        figures = {split: score(model, self.data, split) for split in ("held_out", "dev")}
        write_json(self.path(row), {**self.common, "method": row, "seconds": seconds, **figures})
        print(*self.common.values(), row, figures, f"{seconds:.0f} s", flush=True)


def run_seed(rows: Rows, model_name: str, budgets: list[float], bf16: bool) -> None:
    data, seed = rows.data, rows.common["seed"]
    task, epochs = data.task, data.task.epochs
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not torch.cuda.is_available())

    def base() -> nn.Module:
        set_seed(seed)
        return fresh_base(task, model_name)

    def timed(action: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        return action(), time.perf_counter() - start

    def wrapped(model: nn.Module, budget: float) -> tuple[Any, float]:
        config = SensiConfig(budget=budget, calibration=data.calibration(), seed=seed, task_type=task_type(model))
        with accelerator.autocast():
            return timed(lambda: get_peft_model(model, config))

    trimmed = [f"fine-tuned, trimmed to {budget:g}" for budget in budgets]
    if rows.missing("full", *trimmed):
        model = base()
        rows.add("full", model, fit(model, data, accelerator, epochs, RATE, seed))
        for budget, row in zip(budgets, trimmed, strict=True):
            half, seconds = wrapped(copy.deepcopy(model), budget)
            rows.add(row, half, seconds)
    healing = (0, 1, epochs)
    names = {(b, n): f"thorough to {b:g}, {n} epochs after" for b in budgets for n in healing}
    if rows.missing("thorough, untrimmed", *names.values()):
        whole, seconds = wrapped(base(), 1.0)
        seconds += fit(whole, data, accelerator, epochs, RATE, seed)
        rows.add("thorough, untrimmed", whole, seconds)
        for budget in budgets:
            half = copy.deepcopy(whole)
            with accelerator.autocast():
                _, trimming = timed(lambda: half.base_model.trim(budget, calibration=data.calibration()))  # noqa: B023
            rows.add(names[budget, 0], half, seconds + trimming)
            for count in dict.fromkeys(healing[1:]):
                healed = copy.deepcopy(half)
                more = fit(healed, data, accelerator, count, RATE, seed + 100)
                rows.add(names[budget, count], healed, seconds + trimming + more)
    for budget in budgets:
        if rows.missing(row := f"fast to {budget:g}"):
            model, seconds = wrapped(base(), budget)
            rows.add(row, model, seconds + fit(model, data, accelerator, epochs, FAST_RATE, seed))
    if rows.missing("full, twice as long"):
        model = base()
        rows.add("full, twice as long", model, fit(model, data, accelerator, 2 * epochs, RATE, seed))


def table(results: list[dict[str, Any]]) -> str:
    """A line for each row, a column for each model and task: the dev metric, and its share of full fine-tuning's."""
    columns = list(dict.fromkeys((r["model"], r["task"]) for r in sorted(results, key=lambda r: r["model"])))
    values: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, list[float]] = defaultdict(list)
    full = {(r["model"], r["task"], r["seed"]): r for r in results if r["method"] == "full"}
    for result in results:
        values[result["method"]][result["model"], result["task"]].append(result["dev"])
        if (reference := full.get((result["model"], result["task"], result["seed"]))) is not None:
            seconds[result["method"]].append(result["seconds"] / reference["seconds"])
    header = ["way", *(f"{model}, {task}" for model, task in columns), "time"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in values:
        cells = []
        for column in columns:
            found, whole = values[row].get(column, []), values["full"].get(column, [])
            constant = TASKS[column[1]].constant
            kept = ""
            if found and whole and row != "full":
                kept = f" ({(sum(found) / len(found) - constant) / (sum(whole) / len(whole) - constant):.0%})"
            cells.append(cell(found) + kept)
        lines.append("| " + " | ".join([row, *cells, cell(seconds[row], ".2f")]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--model", required=True, help="NAME=FOLDER; the name is used in the table")
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    run.add_argument("--bf16", action="store_true", help="autocast to bfloat16; slow on CPUs without its instructions")
    for command in (run, commands.add_parser("table")):
        command.add_argument("--results", type=Path, default=RESULTS)
        command.add_argument("--page", type=Path, help="page with the markers `learn_first: begin` and `end`")
    options = parser.parse_args()
    if options.command == "run":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        name, _, folder = options.model.partition("=")
        for seed in options.seeds:
            for task in options.tasks:
                common = {"model": name, "task": task, "seed": seed, "bf16": options.bf16}
                data = load_task(TASKS[task], options.data, folder, seed)
                run_seed(Rows(options.results, common, data), folder, options.budgets, options.bf16)
    found = table(read_results(options.results))
    print(found)
    if options.page is not None:
        write_part(options.page, "learn_first", found)


if __name__ == "__main__":
    main()
