"""The commands `plan` and `recipes`.

What needs PyTorch is imported inside the functions, so that `--help` does not wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..recipes import RECIPES
from ..reporting.tables import plan_renderables, records_table
from . import arguments as args
from .arguments import option
from .checks import check_budget, check_files, check_latency_tables, check_picture
from .data_options import DATA_OPTIONS, LABELED, task_options
from .loading import load_base
from .terminal import ascii_only, print_result


@args.with_options(asked=args.BUDGET_OPTIONS, reading=DATA_OPTIONS)
def plan(
    model: args.Model,
    asked: dict[str, Any],
    reading: dict[str, Any],
    data: Annotated[list[str] | None, LABELED] = None,
    score: args.Ranking = None,
    scores: args.SavedScores = None,
    save_scores: Annotated[
        Path | None, option("--save-scores", "FILE", "Save the scores, for plans with other budgets.")
    ] = None,
    plot: Annotated[Path | None, option("--plot", "FILE", "Draw the plan: .png, .svg or .pdf.")] = None,
    style: Annotated[
        args.Style | None, option("--style", "NAME", "The style of the drawing: light or dark. Default: light.")
    ] = None,
    batch_size: args.BatchSize = 32,
    class_weights: args.Weights = None,
    calibration_steps: Annotated[
        int | None,
        option("--calibration-steps", "N", f"Batches to score. Default: {args.CALIBRATION_STEPS}.", min=1),
    ] = None,
    priming_steps: Annotated[
        int | None,
        option(
            "--priming-steps",
            "N",
            f"Steps of the short fine-tuning before scoring. Default: {args.PRIMING_STEPS}.",
            min=0,
        ),
    ] = None,
    overwrite: args.OverwriteFiles = False,
    seed: args.Seed = 0,
    as_json: args.Json = False,
) -> None:
    """Show what a budget would tune, freeze and trim. Nothing is trained or changed.

    All heads and neurons are ranked together. The best ones stay in the model, and the best of these are tuned.
    """
    from accelerate import PartialState

    from ..anatomy.build import build_anatomy
    from ..reporting.facts import plan_figures
    from ..scoring.criteria import DATA_METHODS
    from ..scoring.scores import Scores
    from ..tasks.class_weights import weighted_model_loss
    from .train import plan_for, score_for

    latency_tables = asked.pop("latency_table")
    limits = args.limits_of(**asked)
    if plot is None:
        args.refuse({"--style": style}, "is about the picture of --plot")
    about_scoring = {
        "--class-weights": class_weights, "--calibration-steps": calibration_steps, "--priming-steps": priming_steps,
    }  # fmt: skip
    if scores is not None:
        args.refuse({"--score": score} | about_scoring, f"changes nothing, because {scores} has the scores (--scores)")
    score = score or args.FISHER
    if score not in DATA_METHODS:
        args.refuse(about_scoring, f"changes nothing, because --score {score} reads no data")
    if not data:
        unread = [name for name, value in reading.items() if value not in (None, [], DATA_OPTIONS[name][1])]
        args.refuse({f"--{name.replace('_', '-')}": name != "task" for name in unread}, "is about --data")
    check_picture(plot)
    check_files({"--save-scores": save_scores, "--plot": plot}, overwrite)
    check_latency_tables(latency_tables, limits)
    ranking = None if scores is None else Scores.load(scores)
    needs_data = ranking is None and score in DATA_METHODS
    base, task = load_base(model, data, needs_data, validation_share=0.0, seed=seed, **task_options(reading))
    check_budget(build_anatomy(base), limits, latency_tables)
    if ranking is None:
        batches = None if task is None else task.batches(batch_size, seed)
        steps: dict[str, Any] = {
            "calibration_steps": calibration_steps or args.CALIBRATION_STEPS,
            "priming_steps": args.PRIMING_STEPS if priming_steps is None else priming_steps,
        }
        loss_fn = weighted_model_loss(task) if class_weights else None
        ranking = score_for(base, batches, score=score.value, seed=seed, loss_fn=loss_fn, **steps)
    is_first = PartialState().process_index == 0
    if save_scores is not None and is_first:
        ranking.save(save_scores)  # before the plan, which may fail
    task_type = "SEQ_CLS" if task is None else task.task_type
    found, limits = plan_for(base, limits, ranking, seed, latency_tables, task_type)
    if not is_first:
        return
    if plot is not None:
        cost = "flops" if "flops" in limits and "params" not in limits else "params"
        found.plot(plot, scores=ranking, style=(style or args.LIGHT).value, cost=cost)
    files = {"scores": save_scores, "picture": plot}
    lines = [f"{what}: {path}" for what, path in files.items() if path is not None]
    if ranking.learned is not None:
        lines.insert(0, f"learned of the task in priming: {max(0, ranking.learned):.1%}")
    print_result(
        as_json,
        {
            "model": model,
            "budget": limits,
            "score": ranking.method,
            "learned": ranking.learned,
            "files": files,
            "plan": plan_figures(found),
        },
        *plan_renderables(found, ascii_only()),
        *lines,
    )


def list_recipes(as_json: args.Json = False) -> None:
    """List the published methods that are built in."""
    lines = {name: (function.__doc__ or "").strip().split("\n")[0] for name, function in RECIPES.items()}
    print_result(
        as_json,
        [{"name": name, "what": what} for name, what in lines.items()],
        records_table(["recipe", "what it does"], list(lines.items())),
        "In Python:  config = peft_sensi.recipes.NAME(...)",
        "In a shell: peft-sensi train ... --recipe NAME",
    )
