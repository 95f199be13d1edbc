"""What the commands `plan` and `train` do with a text classifier."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from .. import recipes
from ..anatomy.build import build_anatomy
from ..anatomy.modules import task_head
from ..planning.plan import Plan
from ..reporting.tables import plan_figures
from ..scoring.compute import compute_scores
from ..scoring.scores import Scores
from ..tuner.config import SensiConfig
from ..tuner.schedule import SensiCallback
from ..utils.errors import SensiError
from ..utils.files import write_atomically
from .textdata import TextTask, quality


def score_for(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None,
    score: str,
    calibration_steps: int,
    priming_steps: int,
    seed: int,
) -> Scores:
    """Scores of all units that a plan for this model can speak of: its blocks, or else all its Linears."""
    targets: list[str] = []
    if not build_anatomy(model).groups:
        head = tuple(f"{name}." for name in task_head(model))
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        targets = [name for name in linears if not f"{name}.".startswith(head)]
    return compute_scores(
        model,
        batches,
        score=score,
        calibration_steps=calibration_steps,
        priming_steps=priming_steps,
        seed=seed,
        targets=targets,
    )


def plan_for(model: nn.Module, limits: Any, scores: Scores, seed: int) -> Plan:
    """The plan that training with these limits and scores would get. Wraps the model."""
    config = SensiConfig(budget=limits, scores=for_head_of(model, scores), seed=seed, task_type="SEQ_CLS")
    return plan_of_wrapped(get_peft_model(model, config))


def plan_of_wrapped(model: Any) -> Plan:
    return model.base_model.plan()


def for_head_of(model: nn.Module, scores: Scores) -> Scores:
    """The scores without the primed head where that was one for other labels."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    fits = all(shapes.get(name) == value.shape for name, value in scores.head.items())
    return scores if fits else replace(scores, head={})


def train_for(
    model: Any,
    task: TextTask,
    folder: Path,
    *,
    limits: Any,
    recipe: str | None,
    score: str,
    scores: Scores | None,
    epochs: float,
    lr: float,
    batch_size: int,
    bf16: bool,
    seed: int,
    show: Callable[[Plan], None],
) -> dict[str, Any]:
    """Wraps, trains, evaluates and saves; what is returned is also in `metrics.json`."""
    calibration = list(task.batches(batch_size, seed))[:64]
    scores = None if scores is None else for_head_of(model, scores)
    config = config_for(recipe, limits, score, scores, calibration, seed)
    start = time.perf_counter()
    name = model.name_or_path
    set_seed(seed)
    peft_model: Any = get_peft_model(model, config)
    prepared = time.perf_counter()
    show(plan_of_wrapped(peft_model))
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=lr,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size,
        warmup_steps=0.1,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a CPU
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    callbacks: list[TrainerCallback] = [SensiCallback(calibration=calibration)]
    trainer = Trainer(
        peft_model,
        arguments,
        train_dataset=task.train,  # type: ignore[arg-type]
        data_collator=task.collator,
        processing_class=task.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained = time.perf_counter()
    if not all(bool(torch.isfinite(p).all()) for p in peft_model.parameters() if p.requires_grad):
        raise SensiError("The training ended in values that are not finite, and is not saved: try a smaller --lr.")
    trainer.save_model()  # before anything else can go wrong
    outcome = trainer.predict(task.validation)  # type: ignore[arg-type]
    found = quality(outcome.predictions, outcome.label_ids, task.labels.regression)
    if not trainer.is_world_process_zero():
        return {}
    peft_model.get_base_model().config.save_pretrained(folder)  # the names of the labels
    plan = plan_of_wrapped(peft_model)
    result = {
        "model": name,
        "budget": limits,
        "recipe": recipe,
        "score": config.score if scores is None else scores.method,
        "rows": {"train": len(task.train), "validation": len(task.validation)},
        "classes": task.labels.names,
        "epochs": epochs,
        "learning_rate": lr,
        "seed": seed,
        "validation": found,
        "trained_values": plan.trainable_params,
        "plan": plan_figures(plan),
        "weight_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "seconds": {"preparation": prepared - start, "training": trained - prepared},
        "folder": str(folder),
        "command": sys.argv[1:],
    }
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and of no use with the adapter
    text = json.dumps(result, indent=2, default=str)
    write_atomically(folder / "metrics.json", lambda path: Path(path).write_text(text, encoding="utf-8"))
    return result


def config_for(
    recipe: str | None, limits: Any, score: str, scores: Scores | None, calibration: list[Any], seed: int
) -> SensiConfig:
    common: dict[str, Any] = {"calibration": calibration, "task_type": "SEQ_CLS", "seed": seed}
    if scores is not None:
        common["scores"] = scores
    if recipe is None:
        return SensiConfig(budget=limits, score=score, **common)
    if recipe == "sensi_bert":
        (limit, budget), *_ = limits.items()
        return recipes.sensi_bert(budget, limit, **common)
    return recipes.RECIPES[recipe](**common)
