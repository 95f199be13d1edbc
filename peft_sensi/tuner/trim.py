"""Trims a trained adapter.

Scores the units of the adapted model, makes a plan, refits the kept weights by least squares, and shrinks the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.build import nothing_to_trim
from ..anatomy.units import Anatomy
from ..layers.layer import layers_of
from ..planning.allocate import make_plan
from ..planning.budget import Budget
from ..planning.plan import Plan
from ..planning.refit import Refitted
from ..scoring.calibration import ScoringOptions, materialize, preserved
from ..scoring.compute import score_units
from ..scoring.criteria import METHODS
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from ..utils.states import TRIMMED
from .config import RunInputs, SensiConfig
from .cuts import plan_with
from .decision import is_refitted
from .in_place import merged_in_place, refit_changes
from .stale import mark_stale
from .targets import anatomy_of
from .wrapping import shrink


LEARNED_WHILE_PRIMING = ("mask", "movement")


@dataclass(frozen=True)
class Trim:
    """What a trim is going to do.

    `refitted` are changes of output projections (see `refit_changes`). `scores` has a number for each unit of the
    base; units that were trimmed before have 0.
    """

    plan: Plan
    refitted: Refitted
    scores: Scores


def trim_adapter(
    root: nn.Module,
    config: SensiConfig,
    adapter_name: str,
    before: Plan,
    budget: Any,
    inputs: RunInputs,
    score: str | None,
    refits: bool | None,
) -> Trim:
    """Carries out `SensiModel.trim`. If it fails, model and config are as they were."""
    settings, trainable = (config.budget, config.also_train), config.limits.trainable
    parameters = list(root.parameters())
    try:
        # A wrong call in one process is an error in all of them.
        with distributed.synchronized("trimming"):
            limits = _check(root, config, adapter_name, before, budget, score)
            if refits and inputs.calibration is None:
                raise SensiError(
                    "`refit=True` needs `calibration`: the kept units are fitted to the activations of its batches."
                )
            default = "fisher" if config.score in LEARNED_WHILE_PRIMING else config.score
            options = config.scoring_options(inputs.loss_fn, score=score or default, priming_steps=0)
            trim = _decide(root, config, adapter_name, before, limits, inputs, options, refits)
        shrink(root, config, adapter_name, trim.plan, trim.refitted)
    except BaseException:
        config.budget, config.also_train = settings
        raise
    given = asdict(limits) | {"trainable": trainable}
    config.budget = {name: limit for name, limit in given.items() if limit is not None}
    kept = {id(parameter) for parameter in root.parameters()}
    mark_stale(parameter for parameter in parameters if id(parameter) not in kept and parameter.requires_grad)
    return trim


def _check(root: nn.Module, config: SensiConfig, name: str, before: Plan, budget: Any, score: str | None) -> Budget:
    """The limits of a trim. Raises `SensiError` if the adapter, as it is now, cannot be trimmed like this."""
    limits = Budget.parse(budget)
    if not before.anatomy.trimmable:
        raise nothing_to_trim(root)
    if limits.trainable is not None or not limits.trims:
        raise SensiError(
            "`trim()` removes units under limits on `params` or `flops`. It cannot change how many values are "
            "trained: leave the `trainable` limit out."
        )
    if score not in (None, *METHODS):
        raise SensiError(f"`score` must be one of fisher, taylor, magnitude and random, got {score!r}.")
    if score in LEARNED_WHILE_PRIMING:
        raise SensiError(
            f"score={score!r} is measured while a model is primed, and a trained adapter is not primed: use 'fisher', "
            f"'taylor', 'magnitude' or 'random'."
        )
    if config.compressed is not None:
        raise SensiError(
            f"The adapter is compressed to {config.compressed}: trim the checkpoint that was compressed instead."
        )
    if config.phase == "cut":
        raise SensiError(
            "The adapter has a schedule of cuts. Finish the training (`Schedule.finish()`, which `SensiCallback` "
            "calls) before you trim it further."
        )
    if config.phase == "draw_mask" and not all(layer.is_masked(name) for layer in layers_of(root, name).values()):
        raise SensiError(
            "The adapter's mask has not been drawn yet. Finish the training (`Schedule.finish()`, which "
            "`SensiCallback` calls) before you trim it."
        )
    replicas.check_whole(root)
    return limits


def _decide(
    root: nn.Module,
    config: SensiConfig,
    adapter_name: str,
    before: Plan,
    limits: Budget,
    inputs: RunInputs,
    options: ScoringOptions,
    refits: bool | None,
) -> Trim:
    """Scores, plan and refitted values of the adapted model. The model stays as it was."""
    has_data = inputs.calibration is not None
    given = {**asdict(limits), "score": options.score, "refit": refits, "calibration": has_data}
    distributed.check_equal("its trim", given, "Give all processes the same.")
    kept = {g.name: before.of(g) != TRIMMED for g in before.anatomy.groups}
    with preserved(root), merged_in_place(root, adapter_name):
        # Inside `preserved`, because a shuffling data loader draws random numbers.
        batches = None if inputs.calibration is None else materialize(inputs.calibration, options.calibration_steps)
        root.eval()
        # The merged model is smaller where units were trimmed before; its units are the kept ones in their order.
        now = anatomy_of(root, config, before.targets)
        # A sublayer without any unit has nothing to score. Its Linears then look like Linears outside the blocks.
        now = replace(now, groups=tuple(g for g in now.groups if g.name in kept and kept[g.name].any()))
        found = score_units(root, now, batches, options)
        scores = replace(
            found,
            values={name: _spread(found.values.get(name), mask) for name, mask in kept.items()},
            protected={name: _spread(found.protected.get(name), mask).bool() for name, mask in kept.items()},
        )
        wanted = make_plan(
            before.anatomy,
            scores,
            limits,
            targets=before.targets,
            available=kept,
            sequence_length=config.sequence_length or scores.sequence_length or before.sequence_length,
            multiple_of=config.multiple_of,
            min_units=config.units_to_stay,
            uniform=config.widths == "uniform",
        )
        states = {g.name: np.where(wanted.of(g) == TRIMMED, TRIMMED, before.of(g)) for g in before.anatomy.groups}
        refitted: Refitted = {}
        if batches is not None and is_refitted(root, config, now, config.refit if refits is None else refits):
            small = _plan_of_merged(now, before, states)
            refitted = refit_changes(root, small, batches, inputs.loss_fn, options.progress)
    plan = replace(plan_with(root, config, before, states), sequence_length=wanted.sequence_length)
    return _same_everywhere(Trim(plan, refitted, scores))


def _spread(values: torch.Tensor | None, kept: np.ndarray) -> torch.Tensor:
    """Numbers of the kept units as numbers of all units, with 0 for the others."""
    spread = torch.zeros(len(kept))
    if values is not None:
        spread[torch.from_numpy(kept)] = values.float()
    return spread


def _plan_of_merged(now: Anatomy, before: Plan, states: Mapping[str, np.ndarray]) -> Plan:
    """The plan of the merged model, which does not have the units that `before` trims."""
    own = {g.name: states[g.name][before.of(g) != TRIMMED] for g in before.anatomy.groups}
    return Plan(now, tuple(own[g.name].astype(np.uint8).tobytes() for g in now.groups), before.targets, 1)


def _same_everywhere(trim: Trim) -> Trim:
    """The trim of process 0, for all processes: different hardware may round differently."""
    if distributed.world_size() == 1:
        return trim
    distributed.check_equal("its plan", trim.plan.to_dict(), "The processes must have the same model.")
    refitted = {n: (w.cpu(), None if b is None else b.cpu()) for n, (w, b) in trim.refitted.items()}
    return replace(trim, refitted=distributed.broadcast_object(refitted))
