"""Trims a trained adapter.

Scores the units of the adapted model, makes a plan, refits the kept weights by least squares, and shrinks the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.build import nothing_to_trim
from ..anatomy.linears import bias_of, matrix
from ..anatomy.modules import linear_of
from ..anatomy.units import Anatomy
from ..layers.layer import layers_of
from ..planning.allocate import make_plan
from ..planning.budget import Budget, allowance
from ..planning.costs import costs_of
from ..planning.plan import Plan
from ..planning.refit import Refitted
from ..planning.trimmed import assign, reassigned
from ..scoring.calibration import ScoringOptions, materialize, preserved
from ..scoring.compute import score_units
from ..scoring.methods import METHODS
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.checks import check_types
from ..utils.errors import SensiError
from ..utils.states import TRIMMED
from .config import RunInputs, SensiConfig
from .cuts import recounted
from .decision import is_refitted
from .in_place import merged_in_place, refit_changes
from .predictions import read_latency
from .rescoring import FIT_ROUNDS, REFIT_BATCHES, enough, labeled_by, trained_options
from .targets import anatomy_of
from .wrapping import shrink


LEARNED_WHILE_PRIMING = ("mask", "movement")


@dataclass(frozen=True)
class Trim:
    """What a trim is going to do.

    `refitted` are changes of weights and biases (see `refit_changes`). `scores` has a number for each unit of the
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
    latency: Any = None,
) -> Trim:
    """Carries out `SensiModel.trim`. If it fails, model and config are as they were."""
    plan, budget_before, latency_before, tables_before = config.plan, config.budget, config.latency, config.tables
    try:
        # A wrong call in one process is an error in all of them.
        with distributed.synchronized("trimming"):
            limits = _check(root, config, adapter_name, before, budget, score)
            check_types({"refit": refits})
            config.latency = config.latency if latency is None else latency
            read_latency(config)
            if refits and inputs.calibration is None:
                raise SensiError(
                    "`refit=True` needs `calibration`: the kept units are fitted to the activations of its batches."
                )
            default = "fisher" if config.score in LEARNED_WHILE_PRIMING else config.score
            options = trained_options(config, inputs.loss_fn, score=score or default)
            trim = _decide(root, config, adapter_name, before, limits, inputs, options, refits)
        given = asdict(limits) | {"trainable": config.limits.trainable}
        config.budget = {name: limit for name, limit in given.items() if limit is not None}
        shrink(root, config, adapter_name, trim.plan, trim.refitted)
    except BaseException:
        if config.plan is plan:  # an interrupt may also come when the adapter is trimmed already
            config.budget, config.latency, config.tables = budget_before, latency_before, tables_before
        raise
    return trim


def _check(root: nn.Module, config: SensiConfig, name: str, before: Plan, budget: Any, score: str | None) -> Budget:
    """The limits of a trim. Raises `SensiError` if the adapter, as it is now, cannot be trimmed like this."""
    limits = Budget.parse(budget)
    if not before.anatomy.trimmable:
        raise nothing_to_trim(root)
    if limits.trainable is not None or not limits.trims:
        raise SensiError(
            "`trim()` removes units under limits on `params`, `flops` or latencies. It cannot change how many values "
            "are trained: leave the `trainable` limit out."
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
    """Scores, plan and refitted values of the adapted model. The model stays as it was.

    A budget far below what is there is reached in stages (see `_stages`). A unit that is superfluous beside others may
    be needed once they are gone, so each stage scores the model that the stage before has left, refitted. What remains
    after the last stage is fitted to the whole model, so that the errors of the stages do not add up.
    """
    has_data = inputs.calibration is not None
    given = {**asdict(limits), "score": options.score, "refit": refits, "calibration": has_data}
    distributed.check_equal("its trim", given, "Give all processes the same.")
    present = {g.name: before.of(g) != TRIMMED for g in before.anatomy.groups}
    after, changes = before, Refitted()  # `changes` are of all columns (see `_add`)
    with preserved(root), merged_in_place(root, adapter_name):
        # Inside `preserved`, because a shuffling data loader draws random numbers.
        most = REFIT_BATCHES * config.calibration_steps
        batches = None if inputs.calibration is None else materialize(inputs.calibration, most)
        to_refit = None if batches is None else enough(batches, options.calibration_steps)
        root.eval()
        # The merged model is smaller where units were trimmed before; its units are the present ones in their order.
        now = anatomy_of(root, config, before.targets)
        # A sublayer without any unit has nothing to score. Its Linears then look like Linears outside the blocks.
        now = replace(now, groups=tuple(g for g in now.groups if g.name in present and present[g.name].any()))
        fits = is_refitted(root, config, now, config.refit if refits is None else refits)
        for interim in _stages(before, limits):
            with _closed(root, _plan_of_merged(now, before, after), changes):
                found = score_units(root, now, labeled_by(root, config, batches, options), options)
                kept = {name: ~trimmed for name, trimmed in after.trimmed_units.items()}
                scores = _of_all_units(found, present, kept)
                wanted = make_plan(
                    before.anatomy,
                    scores,
                    interim,
                    targets=before.targets,
                    available=kept,
                    sequence_length=config.sequence_length or scores.sequence_length or before.sequence_length,
                    latency=config.tables,
                    **config.width_options,
                )
                after = after.without(wanted.trimmed_units)
                small = _plan_of_merged(now, before, after)
                if fits and to_refit is not None and interim is not limits:
                    some = to_refit[: options.calibration_steps]
                    _add(root, changes, refit_changes(root, small, some, inputs.loss_fn, options.progress), small)
        refitted = Refitted()
        if fits and to_refit is not None:
            refitted = refit_changes(root, small, to_refit, inputs.loss_fn, options.progress, FIT_ROUNDS)
    plan = replace(recounted(root, config, before, after), sequence_length=wanted.sequence_length)
    return _same_everywhere(Trim(plan, refitted, scores))


def _stages(before: Plan, limits: Budget) -> list[Budget]:
    """Limits on the way from what `before` keeps to the limits of a trim, which are the last ones.

    Each stage keeps about half of what the stage before has kept. In the interim stages only parameters and FLOPs are
    limited, because these limits say how far the way is.
    """
    counted = Budget(params=limits.params, flops=limits.flops)
    costs = costs_of(counted, before.anatomy, before.sequence_length, {})
    targets = {name: allowance(getattr(limits, name), cost.whole) for name, cost in costs.items()}
    kept = {"params": before.kept_params, "flops": before.kept_flops}
    ratios = {name: min(1.0, max(target, 1) / max(kept[name], 1)) for name, target in targets.items()}
    count = max([1, *(round(-math.log2(ratio)) for ratio in ratios.values())])
    # A count of 1 would be read as a share.
    ways = [{n: max(2, int(kept[n] * ratio ** (i / count))) for n, ratio in ratios.items()} for i in range(1, count)]
    return [*(Budget(**way) for way in ways), limits]


@contextmanager
def _closed(root: nn.Module, plan: Plan, changes: Refitted) -> Iterator[None]:
    """Inside the block, the merged model computes without the units that `plan` trims, and with `changes` added.

    `changes` are of all columns of the merged output projections (see `_add`).
    """
    with ExitStack() as restore:
        for group in plan.anatomy.trimmable:
            trimmed = group.output_columns(plan.of(group) == TRIMMED)
            if group.output not in changes and not len(trimmed):
                continue
            linear = linear_of(root, group.output)
            restore.enter_context(reassigned(linear))
            weight, bias = matrix(linear).detach(), bias_of(linear)
            change, bias_change = changes.get(group.output, (torch.zeros(()), None))
            weight = (weight.float() + change.to(weight.device)).index_fill(1, trimmed.to(weight.device), 0.0)
            if bias is not None and bias_change is not None:
                bias = bias.detach().float() + bias_change.to(bias.device)
            assign(linear, weight, bias)
        yield


def _add(root: nn.Module, changes: Refitted, more: Refitted, plan: Plan) -> None:
    """Adds changes of the columns that `plan` keeps (see `refit_changes`) to changes of all columns."""
    groups = {group.output: group for group in plan.anatomy.trimmable}
    for name, (weight, bias) in more.items():
        columns = groups[name].output_columns(plan.of(groups[name]) != TRIMMED).to(weight.device)
        wide = torch.zeros_like(matrix(linear_of(root, name)), dtype=weight.dtype).index_copy_(1, columns, weight)
        old, old_bias = changes.get(name, (torch.zeros_like(wide), None))
        changes[name] = old + wide, bias if bias is None or old_bias is None else old_bias + bias


def _of_all_units(found: Scores, present: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> Scores:
    """Scores of the `present` units as scores of all units. Units that are not `kept` have 0."""

    def spread(values: torch.Tensor | None, name: str) -> torch.Tensor:
        everywhere = torch.zeros(len(present[name]), dtype=torch.float32)
        if values is not None:
            everywhere[torch.from_numpy(present[name])] = values.float()
        return everywhere * torch.from_numpy(kept[name])

    return replace(
        found,
        values={name: spread(found.values.get(name), name) for name in kept},
        protected={name: spread(found.protected.get(name), name).bool() for name in kept},
    )


def _plan_of_merged(now: Anatomy, before: Plan, after: Plan) -> Plan:
    """The plan `after` for the merged model, which does not have the units that `before` trims."""
    own = {g.name: after.of(g)[before.of(g) != TRIMMED] for g in before.anatomy.groups}
    return Plan(now, tuple(own[g.name].tobytes() for g in now.groups), before.targets, 1)


def _same_everywhere(trim: Trim) -> Trim:
    """The trim of process 0, for all processes: different hardware may round differently."""
    if distributed.world_size() == 1:
        return trim
    distributed.check_equal("its plan", trim.plan.to_dict(), "The processes must have the same model.")
    refitted = {n: (w.cpu(), None if b is None else b.cpu()) for n, (w, b) in trim.refitted.items()}
    return replace(trim, refitted=distributed.broadcast_object(refitted))
