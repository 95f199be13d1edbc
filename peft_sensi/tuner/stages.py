"""Which units a trained model can do without, and the values of the others: for a trim, and for cuts in a training.

A budget far below what is there is reached in stages. A unit that is superfluous beside others may be needed once they
are gone, so each stage scores the model that the stage before has left, refitted. What remains after the last stage is
fitted to the model before the first one, so that the errors of the stages do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.modules import linear_of
from ..anatomy.units import Anatomy
from ..planning.allocate import make_plan
from ..planning.budget import TIMES, Budget, allowance
from ..planning.costs import Tables, costs_of, kept_counts
from ..planning.plan import Plan
from ..planning.refit import Refitted, on_cpu, refit
from ..planning.trimmed import kept_values, trimmed
from ..scoring.calibration import ScoringOptions
from ..scoring.compute import score_units
from ..scoring.scores import Scores
from ..utils import distributed
from ..utils.states import TRIMMED
from .config import SensiConfig
from .decision import batches_to_refit, is_refitted
from .in_place import refit_changes
from .rescoring import CUT_BATCHES, FIT_ROUNDS, labeled_by, to_fit_jointly, to_refit
from .targets import anatomy_of


@dataclass(frozen=True)
class Choice:
    """Which units stay.

    `refitted` are changes of weights and biases (see `refit_changes`). `scores` has a number for each unit of the
    base; units that were trimmed before have 0.
    """

    plan: Plan
    refitted: Refitted
    scores: Scores


def choose_units(
    root: nn.Module,
    config: SensiConfig,
    before: Plan,
    limits: Budget,
    batches: list[Mapping[str, Any]] | None,
    options: ScoringOptions,
    *,
    refits: bool | None,
    opened: Plan | None = None,
    may_reopen: bool = True,
    trains_on: bool = False,
    given: Scores | None = None,
) -> Choice:
    """Scores the model inside `merged_in_place`, in evaluation mode, and chooses units under `limits`.

    `before` says which units the layers have, and `opened` which of them no gate has closed (by default all).
    `refits` is the user's choice, `None` for the default. `may_reopen` allows the last stage to open closed units
    again, to use up the budget where no open unit fits any more.

    Whole layers are fitted. If training follows (`trains_on`), and the limits are reached in one stage, training makes
    up for a less exact choice: whole layers are not fitted, and fewer batches are read. After several stages, all
    layers are also fitted together. `given` scores (of all units) take the place of scores that are computed; there is
    then one stage.
    """
    opened = opened or before
    now = _anatomy_of_merged(root, config, before)
    stages = stages_to(opened, limits, config.tables, config.width_options["min_units"])
    exact = not trains_on or len(stages) > 1
    fitted_to = None
    if batches is not None and is_refitted(root, config, now, refits):
        fitted_to = to_refit(batches, config)
    if not exact:
        options = replace(options, calibration_steps=CUT_BATCHES * config.calibration_steps)
        fitted_to = fitted_to and fitted_to[: CUT_BATCHES * batches_to_refit(config)]

    after, values = opened, Refitted()
    for stage in stages if given is None else stages[-1:]:
        left = _plan_of_merged(now, before, after)
        with trimmed(root, left, left.anatomy.trimmable, values):
            anatomy = _anatomy_of_merged(root, config, after)
            scores = _all_scores(root, config, anatomy, after, batches, options) if given is None else given
            reopens = stage is limits and may_reopen
            wanted = make_plan(
                before.anatomy,
                _open_first(scores, kept_units(after)) if reopens else scores,
                stage,
                targets=before.targets,
                available=kept_units(before if reopens else after),
                sequence_length=before.sequence_length,
                latency=config.tables,
                **config.width_options,
            )
            if fitted_to is not None and stage is not limits:
                cut = _plan_of_merged(anatomy, after, before.without(wanted.trimmed_units))
                values = _values_after(root, cut, fitted_to[: options.calibration_steps], options)
        after = before.without(wanted.trimmed_units)
    refitted = Refitted()
    if batches is not None and fitted_to is not None:
        small = _plan_of_merged(now, before, after)
        rounds = FIT_ROUNDS if exact else 0
        joint = to_fit_jointly(batches, config) if len(stages) > 1 else []
        refitted = refit_changes(root, small, fitted_to, options.loss_fn, options.progress, rounds, joint)
    return Choice(after, refitted, scores)


def same_everywhere(choice: Choice) -> Choice:
    """The choice of process 0, for all processes: different hardware may round differently."""
    if distributed.world_size() == 1:
        return choice
    return distributed.broadcast_object(replace(choice, refitted=on_cpu(choice.refitted)))


def stages_to(opened: Plan, limits: Budget, tables: Tables, min_units: int) -> list[Budget]:
    """Limits on the way from what `opened` keeps to `limits`, which are the last ones.

    Each stage keeps about half of what the stage before has kept. Of a latency, only what trimming can save counts: a
    model with the fewest units (`min_units` in each group) needs some time as well.
    """
    costs = costs_of(replace(limits, trainable=None), opened.anatomy, opened.sequence_length, tables)
    kept = kept_counts(opened)
    fewest = {g: min(count, max(min_units, g.least)) for g, count in kept.items()}
    ways = {}  # for each limit: what no stage can save, what can be saved now, and the share of it that stays
    for name, cost in costs.items():
        fixed = cost.kept(fewest) if name in TIMES else 0
        now = max(cost.kept(kept) - fixed, 1)
        target = allowance(getattr(limits, name), cost.whole) - fixed
        ways[name] = fixed, now, min(1.0, max(target, 1) / now)
    count = max([1, *(round(-math.log2(ratio)) for *_, ratio in ways.values())])

    amounts = (
        {name: fixed + int(now * ratio ** (stage / count)) for name, (fixed, now, ratio) in ways.items()}
        for stage in range(1, count)
    )
    return [*map(Budget.of_amounts, amounts), limits]


def _all_scores(
    root: nn.Module,
    config: SensiConfig,
    anatomy: Anatomy,
    left: Plan,
    batches: list[Mapping[str, Any]] | None,
    options: ScoringOptions,
) -> Scores:
    """Scores of the units that `left` keeps, which are those of `anatomy`. The other units have 0."""
    found = Scores({}, options.score)
    if anatomy.groups:  # earlier cuts may have closed all units
        found = score_units(root, anatomy, labeled_by(root, config, batches, options), options)
    return _of_all_units(found, kept_units(left))


def _values_after(root: nn.Module, cut: Plan, batches: list[Mapping[str, Any]], options: ScoringOptions) -> Refitted:
    """Values of all output projections after a stage: refitted ones, or the kept columns of those before it."""
    found = refit(root, cut, batches, options.loss_fn, options.progress)
    groups = {group.output: group for group in cut.anatomy.trimmable}
    return {n: found.get(n) or kept_values(linear_of(root, n), n, group, cut) for n, group in groups.items()}


def kept_units(plan: Plan) -> dict[str, np.ndarray]:
    """For each group's name a boolean mask `[units]` of the units that stay."""
    return {group.name: plan.of(group) != TRIMMED for group in plan.anatomy.groups}


def _anatomy_of_merged(root: nn.Module, config: SensiConfig, plan: Plan) -> Anatomy:
    """The units of the merged model, which are those that `plan` keeps, in their order."""
    found = anatomy_of(root, config, plan.targets)
    # A sublayer without any unit has nothing to score. Its Linears then look like Linears outside the blocks.
    kept = {group.name for group in plan.anatomy.groups if (plan.of(group) != TRIMMED).any()}
    return replace(found, groups=tuple(group for group in found.groups if group.name in kept))


def _of_all_units(found: Scores, kept: Mapping[str, np.ndarray]) -> Scores:
    """Scores of the `kept` units as scores of all units. The others have 0."""

    def spread(values: torch.Tensor | None, name: str) -> torch.Tensor:
        everywhere = torch.zeros(len(kept[name]), dtype=torch.float32, device="cpu")
        if values is not None:
            everywhere[torch.from_numpy(kept[name])] = values.float()
        return everywhere

    return replace(
        found,
        values={name: spread(found.values.get(name), name) for name in kept},
        protected={name: spread(found.protected.get(name), name).bool() for name in kept},
    )


def _open_first(scores: Scores, opened: Mapping[str, np.ndarray]) -> Scores:
    """Scores with which every open unit of a group ranks above every closed one, even if the open unit scores zero."""
    tiny = torch.finfo(torch.float32).tiny
    return replace(
        scores, values={n: value.clamp_min(tiny) * torch.from_numpy(opened[n]) for n, value in scores.values.items()}
    )


def _plan_of_merged(now: Anatomy, before: Plan, after: Plan) -> Plan:
    """The plan `after` for the merged model, which does not have the units that `before` trims."""
    own = {g.name: after.of(g)[before.of(g) != TRIMMED] for g in before.anatomy.groups}
    return Plan(now, tuple(own[g.name].tobytes() for g in now.groups), before.targets, 1)
