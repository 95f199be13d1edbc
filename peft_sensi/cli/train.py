"""A text classifier and its data go in; scores, a plan, or a trained and saved adapter come out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from .. import recipes
from ..anatomy.build import build_anatomy
from ..anatomy.modules import task_head
from ..planning.plan import Plan
from ..reporting.facts import plan_figures
from ..scoring.compute import compute_scores
from ..scoring.scores import Scores
from ..tuner.config import SensiConfig
from ..tuner.schedule import SensiCallback
from ..utils.errors import SensiError
from ..utils.files import write_atomically
from ..utils.progress import show_progress
from .textdata import TextTask


def score_for(model: nn.Module, batches: Iterable[Mapping[str, Any]] | None, **options: Any) -> Scores:
    """Scores of the model's heads and neurons, or of the rows of its Linears if it has no known blocks.

    `options` are those of `compute_scores`.
    """
    targets: list[str] = []
    if not build_anatomy(model).groups:
        head = tuple(f"{name}." for name in task_head(model))
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        targets = [name for name in linears if not f"{name}.".startswith(head)]
    return compute_scores(model, batches, targets=targets, **options)


def plan_for(model: nn.Module, limits: Any, scores: Scores, seed: int, latency: Any = None) -> Plan:
    """The plan for these limits and scores. Wraps the model with an adapter."""
    scores = for_head_of(model, scores)
    config = SensiConfig(budget=limits, scores=scores, seed=seed, latency=latency, task_type="SEQ_CLS")
    peft_model: Any = get_peft_model(model, config)
    return peft_model.base_model.plan()


def for_head_of(model: nn.Module, scores: Scores) -> Scores:
    """The scores, without the primed task head if it is for other labels than the model's head."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    fits = all(shapes.get(name) == value.shape for name, value in scores.head.items())
    return scores if fits else replace(scores, head={})


@dataclass(frozen=True)
class Training:
    """The options of the command about training."""

    epochs: float
    lr: float
    batch_size: int
    bf16: bool
    seed: int


class Run:
    """An adapter and its task, and the folder in which it is saved after each training."""

    def __init__(self, model: Any, task: TextTask, folder: Path, training: Training) -> None:
        self.model, self.task, self.folder, self.training = model, task, folder, training
        self.seconds = 0.0

    def trainer(self, epochs: float = 0.0, callbacks: list[Any] | None = None) -> Trainer:
        options = self.training
        arguments = TrainingArguments(
            str(self.folder),
            num_train_epochs=epochs,
            learning_rate=options.lr,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=2 * options.batch_size,
            warmup_steps=0.1,
            bf16=options.bf16,
            use_cpu=not torch.accelerator.is_available(),  # otherwise TrainingArguments refuses bf16 on a CPU
            seed=options.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            self.model,
            arguments,
            train_dataset=self.task.train,  # type: ignore[arg-type]
            data_collator=self.task.collator,
            processing_class=self.task.tokenizer,
            callbacks=callbacks,
        )
        show_progress(trainer)
        return trainer

    def train(self, epochs: float, callbacks: list[Any] | None = None) -> None:
        """Trains, and saves the adapter. Raises `SensiError`, without saving, if values are not finite."""
        start = time.perf_counter()
        trainer = self.trainer(epochs, callbacks)
        trainer.train()
        self.seconds += time.perf_counter() - start
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad):
            raise SensiError(
                "The training ended in values that are not finite, and the adapter was not saved: try a smaller --lr."
            )
        trainer.save_model()  # before anything else can go wrong

    def evaluate(self) -> dict[str, float | None]:
        outcome = self.trainer().predict(self.task.validation)  # type: ignore[arg-type]
        return quality(outcome.predictions, outcome.label_ids, self.task.labels.regression)

    def write_metrics(self, **more: Any) -> dict[str, Any]:
        """Writes `metrics.json`. Returns the metrics; `{}` except in process 0."""
        if PartialState().process_index:
            return {}
        # Loaders take a folder with this file, of a run of an older version, for a whole model.
        (self.folder / "config.json").unlink(missing_ok=True)
        plan = self.model.base_model.plan()
        result = {
            **more,
            "rows": {"train": len(self.task.train), "validation": len(self.task.validation)},
            "classes": self.task.labels.names,
            "learning_rate": self.training.lr,
            "seed": self.training.seed,
            "bf16": self.training.bf16,
            "trained_values": plan.trainable_params,
            "plan": plan_figures(plan),
            "weight_bytes": (self.folder / "adapter_model.safetensors").stat().st_size,
            "folder": str(self.folder),
            "command": sys.argv[1:],
        }
        (self.folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nobody needs with the adapter
        text = json.dumps(result, indent=2, default=str)
        write_atomically(self.folder / "metrics.json", lambda path: Path(path).write_text(text, encoding="utf-8"))
        return result


def train_for(
    model: Any,
    task: TextTask,
    folder: Path,
    training: Training,
    *,
    limits: Any,
    latency: Any = None,
    recipe: str | None,
    score: str,
    scores: Scores | None,
    thorough: bool,
    show: Callable[[Plan], None],
) -> dict[str, Any]:
    """Wraps the base model, trains the adapter, evaluates it, and saves it in a folder with its tokenizer and card.

    The arguments are the command's options; `show` is called with the plan once it is known. With `thorough`, the
    whole model is trained, then trimmed, then trained as long again. Returns what `metrics.json` contains, and an
    empty dict in all processes but the first.
    """
    calibration = list(task.batches(training.batch_size, training.seed))[:64]
    scores = None if scores is None else for_head_of(model, scores)
    seed = training.seed
    common: dict[str, Any] = {"calibration": calibration, "scores": scores, "task_type": "SEQ_CLS", "seed": seed}
    common["latency"] = latency
    if recipe is None:
        config = SensiConfig(budget=1.0 if thorough else limits, score=score, **common)
    elif recipe == "sensi_bert":
        (limit, budget), *_ = limits.items()
        config = recipes.sensi_bert(budget, limit, **common)
    else:
        config = recipes.RECIPES[recipe](**common)
    start = time.perf_counter()
    name = model.name_or_path
    set_seed(seed)
    run = Run(get_peft_model(model, config), task, folder, training)
    prepared = time.perf_counter() - start
    if not thorough:
        show(run.model.base_model.plan())
    run.train(training.epochs, [SensiCallback(calibration=calibration)])
    if thorough:
        start = time.perf_counter()
        show(run.model.base_model.trim(limits or 0.5, calibration))
        prepared += time.perf_counter() - start
        run.train(training.epochs)
    return run.write_metrics(
        model=name,
        budget=limits,
        recipe=recipe,
        thorough=thorough,
        score=config.score if scores is None else scores.method,
        epochs=training.epochs,
        validation=run.evaluate(),
        seconds={"preparation": prepared, "training": run.seconds},
    )


def trim_for(
    model: Any,
    task: TextTask,
    folder: Path,
    training: Training,
    *,
    name: str,
    limits: Any,
    latency: Any = None,
    show: Callable[[Plan], None],
) -> dict[str, Any]:
    """Trims a trained adapter or a fine-tuned model, trains it on for `training.epochs`, and saves the adapter.

    Returns what `metrics.json` contains: the quality before the trim, after it, and after the training.
    """
    calibration = list(task.batches(training.batch_size, training.seed))[:64]
    set_seed(training.seed)
    run = Run(model, task, folder, training)
    before, start = run.evaluate(), time.perf_counter()
    if not isinstance(model, PeftModel):
        config = SensiConfig(budget=1.0, calibration=calibration, task_type="SEQ_CLS", seed=training.seed)
        run.model = get_peft_model(model, config)
    run.model.base_model.trim(limits, calibration, latency=latency)
    seconds = time.perf_counter() - start
    show(run.model.base_model.plan())
    trimmed = run.evaluate()
    if training.epochs:
        run.train(training.epochs)
    else:
        run.trainer().save_model()
    return run.write_metrics(
        model=name,
        budget=limits,
        epochs=training.epochs,
        validation_before=before,
        validation_trimmed=trimmed,
        validation=run.evaluate() if training.epochs else trimmed,
        seconds={"preparation": seconds, "training": run.seconds},
    )


def quality(predictions: Any, labels: Any, regression: bool) -> dict[str, float | None]:
    """Accuracy and macro F1 of a classifier, Pearson's and Spearman's correlation of a regressor.

    `predictions` are logits `[rows, classes]` or numbers `[rows, 1]`, or a tuple of arrays that begins with them, and
    `labels` has the shape `[rows]`. A correlation is `None` if all labels or all predictions are equal, because it is
    undefined then.
    """
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    if not regression:
        predicted = np.argmax(predictions, axis=-1)
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        }
    values = np.asarray(predictions, dtype=float).reshape(-1)
    varied = all(len(np.unique(column)) > 1 for column in (labels, values))
    measures = {"pearson": pearsonr, "spearman": spearmanr}
    return {name: float(measure(labels, values).statistic) if varied else None for name, measure in measures.items()}
