"""The commands of `peft-sensi`. What they do is in the library; here is what they take, and what they print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .. import recipes
from ..planning.plan import Plan
from ..reporting.saved import facts, figures, load_adapter, open_adapter, plan_without_weights
from ..reporting.tables import facts_table, legend, plan_facts, plan_figures, plan_table, records_table
from ..scoring.scores import Scores
from ..utils.errors import SensiError
from ..utils.formatting import size_of
from .arguments import (
    DATA,
    FISHER,
    Adapter,
    Base,
    BatchSize,
    Debug,
    Flops,
    Json,
    Label,
    MaxLength,
    MaxRows,
    Model,
    Pair,
    Params,
    Ranking,
    Recipe,
    Regression,
    SavedScores,
    Score,
    Seed,
    Style,
    Text_,
    Trainable,
    check_out,
    limits_of,
)
from .terminal import ascii_only, err, out, print_json, readable, step


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune and trim transformers under a budget: rank heads and neurons, then tune, freeze or trim them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"peft-sensi {__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: peft-sensi plan bert-base-uncased --data train.tsv --budget 0.5")
@readable
def plan(
    model: Model,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=DATA, help="Labeled texts: .tsv, .csv, .json or .jsonl."),
    ] = None,
    budget: Params = None,
    flops: Flops = None,
    trainable: Trainable = None,
    score: Ranking = FISHER,
    scores: SavedScores = None,
    save_scores: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep them for other budgets.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture: .png, .svg or .pdf.")] = None,
    style: Annotated[Style, typer.Option(metavar="NAME", help="Of the picture: light or dark.")] = Style.light,
    text_column: Text_ = None,
    pair_column: Pair = None,
    label_column: Label = None,
    regression: Regression = False,
    max_length: MaxLength = 128,
    max_rows: MaxRows = None,
    batch_size: BatchSize = 32,
    calibration_steps: Annotated[int, typer.Option(min=1, metavar="N", help="Batches that are scored.")] = 24,
    priming_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Steps of the short fine-tuning before that.")
    ] = 40,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a budget would tune, freeze and trim. Nothing is trained or changed.

    Two lines through one ranking of all heads and neurons: the better ones stay, and of those some are tuned.
    """
    from .train import plan_for, score_for

    limits = limits_of(budget, flops, trainable)
    columns: dict[str, Any] = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    options: dict[str, Any] = {"max_length": max_length, "max_rows": max_rows, "seed": seed}
    options |= {"regression": regression or None}
    base, task = load_for(model, data, scores is not None or score in ("magnitude", "random"), columns, options)
    if scores is not None:
        ranking = Scores.load(scores)
    else:
        batches = None if task is None else task.batches(batch_size, seed)
        ranking = score_for(base, batches, score.value, calibration_steps, priming_steps, seed)
    found = plan_for(base, limits, ranking, seed)
    if save_scores is not None:
        ranking.save(save_scores)
    if plot is not None:
        cost = "flops" if isinstance(limits, dict) and "flops" in limits and "params" not in limits else "params"
        found.plot(plot, scores=ranking, style=style.value, cost=cost)
    files = {"scores": save_scores, "picture": plot}
    if json:
        print_json(
            {"model": model, "budget": limits, "score": ranking.method, "files": files, "plan": plan_figures(found)}
        )
        return
    show_plan(found)
    show_files(files)


@app.command(epilog="Example: peft-sensi train bert-base-uncased --data train.tsv --budget 0.5 --out adapter")
@readable
def train(
    model: Model,
    data: Annotated[
        Path, typer.Option(metavar="FILE", rich_help_panel=DATA, help="Labeled texts: .tsv, .csv, .json or .jsonl.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the adapter goes.")],
    validation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=DATA, help="Default: a tenth of the data is held out."),
    ] = None,
    budget: Params = None,
    flops: Flops = None,
    trainable: Trainable = None,
    recipe: Annotated[
        Recipe | None, typer.Option(metavar="NAME", help="A published system, as `peft-sensi recipes` lists them.")
    ] = None,
    score: Annotated[
        Score | None, typer.Option("--score", metavar="NAME", help="As in `peft-sensi plan`; fisher by default.")
    ] = None,
    scores: SavedScores = None,
    epochs: Annotated[float, typer.Option(min=0, metavar="N", help="Passes over the data.")] = 3,
    lr: Annotated[
        float,
        typer.Option(metavar="RATE", help="The learning rate's peak; 1e-3 or more for a --trainable of at most 2 %."),
    ] = 1e-4,
    batch_size: BatchSize = 32,
    text_column: Text_ = None,
    pair_column: Pair = None,
    label_column: Label = None,
    regression: Regression = False,
    max_length: MaxLength = 128,
    max_rows: MaxRows = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe.")] = False,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a text classifier (or a regressor) under a budget, and save the adapter.

    The folder gets the adapter, the tokenizer, the names of the labels, a card and metrics.json.
    """
    from .train import train_for

    limits = limits_of(budget, flops, trainable)
    if recipe == "sensi_bert" and set(limits or ()) not in ({"params"}, {"flops"}):
        raise SensiError("The recipe sensi_bert needs one limit, --budget or --flops.")
    if recipe not in (None, "sensi_bert") and limits is not None:
        raise SensiError(f"The recipe {recipe.value if recipe else ''} brings its own limits.")
    if recipe is not None and score is not None:
        raise SensiError("A recipe says how units are ranked: leave --score out.")
    if not 0 < lr < float("inf"):
        raise SensiError(f"--lr must be a positive number, got {lr}.")
    check_out(out_folder)
    columns: dict[str, Any] = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    options: dict[str, Any] = {"max_length": max_length, "max_rows": max_rows, "seed": seed}
    options |= {"regression": regression or None, "validation": validation, "hold_out": 0.0 if validation else 0.1}
    base, task = load_for(model, data, False, columns, options)
    result = train_for(
        base,
        task,
        out_folder,
        limits=limits,
        recipe=recipe.value if recipe else None,
        score=(score or FISHER).value,
        scores=None if scores is None else Scores.load(scores),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        bf16=bf16,
        seed=seed,
        show=show_plan_on_stderr,
    )
    if json:
        print_json(result)
        return
    lines = {n: "undefined" if value is None else f"{value:.4f}" for n, value in result["validation"].items()}
    lines |= {
        "validation rows": f"{result['rows']['validation']:,}",
        "trained values": f"{result['trained_values']:,}",
    }
    lines |= {"adapter": size_of(result["weight_bytes"]), "training": f"{result['seconds']['training']:.0f} s"}
    out.print(facts_table(lines))
    out.print(Text(f"saved in {out_folder}"), soft_wrap=True)


@app.command(epilog="Example: peft-sensi inspect adapter --json")
@readable
def inspect(adapter: Adapter, base: Base = None, json: Json = False, debug: Debug = False) -> None:
    """Show what is in an adapter. No weights are loaded; shares need the base model's configuration."""
    saved = open_adapter(adapter)
    found = plan_without_weights(saved, base)
    if json:
        print_json(figures(saved, found))
        return
    out.print(facts_table(facts(saved, found)))
    show_units(found if found is not None else saved.config.plan)
    if found is None:
        err.print(Text(f"The shares need the base model, which was not found: {base or saved.base}", "dim"))


@app.command(epilog="Example: peft-sensi merge adapter small-model")
@readable
def merge(
    adapter: Adapter,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for the merged model.", show_default=False)],
    base: Base = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: a Transformers model with smaller matrices, for `load_merged`."""
    from ..merging.save import save_merged

    saved, model = load_saved(adapter, base, json)
    with step("merging", show=not json):
        small = model.merge_and_unload()
        plain = save_merged(small, folder)
        copy_tokenizer(saved, base, folder)
    count = sum(parameter.numel() for parameter in small.parameters())
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if json:
        print_json({"folder": str(folder), "parameters": count, "bytes": size, "loads_without_peft_sensi": plain})
        return
    out.print(Text(f"{folder}: {count:,} parameters, {size_of(size)}"), soft_wrap=True)
    if plain:
        out.print("Its layers are alike: any AutoModel...from_pretrained loads it, without peft_sensi.")
    else:
        out.print("Its layers have widths of their own: load it with peft_sensi.load_merged(folder),")
        out.print("or, without peft_sensi, with trust_remote_code=True.")


@app.command(epilog="Example: peft-sensi export adapter model.onnx")
@readable
def export(
    adapter: Adapter,
    file: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.", show_default=False)],
    int8: Annotated[bool, typer.Option("--int8", help="Also a copy with weights in 8 bits, OUT.int8.onnx.")] = False,
    opset: Annotated[int, typer.Option(min=14, metavar="N", help="Of the operators.")] = 17,
    base: Base = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the merged model as ONNX, with any batch size and length, checked in onnxruntime."""
    if file.suffix.lower() != ".onnx":
        raise SensiError(f"{file}: the name of an ONNX file ends in .onnx.")
    from ..merging.onnx import export_onnx

    _, model = load_saved(adapter, base, json)
    with step("exporting", show=not json):
        file.parent.mkdir(parents=True, exist_ok=True)
        report = export_onnx(model, file, int8=int8, opset=opset)
    if json:
        print_json(asdict(report))
        return
    out.print(Text(str(report)), soft_wrap=True)


Results = Annotated[
    Path | None, typer.Option(metavar="FILE", help="metrics.json, or any JSON with measured numbers, for the card.")
]
License = Annotated[str | None, typer.Option(metavar="NAME", help="Of the adapter, for the card, such as apache-2.0.")]


@app.command(epilog="Example: peft-sensi card adapter --results metrics.json --license apache-2.0")
@readable
def card(
    adapter: Adapter,
    results: Results = None,
    license: License = None,
    repo: Annotated[str | None, typer.Option(metavar="REPO", help="The name it will have on the Hub.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Default: the adapter's own.")] = None,
    base: Base = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model card (README.md and the plan's picture) into an adapter's folder."""
    from ..reporting.card import write_card

    saved = open_adapter(adapter)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    written = write_card(saved, results=results, license=license, base=base, repo=repo, folder=folder)
    if json:
        print_json({"files": [str(path) for path in written]})
        return
    for path in written:
        out.print(Text(str(path)), soft_wrap=True)


@app.command(epilog="Example: peft-sensi push adapter me/my-adapter --private")
@readable
def push(
    adapter: Adapter,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The name on the Hub, user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Only for you.")] = False,
    results: Results = None,
    license: License = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Of the commit.")] = "Upload adapter",
    base: Base = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload an adapter with its card to the Hub (log in first: hf auth login)."""
    from ..reporting.hub import push_folder

    saved = open_adapter(adapter)
    with step(f"uploading to {repo}", show=not json):
        card: dict[str, Any] = {"results": results, "license": license, "base": base}
        commit = push_folder(saved, repo, private=private or None, message=message, **card)
    if json:
        print_json({"url": commit.commit_url, "repo": repo})
        return
    out.print(Text(commit.commit_url), soft_wrap=True)


@app.command("recipes", epilog="Example: peft-sensi recipes --json")
@readable
def list_recipes(json: Json = False, debug: Debug = False) -> None:
    """List the published systems that are built in."""
    lines = {name: (function.__doc__ or "").strip().split("\n")[0] for name, function in recipes.RECIPES.items()}
    if json:
        print_json([{"name": name, "what": what} for name, what in lines.items()])
        return
    out.print(records_table(["recipe", "what it does"], [[name, what] for name, what in lines.items()]))
    out.print("In Python: config = peft_sensi.recipes.NAME(...)")
    out.print("Here:      peft-sensi train ... --recipe NAME")


# -- what the commands share ------------------------------------------------------------------------------------------


def load_for(
    model: str, data: Path | None, without: bool, columns: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, Any]:
    """The base model, and the task that the data poses, if any."""
    from .textdata import load_classifier, read_task

    if data is None and not without:
        raise SensiError("Give --data, labeled texts to score with; only --score magnitude and random do without.")
    if data is None:
        with step("loading the model"):
            return load_classifier(model), None
    with step("reading the data"):
        task = read_task(model, data, **columns, **options)
    err.print(Text(task.line, "dim"), soft_wrap=True)
    with step("loading the model"):
        return load_classifier(model, task.labels, task.tokenizer), task


def load_saved(adapter: str, base: str | None, json: bool) -> tuple[Any, Any]:
    saved = open_adapter(adapter)
    with step("loading the model", show=not json):
        return saved, load_adapter(saved, base)


def copy_tokenizer(saved: Any, base: str | None, folder: Path) -> None:
    """From the adapter's folder or from the base, if one of them has any."""
    from transformers import AutoTokenizer

    for source in (str(saved.folder), base or saved.base):
        try:
            AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
            return
        except Exception:  # there are many ways not to be a tokenizer, and the merged model is saved by now
            continue


def show_units(found: Any) -> None:
    out.print(plan_table(found, ascii_only()))
    out.print(legend(found, ascii_only()))


def show_plan(found: Plan) -> None:
    show_units(found)
    out.print(facts_table(plan_facts(found)))


def show_plan_on_stderr(found: Plan) -> None:
    err.print(plan_table(found, ascii_only()), legend(found, ascii_only()), facts_table(plan_facts(found)))


def show_files(files: dict[str, Path | None]) -> None:
    for what, path in files.items():
        if path is not None:
            out.print(Text(f"{what}: {path}"), soft_wrap=True)
