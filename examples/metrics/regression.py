"""Pearson and Spearman correlation, mean squared error. Load with `evaluate.load(<path of this file>)`."""

from __future__ import annotations

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error


class Regression(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson and Spearman correlation and mean squared error of predicted numbers.",
            citation="",
            inputs_description="predictions, references: numbers",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {
            "pearson": float(pearsonr(references, predictions).statistic),
            "spearman": float(spearmanr(references, predictions).statistic),
            "mse": float(mean_squared_error(references, predictions)),
        }
