"""The commands that score or train a model: `plan`, `train`, `trim`; and `recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from ..recipes import RECIPES
from ..reporting.tables import facts_table, legend, plan_table, records_table
from ..utils.errors import SensiError
from ..utils.formatting import human, size_of
from . import arguments as args
from .arguments import option
from .terminal import ascii_only, err, print_result, step


# What needs PyTorch is imported inside the functions, so that `--help` does not wait for it.
if TYPE_CHECKING:
    from ..planning.plan import Plan


def plan(
    model: args.Model,
    data: Annotated[Path | None, args.LABELED_TEXTS] = None,
    budget: args.Params = None,
    flops: args.Flops = None,
    latency: args.Latency = None,
    decode_latency: args.DecodeLatency = None,
    latency_table: args.LatencyTables = None,
    trainable: args.Trainable = None,
    score: args.Ranking = args.FISHER,
    scores: args.SavedScores = None,
    save_scores: Annotated[
        Path | None, option("--save-scores", "FILE", "Save the scores, for plans with other budgets.")
    ] = None,
    plot: Annotated[Path | None, option("--plot", "FILE", "Draw the plan: .png, .svg or .pdf.")] = None,
    style: Annotated[args.Style, option("--style", "NAME", "The style of the drawing: light or dark.")] = args.LIGHT,
    text_column: args.TextColumn = None,
    pair_column: args.PairColumn = None,
    label_column: args.LabelColumn = None,
    regression: args.Regression = False,
    max_length: args.MaxLength = 128,
    max_rows: args.MaxRows = None,
    batch_size: args.BatchSize = 32,
    calibration_steps: Annotated[
        int, option("--calibration-steps", "N", "Batches to compute scores from.", min=1)
    ] = 24,
    priming_steps: Annotated[
        int, option("--priming-steps", "N", "Steps of the short fine-tuning before scoring.", min=0)
    ] = 40,
    seed: args.Seed = 0,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Show what a budget would tune, freeze and trim. Nothing is trained or changed.

    All heads and neurons are ranked together. The best ones stay in the model, and the best of these are tuned.
    """
    from ..reporting.facts import plan_figures
    from ..scoring.criteria import DATA_METHODS
    from ..scoring.scores import Scores
    from .train import plan_for, score_for

    limits = args.limits_of(budget, flops, trainable, latency, decode_latency)
    base, task = load_base(
        model, data, needs_data=scores is None and score in DATA_METHODS, text_column=text_column,
        pair_column=pair_column, label_column=label_column, regression=regression or None, max_length=max_length,
        max_rows=max_rows, seed=seed,
    )  # fmt: skip
    if scores is not None:
        ranking = Scores.load(scores)
    else:
        batches = None if task is None else task.batches(batch_size, seed)
        steps: dict[str, Any] = {"calibration_steps": calibration_steps, "priming_steps": priming_steps}
        ranking = score_for(base, batches, score=score.value, seed=seed, **steps)
    found = plan_for(base, limits, ranking, seed, latency_table)
    if save_scores is not None:
        ranking.save(save_scores)
    if plot is not None:
        cost = "flops" if limits and "flops" in limits and "params" not in limits else "params"
        found.plot(plot, scores=ranking, style=style.value, cost=cost)
    files = {"scores": save_scores, "picture": plot}
    lines = [f"{what}: {path}" for what, path in files.items() if path is not None]
    print_result(
        json,
        {"model": model, "budget": limits, "score": ranking.method, "files": files, "plan": plan_figures(found)},
        *plan_renderables(found),
        *lines,
    )


def train(
    model: args.Model,
    data: Annotated[Path, args.LABELED_TEXTS],
    out_folder: Annotated[Path, option("--out", "FOLDER", "The folder for the adapter.")],
    validation: Annotated[
        Path | None,
        option("--validation", "FILE", "Validation texts. Default: a tenth of the data.", args.DATA),
    ] = None,
    budget: args.Params = None,
    flops: args.Flops = None,
    latency: args.Latency = None,
    decode_latency: args.DecodeLatency = None,
    latency_table: args.LatencyTables = None,
    trainable: args.Trainable = None,
    recipe: Annotated[
        args.Recipe | None, option("--recipe", "NAME", "A published method that `peft-sensi recipes` lists.")
    ] = None,
    score: Annotated[
        args.Score | None, option("--score", "NAME", "How units are ranked, as in `peft-sensi plan`. Default: fisher.")
    ] = None,
    scores: args.SavedScores = None,
    thorough: Annotated[
        bool,
        option("--thorough", None, "Train the whole model, then trim it, then train as long again: for hard tasks."),
    ] = False,
    epochs: Annotated[float, option("--epochs", "N", "Passes over the data.", min=0)] = 3,
    lr: Annotated[
        float | None,
        option(
            "--lr",
            "RATE",
            "The peak learning rate. Default: 1e-4, and 5e-5 with --thorough. Use 1e-3 to 3e-3 if --trainable is the "
            "only limit, or at most 2%.",
        ),
    ] = None,
    batch_size: args.BatchSize = 32,
    text_column: args.TextColumn = None,
    pair_column: args.PairColumn = None,
    label_column: args.LabelColumn = None,
    regression: args.Regression = False,
    max_length: args.MaxLength = 128,
    max_rows: args.MaxRows = None,
    bf16: args.Bf16 = None,
    seed: args.Seed = 0,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Train a text classifier (or a regressor) under a budget, and save the adapter.

    The folder gets the adapter, the tokenizer, the names of the labels, a model card and metrics.json.
    """
    from ..scoring.scores import Scores
    from .train import Training, train_for

    limits = args.limits_of(budget, flops, trainable, latency, decode_latency)
    if thorough and (recipe is not None or trainable is not None or scores is not None):
        raise SensiError("--thorough trains the whole model first: leave out --recipe, --trainable and --scores.")
    if recipe == "sensi_bert" and set(limits or ()) not in ({"params"}, {"flops"}):
        raise SensiError("The recipe sensi_bert needs exactly one limit: --budget or --flops.")
    if recipe not in (None, "sensi_bert") and limits is not None:
        raise SensiError(f"The recipe {recipe} has its own limits: leave out --budget and other limits.")
    if recipe is not None and score is not None:
        raise SensiError(f"The recipe {recipe} has its own way to rank units: leave out --score.")
    rate = args.check_rate(lr, 5e-5 if thorough else 1e-4)
    args.check_out(out_folder)
    base, task = load_base(
        model, data, text_column=text_column, pair_column=pair_column, label_column=label_column,
        regression=regression or None, max_length=max_length, max_rows=max_rows, seed=seed,
        validation=validation, hold_out=0.0 if validation else 0.1,
    )  # fmt: skip
    result = train_for(
        base, task, out_folder, Training(epochs, rate, batch_size, args.is_bf16(bf16), seed), limits=limits,
        thorough=thorough, latency=latency_table, recipe=recipe.value if recipe else None,
        score=(score or args.FISHER).value, scores=None if scores is None else Scores.load(scores),
        show=lambda plan: err.print(*plan_renderables(plan)),
    )  # fmt: skip
    facts = {name: "undefined" if v is None else f"{v:.4f}" for name, v in result["validation"].items()}
    facts |= {
        "validation rows": f"{result['rows']['validation']:,}",
        "trained values": f"{result['trained_values']:,}",
        "adapter": size_of(result["weight_bytes"]),
        "training": f"{result['seconds']['training']:.0f} s",
    }
    print_result(json, result, facts_table(facts), f"saved in {out_folder}")


def trim(
    model: Annotated[str, args.argument("MODEL_OR_ADAPTER", "A fine-tuned classifier, or an adapter of `train`.")],
    data: Annotated[Path, args.LABELED_TEXTS],
    out_folder: Annotated[Path, option("--out", "FOLDER", "The folder for the trimmed adapter.")],
    validation: Annotated[
        Path | None,
        option("--validation", "FILE", "Validation texts. Default: a tenth of the data.", args.DATA),
    ] = None,
    budget: args.Params = None,
    flops: args.Flops = None,
    latency: args.Latency = None,
    decode_latency: args.DecodeLatency = None,
    latency_table: args.LatencyTables = None,
    heal_epochs: Annotated[
        float, option("--heal-epochs", "N", "Passes over the data after the trim; 0 for no training.", min=0)
    ] = 0,
    lr: Annotated[
        float | None, option("--lr", "RATE", "The peak learning rate after the trim. Default: 5e-5.")
    ] = None,
    base: args.Base = None,
    batch_size: args.BatchSize = 32,
    text_column: args.TextColumn = None,
    pair_column: args.PairColumn = None,
    label_column: args.LabelColumn = None,
    regression: args.Regression = False,
    max_length: args.MaxLength = 128,
    max_rows: args.MaxRows = None,
    bf16: args.Bf16 = None,
    seed: args.Seed = 0,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Make a trained model smaller: a fine-tuned text classifier, or an adapter that `train` has made.

    Shows the quality before the trim, after it without any training, and after --heal-epochs of training.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from ..reporting.saved import base_config, is_adapter, load_adapter, load_pretrained, open_adapter
    from .train import Training, trim_for

    limits = args.limits_of(budget, flops, None, latency, decode_latency) or {"params": 0.5}
    rate = args.check_rate(lr, 5e-5)
    args.check_out(out_folder)
    saved = open_adapter(model) if is_adapter(model) else None
    config: Any = load_pretrained(AutoConfig, model) if saved is None else base_config(saved, base)
    is_regressor = config.problem_type == "regression" or config.num_labels == 1
    head = [] if is_regressor else [str(config.id2label[i]) for i in range(config.num_labels)]
    source = model if saved is None else str(saved.folder)
    task = read_data(
        source, data, text_column=text_column, pair_column=pair_column, label_column=label_column,
        regression=is_regressor or regression or None, max_length=max_length, max_rows=max_rows, seed=seed,
        validation=validation, hold_out=0.0 if validation else 0.1, trained_head=head, config=config,
    )  # fmt: skip
    with step("loading the model"):
        if saved is None:
            trained: Any = load_pretrained(AutoModelForSequenceClassification, model).float()
        else:
            trained = load_adapter(saved, base, is_trainable=True)
    result = trim_for(
        trained, task, out_folder, Training(heal_epochs, rate, batch_size, args.is_bf16(bf16), seed), name=model,
        limits=limits, latency=latency_table, show=lambda plan: err.print(*plan_renderables(plan)),
    )  # fmt: skip
    measured = {"before": "validation_before", "trimmed, no training": "validation_trimmed"}
    if heal_epochs:
        measured[f"after {heal_epochs:g} epochs"] = "validation"
    rows = [
        [when, *("undefined" if value is None else f"{value:.4f}" for value in result[key].values())]
        for when, key in measured.items()
    ]
    table = records_table(["", *result["validation"]], rows)
    print_result(json, result, table, f"saved in {out_folder}")


def list_recipes(json: args.Json = False, debug: args.Debug = False) -> None:
    """List the published methods that are built in."""
    lines = {name: (function.__doc__ or "").strip().split("\n")[0] for name, function in RECIPES.items()}
    print_result(
        json,
        [{"name": name, "what": what} for name, what in lines.items()],
        records_table(["recipe", "what it does"], list(lines.items())),
        "In Python:  config = peft_sensi.recipes.NAME(...)",
        "In a shell: peft-sensi train ... --recipe NAME",
    )


def load_base(model: str, data: Path | None, needs_data: bool = True, **options: Any) -> tuple[Any, Any]:
    """Loads the base model, and the task of the data file if there is one (else `None`).

    The model gets a fresh head for the labels of the file. `options` are those of `textdata.read_task`.
    """
    from .textdata import load_classifier

    if data is None:
        if needs_data:
            raise SensiError(
                "Give --data, a file of labeled texts to compute scores from. Only --score magnitude and --score "
                "random need no data."
            )
        with step("loading the model"):
            return load_classifier(model), None
    task = read_data(model, data, **options)
    with step("loading the model"):
        return load_classifier(model, task.labels, task.tokenizer), task


def read_data(model: str, data: Path, **options: Any) -> Any:
    """`textdata.read_task`, with a line that says what was understood."""
    from .textdata import read_task

    with step("reading the data"):
        task = read_task(model, data, **options)
    err.print(Text(task.line, "dim"), soft_wrap=True)
    return task


def plan_renderables(plan: Plan) -> list[Any]:
    return [plan_table(plan, ascii_only()), legend(plan, ascii_only()), facts_table(plan.facts(human))]
