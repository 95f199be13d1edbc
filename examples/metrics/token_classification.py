"""Precision, recall and F1 of entities, tag accuracy. Load with `evaluate.load(<path of this file>)`."""

from __future__ import annotations

import datasets
import evaluate


class TokenClassification(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="An entity is correct if its type, first word and last word are correct; micro averages.",
            citation="",
            inputs_description="predictions, references: for each sentence, the tags of its words, such as B-person",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        predicted = entities_of(predictions)
        expected = entities_of(references)
        right = len(predicted & expected)
        tags = [
            guess == tag
            for guesses, sentence in zip(predictions, references, strict=True)
            for guess, tag in zip(guesses, sentence, strict=True)
        ]
        return {
            "precision": right / len(predicted) if predicted else 0.0,
            "recall": right / len(expected) if expected else 0.0,
            # If there is nothing to find, finding nothing is correct.
            "f1": 2 * right / (len(predicted) + len(expected)) if predicted or expected else 1.0,
            "tag_accuracy": sum(tags) / len(tags) if tags else 1.0,
        }


def entities_of(sentences: list[list[str]]) -> set[tuple[int, str, int, int]]:
    """(sentence, type, first word, word after the last) of every entity."""
    return {(number, *entity) for number, tags in enumerate(sentences) for entity in entities(tags)}


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
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
