"""`peft-sensi measure FOLDER` on a device that has onnxruntime and NumPy, but neither PyTorch, PEFT nor typer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..merging.latency_graphs import measure_graphs
from ..utils.checks import MOST_THREADS
from ..utils.errors import SensiError
from .checks import check_files


def main(arguments: Sequence[str], missing: str) -> None:
    """Measures a folder of graphs and ends the process. `missing` is the module without which nothing else works."""
    parser = argparse.ArgumentParser(
        prog="peft-sensi measure",
        description=f"Measures a folder of graphs that `peft-sensi measure MODEL --export FOLDER` wrote on a machine "
        f"with PyTorch. (All other commands need {missing}.)",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of graphs")
    parser.add_argument("--runtime", choices=["onnxruntime"], default="onnxruntime", help="only onnxruntime")
    parser.add_argument("--threads", metavar="N", type=int, help="number of threads; default: one for each core")
    parser.add_argument("--rounds", metavar="N", type=int, default=7, help="how often each variant takes its turns")
    parser.add_argument("--out", metavar="FILE", type=Path, help="save the table as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the table of an earlier run")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args(arguments)
    if min(options.rounds, 1 if options.threads is None else options.threads) < 1:
        parser.error("--threads and --rounds must be at least 1")
    if (options.threads or 1) > MOST_THREADS:
        parser.error(f"--threads must be at most {MOST_THREADS}")
    try:
        check_files({"--out": options.out}, options.overwrite)
        table = measure_graphs(options.folder, options.threads, options.rounds)
        if options.out is not None:
            table.save(options.out)
    except (SensiError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(table.to_dict(), indent=1) if options.json else table)
    if options.out is not None:
        print(f"saved as {options.out}", file=sys.stderr)
    sys.exit(0)
