"""What a wrap does, decided before any module is replaced: targets, scores, plan, refitted values and slices.

`prepare` is the whole pipeline. It fills in every field of the config whose default depends on the model. The data
(`RunInputs`) is used here, and not kept.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..anatomy.build import nothing_to_trim
from ..anatomy.inputs import image_tokens
from ..anatomy.linears import bias_of, is_quantized
from ..anatomy.modules import linear_of
from ..anatomy.units import Anatomy
from ..planning.allocate import check_fits, make_plan
from ..planning.budget import DEFAULT_LIMITS, Budget
from ..planning.plan import Plan
from ..planning.refit import Refitted, on_cpu, refit
from ..scoring.calibration import materialize, preserved
from ..scoring.compute import score_units
from ..scoring.criteria import only_seen
from ..scoring.head import head_to_train
from ..scoring.learned import ENOUGH
from ..scoring.lengths import mean_length
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from .admission import check_plain
from .config import RunInputs, SensiConfig
from .fingerprint import check_fingerprint, fingerprint
from .latencies import exceeds, measure_missing, note_latency
from .reach import Reach, reach_of
from .slicing import Slices, fit_rank, slices_of, trained_beside_units
from .targets import bias_values, described, low_rank_values


logger = logging.getLogger(__name__)

# A refit has more to fit than a score: its matrices have as many rows as a layer has units.
REFIT_PER_SCORED = 1.8  # batches that are refitted, for each one that is scored

_receiver: ContextVar[Callable[[Scores], object] | None] = ContextVar("_receiver", default=None)


@dataclass(frozen=True)
class Decision:
    """What a wrap is going to do.

    `refitted` holds the new weight and bias of output projections, and `head` the start values of the task head by
    parameter name. `scores` are those that the plan was made from, if it was made in this process and ranks units.
    """

    plan: Plan
    slices: Slices
    refitted: Refitted = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: Scores | None = None


def prepare(model: nn.Module, config: SensiConfig, inputs: RunInputs) -> Decision | None:
    """Decides everything about a wrap, and fills the defaults into `config`. The model stays as it was.

    Returns `None` if the config targets no module; PEFT raises its own error for that.
    """
    reach = reach_of(model, config, inputs)
    if reach is None:
        return None
    targets, anatomy, saved_values = reach
    planned = config.plan is not None
    if not planned and config.chooses_nothing and anatomy.trimmable:
        config.budget = dict(DEFAULT_LIMITS)  # so that an adapter and its card say what was asked for
    if planned:
        if config.fingerprint is not None:
            check_fingerprint(config.fingerprint, model, anatomy)
        plan = Plan.from_dict(config.plan, anatomy, targets)
        if config.phase == "cut" and plan.trims:  # its gates would need all units
            raise SensiError(
                "The phase 'cut' needs a model with all units, and this `plan` trims already: leave the schedule out, "
                "and call `trim` after the training."
            )
        if not config.from_file:  # `make_plan`, or another config, may have counted other values beside the units
            plan = _counted(model, config, plan, saved_values)
            config.plan = plan.to_dict()
        decision = Decision(plan, slices_of(model, config, plan))
        check_plain(model, decision.slices)
    else:
        with preserved(model), others_disabled(model):
            measure_missing(model, config)
            make = partial(decide, model, config, inputs, reach)
            if distributed.world_size() == 1:
                decision = make()
            else:
                decision = _decide_together(make, model, config, inputs)
                plan = Plan.from_dict(decision.plan.to_dict(), anatomy, targets)  # raises if models differ
                distributed.check_equal("its plan", plan.to_dict(), "The processes must have the same model.")
                fit_rank(model, config, plan, saved_values)  # a process without weights has not decided
                decision = replace(decision, plan=plan, slices=slices_of(model, config, plan))
        config.plan = decision.plan.to_dict()
        note_latency(config, decision.plan)
        logger.info("%s", described(decision.plan, config).line())
    if not decision.slices:
        raise SensiError(
            "The plan neither tunes nor trims anything in the targeted modules, so there is nothing to adapt: target "
            "other modules, or change what is tuned (`budget`, `retention`, `also_train`)."
        )
    # A fingerprint that this base has just been compared with stays: that of a copy may be less exact.
    if not (planned and config.fingerprint is not None):
        config.fingerprint = distributed.broadcast_object(fingerprint(model, anatomy)) or config.fingerprint
    return decision


def _decide_together(make: Callable[[], Decision], model: nn.Module, config: SensiConfig, data: RunInputs) -> Decision:
    """The decision of process 0, for all processes of `distributed.synchronized`. It has no slices yet."""
    # Paths may differ between machines; plan and fingerprint are filled in later.
    own = ("base_model_name_or_path", "revision", "plan", "fingerprint")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in own}
    given = {f.name: getattr(data, f.name) is not None for f in fields(data)}
    distributed.check_equal("its configuration", {**given, **settings}, "Give all processes the same.")
    decision = None
    if not replicas.any_process_on_meta(model):
        decision = make()
    elif distributed.rank() == 0:
        with distributed.alone():
            decision = make()
    # Process 0 decides: the sums are the same everywhere, but different hardware may round differently.
    if decision is not None:
        # On the CPU, because a tensor arrives on the device of its sender. Each process makes its own slices.
        head = {name: value.cpu() for name, value in decision.head.items()}
        decision = replace(decision, slices={}, refitted=on_cpu(decision.refitted), head=head)
    return distributed.broadcast_object(decision)


def decide(model: nn.Module, config: SensiConfig, inputs: RunInputs, reach: Reach) -> Decision:
    """Scores the units, makes the plan and refits, inside `calibration.preserved`. Fills in `config.rank`."""
    targets, anatomy, saved_values = reach
    limits = _limits_on_units(model, config, anatomy)
    batches = read = None
    if inputs.calibration is not None:
        to_score = max(config.calibration_steps, config.priming_steps)  # as in `compute_scores`
        batches = materialize(inputs.calibration, max(to_score, batches_to_refit(config)))
        read = batches[:to_score]
        _warn_of_lost_inputs(config, batches)
    scores = inputs.scores
    if scores is None and (limits != Budget() or config.retention or config.tuned_layers):
        scores = score_units(model, anatomy, read, config.scoring_options(inputs.loss_fn))
        if (receive := _receiver.get()) is not None:
            receive(scores)
    elif scores is None:  # nothing is ranked, but tokens are tuned only if they are in the data
        unranked = {g.name: g.zeros() + (g.kind == "token") for g in anatomy.groups}
        length = mean_length(model, anatomy, read, inputs.loss_fn) if read else None
        scores = Scores(only_seen(anatomy, unranked, batches), "none", length)
    plan = make_plan(
        anatomy,
        scores,
        limits if limits != Budget() else None,
        targets=targets,
        sequence_length=config.sequence_length or scores.sequence_length or image_tokens(model) or 128,
        **config.width_options,
        always_trained=saved_values + bias_values(model, config, targets) + low_rank_values(model, config, targets),
        tunes=config.tunes_units,
        retention=config.retention,
        biases_apart="biases" in (config.also_train or ()),
        tuned_layers=config.tuned_layers,
        latency=config.tables,
    )
    if config.phase == "cut":  # the cuts come after a part of the training, which would be lost
        check_fits(anatomy, config.limits, plan.sequence_length, latency=config.tables, **config.width_options)
        if not exceeds(plan, config):
            warnings.warn(
                f"The whole model meets the budget {config.budget!r}, so the cuts of the schedule remove nothing. "
                f"Give a smaller limit.",
                stacklevel=2,
            )
    _warn_of_nothing_learned(scores, plan)
    fit_rank(model, config, plan, saved_values)
    plan = _counted(model, config, plan, saved_values)
    refitted: Refitted = {}
    if is_refitted(model, config, anatomy, config.refit) and batches is not None and plan.trims:
        model.eval()
        refitted = refit(model, plan, batches[: batches_to_refit(config)], inputs.loss_fn, distributed.rank() == 0)
    head = scores.head or (head_to_train(model, batches) if batches is not None else {})
    ranked = scores if scores.method != "none" else None
    return Decision(plan, slices_of(model, config, plan), refitted, head, ranked)


def _counted(model: nn.Module, config: SensiConfig, plan: Plan, saved_values: int) -> Plan:
    """The plan with an exact number of values that are trained beside its units."""
    return replace(plan, always_trained=saved_values + trained_beside_units(model, config, plan))


@contextmanager
def scores_sent_to(receive: Callable[[Scores], object]) -> Iterator[None]:
    """Inside the block, a wrap calls `receive` with its scores as soon as it has computed them.

    Scores take most of the time of a wrap, and the plan and the refit after them can fail or be interrupted.
    """
    token = _receiver.set(receive)
    try:
        yield
    finally:
        _receiver.reset(token)


def _limits_on_units(model: nn.Module, config: SensiConfig, anatomy: Anatomy) -> Budget:
    """The limits under which units are chosen when the model is wrapped."""
    limits = config.limits
    if limits.trims and not anatomy.trimmable:
        raise nothing_to_trim(model)
    if config.chooses_nothing and any(is_quantized(module) for module in model.modules()):
        raise SensiError(
            "No budget was given and the base model is quantized. It cannot be trimmed, so every target would be "
            "trained whole in float32, which needs more memory than the model itself. Set a limit, such as "
            "budget={'trainable': 0.01}; {'trainable': 1.0} trains everything."
        )
    elif config.chooses_nothing:
        message = "No budget was given and the model has nothing to trim: all targeted modules are tuned whole."
        warnings.warn(message, stacklevel=2)
    if config.phase == "cut":
        return Budget()  # the cuts come during training
    if limits.trainable is None and all(limit in (None, 1) for limit in asdict(limits).values()):
        return Budget()  # everything stays and is tuned, so nothing needs to be scored
    return limits if config.tunes_units else replace(limits, trainable=None)  # the rank follows from that limit


def batches_to_refit(config: SensiConfig) -> int:
    """How many batches a refit reads if training follows it."""
    return math.ceil(REFIT_PER_SCORED * config.calibration_steps)


def is_refitted(model: nn.Module, config: SensiConfig, anatomy: Anatomy, wanted: bool | None) -> bool:
    """Whether trimmed blocks are refitted. The fit moves output biases, so the adapter must hold these.

    `wanted` is the user's choice, `None` for the default. Raises `SensiError` if the choice is not possible.
    """
    has_biases = any(bias_of(linear_of(model, group.output)) is not None for group in anatomy.trimmable)
    fits = not has_biases or bool({"biases", "output_biases"} & set(config.also_train or ()))
    if wanted and not fits:
        raise SensiError("`refit=True` moves the output biases: add 'output_biases' to `also_train`.")
    return wanted if wanted is not None else config.limits.trainable is None and fits


def _warn_of_nothing_learned(scores: Scores, plan: Plan) -> None:
    if plan.trims and scores.learned is not None and scores.learned < ENOUGH:
        warnings.warn(
            f"Priming has taught the model hardly anything of this task: its loss is {max(0, scores.learned):.1%} "
            "smaller than with the labels of other examples. A ranking from such a model says little, and a model "
            "that is trimmed by it can lose half of its quality. Trim it when it has learned the task: during the "
            "training with `recipes.sensi_bert(..., trim='late')` (the command's --late), or after it with `trim()` "
            "(--thorough).",
            stacklevel=2,
        )


def _warn_of_lost_inputs(config: SensiConfig, batches: list[Mapping[str, Any]]) -> None:
    """Warns about token types for question answering: PEFT's model accepts and ignores them (PEFT 0.21)."""
    if config.task_type != "QUESTION_ANS":
        return
    types = [batch.get("token_type_ids") for batch in batches]
    if any(isinstance(ids, torch.Tensor) and bool(ids.any()) for ids in types):
        warnings.warn(
            "The calibration batches have `token_type_ids`, which PEFT's model for task_type='QUESTION_ANS' ignores. "
            "The adapter would be scored and merged with token types, but trained without them. Leave them out of "
            "all batches, or set task_type=None.",
            stacklevel=2,
        )


@contextmanager
def others_disabled(model: nn.Module) -> Iterator[None]:
    """Disables all other adapters inside the block, because a new adapter is scored on the base model."""
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
        # `enable_adapters` makes all active adapters trainable, even those that were loaded for inference.
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
