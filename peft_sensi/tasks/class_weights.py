"""Class weights: the labels of the training rows go in; a loss in which all classes count the same comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..utils.errors import DataError
from .task import Task


def balanced_weights(task: Task) -> np.ndarray:
    """One weight for each class, float32 `[classes]`.

    For classes, rows / (classes * rows of the class), as in scikit-learn; 0 for a class without rows. For rows with
    several labels, the weight of a positive label: rows without it / rows with it; 1 if none or all rows have it.

    Raises:
        DataError: The task has no classes.
    """
    if not task.labels.names:
        raise DataError("--class-weights needs classes, not numbers or answers.")
    values = [row["labels"] for row in task.train.inputs]
    if task.labels.several:
        positive = np.array(values).sum(0)
        negative = len(values) - positive
        return np.where(positive * negative > 0, negative / np.maximum(positive, 1), 1.0).astype(np.float32)
    flat = [label for row in values for label in row if label >= 0] if task.kind == "words" else values
    counts = Counter(flat)
    rows = np.array([counts[i] for i in range(len(task.labels.names))], dtype=float)
    present = int((rows > 0).sum())
    return np.where(rows > 0, len(flat) / (present * np.maximum(rows, 1)), 0.0).astype(np.float32)


def weighted_loss(task: Task) -> Callable[..., Any]:
    """A loss for Trainer's `compute_loss_func`: a function of a model's output and the labels."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    weights = torch.from_numpy(balanced_weights(task))

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = (outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]).float()
        own = weights.to(logits.device)
        if task.labels.several:
            return binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=own)
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), own, ignore_index=-100)

    return loss


def weighted_model_loss(task: Task) -> Callable[..., Any]:
    """The same loss as a function of a model and a batch, as scoring takes it (`SensiConfig(loss_fn=...)`)."""
    loss = weighted_loss(task)

    def of_batch(model: Any, batch: Mapping[str, Any]) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return loss(model(**inputs), batch["labels"])

    return of_batch
