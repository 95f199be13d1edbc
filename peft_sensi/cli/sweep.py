"""The command `sweep`: one ranking, several budgets, and what each of them costs and saves."""

from __future__ import annotations

import copy
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..reporting.tables import plan_renderables, records_table
from ..utils.errors import SensiError
from ..utils.files import read_json_object, write_json_atomically
from ..utils.formatting import human, interval_text, metric_text
from ..utils.hub_names import UNFINISHED
from . import arguments as args
from .arguments import option
from .checks import PICTURE, SCORES, TABLE, check_budget, check_out
from .data_options import DATA_OPTIONS, LABELED, VALIDATION_OPTIONS, places_of_rows, task_options
from .loading import load_base
from .measure import length_for
from .terminal import ascii_only, err, print_result, print_warning, step


@args.with_options(reading=DATA_OPTIONS | VALIDATION_OPTIONS)
def sweep(
    model: args.Model,
    reading: dict[str, Any],
    given: dict[str, Any],
    data: Annotated[list[str], LABELED],
    out_folder: Annotated[Path, option("--out", "FOLDER", "The folder for the adapters, the table and the picture.")],
    budgets: Annotated[
        str | None,
        option(
            "--budgets",
            "LIMITS",
            "Budgets, such as 0.75 0.5 0.25: shares of the parameters of heads and neurons "
            "to keep. 1 is the whole model. Default: those given as LIMIT.",
            args.BUDGET,
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="LIMIT", help="Budgets, with or without --budgets before the first.")
    ] = None,
    score: args.Ranking = None,
    epochs: Annotated[float, option("--epochs", "N", "Passes over the data for each budget.", min=0)] = 3,
    lr: Annotated[
        float | None,
        option("--lr", "RATE", "The peak learning rate. Default: that of the command train, for each budget."),
    ] = None,
    batch_size: args.BatchSize = 32,
    class_weights: args.Weights = None,
    sequence_length: Annotated[
        int | None,
        option(
            "--sequence-length",
            "N",
            "Tokens of the sequence whose time is measured. Default: 128, or as many as the model takes.",
            min=1,
        ),
    ] = None,
    rounds: Annotated[int, option("--rounds", "N", "How often the models take turns when they are timed.", min=1)] = 7,
    overwrite: args.Overwrite = False,
    resume: args.Resume = False,
    bf16: args.Bf16 = None,
    seed: args.Seed = 0,
    as_json: args.Json = False,
) -> None:
    """Train under several budgets with one ranking, and show the metric over size and over measured time.

    Heads and neurons are ranked once. Each budget gets an adapter of its own in the folder, beside a table
    (sweep.json) and a picture (sweep.png).

    After an interruption, --resume keeps the ranking and the adapters that are finished, and goes on.
    """
    from accelerate import PartialState

    from ..anatomy.build import build_anatomy
    from ..reporting.saved import METRICS
    from ..scoring.scores import Scores
    from ..tasks.class_weights import weighted_model_loss
    from .resuming import check_same_options, note_data, read_state, resumed_state
    from .run import Training, check_training, write_record
    from .train import save_scores, score_for, train_for

    limits = budgets_of([budgets or "", *(more or [])])
    args.check_rate(lr)
    args.check_epochs(epochs)
    args.check_overwrite(overwrite, resume)
    score = score or args.FISHER
    folders = {limit: out_folder / f"{limit:.15g}" for limit in limits}
    options = {**given, "--budgets": limits}
    del options["LIMIT"]
    check_out(out_folder, overwrite, resume, [SCORES, PICTURE], places_of_rows(data, reading))
    if resume:
        state = {"finished": [], **read_state(out_folder)}
        check_same_options(state, options)
    else:
        state = {"options": options, "finished": []}
        for folder in folders.values():
            check_out(folder, overwrite)
    base, task = load_base(model, data, seed=seed, **task_options(reading))
    if not len(task.validation):
        raise SensiError("A sweep compares validation results: give --validation, or a --validation-share above 0.")
    length = length_for(base, sequence_length)
    anatomy = build_anatomy(base)
    for limit in limits:  # shares and counts cannot be compared
        check_budget(anatomy, {"params": limit}, option="--budgets")
    training = Training(epochs, lr, batch_size, args.is_bf16(bf16), seed, class_weights)
    check_training(task, training)
    note_data(state, task)
    if resume and (out_folder / SCORES).is_file():
        ranking = Scores.load(out_folder / SCORES)
    else:
        # Without a spinner, because scoring shows bars.
        loss_fn = weighted_model_loss(task) if class_weights else None
        ranking = score_for(base, task.batches(batch_size, seed), score=score.value, seed=seed, loss_fn=loss_fn)
        save_scores(ranking, out_folder)  # before the trainings, which may be interrupted
        write_record(out_folder / UNFINISHED, state)
    results = []
    for limit, folder in folders.items():
        err.print(Text(f"budget {limit:.15g}", "bold"))
        if limit in state["finished"]:
            err.print(Text(f"finished before: {folder}", "dim"), soft_wrap=True)
            results.append(read_json_object(folder / METRICS))
            if not all(isinstance(results[-1].get(name), dict) for name in ("validation", "validation_interval")):
                raise SensiError(f"{folder / METRICS} is damaged: start again with --overwrite.")
            continue
        own = {"options": options}
        if resume and (folder / UNFINISHED).is_file():
            with suppress(SensiError):  # without a checkpoint, the training starts again
                own = resumed_state(folder, options)
        results.append(train_for(
            copy.deepcopy(base), task, folder, training, limits={"params": limit}, recipe=None, score=score.value,
            scores=ranking, state=own,
            show=lambda plan: None if as_json else err.print(*plan_renderables(plan, ascii_only())),
        ))  # fmt: skip
        state["finished"].append(limit)
        write_record(out_folder / UNFINISHED, state)
    if PartialState().process_index:
        return  # the first process writes and prints
    points = [point_of(limit, result, task.main_metric) for limit, result in zip(limits, results, strict=True)]
    whole = add_times(points, [str(folder) for folder in folders.values()], base, length, rounds, as_json)
    table = {"model": model, "metric": task.main_metric, "base_parameters": base.num_parameters(), "base_ms": whole,
             "sequence_length": length, "points": points}  # fmt: skip
    write_json_atomically(out_folder / TABLE, table)
    (out_folder / UNFINISHED).unlink(missing_ok=True)
    lines = ["Below each value is its 95 % interval.", f"table: {out_folder / TABLE}"]
    if (picture := draw(points, table, out_folder / PICTURE)) is not None:
        lines.append(f"picture: {picture}")
    print_result(as_json, table, points_table(points, table), *lines)


def budgets_of(texts: list[str]) -> list[float | int]:
    """The budgets in the texts, between blanks or commas, the largest first. Raises `SensiError`."""
    parts = [part for text in texts for part in re.split(r"[,\s]+", text) if part]
    limits = {args.number("budgets", part) for part in parts}
    if not limits:
        raise SensiError("--budgets needs at least one share, such as 0.75 0.5 0.25.")
    for limit in limits:
        args.check_limits({"params": limit}, "--budgets")
    return sorted(limits, key=lambda limit: (limit > 1, limit), reverse=True)


def point_of(limit: float | int, result: dict[str, Any], metric: str) -> dict[str, Any]:
    """One line of the table, from the metrics of a training."""
    return {
        "budget": limit,
        "folder": result.get("folder"),
        "value": result["validation"].get(metric),
        "interval": result["validation_interval"].get(metric),
        "metrics": result["validation"],
    }


def add_times(
    points: list[dict[str, Any]], folders: list[str], base: Any, length: int, rounds: int, quiet: bool
) -> float | None:
    """Adds the parameters and the time of each merged model to its point. Returns the base's time in milliseconds.

    The models take turns, one sequence at a time. On a machine that is too busy, times are `None`, with a warning.
    """
    import torch

    from ..merging.latency import time_models
    from ..reporting.saved import load_adapter, open_adapter

    models = {}
    for point, folder in zip(points, folders, strict=True):
        merged: Any = load_adapter(open_adapter(folder)).merge_and_unload()
        point |= {"parameters": merged.num_parameters(), "ms": None}
        models[folder] = merged.float().cpu().eval()
    try:
        with step("measuring times", show=not quiet), torch.no_grad():
            whole, times = time_models(base.float().cpu().eval(), models, sequence_length=length, rounds=rounds)
    except SensiError as error:
        print_warning(f"no times: {error}")
        return None
    for point, folder in zip(points, folders, strict=True):
        point["ms"] = times[folder]
    return whole


def draw(points: list[dict[str, Any]], table: dict[str, Any], path: Path) -> Path | None:
    """Draws the picture, if matplotlib is installed and there is something to draw."""
    from ..plotting.sweeps import plot_sweep

    drawn = [point for point in points if point["value"] is not None]
    if not drawn:
        return None
    sizes = {"share of the base's parameters": [point["parameters"] / table["base_parameters"] for point in drawn]}
    if table["base_ms"]:
        sizes["share of the base's measured time"] = [point["ms"] / table["base_ms"] for point in drawn]
    try:
        plot_sweep(
            path, table["metric"], [point["value"] for point in drawn], [point["interval"] for point in drawn],
            [f"{point['budget']:.15g}" for point in drawn], sizes,
        )  # fmt: skip
    except SensiError as error:  # no matplotlib
        err.print(Text(f"no picture: {error}", "dim"), soft_wrap=True)
        return None
    return path


def points_table(points: list[dict[str, Any]], table: dict[str, Any]) -> Any:
    rows = []
    for point in points:
        value, bounds = point["value"], point["interval"]
        share, ms = point["parameters"] / table["base_parameters"], point["ms"]
        rows.append([
            f"{point['budget']:.15g}",
            f"{human(point['parameters'])} ({share:.0%})",
            "-" if ms is None else f"{ms:.3g} ms ({ms / table['base_ms']:.0%})",
            metric_text(value) + (f"\n{interval_text(bounds)}" if bounds else ""),  # at 60 columns
        ])  # fmt: skip
    return records_table(["budget", "parameters", "time", table["metric"]], rows)
