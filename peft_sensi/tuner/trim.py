"""Trims a trained adapter: chooses units in stages, fits the kept ones to the untrimmed model, removes the others.

The module `stages` chooses and fits.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from ..anatomy.build import nothing_to_trim
from ..anatomy.linears import not_trimmable
from ..layers.layer import layers_of
from ..planning.allocate import check_fits
from ..planning.budget import Budget
from ..planning.costs import tables_by_limit
from ..planning.plan import Plan
from ..scoring.calibration import ScoringOptions, preserved
from ..scoring.criteria import UNPRIMED_METHODS
from ..scoring.lengths import mean_length
from ..scoring.methods import METHODS
from ..utils import distributed, replicas
from ..utils.checks import check_types
from ..utils.errors import BudgetError, SensiError
from .combinations import recheck
from .config import RunInputs, SensiConfig
from .cuts import recounted
from .in_place import merged_in_place
from .latencies import exceeds, read_latency
from .rescoring import read_batches, trained_options
from .stages import Choice, choose_units, kept_units, same_everywhere
from .wrapping import shrink


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
) -> Choice | None:
    """Carries out `SensiModel.trim`. If it fails, model and config are as they were.

    They also stay as they are, with a warning, if the adapter meets the budget already. The result is then `None`.
    """
    plan, fields = config.plan, (config.budget, config.latency, config.tables)
    try:
        recheck(config)
        limits = _check(root, config, adapter_name, before, budget, score)
        check_types({"refit": refits})
        read_latency(config)  # the user may have set it
        if latency is not None:  # a table for one limit does not replace that for another
            config.tables = {**config.tables, **tables_by_limit(latency)}
        if refits and inputs.calibration is None:
            raise SensiError(
                "`refit=True` needs `calibration`: the kept units are fitted to the activations of its batches."
            )
        given = asdict(limits) | {"trainable": config.limits.trainable}
        config.budget = {name: limit for name, limit in given.items() if limit is not None}
        default = config.score if config.score in UNPRIMED_METHODS else "fisher"
        options = trained_options(config, inputs.loss_fn, score=score or default)
        trim = _decide(root, config, adapter_name, before, limits, inputs, options, refits)
        if trim is not None:
            shrink(root, config, adapter_name, trim.plan, trim.refitted)
        return trim
    finally:
        if config.plan is plan:  # an error or an interrupt may also come when the adapter is trimmed already
            config.budget, config.latency, config.tables = fields


def _check(root: nn.Module, config: SensiConfig, name: str, before: Plan, budget: Any, score: str | None) -> Budget:
    """The limits of a trim. Raises `SensiError` if the adapter, as it is now, cannot be trimmed like this."""
    limits = Budget.parse(budget)
    if any(layer.sensi_coded for layer in layers_of(root, name).values()):
        raise not_trimmable()
    if not before.anatomy.trimmable:
        if config.granularity == "unit":
            raise nothing_to_trim(root)
        raise SensiError(
            f"The adapter has granularity={config.granularity!r}: heads and neurons were not its units, so `trim()` "
            f"has nothing to remove. Merge it (`merge_and_unload()`), and wrap the merged model with a budget."
        )
    if limits.trainable is not None or not limits.trims:
        raise SensiError(
            "`trim()` removes units under limits on `params`, `flops` or latencies. It cannot change how many values "
            "are trained: leave the `trainable` limit out."
        )
    if score not in (None, *UNPRIMED_METHODS):
        primed = " is measured while a model is primed, and a trained adapter is not primed" * (score in METHODS)
        raise SensiError(f"score={score!r}{primed}: `trim` takes one of {', '.join(UNPRIMED_METHODS)}.")
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
) -> Choice | None:
    """Scores, plan and refitted values of the adapted model; `None` if nothing has to be removed.

    The model stays as it was.
    """
    has_data = inputs.calibration is not None
    given = {**asdict(limits), "score": options.score, "refit": refits, "calibration": has_data}
    given["latency table"] = {name: table.fingerprint for name, table in config.tables.items()}
    distributed.check_equal("its trim", given, "Give all processes the same.")
    with preserved(root), merged_in_place(root, adapter_name):
        # Inside `preserved`, because a shuffling data loader draws random numbers.
        batches = None if inputs.calibration is None else read_batches(inputs.calibration, config)
        root.eval()
        scored = (batches or [])[: options.calibration_steps]
        length = mean_length(root, before.anatomy, scored, options.loss_fn) if scored else None
        before = replace(before, sequence_length=config.sequence_length or length or before.sequence_length)
        if not exceeds(before, config):
            warnings.warn(
                f"Nothing is removed, because the adapter meets the budget already. It keeps "
                f"{before.params_share:.1%} of the base's prunable parameters and {before.flops_share:.1%} of its "
                f"prunable FLOPs, and limits refer to the base.",
                stacklevel=5,
            )
            return None
        _check_fits(config, adapter_name, before, limits)
        refits = config.refit if refits is None else refits
        choice = choose_units(root, config, before, limits, batches, options, refits=refits)
    distributed.check_equal("its plan", choice.plan.to_dict(), "The processes must have the same model.")
    return same_everywhere(replace(choice, plan=recounted(root, config, before, choice.plan)))


def _check_fits(config: SensiConfig, adapter_name: str, before: Plan, limits: Budget) -> None:
    """Raises `BudgetError` if the limits allow no plan. This is found out before the units are scored."""
    try:
        check_fits(
            before.anatomy,
            limits,
            before.sequence_length,
            available=kept_units(before),
            latency=config.tables,
            **config.width_options,
        )
    except BudgetError as error:
        if not error.settings:
            raise
        where = f"in the config of the adapter, which is `model.peft_config[{adapter_name!r}]`, before you trim it."
        names = " and ".join(f"`{name}`" for name in error.settings)
        raise BudgetError(
            error.problem, f"{error.advice} Set {names} {where}", limits=error.limits, settings=error.settings
        ) from None
