"""The batches with which a trained model is scored and refitted: for a trim, and for cuts during a training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..scoring.calibration import LossFn, ScoringOptions, materialize, tokens_in
from ..scoring.criteria import DATA_METHODS
from ..scoring.drawn_labels import draw_labels
from ..utils import distributed
from .config import SensiConfig


# A trim scores and refits on more batches than a wrap, because little or no training follows that could make up for
# what is removed. All counts of batches are multiples of `calibration_steps`.
SCORED_BATCHES = 3
# A cut in one stage is followed by training: it scores and refits on this many times the batches of a wrap. On CoLA,
# the outputs after such a cut were as close to those before it as with more batches, and less close with fewer.
CUT_BATCHES = 2
# The hidden states of all tokens are held at the same time, so more batches than are scored are read only up to this
# limit on tokens.
REFIT_BATCHES, REFIT_TOKENS = 9, 65_536
# The fit of all layers together holds one batch at a time. Its upper limit on tokens bounds the time. With less than
# the lower one (of all processes), all layers together fit these batches and no others, as on TREC-6 (55,000 tokens).
JOINT_BATCHES, LEAST_JOINT_TOKENS, JOINT_TOKENS = 24, 65_536, 131_072
FIT_ROUNDS = 3  # how often a trim uses each batch to fit layers (see `planning.layer_fit` and `planning.joint_fit`)


def trained_options(config: SensiConfig, loss_fn: LossFn | None, **changes: Any) -> ScoringOptions:
    """How this config scores a trained model: without priming. `changes` replace single options."""
    steps = SCORED_BATCHES * config.calibration_steps
    return config.scoring_options(loss_fn, calibration_steps=steps, priming_steps=0, **changes)


def labeled_by(
    root: nn.Module, config: SensiConfig, batches: list[Mapping[str, Any]] | None, options: ScoringOptions
) -> list[Mapping[str, Any]] | None:
    """The batches with labels drawn from the model's predictions, if they matter and the loss is the model's own."""
    if batches is None or options.loss_fn is not None or options.score not in DATA_METHODS:
        return batches
    scored = batches[: options.calibration_steps]
    # Without a task type, the class says so: in other models with labels for each token, labels may be shifted.
    per_token = config.task_type == "TOKEN_CLS" or type(root).__name__.endswith("ForTokenClassification")
    return draw_labels(root, scored, options.seed, per_token=per_token)


def read_batches(calibration: Iterable[Mapping[str, Any]], config: SensiConfig) -> list[Mapping[str, Any]]:
    """The batches that a trim or a cut may use. Raises the errors of `materialize`."""

    def suffice(read: list[Any]) -> bool:
        # The others would not be used. Batches of images are large, and all that were read are held.
        return len(read) >= SCORED_BATCHES * config.calibration_steps and sum(map(tokens_in, read)) >= JOINT_TOKENS

    return materialize(calibration, JOINT_BATCHES * config.calibration_steps, suffice)


def to_refit(batches: list[Mapping[str, Any]], config: SensiConfig) -> list[Mapping[str, Any]]:
    """The batches to which the kept units are refitted."""
    return _enough(batches[: REFIT_BATCHES * config.calibration_steps], config, REFIT_TOKENS)


def to_fit_jointly(batches: list[Mapping[str, Any]], config: SensiConfig) -> list[Mapping[str, Any]]:
    """The batches to which all layers are fitted together; none if they have too few tokens."""
    found = _enough(batches[: JOINT_BATCHES * config.calibration_steps], config, JOINT_TOKENS)
    counts = distributed.gather("counting tokens", sum(map(tokens_in, found)))
    return found if sum(counts) >= LEAST_JOINT_TOKENS else []


def _enough(batches: list[Mapping[str, Any]], config: SensiConfig, tokens: int) -> list[Mapping[str, Any]]:
    """As many batches as are scored, and more of them as long as all have at most so many tokens."""
    totals = list(itertools.accumulate(map(tokens_in, batches)))
    return batches[: max(SCORED_BATCHES * config.calibration_steps, sum(total <= tokens for total in totals))]
