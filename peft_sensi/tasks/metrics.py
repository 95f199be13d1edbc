"""Predictions and correct answers go in; metrics come out, each with its baseline and its 95 % interval.

Everything here is NumPy: predictions can be measured where there is no PyTorch.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


RESAMPLES = 200  # of a bootstrap
Values = dict[str, float | None]


@dataclass(frozen=True)
class Quality:
    """Metrics (`None` if undefined), those of a constant answer, 95 % intervals, and sentences about their limits."""

    values: Values
    baseline: Values = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "validation": self.values,
            "validation_baseline": self.baseline,
            "validation_interval": {name: list(interval) for name, interval in self.intervals.items()},
            "validation_remarks": self.remarks,
        }


def beats_baseline(values: Values, baseline: Values) -> bool:
    """Whether any metric is better than that of the constant answer. An undefined one counts as 0."""
    gains = {name: (value or 0.0) - (baseline.get(name) or 0.0) for name, value in values.items()}
    return any(gain < 0 if name == "mse" else gain > 0 for name, gain in gains.items())


def measured(
    measure: Callable[[np.ndarray], Values],
    rows: int,
    shares: Mapping[str, int] | None = None,
    fast: Callable[[np.ndarray], Values] | None = None,
) -> tuple[Values, dict[str, tuple[float, float]]]:
    """The metrics of all rows and their 95 % intervals.

    Args:
        measure: Computes the metrics from an int array of row numbers, which may contain a row several times.
        rows: The number of rows: texts, sentences or questions.
        shares: For metrics that are shares of independent rows, the number of these rows. They have Wilson's interval,
            which is right for shares near 0 and 1 too. All other intervals are bootstrapped over rows.
        fast: A faster form of `measure` with the same values, for the resamples.
    """
    values = measure(np.arange(rows))
    intervals = {name: wilson(float(values[name] or 0), n) for name, n in (shares or {}).items() if n}
    others = [name for name, value in values.items() if name not in intervals and value is not None]
    if others and rows > 1:
        generator = np.random.default_rng(0)
        samples = [(fast or measure)(generator.integers(rows, size=rows)) for _ in range(RESAMPLES)]
        for name in others:
            found = [value for sample in samples if (value := sample[name]) is not None]
            if found:
                low, high = np.quantile(found, [0.025, 0.975])
                intervals[name] = float(low), float(high)
    return values, intervals


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` rows (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


# -- texts ------------------------------------------------------------------------------------------------------------


def classes(predicted: np.ndarray, expected: np.ndarray) -> Values:
    """Accuracy, macro F1 and Matthews correlation of class numbers `[rows]`, from 0.

    Macro F1 is the mean over the classes that are predicted or expected. The Matthews correlation is 0 if all
    predictions, or all correct classes, are equal.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    varied = len(np.unique(predicted)) > 1 and len(np.unique(expected)) > 1
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "f1_macro": float(f1_score(expected, predicted, average="macro", zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(expected, predicted)) if varied else 0.0,
    }


def several_classes(predicted: np.ndarray, expected: np.ndarray) -> Values:
    """Micro and macro F1 of bool arrays `[rows, classes]`, and the accuracy: the share of rows without any error.

    Macro F1 is the mean over the classes that are predicted or expected. Without any such class, both are 1.
    """
    from sklearn.metrics import accuracy_score, f1_score

    if not (predicted.any() or expected.any()):
        return {"accuracy": 1.0, "f1_micro": 1.0, "f1_macro": 1.0}
    # scikit-learn would take a single column for two classes. A second, empty one counts in no metric.
    predicted, expected = (np.pad(a, ((0, 0), (0, int(a.shape[1] == 1)))) for a in (predicted, expected))
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "f1_micro": float(f1_score(expected, predicted, average="micro")),
        "f1_macro": float(f1_score(expected, predicted, average="macro", zero_division=np.nan)),
    }


def counted_classes(predicted: np.ndarray, expected: np.ndarray) -> Values:
    """`classes` from counts: the same values in a hundredth of the time, for resamples."""
    size = int(max(predicted.max(), expected.max())) + 1
    right = np.bincount(expected[predicted == expected], minlength=size).astype(float)
    found, true = (np.bincount(numbers, minlength=size).astype(float) for numbers in (predicted, expected))
    rows, seen = len(expected), found + true > 0
    varied = (rows**2 - found @ found) * (rows**2 - true @ true)
    return {
        "accuracy": float(right.sum() / rows),
        "f1_macro": float((2 * right[seen] / (found + true)[seen]).mean()),
        "matthews_correlation": float((right.sum() * rows - found @ true) / np.sqrt(varied)) if varied else 0.0,
    }


def counted_several_classes(predicted: np.ndarray, expected: np.ndarray) -> Values:
    """`several_classes` from counts, for resamples."""
    right, both = (predicted & expected).sum(0), predicted.sum(0) + expected.sum(0)
    if not both.any():
        return {"accuracy": 1.0, "f1_micro": 1.0, "f1_macro": 1.0}
    seen = both > 0
    return {
        "accuracy": float((predicted == expected).all(1).mean()),
        "f1_micro": float(2 * right.sum() / both.sum()),
        "f1_macro": float((2 * right[seen] / both[seen]).mean()),
    }


def numbers(predicted: np.ndarray, expected: np.ndarray) -> Values:
    """Pearson's and Spearman's correlation, and the mean squared error.

    A correlation is `None` if all correct numbers, or all predictions, are equal.
    """
    from scipy.stats import pearsonr, spearmanr

    varied = len(np.unique(predicted)) > 1 and len(np.unique(expected)) > 1
    return {
        "pearson": float(pearsonr(predicted, expected).statistic) if varied else None,
        "spearman": float(spearmanr(predicted, expected).statistic) if varied else None,
        "mse": float(np.mean((predicted - expected) ** 2)),
    }


# -- words ------------------------------------------------------------------------------------------------------------


def word_counts(predicted: Iterable[Sequence[str]], expected: Iterable[Sequence[str]]) -> np.ndarray:
    """For each sentence: right, predicted and expected entities; right tags; words. An int array `[sentences, 5]`."""
    rows = []
    for guesses, tags in zip(predicted, expected, strict=True):
        found, true = set(entities(guesses)), set(entities(tags))
        right = sum(guess == tag for guess, tag in zip(guesses, tags, strict=True))
        rows.append((len(found & true), len(found), len(true), right, len(tags)))
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def words(counts: np.ndarray) -> Values:
    """Precision, recall and F1 of entities, and the share of right tags, from `word_counts`; micro averages.

    An entity is right if its type, first word and last word are right. If there is nothing to find, finding nothing is
    right.
    """
    right, found, true, tags, total = (int(n) for n in counts.sum(0))
    return {
        "precision": right / found if found else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (found + true) if found or true else 1.0,
        "tag_accuracy": tags / total if total else 1.0,
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity of one sentence.

    This is the convention of the CoNLL-2000 script. An entity begins at B- (or S-, U-), and at I- (or E-, L-) if no
    entity of the same type is open. Therefore IOB1, IOB2, IOBES and BILOU can be read, and so can inconsistent
    predictions of a model.
    """
    found = []
    kind: str | None = None
    start = 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and not (prefix in ("I", "E", "L") and name == kind):
            found.append((kind, start, position))
            kind = None
        if kind is None and tag != "O":
            kind, start = name, position
        if prefix in ("E", "L", "S", "U") and kind is not None:
            found.append((kind, start, position + 1))
            kind = None
    return found


# -- answers ----------------------------------------------------------------------------------------------------------


def answer_scores(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Exact match and F1 of each question, float `[questions, 2]`; the best of its references counts.

    The right answer to a question without references is the empty text (Rajpurkar et al. 2016, 2018).
    """
    pairs = [(text, list(answers) or [""]) for text, answers in zip(predicted, references, strict=True)]
    rows = [[max(measure(text, a) for a in answers) for measure in (exact, f1)] for text, answers in pairs]
    return np.array(rows, dtype=float).reshape(-1, 2)


def answers(scores: np.ndarray) -> Values:
    """Exact match and F1 in 0..1: the means of `answer_scores`."""
    return {"exact_match": float(scores[:, 0].mean()), "f1": float(scores[:, 1].mean())}


def normalized(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and English articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact(predicted: str, answer: str) -> float:
    return float(normalized(predicted) == normalized(answer))


def f1(predicted: str, answer: str) -> float:
    """F1 of the two bags of words."""
    found, expected = normalized(predicted), normalized(answer)
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))
