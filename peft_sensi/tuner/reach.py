"""Which modules of a model an adapter reaches: fills in the config's fields about this, and checks the modules."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..anatomy.build import build_anatomy, nothing_to_trim
from ..anatomy.linears import is_plain
from ..anatomy.modules import base_of, linear_of, name_in_base
from ..anatomy.units import Anatomy
from ..utils.errors import SensiError
from .admission import (
    check_plain,
    check_quantized,
    check_saved,
    check_saved_whole,
    head_to_save,
    is_partly_frozen,
    leave_frozen,
    warn_of_frozen_linears,
    warn_of_statistics,
    warn_of_unknown_names,
)
from .config import RunInputs, SensiConfig
from .loading import prefix_of
from .targets import (
    add_modules_to_save,
    also_saved,
    anatomy_of,
    check_targets,
    default_also_train,
    default_update,
    name_saved_modules,
    name_targets,
    saved_whole,
    targets_of,
    tied_to_embeddings,
)


class Reach(NamedTuple):
    """What an adapter may change.

    `targets` are the modules that may be tuned, and `anatomy` has the units of the model. `saved_values` is the number
    of values of base modules beside the task head that are trained whole.
    """

    targets: frozenset[str]
    anatomy: Anatomy
    saved_values: int


def reach_of(model: nn.Module, config: SensiConfig, inputs: RunInputs) -> Reach | None:
    """Fills in `target_modules`, `modules_to_save`, `also_train` and `update` of the config, and checks the modules.

    Returns `None` if the config targets no module; PEFT raises its own error for that.
    """
    blocks = build_anatomy(model, (), config.layouts())
    if not config.from_file:  # a file lists what it holds
        add_modules_to_save(config, head_to_save(model))
        name_saved_modules(model, config)
    if not _choose_targets(model, config, blocks):
        return None
    partly_frozen = is_partly_frozen(model, targets_of(model, config))
    but_frozen = partly_frozen and config.also_train is None
    if config.also_train is None:
        config.also_train = default_also_train(model, config, inputs, blocks, partly_frozen)
    saved = [] if config.from_file else also_saved(model, blocks, config, but_frozen)
    add_modules_to_save(config, saved)
    check_saved(model, config)
    saved_values = sum(p.numel() for name in saved for p in base_of(model.get_submodule(name)).parameters())
    targets = name_targets(model, config)
    anatomy = anatomy_of(model, config, targets)
    check_targets(model, config, targets, anatomy)
    if config.plan is None:
        warn_of_frozen_linears(model, blocks, targets, config)
        warn_of_statistics(model, config)
        whole_blocks = config.limits.trims or config.chooses_nothing or config.sparsity is not None
        whole_blocks |= config.phase == "cut"
        check_saved_whole(model, config, list(anatomy.trimmable) if whole_blocks else [])
        warn_of_unknown_names(model, config)
        # The modules of a group are changed together: tuned units come first in all of them.
        reached = [g for g in anatomy.groups if targets & set(g.modules) or (whole_blocks and g.in_block)]
        check_plain(model, {name for group in reached for name in group.modules})
    if config.update is None:
        config.update = default_update(model, config, inputs, anatomy, targets, saved_values)
    linears = [linear_of(model, name) for group in anatomy.groups for name in group.modules]
    check_quantized(linears, config)
    return Reach(targets, anatomy, saved_values)


def _choose_targets(model: nn.Module, config: SensiConfig, blocks: Anatomy) -> bool:
    """Fills in `target_modules`. Returns whether they match anything."""
    was_default = config.target_modules is None
    if was_default:
        names = {module for group in blocks.groups for module in group.modules}
        config.target_modules = names or "all-linear"  # type: ignore[assignment]
    was_text = isinstance(config.target_modules, str)
    _maybe_include_all_linear_layers(config, model)
    was_all = was_text and isinstance(config.target_modules, set)
    if was_all and isinstance(config.target_modules, set):  # "all-linear" has become a set of names
        # PEFT leaves out an output layer that the model names as such; BLIP's is tied, and is not named.
        config.target_modules -= set(tied_to_embeddings(model, config.target_modules))
        special = {n for n in config.target_modules if not is_plain(base_of(model.get_submodule(n)))}
        if special:
            warnings.warn(
                f"{len(special)} modules are not tuned, such as {min(special)!r}: they are subclasses of Linear whose "
                f"forward pass computes something else.",
                stacklevel=2,
            )
        config.target_modules = set(map(name_in_base, config.target_modules - special))
        # PEFT saves both embeddings of a model if `lm_head` is a target, and models of speech (CTC) have none.
        config.target_modules -= set(filter(saved_whole(model, config), config.target_modules))
    if not config.from_file and (targets := targets_of(model, config)):
        staying = leave_frozen(model, set(targets), chosen=not (was_default or was_all))
        if staying != targets:
            config.target_modules = staying  # type: ignore[assignment]
    if targets_of(model, config):
        return True
    if (was_default or was_all) and not config.exclude_modules:
        if config.limits.trims:
            raise nothing_to_trim(model)
        raise SensiError(
            f"{type(model).__name__} has no Linear outside of its task head, so nothing of it can be tuned. If it has "
            f"an embedding, name that in `target_modules`."
        )
    bare = config.own_copy()
    bare.modules_to_save = None
    if config.target_modules and not config.exclude_modules and not targets_of(model, bare):
        # PEFT counts a task head that is saved whole as excluded; its message then does not name the targets.
        advice = "Please check the target modules and try again."
        if prefix := prefix_of(config, model):
            advice = (
                f"The adapter was made for a model with a head, and {type(model).__name__} is only the base model "
                f"inside of it: load the adapter on the model with the head, and use its `{prefix[:-1]}`."
            )
        elif config.from_file:
            raise NoMatchingPeftModuleError(
                f"The adapter was made for another kind of model: {type(model).__name__} has no module "
                f"{min(config.target_modules)!r}. Load the adapter on the base model that it names."
            )
        if blocks.groups:
            advice += f" This model has, for example, {blocks.groups[0].modules[0]!r}."
        raise NoMatchingPeftModuleError(
            f"Target modules {config.target_modules} not found in the base model. {advice}"
        )
    return False
