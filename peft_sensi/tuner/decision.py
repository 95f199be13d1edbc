"""Data in, decisions out: calibration batches become scores, a plan and refitted values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..anatomy.build import build_anatomy, nothing_to_trim
from ..anatomy.linears import check_quantized, is_plain
from ..anatomy.modules import base_of, linear_of, task_head
from ..anatomy.units import Anatomy
from ..planning.allocate import make_plan
from ..planning.budget import Budget
from ..planning.plan import Plan
from ..planning.refit import Refitted, refit
from ..scoring.calibration import image_tokens, materialize, preserved
from ..scoring.compute import score_units
from ..scoring.criteria import only_seen
from ..scoring.head import head_at_prior
from ..scoring.options import ScoringOptions
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from .checkpoint import check_fingerprint, fingerprint
from .config import SensiConfig
from .slicing import fit_rank, trained_beside_units
from .targets import (
    also_saved,
    anatomy_of,
    bias_values,
    check_tokens,
    name_targets,
    refuse_tied,
    targets_of,
    usual_update,
    usually_also_trained,
    values_of,
)
from .wrapping import save_whole


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
        batches = materialize(given.calibration, max(given.calibration_steps, given.priming_steps))
        _warn_of_lost_inputs(given, batches)
    scores = given.scores
    if scores is None and (limits != Budget() or given.retention or given.tuned_layers):
        options = ScoringOptions(
            score=given.score,
            calibration_steps=given.calibration_steps,
            priming_steps=given.priming_steps,
            priming_lr=given.priming_lr,
            priming_optimizer=given.priming_optimizer,
            loss_fn=given.loss_fn,
            seed=given.seed,
            progress=distributed.rank() == 0,
        )
        scores = score_units(model, anatomy, batches, options)
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
    # The fit is centered, so it moves the output biases where there are any: the adapter must hold them, too.
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
    """`decide` with all processes of `distributed.synchronized`, which get the same decision."""
    if distributed.world_size() == 1:
        return decide(model, given, config, anatomy, targets, saved)
    # Paths may differ between machines; plan and fingerprint are filled in below.
    own = ("base_model_name_or_path", "revision", "plan", "fingerprint")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in own}
    data = {name: getattr(given, name) is not None for name in ("calibration", "scores", "loss_fn")}
    distributed.check_equal("its configuration", {**data, **settings}, "Give all processes the same.")
    if replicas.any_process_on_meta(model):
        decision = None
        if distributed.rank() == 0:
            with distributed.alone():
                decision = decide(model, given, config, anatomy, targets, saved)
    else:
        decision = decide(model, given, config, anatomy, targets, saved)
    # Sums are the same everywhere, but rounding on different hardware may not be.
    decision = distributed.broadcast_object(None if decision is None else decision.on_cpu())
    plan = Plan.from_dict(decision.plan.to_dict(), anatomy, targets)  # raises where the model is another one
    distributed.check_equal("its plan", plan.to_dict(), "The processes must have the same model.")
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


logger = logging.getLogger(__name__)


def prepare(model: nn.Module, given: SensiConfig, config: SensiConfig) -> Decision | None:
    """Everything that is decided before a module is replaced. Fills in `config`; leaves the model as it was.

    `given` is the user's config with the data, `config` the model's own copy. `None` where nothing is targeted.
    """
    blocks = build_anatomy(model, (), config.layouts())
    if config.target_modules is None:
        names = {module for group in blocks.groups for module in group.modules}
        config.target_modules = names or "all-linear"  # type: ignore[assignment]
    save_whole(config, task_head(model))
    everything = isinstance(config.target_modules, str)
    _maybe_include_all_linear_layers(config, model)
    if everything and isinstance(config.target_modules, set):
        special = {n for n in config.target_modules if not is_plain(base_of(model.get_submodule(n)))}
        if special:
            warnings.warn(
                f"{len(special)} modules are not tuned, such as {min(special)!r}: they are Linears that compute "
                f"something else.",
                stacklevel=2,
            )
        config.target_modules -= special
    if not targets_of(model, config):
        bare = config.own_copy()
        bare.modules_to_save = None
        if config.target_modules and not config.exclude_modules and not targets_of(model, bare):
            # PEFT's message does not name them where a task head is saved whole, which it counts as excluded.
            raise NoMatchingPeftModuleError(
                f"Target modules {config.target_modules} not found in the base model. Please check the target "
                f"modules and try again."
            )
        return None  # PEFT raises its own error for that
    if config.also_train is None:
        config.also_train = usually_also_trained(model, given, blocks)
    saved = also_saved(model, blocks, config)
    save_whole(config, saved)
    targets = name_targets(model, config)
    refuse_tied(model, targets)
    anatomy = anatomy_of(model, config, targets)
    check_tokens(config, anatomy)
    if config.update is None:
        config.update = usual_update(model, given, anatomy, targets, values_of(model, saved))
    linears = [linear_of(model, name) for group in anatomy.groups for name in group.modules]
    check_quantized(linears, config.update, config.sparsity, config.keep_base)
    if config.plan is not None:
        if config.fingerprint is not None:
            check_fingerprint(config.fingerprint, model, anatomy)
        decision = Decision(Plan.from_dict(config.plan, anatomy, targets))
    else:
        with others_disabled(model), preserved(model):
            decision = decide_together(model, given, config, anatomy, targets, saved)
        # Again, for a process that had no weights and has only been told the plan.
        fit_rank(model, config, decision.plan, values_of(model, saved))
        config.plan = decision.plan.to_dict()
        logger.info("%s", decision.plan.line())
    config.fingerprint = distributed.broadcast_object(fingerprint(model, anatomy)) or config.fingerprint
    return decision


@contextmanager
def others_disabled(model: nn.Module) -> Iterator[None]:
    """A second adapter is scored on the base, not on what other adapters make of it."""
    wrapped = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    enabled = [m for m in wrapped if not m.disable_adapters]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for module in enabled:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in enabled:
            module.enable_adapters(True)
        # Enabling makes the active adapters trainable, also those that were loaded for inference, and no others.
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
