"""Accuracy, macro F1 and Matthews correlation. Load with `evaluate.load(<path of this file>)`."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


class Classification(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, macro-averaged F1 and Matthews correlation of predicted classes.",
            citation="",
            inputs_description="predictions, references: class indices",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0)),
            "matthews_correlation": float(matthews_corrcoef(references, predictions)),
        }
