"""The commands that train: `train` and `trim`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..planning.budget import DEFAULT_LIMITS
from ..reporting.tables import facts_table, plan_renderables, records_table
from ..utils.errors import SensiError
from ..utils.formatting import interval_text, metric_text, size_of
from ..utils.hub_names import absolute
from . import arguments as args
from .arguments import option
from .checks import SCORES, check_latency_tables, check_out
from .data_options import DATA_OPTIONS, LABELED, VALIDATION_OPTIONS, places_of_rows, task_options
from .loading import load_base, read_data, refuse_base
from .terminal import ascii_only, err, print_result, print_warning, step
from .trained_options import TRAINED_OPTIONS, read_as_trained, untrained_columns


# What needs PyTorch is imported inside the functions, so that `--help` does not wait for it.


# A trim cannot change how many values are trained.
_TRIMMING = {name: entry for name, entry in args.BUDGET_OPTIONS.items() if name != "trainable"}


@args.with_options(asked=args.BUDGET_OPTIONS, reading=DATA_OPTIONS | VALIDATION_OPTIONS)
def train(
    model: args.Model,
    asked: dict[str, Any],
    reading: dict[str, Any],
    given: dict[str, Any],
    data: Annotated[list[str], LABELED],
    out_folder: Annotated[Path, option("--out", "FOLDER", "The folder for the adapter.")],
    recipe: Annotated[
        args.Recipe | None, option("--recipe", "NAME", "A published method that `peft-sensi recipes` lists.")
    ] = None,
    score: args.Ranking = None,
    scores: args.SavedScores = None,
    late: Annotated[
        bool, option("--late", None, "Train the whole model, and trim it after 60 % of the training: for hard tasks.")
    ] = False,
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
            "The peak learning rate. Default: 2e-3 for a low-rank update, 1e-4 for dense units (3e-4 if they are "
            "less than a quarter of the base, 2e-3 if less than 2 %), 3e-3 for masks, 5e-5 for the whole model, also "
            "with --late and --thorough.",
        ),
    ] = None,
    batch_size: args.BatchSize = 32,
    class_weights: args.Weights = None,
    early_stopping: Annotated[
        int | None,
        option(
            "--early-stopping",
            "N",
            "Evaluate after each epoch, stop after N epochs without progress, and keep the best model. Default: train "
            "all epochs.",
            min=1,
        ),
    ] = None,
    overwrite: args.Overwrite = False,
    resume: args.Resume = False,
    bf16: args.Bf16 = None,
    seed: args.Seed = 0,
    as_json: args.Json = False,
) -> None:
    """Train an adapter under a budget: for classes, numbers, tags of words, or answers to questions.

    The folder gets the adapter, the tokenizer, the names of the labels, metrics.json and the scores.

    Ctrl-C, SIGTERM and a closed terminal (SIGHUP) leave a checkpoint, from which --resume goes on.
    """
    from ..scoring.scores import Scores
    from .resuming import note_data, resumed_state
    from .run import Training, check_training
    from .train import train_for

    latency_tables = asked.pop("latency_table")
    limits = args.limits_of(**asked)
    whole = "--late" if late else "--thorough" if thorough else None
    if late and thorough:
        raise SensiError("--late trims during the training, --thorough after it: leave one of them out.")
    if whole and (recipe is not None or asked["trainable"] is not None or scores is not None):
        raise SensiError(f"{whole} trains the whole model first: leave out --recipe, --trainable and --scores.")
    if recipe == "sensi_bert" and set(limits or ()) not in ({"params"}, {"flops"}, {"latency"}):
        raise SensiError("The recipe sensi_bert needs exactly one limit: --budget, --flops or --latency.")
    if recipe not in (None, "sensi_bert") and limits is not None:
        raise SensiError(f"The recipe {recipe} has its own limits: leave out --budget and other limits.")
    if recipe is not None:
        own = {"--score": score, "--scores": scores if recipe != "sensi_bert" else None}
        args.refuse(own, f"changes nothing, because the recipe {recipe} has its own way to rank units")
    if scores is not None:
        args.refuse({"--score": score}, f"changes nothing, because {scores} has the scores (--scores)")
    args.check_overwrite(overwrite, resume)
    if whole and early_stopping:
        raise SensiError(f"{whole} trains for a fixed number of epochs: leave out --early-stopping.")
    if whole and limits and set(limits.values()) == {1}:
        raise SensiError(f"A limit of 1 keeps everything, and {whole} would trim nothing: give a smaller one.")
    args.check_rate(lr)
    args.check_epochs(epochs)
    check_latency_tables(latency_tables, limits)
    saved = [SCORES] if scores is None else []
    check_out(out_folder, overwrite, resume, saved, places_of_rows(data, reading))
    state = resumed_state(out_folder, given) if resume else {"options": given}
    training = Training(epochs, lr, batch_size, args.is_bf16(bf16), seed, class_weights, early_stopping)
    ranking = None if scores is None else Scores.load(scores)
    base, task = load_base(model, data, seed=seed, **task_options(reading))
    check_training(task, training)
    note_data(state, task)
    result = train_for(
        base, task, out_folder, training, limits=limits, late=late, thorough=thorough, latency=latency_tables,
        recipe=recipe.value if recipe else None, score=(score or args.FISHER).value, scores=ranking, state=state,
        show=lambda plan: err.print(*plan_renderables(plan, ascii_only())),
    )  # fmt: skip
    if not result:
        return  # another process prints
    facts = quality_facts(result) | {
        "validation rows": f"{result['rows']['validation']:,}",
        "trained values": f"{result['trained_values']:,}",
        "adapter": size_of(result["weight_bytes"]),
        "training": f"{result['seconds']['training']:.0f} s",
    }
    print_remarks(result)
    print_result(as_json, result, facts_table(facts), f"saved in {out_folder}")


@args.with_options(asked=_TRIMMING, reading=TRAINED_OPTIONS | VALIDATION_OPTIONS)
def trim(
    model: Annotated[str, args.argument("MODEL_OR_ADAPTER", "A fine-tuned model, or an adapter of `train`.")],
    asked: dict[str, Any],
    reading: dict[str, Any],
    given: dict[str, Any],
    data: Annotated[list[str], LABELED],
    out_folder: Annotated[Path, option("--out", "FOLDER", "The folder for the trimmed adapter.")],
    heal_epochs: Annotated[
        float, option("--heal-epochs", "N", "Passes over the data after the trim; 0 for no training.", min=0)
    ] = 0,
    lr: Annotated[
        float | None,
        option(
            "--lr",
            "RATE",
            "The peak learning rate after the trim. Default: 5e-5, or that of `train` if only a part is trained.",
        ),
    ] = None,
    overwrite: args.Overwrite = False,
    resume: args.Resume = False,
    base: args.Base = None,
    batch_size: args.BatchSize = 32,
    class_weights: args.Weights = None,
    bf16: args.Bf16 = None,
    seed: args.Seed = 0,
    as_json: args.Json = False,
) -> None:
    """Make a trained model smaller: a fine-tuned model, or an adapter that `train` has made.

    Shows the quality before the trim, after it without any training, and after --heal-epochs of training.
    """
    import transformers
    from transformers import AutoConfig

    from ..anatomy.widths import is_merged
    from ..reporting.pretrained import TOKENIZER_CONFIG, load_pretrained
    from ..reporting.saved import base_config, is_adapter, load_adapter, open_adapter
    from ..reporting.task_record import saved_record
    from ..tasks.labels import labels_of_config
    from ..tasks.models import agree_on_padding
    from ..utils.task_types import TASK_TYPES, kind_of_model
    from .resuming import note_data, resumed_state, saved_training
    from .run import Training, check_training
    from .train import trim_for

    latency_tables = asked.pop("latency_table")
    limits = args.limits_of(**asked) or dict(DEFAULT_LIMITS)
    args.check_rate(lr)
    args.check_epochs(heal_epochs, "--heal-epochs")
    if not heal_epochs:
        args.refuse({"--lr": lr}, "is about the training after the trim, and there is none without --heal-epochs")
    args.check_overwrite(overwrite, resume)
    check_latency_tables(latency_tables, limits)
    check_out(out_folder, overwrite, resume, rows=places_of_rows(data, reading))
    state = resumed_state(out_folder, given) if resume else {"options": given}
    saved = open_adapter(model) if is_adapter(model) else None
    task_type, record, source = None, dict[str, Any](), model
    if saved is None:
        config: Any = load_pretrained(AutoConfig, model)
        refuse_base(model, base)
        if is_merged(config.to_dict()):
            record = saved_record(model)
    else:
        config = base_config(saved, base)
        task_type, record = saved.task, saved_record(saved.folder)
        source = str(saved.folder) if (saved.folder / TOKENIZER_CONFIG).is_file() else str(base or saved.base)
    named = {name: value for name, value in task_options(reading).items() if value is not None}
    kind = named.pop("kind", None) or kind_of_model(task_type, config.architectures)
    rows, wanted = read_as_trained(record, kind, data, named, beside=named.get("validation"))
    head = None if kind == "answers" else labels_of_config(kind, config)
    numbers = head is not None and head.regression
    task = read_data(
        source, rows, seed=seed, kind=kind, head=head, config=config, doubts=untrained_columns(record, wanted),
        **wanted | {"regression": numbers or wanted.get("regression")},
    )  # fmt: skip
    training = Training(heal_epochs, lr, batch_size, args.is_bf16(bf16), seed, class_weights)
    check_training(task, training)
    note_data(state, task)
    with step("loading the model"):
        if resume:
            saved = open_adapter(str(saved_training(out_folder, state)))
        if saved is not None:
            trained: Any = load_adapter(saved, base, is_trainable=True)
        else:
            transformers.set_seed(seed)
            trained = load_pretrained(getattr(transformers, TASK_TYPES[task.task_type].auto_class), absolute(model))
            known = [name.removeprefix("Sensi") for name in config.architectures or ()]
            if known and type(trained).__name__ not in known:
                print_warning(
                    f"{model} is a {known[0]} without a head for this task. The head is random, so the "
                    f"trim cannot know what the task needs: fine-tune the model first, or use train --thorough."
                )
        trained = trained.float()  # as in `train`: a model may be stored in 16 bits
        agree_on_padding(trained, task.tokenizer)
    result = trim_for(
        trained, task, out_folder, training, name=absolute(model), limits=limits, latency=latency_tables, state=state,
        show=lambda plan: err.print(*plan_renderables(plan, ascii_only())),
    )  # fmt: skip
    if not result:
        return  # another process prints
    measured = {"before": "validation_before", "trimmed": "validation_trimmed"}
    if heal_epochs:
        measured[f"after {heal_epochs:g} epoch{'s' * (heal_epochs != 1)}"] = "validation"
    print_remarks(result)
    rows = [[name, *(metric_text(result[key][name]) for key in measured.values())] for name in result["validation"]]
    tables = [records_table(["", *measured], rows)] if rows else []
    print_result(as_json, result, *tables, f"saved in {out_folder}")


def print_remarks(result: dict[str, Any]) -> None:
    for remark in result["validation_remarks"]:
        print_warning(remark)


def quality_facts(result: dict[str, Any]) -> dict[str, str]:
    """The metrics with their intervals and baselines, as texts by name. `{}` without validation rows."""
    from ..tasks.task import baseline_words

    facts = {}
    for name, value in result["validation"].items():
        interval = interval_text(result["validation_interval"].get(name))
        constant = result["validation_baseline"].get(name)
        baseline = "" if constant is None else f", baseline {metric_text(constant)}"
        facts[name] = metric_text(value) + ("" if value is None else (f" ({interval})" if interval else "") + baseline)
    return facts and facts | {"baseline": baseline_words(result["task"])}
