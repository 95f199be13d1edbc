"""A model and its task go in; scores, a plan, or a trained and saved adapter come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel, get_peft_model
from rich.text import Text
from torch import nn
from transformers import set_seed

from .. import recipes
from ..anatomy.build import build_anatomy
from ..anatomy.task_heads import task_head
from ..planning.budget import DEFAULT_LIMITS, TIMES
from ..planning.latency_torch import fresh_copy
from ..planning.plan import Plan
from ..scoring.calibration import preserved
from ..scoring.compute import compute_scores
from ..scoring.scores import Scores
from ..tasks.class_weights import weighted_model_loss
from ..tasks.task import Task
from ..tuner.callback import SensiCallback
from ..tuner.config import SensiConfig
from ..tuner.decision import scores_sent_to
from ..tuner.latencies import measure_missing, read_latency
from ..utils import distributed
from .checks import SCORES, budget_advice, check_budget
from .rates import rate_line
from .resuming import saved_training
from .run import Run, Training
from .terminal import err


CALIBRATION = 192  # batches; a trim to little fits all layers to so many, and a wrap reads fewer


def score_for(model: nn.Module, batches: Iterable[Mapping[str, Any]] | None, **options: Any) -> Scores:
    """Scores of the model's heads and neurons, or of the rows of its Linears if it has no known blocks.

    `options` are those of `compute_scores`.
    """
    targets: list[str] = []
    if not build_anatomy(model).groups:
        head = tuple(f"{name}." for name in task_head(model))
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        targets = [name for name in linears if not f"{name}.".startswith(head)]
    return compute_scores(model, batches, targets=targets, progress=not err.quiet, **options)


def plan_for(
    model: nn.Module, limits: Any, scores: Scores, seed: int, latency: Any, task_type: str
) -> tuple[Plan, dict[str, Any]]:
    """The plan for these limits and scores, and the limits, which have a default. Wraps the model with an adapter."""
    scores = for_head_of(model, scores)
    config = SensiConfig(budget=limits, scores=scores, seed=seed, latency=latency, task_type=task_type)
    with budget_advice():
        peft_model: Any = get_peft_model(model, config)
    return peft_model.base_model.plan(), peft_model.active_peft_config.budget or {}


def for_head_of(model: nn.Module, scores: Scores) -> Scores:
    """The scores, without the primed task head if it is for other labels than the model's head."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    fits = all(shapes.get(name) == value.shape for name, value in scores.head.items())
    return scores if fits else replace(scores, head={})


def train_for(
    model: Any,
    task: Task,
    folder: Path,
    training: Training,
    *,
    limits: Any,
    latency: Any = None,
    recipe: str | None,
    score: str,
    scores: Scores | None,
    late: bool = False,
    thorough: bool = False,
    state: Mapping[str, Any],
    show: Callable[[Plan], None],
) -> dict[str, Any]:
    """Wraps the base model, trains the adapter, evaluates it, and saves it in a folder with its tokenizer and card.

    The arguments are the command's options; `show` is called with the plan once it is known. With `thorough`, the
    whole model is trained, then trimmed, then trained as long again; with `late`, it is trimmed during the training.
    `state` is that of an interrupted training, or has its `options` only. Returns what `metrics.json` contains, and an
    empty dict in all processes but the first.
    """
    calibration = list(islice(task.batches(training.batch_size, training.seed), CALIBRATION))
    seed, base, name = training.seed, model.config, model.name_or_path
    loss_fn = weighted_model_loss(task) if training.class_weights else None
    state, start = dict(state), time.perf_counter()
    set_seed(seed)
    stage = state.get("stage")
    if late or thorough:
        limits = limits or dict(DEFAULT_LIMITS)
        if stage in (None, "train"):  # before the training, which would be lost
            latency = tables_for(model, limits, latency)
    if stage is not None:
        wrapped: Any = PeftModel.from_pretrained(model, str(saved_training(folder, state)), is_trainable=True)
        if (config := wrapped.active_peft_config).phase == "cut" and latency:  # files hold no tables
            config.latency = latency
            read_latency(config)
    else:
        check_budget(build_anatomy(model), limits, latency)
        common: dict[str, Any] = {"calibration": calibration, "task_type": task.task_type, "seed": seed}
        common |= {"scores": None if scores is None else for_head_of(model, scores)}
        common |= {"latency": latency, "loss_fn": loss_fn}
        # The scores are saved also if the rest of the wrap fails.
        with scores_sent_to(partial(save_scores, folder=folder)), budget_advice():
            if late:
                config = SensiConfig(budget=limits, score=score, schedule=dict(recipes.LATE_CUT), **common)
            else:
                config = _config(recipe, 1.0 if thorough else limits, score, common)
            wrapped = get_peft_model(model, config)
        state["score"] = wrapped.active_peft_config.score if scores is None else scores.method
    run = Run(wrapped, task, folder, training, state, is_whole=late or thorough)
    run.state["preparation"] = float(state.get("preparation", 0.0)) + time.perf_counter() - start
    if not (late or thorough):
        show(wrapped.base_model.plan())
        if training.lr is None:
            err.print(Text(rate_line(run.rate, wrapped), "dim"))
    if stage in (None, "train"):
        run.train(training.epochs, [SensiCallback(calibration=calibration, loss_fn=loss_fn)])
        if late:
            show(wrapped.base_model.plan())
        if thorough:
            start = time.perf_counter()
            show(wrapped.base_model.trim(limits, calibration, latency=latency, loss_fn=loss_fn))
            run.state["preparation"] += time.perf_counter() - start
    if thorough:
        run.train(training.epochs, stage="train on")
    quality = run.evaluate()
    return run.write_metrics(
        base,
        model=name,
        budget=run.model.active_peft_config.budget,
        recipe=recipe,
        late=late,
        thorough=thorough,
        score=run.state.get("score"),
        epochs=training.epochs,
        steps=run.state["steps"],
        **quality.to_dict(),
        seconds={"preparation": run.state["preparation"], "training": run.seconds},
    )


def tables_for(model: Any, limits: Any, latency: Any) -> Any:
    """The latency tables for these limits: those that are given, otherwise this machine is measured, as at a wrap.

    `model` is a base model, or an adapter on its base, which is measured then. It stays as it is.
    """
    times = {name: limits[name] for name in TIMES if name in (limits or {})}
    if latency or not times:
        return latency
    base = fresh_copy(model).unload() if isinstance(model, PeftModel) else model  # type: ignore[operator]
    config = SensiConfig(budget=times)
    with preserved(base), distributed.synchronized("measuring the model"):
        measure_missing(base, config)
    return list(config.tables.values())


def _config(recipe: str | None, limits: Any, score: str, common: dict[str, Any]) -> SensiConfig:
    if recipe is None:
        return SensiConfig(budget=limits, score=score, **common)
    if recipe == "sensi_bert":
        (limit, budget), *_ = limits.items()
        return recipes.sensi_bert(budget, limit, **common)
    return recipes.RECIPES[recipe](**common)


def save_scores(scores: Scores, folder: Path) -> None:
    """Saves the scores of a base model, for other budgets and for another start."""
    if not PartialState().process_index:
        folder.mkdir(parents=True, exist_ok=True)
        scores.save(folder / SCORES)
        err.print(Text(f"scores: {folder / SCORES} (--scores)", "dim"), soft_wrap=True)


def trim_for(
    model: Any,
    task: Task,
    folder: Path,
    training: Training,
    *,
    name: str,
    limits: Any,
    latency: Any = None,
    state: Mapping[str, Any],
    show: Callable[[Plan], None],
) -> dict[str, Any]:
    """Trims a trained adapter or a fine-tuned model, trains it on for `training.epochs`, and saves the adapter.

    Returns what `metrics.json` contains: the quality before the trim, after it, and after the training. `state` is as
    in `train_for`; `model` then is the adapter of the checkpoint.
    """
    calibration = list(islice(task.batches(training.batch_size, training.seed), CALIBRATION))
    set_seed(training.seed)
    is_adapter, start = isinstance(model, PeftModel), time.perf_counter()
    adapter = model.active_peft_config if is_adapter else None
    is_whole = adapter is None or (adapter.parts == ["dense"] and adapter.limits.trainable is None)
    run = Run(model, task, folder, training, state, is_whole)
    base = model.get_base_model().config if is_adapter else model.config
    if "stage" not in run.state:
        latency = tables_for(model, limits, latency)
        widths = model.active_peft_config.width_options if is_adapter else {}
        anatomy = model.base_model.plan().anatomy if is_adapter else build_anatomy(model)
        check_budget(anatomy, limits, latency, **widths)
        before = run.evaluate("Fine-tune it before the trim, or use train --thorough.")
        run.state |= {"before": before.values, "doubts": before.remarks}
        start = time.perf_counter()
        if not is_adapter:
            config = SensiConfig(budget=1.0, calibration=calibration, task_type=task.task_type, seed=training.seed)
            run.model = get_peft_model(model, config)
        loss_fn = weighted_model_loss(task) if training.class_weights else None
        with budget_advice():
            run.model.base_model.trim(limits, calibration, latency=latency, loss_fn=loss_fn)
        run.state["preparation"] = time.perf_counter() - start
        show(run.model.base_model.plan())
        quality = run.evaluate("Give a larger budget, or train on with --heal-epochs.")
        run.state["trimmed"] = quality.values
    if training.epochs:
        run.train(training.epochs, stage="heal")
        quality = run.evaluate()
    else:
        run.check_room()
        run.save(run.trainer())
    return run.write_metrics(
        base,
        model=name,
        budget=limits,
        epochs=training.epochs,
        validation_before=run.state["before"],
        validation_trimmed=run.state["trimmed"],
        **quality.to_dict() | {"validation_remarks": run.state.get("doubts") or quality.remarks},
        seconds={"preparation": run.state["preparation"], "training": run.seconds},
    )
