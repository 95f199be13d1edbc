"""Data in, decisions out: calibration batches become scores, a plan and refitted values."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .allocate import make_plan
from .anatomy import Anatomy, base_of, linear_of, nothing_to_trim
from .budget import Budget
from .calibration import materialise
from .config import SensiConfig
from .errors import SensiError
from .pieces import trained_beside_units
from .plan import Plan
from .priming import head_at_prior
from .refit import Refitted, refit
from .scores import Scores, score_units


@dataclass(frozen=True)
class Decision:
    """What a wrap is going to do. `head` is the task head as priming left it, by parameter name.

    `scores` are those that the plan was made from, if it was made here.
    """

    plan: Plan
    refitted: Refitted = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: Scores | None = None


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
    if given.schedule is not None and given.schedule["phase"] == "cut":
        limits = Budget()  # everything stays until the cuts come
    batches = None
    if given.calibration is not None:
        batches = materialise(given.calibration, max(given.calibration_steps, given.priming_steps))
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
            loss_fn=given.loss_fn,
            seed=given.seed,
            progress=True,
        )
    if scores is None:
        scores = Scores({g.name: torch.zeros(g.size) for g in anatomy.groups}, "none")
    whole = sum(p.numel() for name in saved for p in base_of(model.get_submodule(name)).parameters())
    biases = [linear_of(model, name).bias for name in targets] if "biases" in (config.also_train or ()) else []
    plan = make_plan(
        anatomy,
        {name: values.numpy() for name, values in scores.values.items()},
        limits if limits != Budget() else None,
        targets=targets,
        protected={name: mask.numpy() for name, mask in scores.protected.items()},
        sequence_length=given.sequence_length or scores.sequence_length or 128,
        multiple_of=given.multiple_of,
        min_units=given.min_units if given.granularity != "tensor" else 0,
        always_trained=whole + sum(bias.numel() for bias in biases if bias is not None),
        tunes="dense" in given.update.split("+"),
        retention=given.retention,
        biases_apart=bool(biases),
        tuned_layers=given.tuned_layers,
        uniform=config.widths == "uniform",
    )
    # Now that the plan is known, what is trained beside its units can be counted exactly.
    plan = replace(plan, always_trained=whole + trained_beside_units(model, config, plan))
    # The fit is centred, so it moves the output biases where there are any: the adapter must hold them, too.
    has_biases = any(linear_of(model, group.output).bias is not None for group in anatomy.trimmable)
    fits = not has_biases or bool({"biases", "output_biases"} & set(config.also_train or ()))
    if given.refit and not fits:
        raise SensiError("`refit=True` moves the output biases: add 'output_biases' to `also_train`.")
    wanted = given.refit if given.refit is not None else limits.trainable is None and fits
    refitted: Refitted = {}
    if wanted and batches is not None and plan.trims:
        model.eval()
        refitted = refit(model, plan, batches[: given.calibration_steps], given.loss_fn)
    head = scores.head
    if not head and batches is not None:  # nothing was primed: the head's first steps shall not go into the prior
        head = head_at_prior(model, batches)
    return Decision(plan, refitted, head, scores)


def _limits(model: nn.Module, given: SensiConfig, anatomy: Anatomy) -> Budget:
    limits = given.limits
    if limits.trims and not anatomy.trimmable:
        raise nothing_to_trim(model)
    chosen = given.retention, given.sparsity, given.tuned_layers
    if given.budget is None and given.update == "dense" and all(choice is None for choice in chosen):
        if anatomy.trimmable:
            return Budget(params=0.5)
        message = "No budget was given and the model has nothing to trim: all targeted modules are tuned whole."
        warnings.warn(message, stacklevel=2)
    return limits
