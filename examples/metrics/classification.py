"""Accuracy, macro F1 and Matthews correlation. Load with `evaluate.load(<path of this file>)`."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from peft_sensi.tasks import metrics


class Classification(evaluate.Metric):
    """`peft_sensi.tasks.metrics.classes`, which `peft-sensi evaluate` computes too."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, macro-averaged F1 and Matthews correlation of predicted classes.",
            citation="",
            inputs_description="predictions, references: class indices",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float | None]:
        return metrics.classes(np.asarray(predictions), np.asarray(references))
