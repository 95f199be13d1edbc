"""The tasks of the benchmarks: their files, columns, metrics and lengths of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
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

from peft_sensi.tasks import answers, word_files, words
from peft_sensi.tasks.encodings import read_text
from peft_sensi.tasks.labels import Labels
from peft_sensi.tasks.models import load_tokenizer
from peft_sensi.tasks.reading import parse_json
from peft_sensi.tasks.task import Rows

import examples_path  # noqa: F401 (for the imports from examples/)
from common import hold_out, read_table, sample, tokenize


BATCH_SIZE = 32
PAIRS = {"train": 3_000, "dev": 1_500}


@dataclass(frozen=True)
class Task:
    """A task.

    `rows` limits the number of training rows; 0 means all. `constant` is the dev metric of always answering the
    most frequent class, and `held_out_constant` that on the held-out rows, if it is another one. Learning rates
    are chosen on `held_out` training rows. With 500 rows the error is one point, so a task with many rows holds
    out more. `kind` says what is predicted: the class of a text (TSV files), the class of every word (CoNLL
    files), or an answer in a text (a JSON file in the format of SQuAD, split by article). With `pairs_of`, the
    texts of that task are paired (see `make_pairs`). A `noisy` task is shown, but left out of means over tasks: it
    cannot separate methods at this model size, or it is no task of its own.
    """

    name: str
    classes: int
    epochs: int
    constant: float
    metric: str = "accuracy"
    pair: bool = False
    rows: int = 0
    held_out: int = 500
    kind: Literal["text", "words", "answers"] = "text"
    noisy: bool = False
    dev: str = "dev.tsv"
    pairs_of: str | None = None
    held_out_constant: float | None = None

    def constant_on(self, split: str) -> float:
        """The metric of always answering the most frequent class of the `"dev"` or the `"held_out"` rows."""
        return self.constant if split == "dev" or self.held_out_constant is None else self.held_out_constant


TASKS = {
    task.name: task
    for task in (
        Task("trec6", classes=6, epochs=4, constant=0.276, held_out_constant=0.24, dev="test.tsv"),
        Task("sst2", classes=2, epochs=1, constant=0.509, held_out_constant=0.5515, rows=16_000, held_out=4_000),
        Task("wnut17", classes=13, epochs=3, constant=0.0, metric="f1", kind="words", dev="dev.conll"),
        Task("cola", classes=2, epochs=3, constant=0.0, metric="matthews_correlation", noisy=True),
        Task("rte", classes=2, epochs=4, constant=0.527, held_out_constant=0.508, pair=True, noisy=True),
        Task(
            "trec6_pairs", classes=2, epochs=3, constant=0.5, pair=True, noisy=True, dev="test.tsv", pairs_of="trec6"
        ),
        Task("mlqa_en", classes=2, epochs=4, constant=0.0, metric="f1", kind="answers", dev="dev.json", noisy=True),
    )
}


@dataclass
class Data:
    """The tokenized rows of a task. Learning rates are chosen on `held_out`, training rows that no run trains on.

    For a task of words or answers, `metrics` has a function for each split that computes its metric from the classes
    of all tokens, or from the two logits of all tokens.
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
    if task.kind == "answers":
        return _load_answers(task, folder, model, seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if task.kind == "words":
        return _load_words(task, folder, tokenizer, seed)
    files = {"train": "train.tsv", "dev": task.dev}
    rows = {name: read_table(folder / (task.pairs_of or task.name) / file) for name, file in files.items()}
    if task.pairs_of:
        rows = {name: make_pairs(part, PAIRS[name]) for name, part in rows.items()}
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


def make_pairs(texts: Dataset, count: int) -> Dataset:
    """Pairs of texts, always the same ones: every second pair has two texts of one class, the others have not."""
    generator = np.random.default_rng(0)
    labels = np.array(texts["label"])
    rows = []
    for number in range(count):
        first = generator.integers(len(labels))
        is_same = labels == labels[first]
        is_same[first] = False
        second = generator.choice(np.flatnonzero(is_same if number % 2 else labels != labels[first]))
        names = {"sentence1": texts["sentence"][int(first)], "sentence2": texts["sentence"][int(second)]}
        rows.append({**names, "label": "same" if number % 2 else "other"})
    return Dataset.from_list(rows)


def _load_words(task: Task, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    files = {
        name: word_files.read_conll(folder / task.name / file)
        for name, file in (("train", "train.conll"), ("dev", task.dev))
    }
    train = Dataset.from_list(files["train"]).train_test_split(test_size=task.held_out, seed=0)
    parts = {"train": train["train"].to_list(), "held_out": train["test"].to_list(), "dev": files["dev"]}
    labels = words.labels_of(*parts.values())
    if len(labels.names) != task.classes:
        raise ValueError(f"{folder / task.name}: expected {task.classes} tags, found {len(labels.names)}")
    encoded, metrics = {}, {}
    for name, part in parts.items():
        rows, _, _ = words.encode(part, labels, tokenizer, 128)
        encoded[name] = Dataset.from_list(rows.inputs)
        metrics[name] = _metric_of_words(labels, rows)
    return Data(task, **encoded, collator=DataCollatorForTokenClassification(tokenizer), seed=seed, metrics=metrics)


def _metric_of_words(labels: Labels, rows: Rows) -> Callable[[EvalPrediction], dict[str, Any]]:
    return lambda prediction: words.measure(labels, prediction.predictions, rows, None).values


def _load_answers(task: Task, folder: Path, model: str, seed: int) -> Data:
    # Windows share more tokens than an answer has.
    tokenizer = load_tokenizer("answers", model)
    file = folder / task.name / task.dev
    rows, dev = hold_out(
        Dataset.from_list(answers.from_squad(file, parse_json(read_text(file)))[0]), 0.3, seed=0, group="article"
    )
    train, held_out = hold_out(rows, 0.15, seed=0, group="article")
    encoded, metrics = {}, {}
    for name, part in (("train", train), ("held_out", held_out), ("dev", dev)):
        found, _, _ = answers.encode(part.to_list(), tokenizer, 256, 31)
        encoded[name] = Dataset.from_list(found.inputs)
        metrics[name] = _metric_of_answers(found)
    return Data(task, **encoded, collator=DataCollatorWithPadding(tokenizer), seed=seed, metrics=metrics)


def _metric_of_answers(rows: Rows) -> Callable[[EvalPrediction], dict[str, Any]]:
    return lambda prediction: answers.measure(prediction.predictions, rows, 30, silent=False).values
