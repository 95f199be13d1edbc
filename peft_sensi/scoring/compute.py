"""From a model and calibration batches to `Scores`: checks the inputs, then runs the chosen criterion."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..anatomy.build import build_anatomy, nothing_to_score
from ..anatomy.layouts import BlockLayout
from ..anatomy.modules import check_module, input_embedding, unwrapped
from ..anatomy.units import Anatomy
from ..utils import distributed, replicas
from ..utils.checks import check_types
from ..utils.errors import SensiError
from .calibration import LossFn, ScoringOptions, materialize, preserved
from .criteria import CRITERIA
from .head import head_to_train
from .lengths import mean_length
from .outliers import find_outliers
from .priming import OPTIMIZERS
from .scores import Scores


def compute_scores(
    model: nn.Module,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    score: str = "fisher",
    calibration_steps: int = 8,
    priming_steps: int = 48,
    priming_lr: float = 1e-4,
    priming_optimizer: str = "adamw",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    targets: Iterable[str] | None = None,
    blocks: Iterable[BlockLayout] | None = None,
    progress: bool = True,
) -> Scores:
    """Scores every unit of `model`, including its input tokens if there is calibration data.

    The model and all random states are left exactly as they were. With several processes, all of them must call this
    function, each with its own batches; all get the same scores. In gradient scores every example counts the same.
    The formulas are in `scoring.criteria`.

    Args:
        model: A model of Transformers, or a module with one inside; not wrapped by PEFT.
        calibration: Batches with labels that `model(**batch)` accepts. Without them, a score that needs data falls
            back to magnitude, with a warning.
        score: One of `random`, `magnitude`, `taylor`, `fisher`, `mask`, `movement`.
        calibration_steps: How many batches are scored at most.
        priming_steps: Number of steps of the short fine-tuning before gradients are taken; 0 for none. It also trains
            the task head that the adapter starts with, whatever the score is. Each step uses 6 examples of a batch.
        priming_lr: Learning rate of that fine-tuning. If the model has learned hardly anything after these steps (see
            `learned.share_learned`), as many follow at three times the rate.
        priming_optimizer: `adamw`, or `sign`, which needs no memory besides the weights.
        loss_fn: Computes the loss from the model and a batch of any size, for models whose output has no `loss`.
        seed: Seed of dropout during priming and of random scores.
        targets: Names of Linears outside the known blocks, and of embeddings: their rows or tokens are scored too.
        blocks: Layouts of the model's blocks, instead of those of its family.
        progress: Whether to show progress: bars on a terminal, else a line every few seconds.

    Raises:
        AnatomyError: The model has no known units, or `targets` or `blocks` do not fit it.
        CalibrationError: The data is empty or has no labels, or a loss or gradient is not finite. The message names
            the batch.
        SensiError: The model has an adapter. An argument has a wrong type or range, or `score` is learned during
            priming and `priming_steps` is 0. Or the weights are sharded, offloaded or on the meta device.
    """
    if score not in CRITERIA:
        raise SensiError(f"`score` must be one of {', '.join(CRITERIA)}, got {score!r}.")
    numbers = {"calibration_steps": calibration_steps, "priming_steps": priming_steps}
    check_types({**numbers, "priming_lr": priming_lr, "seed": seed, "targets": targets})
    if priming_optimizer not in OPTIMIZERS:
        raise SensiError(f"`priming_optimizer` must be one of {', '.join(OPTIMIZERS)}, got {priming_optimizer!r}.")
    check_module(model)
    replicas.check_whole(model)
    options = ScoringOptions(
        score, calibration_steps, priming_steps, priming_lr, priming_optimizer, loss_fn, seed, progress
    )
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        raise SensiError("The model has an adapter: score the base model, or merge the adapter first.")
    # Priming does not train embeddings, so movement cannot rank tokens.
    table = input_embedding(model) if calibration is not None and score != "movement" else None
    named = set(targets or ())
    anatomy = build_anatomy(model, named | ({table} if table else set()), blocks)
    if all(group.output == table and table not in named for group in anatomy.groups):
        raise nothing_to_score(model)
    with distributed.synchronized("scoring"), replicas.weights_from_rank_0(model), preserved(model):
        batches = None
        if calibration is not None:  # inside `preserved`, because a shuffling data loader draws random numbers
            batches = materialize(calibration, max(calibration_steps, priming_steps, 1))
        return score_units(model, anatomy, batches, options)


def score_units(
    model: nn.Module, anatomy: Anatomy, batches: list[Mapping[str, Any]] | None, options: ScoringOptions
) -> Scores:
    """`compute_scores` for a given anatomy and given batches. The caller must be inside `calibration.preserved`."""
    if not anatomy.groups:
        raise nothing_to_score(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SensiError(
            "Weights of the base are on the meta device, so they have no values by which units could be ranked. Load "
            "the base first, without `init_empty_weights` or `torch.device('meta')`."
        )
    method = options.score
    if CRITERIA[method].needs_data and batches is None:
        warnings.warn(
            f"No calibration data was given, so score={method!r} falls back to 'magnitude', which usually loses more "
            f"accuracy. Pass `calibration=` (batches with labels).",
            stacklevel=2,
        )
        method = "magnitude"
    if CRITERIA[method].needs_priming and not options.priming_steps:
        raise SensiError(f"score={method!r} is learned during priming: `priming_steps` must not be 0.")
    length = mean_length(model, anatomy, batches, options.loss_fn) if batches else None
    # Dropout during priming is random: with the same data and seed, the plan is the same.
    seed = options.seed + distributed.rank()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # speech models draw the parts that they mask from it
    found = CRITERIA[method].function(model, anatomy, batches, options)
    protected = found.protected
    if not protected and batches is not None:
        protected = find_outliers(model, anatomy, batches[: max(1, options.calibration_steps)], options.loss_fn)
    head = head_to_train(model, batches, found.head) if found.head and batches is not None else {}
    return Scores(found.values, method, length, protected, head, found.learned)
