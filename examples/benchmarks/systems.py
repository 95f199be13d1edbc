"""The five systems and their controls on real tasks. Each run writes a JSON file; a Markdown table shows all runs.

    python examples/benchmarks/systems.py run --model BERT --data FOLDER
    python examples/benchmarks/systems.py table --page docs/results-systems.md

Runs that have a result are not repeated. The data folder has `<task>/train.tsv` and `dev.tsv` (TREC: `test.tsv`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import examples_path  # noqa: F401 (for the imports from examples/)
from grid import run_all
from methods import SYSTEMS
from pages import write_part
from runner import readable_errors
from tables import read_results, systems_table
from tasks import TASKS


RESULTS = Path(__file__).resolve().parent / "results" / "systems"


@readable_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--model", required=True)
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--methods", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument(
        "--rates", nargs="+", type=float, default=[], help="learning rates to use instead of each method's own"
    )
    for command in (run, commands.add_parser("table")):
        command.add_argument("--results", type=Path, default=RESULTS)
        command.add_argument(
            "--page",
            type=Path,
            help="Markdown page with the markers `systems: begin` and `end`; the table is written between them",
        )
    options = parser.parse_args()
    if options.command == "run":
        tasks = [TASKS[name] for name in options.tasks]
        methods = {name: SYSTEMS[name] for name in options.methods}
        run_all(tasks, methods, options.seeds, options.model, options.data, options.results, options.rates)
    table = systems_table(read_results(options.results), SYSTEMS)
    print(table)
    if options.page is not None:
        write_part(options.page, "systems", table)


if __name__ == "__main__":
    main()
