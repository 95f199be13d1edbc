"""Data in, decisions out: calibration batches become scores, a plan and refitted values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from .anatomy.build import nothing_to_trim
from .anatomy.modules import linear_of
from .anatomy.units import Anatomy
from .config import SensiConfig
from .pieces import bias_values, fit_rank, trained_beside_units, values_of
from .planning.allocate import make_plan
from .planning.budget import Budget
from .planning.plan import Plan
from .planning.refit import Refitted, refit
from .scoring.calibration import image_tokens, materialise
from .scoring.criteria import only_seen, score_units
from .scoring.head import head_at_prior
from .scoring.scores import Scores
from .utils import distributed, replicas
from .utils.errors import SensiError


@dataclass(frozen=True)
class Decision:
    """What a wrap is going to do. `head` is the task head as priming left it, by parameter name.

    `scores` are those that the plan was made from, if it was made here.
    """

    plan: Plan
    refitted: Refitted = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: Scores | None = None

    def on_cpu(self) -> Decision:
        """A tensor that is sent to another process would arrive on the sender's device."""
        refitted = {
            name: (weight.cpu(), None if bias is None else bias.cpu())
            for name, (weight, bias) in self.refitted.items()
        }
        return replace(self, refitted=refitted, head={name: value.cpu() for name, value in self.head.items()})


def decide(
    model: nn.Module,
    given: SensiConfig,
    config: SensiConfig,
    anatomy: Anatomy,
    targets: frozenset[str],
    saved: list[str],
) -> Decision:
    """Scores the units, plans, refits; to be called inside `calibration.preserved`.

    `given` is the user's config with the data, `config` the model's own copy with all defaults filled in, `saved` the
    base modules that are trained whole.
    """
    limits = _limits(model, given, anatomy)
    limited = limits.trainable is not None
    if not config.tunes_units:
        limits = replace(limits, trainable=None)  # it limits the rank, not the units
    if given.schedule is not None and given.schedule["phase"] == "cut":
        limits = Budget()  # everything stays until the cuts come
    batches = None
    if given.calibration is not None:
        batches = materialise(given.calibration, max(given.calibration_steps, given.priming_steps))
        _warn_of_lost_inputs(given, batches)
    scores = given.scores
    if scores is None and (limits != Budget() or given.retention or given.tuned_layers):
        scores = score_units(
            model,
            anatomy,
            batches,
            score=given.score,
            calibration_steps=given.calibration_steps,
            priming_steps=given.priming_steps,
            priming_lr=given.priming_lr,
            priming_optimizer=given.priming_optimizer,
            loss_fn=given.loss_fn,
            seed=given.seed,
            progress=distributed.rank() == 0,
        )
    if scores is None:
        unranked = {g.name: g.zeros() + (g.kind == "token") for g in anatomy.groups}
        scores = Scores(only_seen(anatomy, unranked, batches), "none")
    whole = values_of(model, saved)
    plan = make_plan(
        anatomy,
        {name: values.numpy() for name, values in scores.values.items()},
        limits if limits != Budget() else None,
        targets=targets,
        protected={name: mask.numpy() for name, mask in scores.protected.items()},
        sequence_length=given.sequence_length or scores.sequence_length or image_tokens(model) or 128,
        multiple_of=given.multiple_of,
        min_units=given.units_to_stay,
        always_trained=whole + bias_values(model, config, targets),
        tunes=config.tunes_units,
        retention=given.retention,
        biases_apart="biases" in (config.also_train or ()),
        uniform=config.widths == "uniform",
        tuned_layers=given.tuned_layers,
    )
    fit_rank(model, config, plan, whole)
    # Now that the plan is known, what is trained beside its units can be counted exactly.
    plan = replace(plan, always_trained=whole + trained_beside_units(model, config, plan))
    # The fit is centred, so it moves the output biases where there are any: the adapter must hold them, too.
    has_biases = any(linear_of(model, group.output).bias is not None for group in anatomy.trimmable)
    fits = not has_biases or bool({"biases", "output_biases"} & set(config.also_train or ()))
    if given.refit and not fits:
        raise SensiError("`refit=True` moves the output biases: add 'output_biases' to `also_train`.")
    wanted = given.refit if given.refit is not None else not limited and fits
    refitted: Refitted = {}
    if wanted and batches is not None and plan.trims:
        model.eval()
        refitted = refit(model, plan, batches[: given.calibration_steps], given.loss_fn, distributed.rank() == 0)
    head = scores.head
    if not head and batches is not None:  # nothing was primed: the head's first steps shall not go into the prior
        head = head_at_prior(model, batches)
    return Decision(plan, refitted, head, scores)


def _warn_of_lost_inputs(given: SensiConfig, batches: list[Mapping[str, Any]]) -> None:
    """PEFT's model for question answering takes token types and never passes them on (seen in PEFT 0.21)."""
    if str(given.task_type).rpartition(".")[2] != "QUESTION_ANS":
        return
    types = [batch["token_type_ids"] for batch in batches if isinstance(batch.get("token_type_ids"), torch.Tensor)]
    if any(bool(ids.any()) for ids in types):
        message = (
            "The calibration batches have `token_type_ids`, which PEFT's model for task_type='QUESTION_ANS' drops: "
            "the adapter is trained without them, but scored with them, and the merged model would use them. Leave "
            "them out everywhere, or set task_type=None."
        )
        warnings.warn(message, stacklevel=2)


def decide_together(
    model: nn.Module,
    given: SensiConfig,
    config: SensiConfig,
    anatomy: Anatomy,
    targets: frozenset[str],
    saved: list[str],
) -> Decision:
    """`decide` with all processes of `distributed.together`, which get the same decision."""
    if distributed.count() == 1:
        return decide(model, given, config, anatomy, targets, saved)
    # Paths may differ between machines; plan and fingerprint are filled in below.
    own = ("base_model_name_or_path", "revision", "plan", "fingerprint")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in own}
    data = {name: getattr(given, name) is not None for name in ("calibration", "scores", "loss_fn")}
    distributed.agree("its configuration", {**data, **settings}, "Give all processes the same.")
    if replicas.somebody_has_no_weights(model):
        decision = None
        if distributed.rank() == 0:
            with distributed.alone():
                decision = decide(model, given, config, anatomy, targets, saved)
    else:
        decision = decide(model, given, config, anatomy, targets, saved)
    # Sums are the same everywhere, but rounding on different hardware may not be.
    decision = distributed.from_0(None if decision is None else decision.on_cpu())
    plan = Plan.from_dict(decision.plan.to_dict(), anatomy, targets)  # raises where the model is another one
    distributed.agree("its plan", plan.to_dict(), "The processes must have the same model.")
    return replace(decision, plan=plan)


def _limits(model: nn.Module, given: SensiConfig, anatomy: Anatomy) -> Budget:
    limits = given.limits
    if limits.trims and not anatomy.trimmable:
        raise nothing_to_trim(model)
    if given.chooses_nothing:
        if anatomy.trimmable:
            return Budget(params=0.5)
        message = "No budget was given and the model has nothing to trim: all targeted modules are tuned whole."
        warnings.warn(message, stacklevel=2)
    return limits
