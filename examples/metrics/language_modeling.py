"""Perplexity and next-token accuracy: `evaluate.load(<path of this file>)`, no download."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np


class LanguageModeling(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity is exp of the mean of -log p over all tokens, each weighing the same.",
            citation="",
            inputs_description="predictions: likeliest tokens; references: tokens; log_likelihoods: natural log of p",
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
            "perplexity": math.exp(min(-mean, 700.0)),  # beyond it a float overflows
            "next_token_accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references))),
        }
