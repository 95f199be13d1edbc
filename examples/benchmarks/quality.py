"""Accuracy at every budget: `SensiConfig` and its alternatives, with the same learning rates to choose from.

    python examples/benchmarks/quality.py run --model BERT --data FOLDER
    python examples/benchmarks/quality.py table --page docs/quality.md
    python examples/benchmarks/quality.py plot docs/accuracy.png
    python examples/benchmarks/quality.py front docs/front.png --tasks trec6 sst2

The learning rate of a row is the one with the best metric on held-out training rows, with seed 0. The other seeds run
only at this rate. Runs that have a result are not repeated.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import examples_path  # noqa: F401 (for the imports from examples/)
from grid import run_all
from methods import TRIMMING, TUNING, Method, blocks_only, full, started
from pages import write_part
from plots import plot_budgets, plot_front
from runner import readable_errors
from tables import best_rates, budgets_series, front_series, quality_table, read_results
from tasks import TASKS


RESULTS = Path(__file__).resolve().parent / "results" / "quality"
RATES = [5e-5, 1.5e-4, 3e-4]
# Variants of full fine-tuning: the differences from `ours` that have nothing to do with units.
FULL = {"full, embeddings frozen": blocks_only, "full, head started": started(full)}
# The rows of the picture in the README, and their names there.
FRONT = {
    "trim ours": "peft_sensi",
    "trim random, refitted": "random ranking",
    "tune LoRA": "LoRA",
    "full": "full fine-tuning",
}
KINDS = {"trim": (TRIMMING, [0.5, 0.25, 0.1]), "tune": (TUNING, [0.1, 0.01, 0.001])}


def rows(kind: str, names: list[str] | None, budgets: list[float] | None) -> dict[str, Method]:
    """The rows, named `<kind> <budget> <method>`. The first is full fine-tuning, the reference for all others."""
    makers, usual = KINDS[kind]
    methods = {"full": Method(full, RATES[0])}
    if kind == "trim":
        methods |= {name: Method(make, RATES[0]) for name, make in FULL.items() if names is None or name in names}
    for budget in budgets or usual:
        for name, make in makers.items():
            if names is None or name in names:
                methods[f"{kind} {budget:g} {name}"] = Method(make(budget), RATES[0])
    return methods


@readable_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run, table, plot, front = (commands.add_parser(name) for name in ("run", "table", "plot", "front"))
    run.add_argument("--model", required=True)
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--kind", choices=KINDS, default="trim")
    run.add_argument("--methods", nargs="+")
    run.add_argument("--budgets", nargs="+", type=float)
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument(
        "--rates", nargs="+", type=float, default=RATES, help="learning rates to choose from, with seed 0"
    )
    for command in (plot, front):
        command.add_argument("picture", type=Path)
    front.add_argument("--style", choices=("light", "dark"), default="light")
    for command in (run, table):
        command.add_argument(
            "--page",
            type=Path,
            help="Markdown page with the markers `quality: begin` and `end`; the table is written between them",
        )
    for command in (run, table, plot, front):
        command.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
        command.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        methods = rows(options.kind, options.methods, options.budgets)
        for name in options.tasks:
            common = (options.model, options.data, options.results)
            run_all([TASKS[name]], methods, [0], *common, rates=options.rates)
            chosen = best_rates(read_results(options.results), name, methods)
            for row, rate in chosen.items():
                seeds = [seed for seed in options.seeds if seed]
                run_all([TASKS[name]], {row: methods[row]}, seeds, *common, rates=[rate])
    shown = TASKS if options.command == "run" else options.tasks
    results = [result for result in read_results(options.results) if result["task"] in shown]
    if options.command == "plot":
        tasks = ", ".join(name for name in TASKS if any(result["task"] == name for result in results))
        plot_budgets(
            budgets_series(results), options.picture, y="retention", ylabel="retention of full fine-tuning",
            xlabel="share of the prunable parameters kept", reference="full fine-tuning",
            runs=f"tasks ({tasks}) and seeds",
        )  # fmt: skip
    elif options.command == "front":
        of = " and ".join(re.sub(r"(?<=[A-Z])(?=[0-9])", "-", name.upper()) for name in shown)
        metric = " or ".join(sorted({result["metric"] for result in results}))
        axes = {"xlabel": "FLOPs of heads and neurons that are left", "ylabel": f"{metric}, mean of {of}"}
        plot_front(front_series(results, FRONT), options.picture, FRONT["full"], style=options.style, **axes)
    else:
        text = quality_table(results)
        print(text)
        if options.page is not None:
            write_part(options.page, "quality", text)


if __name__ == "__main__":
    main()
