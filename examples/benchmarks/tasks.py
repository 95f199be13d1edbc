"""The tasks of the benchmarks: their files, columns, metrics and lengths of training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.trainer_pt_utils import LengthGroupedSampler


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from token_classification import OUTSIDE, entity_metrics, read_conll, windows

from common import read_table, sample, tokenize


BATCH_SIZE = 32


@dataclass(frozen=True)
class Task:
    """A task.

    `rows` limits the number of training rows; 0 means all. `constant` is the dev metric of always answering the most
    frequent class. Learning rates are chosen on `held_out` training rows. With 500 rows the error is one point, so a
    task with many rows holds out more. With `words`, every word of a sentence has a class (CoNLL files). A `noisy`
    task cannot separate methods at this model size: it is shown, but left out of means over tasks.
    """

    name: str
    classes: int
    epochs: int
    constant: float
    metric: str = "accuracy"
    pair: bool = False
    rows: int = 0
    held_out: int = 500
    words: bool = False
    noisy: bool = False
    dev: str = "dev.tsv"


TASKS = {
    task.name: task
    for task in (
        Task("trec6", classes=6, epochs=4, constant=0.276, dev="test.tsv"),
        Task("sst2", classes=2, epochs=1, constant=0.509, rows=16_000, held_out=4_000),
        Task("wnut17", classes=13, epochs=3, constant=0.0, metric="f1", words=True, dev="dev.conll"),
        Task("cola", classes=2, epochs=3, constant=0.0, metric="matthews_correlation", noisy=True),
        Task("rte", classes=2, epochs=4, constant=0.527, pair=True, noisy=True),
    )
}


@dataclass
class Data:
    """The tokenized rows of a task. Learning rates are chosen on `held_out`, training rows that no run trains on.

    For a task with a class per word, `metrics` has a function for each split that computes its metric from the classes
    of all tokens.
    """

    task: Task
    train: Dataset
    held_out: Dataset
    dev: Dataset
    collator: Any
    seed: int
    metrics: dict[str, Callable[[EvalPrediction], dict[str, float]]] = field(default_factory=dict)

    def training_batches(self, seed: int) -> DataLoader:
        """Batches of rows of similar length, which need little padding."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [len(ids) for ids in self.train["input_ids"]]
        sampler = LengthGroupedSampler(BATCH_SIZE, lengths=lengths, generator=generator)
        return DataLoader(self.train, BATCH_SIZE, sampler=sampler, collate_fn=self.collator, drop_last=True)

    def calibration(self) -> DataLoader:
        """Batches of training rows, in another order than for training."""
        return self.training_batches(self.seed + 1000)

    def order(self, split: str) -> list[int]:
        rows = getattr(self, split)
        return sorted(range(len(rows)), key=[len(ids) for ids in rows["input_ids"]].__getitem__)

    def batches(self, split: str) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of a split, in the order of `order`."""
        rows = getattr(self, split).select(self.order(split))
        return iter(DataLoader(rows, 2 * BATCH_SIZE, collate_fn=self.collator))


def load_task(task: Task, folder: Path, model: str, seed: int) -> Data:
    """Reads `folder/<task>/train.tsv` and the dev file. `seed` selects the training rows for all methods."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if task.words:
        return _load_words(task, folder, tokenizer, seed)
    rows = {name: read_table(folder / task.name / file) for name, file in (("train", "train.tsv"), ("dev", task.dev))}
    names = sorted(set(rows["train"]["label"]))
    if len(names) != task.classes:
        raise ValueError(f"{folder / task.name}: expected {task.classes} classes, found {len(names)}")
    # The held-out rows are the same for every seed.
    split = rows["train"].train_test_split(test_size=task.held_out, seed=0)
    chosen = {
        "train": sample(split["train"], task.rows or None, seed),
        "held_out": split["test"],
        "dev": rows["dev"],
    }
    columns = ("sentence1", "sentence2") if task.pair else ("sentence", None)
    encoded = {
        name: tokenize(rows, tokenizer, *columns, [names.index(label) for label in rows["label"]], max_length=128)
        for name, rows in chosen.items()
    }
    return Data(task, **encoded, collator=DataCollatorWithPadding(tokenizer), seed=seed)


def _load_words(task: Task, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    train = read_conll(folder / task.name / "train.conll", 0, -1).train_test_split(test_size=task.held_out, seed=0)
    rows = {
        "train": train["train"],
        "held_out": train["test"],
        "dev": read_conll(folder / task.name / task.dev, 0, -1),
    }
    found = sorted({tag for part in rows.values() for row in part["tags"] for tag in row} - {OUTSIDE})
    tags = [OUTSIDE, *found]
    if len(tags) != task.classes:
        raise ValueError(f"{folder / task.name}: expected {task.classes} tags, found {len(tags)}")
    encoded, metrics = {}, {}
    for name, part in rows.items():
        encoded[name], places = windows(part, tokenizer, tags, max_length=128)
        metrics[name] = entity_metrics(part, places, tags)
    return Data(task, **encoded, collator=DataCollatorForTokenClassification(tokenizer), seed=seed, metrics=metrics)
