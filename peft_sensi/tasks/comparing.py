"""The outputs of two models for the same labeled rows go in; how sure the difference between them is comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import metrics
from .kinds import decode
from .options import MAX_ANSWER_LENGTH
from .task import Task


RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """The difference between two models, B minus A, on the same rows.

    Attributes:
        metric: What `mean` and `interval` are about: the share of rows that are right, or a score of each row.
        mean: The mean difference of the rows' scores.
        interval: Its 95 % interval, from a bootstrap over rows: the rows of both models are drawn together.
        same: The share of rows for which both give the same prediction; `None` for numbers, which hardly ever are.
        only_a, only_b: The number of rows that only one of them has right; `None` if rows are not just right or wrong.
        p: The p-value of McNemar's exact test of these two numbers, or `None`.
    """

    metric: str
    mean: float
    interval: tuple[float, float]
    same: float | None
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def facts(self) -> dict[str, str]:
        """The difference as texts, by label."""
        low, high = self.interval
        facts = {f"B minus A, {self.metric}": f"{self.mean:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"}
        if self.same is not None:
            facts["same prediction"] = f"{self.same:.1%} of the rows"
        if self.p is not None:
            facts["only A is right, only B"] = (
                f"{self.only_a:,}, {self.only_b:,} rows (McNemar's exact p = {self.p:.3g})"
            )
        return facts


def compare_rows(tasks: Sequence[Task], outputs: Sequence[Any]) -> Difference:
    """Compares two models. Each has its own task, because its tokenizer and the numbers of its labels may differ.

    Rows are right or wrong for classes, have an F1 for answers and the share of right tags for words, and the negative
    squared error for numbers.
    """
    kind = tasks[0].kind
    found = [
        decode(kind, out, task.train, task.labels, task.record.get("max_answer_length", MAX_ANSWER_LENGTH),
               task.record.get("silent", False))
        for task, out in zip(tasks, outputs, strict=True)
    ]  # fmt: skip
    name, scored = _scored(tasks, found)
    difference = scored[1] - scored[0]
    generator = np.random.default_rng(0)
    means = [difference[generator.integers(len(difference), size=len(difference))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    key = next(k for k in ("label", "labels", "value", "tags", "answer") if k in found[0][0])
    pairs = [(row[key], other[key]) for row, other in zip(*found, strict=True)]
    if key == "labels":  # each model has them in the order of its head
        pairs = [(sorted(a), sorted(b)) for a, b in pairs]
    same = None if key == "value" else float(np.mean([a == b for a, b in pairs]))
    if name != "accuracy":
        return Difference(name, float(difference.mean()), (float(low), float(high)), same)
    only_a, only_b = int((difference < 0).sum()), int((difference > 0).sum())
    return Difference(name, float(difference.mean()), (float(low), float(high)), same, only_a, only_b,
                      mcnemar(only_a, only_b))  # fmt: skip


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: the two-sided p-value of numbers at least this unequal if both models are equally good."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _scored(tasks: Sequence[Task], found: Sequence[list[dict[str, Any]]]) -> tuple[str, list[np.ndarray]]:
    """The name of the rows' score, and the scores of all rows for each model."""
    task, raw = tasks[0], tasks[0].train.raw
    if task.kind == "answers":
        texts = [[row["answer"] for row in rows] for rows in found]
        references = [row["answers"] for row in raw]
        return "F1", [metrics.answer_scores(answers, references)[:, 1] for answers in texts]
    if task.kind == "words":
        return "share of right tags", [
            np.array([np.mean([a == b for a, b in zip(row["tags"], tagged["tags"], strict=True)])
                      for row, tagged in zip(rows, raw, strict=True)])
            for rows in found
        ]  # fmt: skip
    encoded = [[own.labels.encode(row["label"]) for row in raw] for own in tasks]
    if task.labels.regression:
        return "negative squared error", [
            -((np.array([row["value"] for row in rows]) - np.array(truth)) ** 2)
            for rows, truth in zip(found, encoded, strict=True)
        ]
    key = "labels" if task.labels.several else "label"
    names = [_named(own, truth) for own, truth in zip(tasks, encoded, strict=True)]
    return "accuracy", [
        np.array([float(row[key] == truth) for row, truth in zip(rows, wanted, strict=True)])
        for rows, wanted in zip(found, names, strict=True)
    ]


def _named(task: Task, encoded: Sequence[Any]) -> list[Any]:
    """The correct labels as `decode` writes them."""
    names = task.labels.in_data
    if task.labels.several:
        return [[names[i] for i, chosen in enumerate(row) if chosen] for row in encoded]
    return [names[int(value)] for value in encoded]
