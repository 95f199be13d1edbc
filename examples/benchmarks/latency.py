"""Plans by measured latency: does the merged model keep the promise, and is it better than a plan by FLOPs?

    python examples/benchmarks/latency.py promise --minilm FOLDER --twelve FOLDER --page docs/latency.md
    python examples/benchmarks/latency.py accuracy --model minilm=FOLDER --data FOLDER --picture docs/latency.png

`promise` measures a table for each model, runtime, batch size and number of threads, plans for each share of the
untrimmed latency (with random scores: the time does not depend on which units are kept), merges, and times the merged
model and the base in turns. DistilBERT and the small Llama have random weights. `accuracy` fine-tunes a model on each
task, trims it under limits on `params`, `flops` and `latency` without training after, and fine-tunes models with fewer
layers. It times the merged models, each in a new process, and draws accuracy over measured latency. Every result is a
JSON file of its own, and finished ones are not repeated. `--quick` checks that everything runs, with a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import pickle
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
)

from peft_sensi import LatencyTable, SensiConfig, SensiError, measure_latency
from peft_sensi.merging.latency import check_prediction, compare_latency
from peft_sensi.utils.timing import processor_name

import examples_path  # noqa: F401 (for the imports from examples/)
from common import is_done, write_json
from grid import base_name
from learn_first import RATES, Rows, Seed, full, settings_of
from pages import write_part
from plots import plot_budgets
from runner import readable_errors
from tables import cell, read_results
from tasks import TASKS, load_task


RESULTS = Path(__file__).resolve().parent / "results" / "latency"
SMALL_LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
               "num_key_value_heads": 4, "vocab_size": 8000}  # fmt: skip
TINY = {"dim": 64, "hidden_dim": 256, "n_layers": 2, "n_heads": 4, "vocab_size": 100}
RUNTIMES = ["torch", "onnxruntime"]
METHODS = ["params", "flops", "latency", "layers"]


def build(name: str, options: argparse.Namespace) -> nn.Module:
    """A base model in evaluation mode."""
    torch.manual_seed(0)
    if name in ("minilm", "twelve"):
        return AutoModelForSequenceClassification.from_pretrained(getattr(options, name), num_labels=2).float().eval()
    if name == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_LLAMA)).eval()
    config = DistilBertConfig(**(TINY if name == "tiny" else {}), num_labels=2)
    return AutoModelForSequenceClassification.from_config(config).eval()


def promise(options: argparse.Namespace) -> None:
    for name, runtime, size, threads in itertools.product(
        options.models, options.runtimes, options.batches, options.threads
    ):
        base, key = None, f"{name}-{runtime}-batch{size}-threads{threads}"
        where = {"batch_size": size, "sequence_length": options.length, "runtime": runtime, "threads": threads}
        for share in options.shares:
            path = options.results / "promise" / f"{key}-{share}.json"
            record = {"model": name, "limit": share, **where}
            if folder := getattr(options, name, None):
                record["base"] = base_name(folder)
            if is_done(path, record):
                continue
            base = build(name, options) if base is None else base
            file = options.results / "tables" / f"{key}.json"
            table = table_at(file, where, partial(measure_latency, base, rounds=options.rounds, **where))
            config = SensiConfig(budget={"latency": share}, latency=table, score="random", min_units=0)
            model = get_peft_model(copy.deepcopy(base), config)
            predicted = model.peft_config["default"].latency["latency"]
            merged = model.merge_and_unload().eval()
            found = check_prediction(merged, base, predicted, options.rounds)
            over = found["measured_share"] / share - 1
            write_json(path, {**record, **found, "over": over})
            print(key, share, f"off {found['off']:+.1%}, over the limit {over:+.1%}", flush=True)


def table_at(file: Path, where: dict[str, Any], measure: Callable[[], LatencyTable]) -> LatencyTable:
    """The table in the file, or a measured one. One of another processor is an error: plans would be wrong."""
    if not is_done(file, {**where, "device": processor_name()}):
        file.parent.mkdir(parents=True, exist_ok=True)
        measure().save(file)
    return LatencyTable.load(file)


def promise_table(results: Path) -> str:
    records = read_results(results / "promise")
    header = ["model", "runtime", "batch", "threads", "limit", "predicted", "measured", "off", "over the limit"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * 2 + "| ---: " * 7 + "|"]
    for r in records:
        shares = [f"{r[name]:.1%}" for name in ("limit", "predicted_share", "measured_share")]
        cells = [
            r["model"],
            r["runtime"],
            r["batch_size"],
            r["threads"],
            *shares,
            f"{r['off']:+.1%}",
            f"{r['over']:+.1%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if records:
        worst, most = max(abs(r["off"]) for r in records), max(r["over"] for r in records)
        limit = f"the limit is exceeded by at most {most:.1%}" if most > 0 else "no limit is exceeded"
        lines += ["", f"Of {len(records)} models, the prediction is off by at most {worst:.1%}, and {limit}."]
    return "\n".join(lines)


def accuracy(options: argparse.Namespace) -> None:
    name, _, folder = options.model.partition("=")
    where = {"batch_size": 1, "sequence_length": options.length, "runtime": options.runtime, "threads": 1}
    settings = settings_of(folder, options.bf16, (options.rate, options.rate)) | where
    for seed, task in itertools.product(options.seeds, options.tasks):
        common = {"model": name, "task": task, "seed": seed}
        data = load_task(TASKS[task], options.data, folder, seed)
        rows = Rows(options.results / "accuracy", common, data, settings)
        run = Seed(rows, folder, options.models)
        file = options.results / "tables" / f"{name}-{task}-{where['runtime']}.json"
        whole = run.base().eval()
        full(run, [])
        for method, share in itertools.product(options.methods, options.shares):
            if not run.rows.missing(row := f"{method} {share}"):
                continue
            measure = partial(in_new_process, measure_latency, whole, rounds=options.rounds, **where)
            model = _model_within(run, method, share, table_at(file, where, measure))
            own, base = in_new_process(compare_latency, model.eval(), whole, rounds=options.rounds, **where)
            run.rows.add(row, model, 0.0, method=method, limit=share, latency=own / base)


def in_new_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a process finds that has not trained: training leaves the memory so that small models measure slower."""
    # As bytes: multiprocessing would put the tensors into shared memory, of which many containers have 64 MB only.
    job = pickle.dumps(partial(function, *arguments, **options))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_run, job).result()


def _run(job: bytes) -> Any:
    return pickle.loads(job)()


def _model_within(run: Seed, method: str, share: float, table: LatencyTable) -> Any:
    """The fine-tuned model, trimmed under one limit, not trained after and merged; or one with fewer layers."""
    if method == "layers":
        model = fewer_layers(run.base(), share)
        run.fit(model, run.epochs, run.rate)
        return model
    model, _ = run.wrapped(copy.deepcopy(run.full[0]), budget=1.0, latency=table)
    run.trim(model, {method: share})
    return model.merge_and_unload()


LINES = {
    "full": "whole model",
    "params": "limit on parameters",
    "flops": "limit on FLOPs",
    "latency": "limit on latency",
    "layers": "fewer layers",
}


def accuracy_table(results: Path, shares: Sequence[float]) -> str:
    """The dev metric at equal measured latency: means over seeds, and how plans by latency compare with the others.

    A cell is a dash where a method has no model as fast as that. A cell with fewer seeds than its row names them.
    """
    found: dict[tuple, dict[str, dict[int, list[float | None]]]] = defaultdict(lambda: defaultdict(dict))
    for (model, task, seed), methods in runs_by_method(results).items():
        whole = methods.pop("full")
        found[model, task]["full"][seed] = [*whole.values()] * len(shares)
        for method, points in methods.items():
            found[model, task][method][seed] = [at_latency(points | whole, share) for share in shares]
    lines = ["| model | task | limit on | seeds | " + " | ".join(f"at {s:.0%}" for s in shares) + " |"]
    lines.append("| --- " * 4 + "| ---: " * len(shares) + "|")
    for run, methods in sorted(found.items()):
        whole = methods.pop("full")
        rows = {**dict(sorted(methods.items())), "nothing (the whole model)": whole}
        for method in ("flops", "params"):
            if ahead := points_ahead(methods["latency"], methods[method]):
                rows[f"latency, points above {method}"] = ahead
        for name, seeds in rows.items():
            form = "+z.1f" if "points" in name else ".3f"
            cells = []
            for column in zip(*seeds.values(), strict=True):
                values = [value for value in column if value is not None]
                cells.append(cell(values, form) + f" ({len(values)})" * (0 < len(values) < len(seeds)))
            lines.append("| " + " | ".join([*run, name, str(len(seeds)), *cells]) + " |")
    return "\n".join(lines)


def runs_by_method(results: Path) -> dict[tuple[str, str, int], dict[str, dict[float, float]]]:
    """For each model, task and seed, the dev metric of each method by its measured share of the time."""
    runs: dict[tuple, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in read_results(results / "accuracy"):
        runs[r["model"], r["task"], r["seed"]][r["method"]][r.get("latency", 1.0)] = r["dev"]
    return runs


def at_latency(points: Mapping[float, float], share: float) -> float | None:
    """The metric at this share of the time, between measured models; `None` if none is as fast (to two points)."""
    found = sorted(points.items())
    return float(np.interp(share, *zip(*found, strict=True))) if share > found[0][0] - 0.02 else None


def points_ahead(
    own: Mapping[int, list[float | None]], other: Mapping[int, list[float | None]]
) -> dict[int, list[float | None]]:
    """By how many points each seed's values are above those of the other method with this seed."""
    return {
        seed: [None if a is None or b is None else 100 * (a - b) for a, b in zip(own[seed], other[seed], strict=True)]
        for seed in own.keys() & other.keys()
    }


def draw(options: argparse.Namespace) -> None:
    """Draws the chosen model, tasks and seeds: one point for each method and limit."""
    name = options.model.partition("=")[0]
    chosen = [
        r
        for r in read_results(options.results / "accuracy")
        if r["model"] == name and r["task"] in options.tasks and r["seed"] in options.seeds
    ]
    labels = {"xlabel": "share of the base's measured latency", "ylabel": ", ".join(options.tasks)}
    plot_budgets(points(chosen), options.picture, x="latency", y="dev", runs="tasks and seeds", **labels)


def points(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records for `plot_budgets`. All runs of a method at a limit are at the mean of their latencies, so they become
    one point. Raises `SensiError` if the tasks do not have the same metric."""
    if len(metrics := {TASKS[r["task"]].metric for r in results}) > 1:
        raise SensiError(
            f"The tasks of a picture must have one metric, but these have {' and '.join(sorted(metrics))}: draw one "
            f"picture for each of them, with --tasks."
        )
    latencies: dict[tuple[str, float | None], list[float]] = defaultdict(list)
    for r in results:
        if "latency" in r:
            latencies[r["method"], r["limit"]].append(r["latency"])
    return [
        {"method": LINES[r["method"]], "dev": r["dev"]}
        | ({"latency": statistics.fmean(latencies[r["method"], r["limit"]])} if "latency" in r else {})
        for r in results
    ]


def fewer_layers(model: Any, share: float) -> nn.Module:
    """The model with the first layers only, `share` of them, rounded."""
    stack = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    count = max(1, round(share * len(stack)))
    del stack[count:]
    model.config.num_hidden_layers = count
    return model


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first, second = commands.add_parser("promise"), commands.add_parser("accuracy")
    for command in (first, second):
        command.add_argument(
            "--results", type=Path, help="default: the committed results; with --quick, a temporary folder"
        )
        command.add_argument("--length", type=int, default=128, help="tokens of each sequence")
        command.add_argument("--rounds", type=int, default=7)
        command.add_argument("--shares", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    first.add_argument("--minilm", help="the folder of all-MiniLM-L6-v2")
    first.add_argument("--twelve", help="the folder of a model with 12 layers")
    first.add_argument("--models", nargs="+", default=["minilm", "twelve", "distilbert", "llama"])
    first.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    second.add_argument("--runtime", choices=RUNTIMES, default="torch")
    first.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    first.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    first.add_argument("--page", type=Path, help="page with the markers `latency: begin` and `end`")
    second.add_argument("--page", type=Path, help="page with the markers `latency_accuracy: begin` and `end`")
    first.add_argument("--quick", action="store_true", help="check that everything runs, with a tiny model")
    second.add_argument("--model", required=True, help="NAME=FOLDER")
    second.add_argument("--data", type=Path, required=True, help="the folders that docs/quality.md describes")
    second.add_argument("--tasks", nargs="+", choices=TASKS, default=["trec6", "sst2", "wnut17"])
    second.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    second.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    second.add_argument("--rate", type=float, default=RATES[0], help="of the trainings")
    second.add_argument("--models", type=Path, help="folder that keeps fully fine-tuned models for later runs")
    second.add_argument("--bf16", action="store_true", help="train under autocast to bfloat16")
    second.add_argument("--picture", type=Path, help="accuracy over measured latency; .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    if options.command == "accuracy":
        options.results = options.results or RESULTS
        accuracy(options)
        text = accuracy_table(options.results, options.shares)
        print(text)
        if options.page is not None:
            write_part(options.page, "latency_accuracy", text)
        if options.picture is not None:
            draw(options)
        return
    if options.quick:
        options.models, options.batches, options.threads, options.shares = ["tiny"], [1], [1], [0.9]
        options.length = 16
    with tempfile.TemporaryDirectory() as folder:
        options.results = options.results or (Path(folder) if options.quick else RESULTS)
        promise(options)
        text = promise_table(options.results)
    print(text)
    if options.page is not None:
        write_part(options.page, "latency", text)


if __name__ == "__main__":
    main()
