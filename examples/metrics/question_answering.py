"""Exact match and F1 of answers, as in SQuAD. Load with `evaluate.load(<path of this file>)`."""

from __future__ import annotations

import re
import string
from collections import Counter

import datasets
import evaluate


class QuestionAnswering(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Shares in 0..1; each question counts with its best reference (Rajpurkar et al. 2016).",
            citation="",
            inputs_description="predictions: texts, empty for no answer; references: all correct answers of each",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        # The correct prediction for a question without an answer is the empty text.
        pairs = [(text, list(answers) or [""]) for text, answers in zip(predictions, references, strict=True)]
        return {
            "exact_match": sum(max(exact(text, answer) for answer in answers) for text, answers in pairs) / len(pairs),
            "f1": sum(max(f1(text, answer) for answer in answers) for text, answers in pairs) / len(pairs),
        }


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and English articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact(predicted: str, answer: str) -> float:
    return float(words(predicted) == words(answer))


def f1(predicted: str, answer: str) -> float:
    """F1 of the two bags of words."""
    found, expected = words(predicted), words(answer)
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))
