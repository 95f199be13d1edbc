"""Labels drawn from a trained model's own predictions, for the scores of a model that has fitted its training rows.

The Fisher information is an expectation over labels that the model itself predicts. With the true labels of rows that
the model has fitted, nearly all gradients vanish, and the few rows that it has not fitted decide the ranking (Kunstner
et al. 2019, arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..utils import distributed
from ..utils.errors import CalibrationError
from .calibration import device_of, run_model, to_device


def draw_labels(
    model: nn.Module, batches: list[Mapping[str, Any]], seed: int, per_token: bool = False
) -> list[Mapping[str, Any]]:
    """The batches, with labels drawn from the distribution that the model predicts for each example.

    - Classes: int64 `labels` `[examples]` beside `logits` `[examples, classes]`, and with `per_token` also
      `[examples, tokens]` beside `[examples, tokens, classes]`; negative labels stay.
    - Several classes at once: floating `labels` of the shape of `logits`, each 0 or 1.
    - Numbers: `labels` `[examples]`, or several for each example; the prediction plus noise of a standard normal
      distribution, because the squared error is the likelihood of such noise.

    The model's `config.problem_type` says whether floating labels are classes or numbers. Heads of Transformers set it
    when they compute a loss. Where nothing says it, as in a module of the user's own, floating labels may be anything
    (one class of two, shares of classes): they stay.

    A batch with other labels stays as it is. In language models, labels are shifted or are inputs as well. The chances
    of an answer are spread over all tokens of a text, so that most draws are improbable tokens. A batch that the model
    refuses, or for which it predicts no chances at all (NaN), also stays: its loss is computed next, and that error
    tells the number of the batch. The draws depend on `seed` and on a batch's position among those of all processes.
    """
    positions = distributed.batch_positions(len(batches))
    drawn: list[Mapping[str, Any]] = []
    for place, batch in zip(positions, batches, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed + place)
        drawn.append({**batch, **_drawn(model, batch, generator, per_token)})
    return drawn


def _drawn(
    model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator, per_token: bool
) -> dict[str, torch.Tensor]:
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        return {}
    try:
        with torch.no_grad():
            output = run_model(model, to_device(batch, device_of(model)), "a calibration batch")
    except CalibrationError:
        return {}
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if not isinstance(logits, torch.Tensor):
        return {}
    dtype = labels.dtype if labels.is_floating_point() else logits.dtype  # numbers may be given as integers
    logits = logits.detach().float().cpu()
    if not _has_chances(logits):
        return {}
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification" and labels.shape == logits.shape and labels.dim() == 2:
        return {"labels": torch.bernoulli(logits.sigmoid(), generator=generator).to(labels)}
    if problem == "regression" and logits.shape in (labels.shape, (*labels.shape, 1)):
        noise = torch.randn(labels.shape, dtype=torch.float32, generator=generator, device="cpu")
        return {"labels": (logits.reshape(labels.shape) + noise).to(labels.device, dtype)}
    if labels.is_floating_point() or labels.shape != logits.shape[:-1] or labels.dim() != 1 + per_token:
        return {}
    if logits.shape[-1] < 2:
        return {}
    new = _classes(logits, generator).to(labels)
    return {"labels": torch.where(labels < 0, labels, new)}


def _has_chances(logits: torch.Tensor) -> bool:
    """Whether each row of `logits` `[..., classes]` gives finite probabilities."""
    return bool(logits.softmax(-1).isfinite().all())


def _classes(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One class for each row of `logits` (float32, `[..., classes]`)."""
    chances = logits.softmax(-1)
    return torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])
