"""Outputs and labels of a batch go in; how often two models decide alike, and as the labels, comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..tuner.wrapping import root_of
from ..utils.errors import SensiError, first_line


LABELS = ("labels", "start_positions", "end_positions")


def graph_inputs(batch: Mapping[str, Any], example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a graph in a batch, with the dtypes of the graph's example.

    A missing mask or missing token types get the values that the model would assume. Raises `SensiError` if another
    input is missing, or a value is no tensor.
    """
    try:
        tensors = {name: torch.as_tensor(batch[name]).cpu() for name in example if name in batch}
    except (TypeError, ValueError, RuntimeError) as error:
        raise SensiError(f"A batch of `data` has values that are no tensor: {first_line(error)}") from error
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in example and name not in tensors and "input_ids" in tensors:
            tensors[name] = torch.full_like(tensors["input_ids"], value)
    if missing := set(example) - set(tensors):
        raise SensiError(f"A batch of `data` lacks {sorted(missing)[0]!r}, which the graph takes.")
    return {name: tensors[name].to(example[name].dtype) for name in example}


class Agreement:
    """Counts the decisions of a file that are those of its model, and those that are the labels.

    A decision is a class for each text or token; the next token after each token of a causal language model; yes or no
    for each of several labels; and for questions the first and the last token of the answer together. Predicted
    numbers are no decisions, so nothing is counted for them.
    """

    def __init__(self, model: nn.Module) -> None:
        root = root_of(model)
        self.problem = getattr(getattr(root, "config", None), "problem_type", None)
        self.generates = bool(getattr(root, "can_generate", bool)())
        self.agreed, self.right = list[np.ndarray](), list[np.ndarray]()

    def add(self, own: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], batch: Mapping[str, Any]) -> None:
        """Counts one batch: the outputs of the model and those of the file by name, and the batch with its labels."""
        labels = {name: np.asarray(torch.as_tensor(batch[name]).cpu()) for name in LABELS if name in batch}
        ours, found = (self._decisions(outputs, labels.get("labels")) for outputs in (own, theirs))
        if ours is None or found is None:
            return
        wanted, counted = self._wanted(labels, own), np.ones(found.shape, dtype=bool)
        if wanted is not None and wanted.shape == found.shape:
            counted = np.asarray(wanted >= 0)  # -100 stands for "no label"
            self.right.append((found == wanted)[counted])
        self.agreed.append((ours == found)[counted])

    def _decisions(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> np.ndarray | None:
        logits = next(iter(outputs.values()))
        if "start_logits" in outputs:
            return _answers(outputs["start_logits"].argmax(-1), outputs["end_logits"].argmax(-1), logits)
        if self.problem == "multi_label_classification":
            return np.asarray(logits > 0)
        if self.problem == "regression" or logits.shape[-1] == 1:
            return None
        if labels is not None and labels.shape == logits.shape and labels.dtype.kind == "f":
            return np.asarray(logits > 0)  # Transformers takes such labels for several in each text, too
        decisions: np.ndarray = logits.argmax(-1)
        return decisions[:, :-1] if self.generates else decisions

    def _wanted(self, labels: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        if "start_logits" in outputs:
            ends = [labels[name] for name in LABELS[1:] if name in labels]
            return _answers(ends[0], ends[1], outputs["start_logits"]) if len(ends) == 2 else None
        wanted = labels.get("labels")
        return wanted[:, 1:] if self.generates and wanted is not None else wanted

    def shares(self) -> tuple[float | None, float | None]:
        """The shares of decisions that are those of the model, and of those that are the labels; `None` for none."""
        agreed, right = (
            float(np.concatenate(hits).mean()) if any(map(len, hits)) else None for hits in (self.agreed, self.right)
        )
        return agreed, right


def _answers(start: np.ndarray, end: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """One number for each pair of a first and a last token; -1 if one of them is negative."""
    return np.where((start < 0) | (end < 0), -1, start * logits.shape[-1] + end)
