"""Perplexity and next-token accuracy. Load with `evaluate.load(<path of this file>)`."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np


class LanguageModeling(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity is exp of the mean of -log p over all tokens, with equal weights.",
            citation="",
            inputs_description="predictions: most likely tokens; references: tokens; log_likelihoods: ln p",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Value("int64"),
                    "log_likelihoods": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[int], references: list[int], log_likelihoods: list[float]
    ) -> dict[str, float]:
        mean = float(np.mean(log_likelihoods))
        return {
            "perplexity": math.exp(min(-mean, 700.0)),  # a larger exponent overflows
            "next_token_accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references))),
        }
