"""From a config and a model to a decision: what is targeted, what else is trained, how, and under which plan."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .anatomy.build import build_anatomy
from .anatomy.linears import check_quantised, is_plain
from .anatomy.modules import base_of, linear_of, task_head
from .checkpoint import check_fingerprint, fingerprint
from .config import SensiConfig
from .decide import Decision, decide_together
from .pieces import (
    also_saved,
    anatomy_of,
    check_tokens,
    fit_rank,
    name_targets,
    refuse_tied,
    targets_of,
    usual_update,
    usually_also_trained,
    values_of,
)
from .planning.plan import Plan
from .scoring.calibration import preserved
from .utils import distributed
from .wrap import save_whole


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
    check_quantised(linears, config.update, config.sparsity, config.keep_base)
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
    config.fingerprint = distributed.from_0(fingerprint(model, anatomy)) or config.fingerprint
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
