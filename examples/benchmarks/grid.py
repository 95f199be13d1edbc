"""Runs methods on tasks. Each run writes one JSON file, and finished runs are not repeated."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging

from peft_sensi import Schedule
from peft_sensi.tasks import metrics
from peft_sensi.utils.precision import bf16_pays
from peft_sensi.utils.progress import progress_bar

import examples_path  # noqa: F401 (for the imports from examples/)
from common import flops, folder_bytes, is_done, parameters, write_json
from methods import Method, Run, is_sensi
from other_trimmers import BudgetMissed
from tasks import BATCH_SIZE, Data, Task, load_task


def on_cpu(bf16: bool) -> Accelerator:
    """Sets the precision. The benchmarks of accuracy use the CPU on every machine, so all results are comparable."""
    return Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=True)


def train(data: Data, method: Method, model_name: str, rate: float, seed: int, bf16: bool = False) -> dict[str, Any]:
    """Trains with AdamW and a linear schedule. Returns the metrics on the dev rows and on the held-out training rows,
    and the costs. With `bf16`, training and evaluation are under autocast to bfloat16."""
    task = data.task
    logging.set_verbosity_error()  # no warnings about fresh heads
    logging.disable_progress_bar()
    accelerator = on_cpu(bf16)
    set_seed(seed)
    base = fresh_base(task, model_name)
    whole = parameters(base)
    steps = task.epochs * (len(data.train) // BATCH_SIZE)
    start = time.perf_counter()
    with accelerator.autocast():
        model = method.build(base, Run(data.calibration(), steps, task.epochs, seed))
    wrap_seconds = time.perf_counter() - start

    trained_values = parameters(model, trainable_only=True)
    train_seconds = fit(model, data, accelerator, task.epochs, rate, seed)
    figures = {
        "rate": rate,
        "steps": steps,
        "wrap_seconds": wrap_seconds,
        "step_seconds": train_seconds / steps,
        "trained_values": trained_values,
        "dev": score(model, data, "dev", bf16),
        "held_out": score(model, data, "held_out", bf16),
        "bytes": stored_bytes(model),
    }
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    length = 32
    base = fresh_base(task, model_name)
    return figures | {
        "params_share": parameters(merged) / whole,
        "flops_share": flops(merged, length) / flops(base, length),
        "zeros_share": zeros_share(merged),
    }


def own_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def fit(
    model: nn.Module,
    data: Data,
    accelerator: Accelerator,
    epochs: int,
    rate: float,
    seed: int,
    loss_fn: Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] = own_loss,
) -> float:
    """Trains with AdamW and a linear schedule, and returns the seconds. The accelerator sets the precision."""
    steps = epochs * (len(data.train) // BATCH_SIZE)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, fused=True)  # on a CPU five times as fast
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    phases = None
    if is_sensi(model) and model.peft_config["default"].schedule is not None:
        phases = Schedule(model, steps, steps // epochs, calibration=data.calibration())
    set_seed(seed)
    model.train()
    start = time.perf_counter()
    reallocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)  # AdaLoRA's
    step = 0
    for epoch in range(epochs):
        for batch in data.training_batches(seed + epoch):
            if phases is not None:
                phases.step(optimizer)
            with accelerator.autocast():
                loss = loss_fn(model, batch)
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a cut may have replaced some
            optimizer.step()
            if reallocate is not None:
                reallocate(step := step + 1)
            schedule.step()
            optimizer.zero_grad()
    if phases is not None:
        phases.finish()
    return time.perf_counter() - start


def fresh_base(task: Task, model_name: str) -> PreTrainedModel:
    kinds = {
        "text": AutoModelForSequenceClassification,
        "words": AutoModelForTokenClassification,
        "answers": AutoModelForQuestionAnswering,
    }
    return kinds[task.kind].from_pretrained(model_name, num_labels=task.classes)


@torch.no_grad()
def score(model: nn.Module, data: Data, split: str, bf16: bool = False) -> float:
    """The metric of the task. `bf16` is the precision of the training: a CPU must not decide on another one here."""
    model.eval()
    predicted: list[Any] = []
    labels: list[Any] = []
    for batch in data.batches(split):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**batch)
        if data.task.kind == "answers":
            predicted += zip(output.start_logits.float().numpy(), output.end_logits.float().numpy(), strict=True)
        else:
            labels += batch["labels"].tolist()
            predicted += output.logits.argmax(-1).tolist()
    if data.task.kind == "text":
        return metrics.classes(np.array(predicted), np.array(labels))[data.task.metric]
    places = np.argsort(data.order(split))
    in_order: Any
    if data.task.kind == "words":
        in_order = [[np.array(part[i]) for i in places] for part in (predicted, labels)]
    else:
        in_order = ([[predicted[i][side] for i in places] for side in (0, 1)], None)
    return data.metrics[split](EvalPrediction(*in_order))[data.task.metric]


def stored_bytes(model: nn.Module) -> int:
    """Bytes that `save_pretrained` writes: the adapter, or the whole model if there is no adapter."""
    if is_sensi(model) and model.peft_config["default"].update == "mask":
        model.base_model.compress("bits")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return folder_bytes(folder)


def zeros_share(model: nn.Module) -> float:
    """The share of zeros among the weights of the transformer's Linears."""
    weights = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def run_all(
    tasks: Iterable[Task],
    methods: Mapping[str, Method],
    seeds: Iterable[int],
    model_name: str,
    data_folder: Path,
    results: Path,
    rates: Iterable[float] = (),
) -> None:
    """Makes all runs that have no result yet. Methods that cannot meet their budget are skipped.

    `rates` replaces the learning rates of the methods. The runs are under bf16 autocast where the CPU is faster with
    it. Raises `SensiError` if a result was made with another model.
    """
    settings = {"model": base_name(model_name), "bf16": bf16_pays("cpu")}
    wanted = [
        (path, task, seed, name, rate)
        for seed in seeds
        for task in tasks
        for name in methods
        for rate in (rates or (methods[name].rate,))
        if not is_done(path := results / task.name / f"{slug(name)}-{rate:g}-{seed}.json", settings, noted=["bf16"])
    ]
    loaded: tuple[tuple[str, int], Data] | None = None
    for path, task, seed, name, rate in (bar := progress_bar(wanted)):
        bar.set_description(f"{task.name} {name} {rate:g} seed {seed}")
        if loaded is None or loaded[0] != (task.name, seed):
            loaded = ((task.name, seed), load_task(task, data_folder, model_name, seed))
        try:
            figures = train(loaded[1], methods[name], model_name, rate, seed, settings["bf16"])
        except BudgetMissed as error:
            bar.write(f"{name} is skipped: {error}")
            continue
        row = {"task": task.name, "method": name, "seed": seed, "metric": task.metric}
        write_json(path, settings | row | figures)


def base_name(model: str) -> str:
    """The name of a base model in the results: of its folder, which may be elsewhere on another machine."""
    return Path(model).resolve().name


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
