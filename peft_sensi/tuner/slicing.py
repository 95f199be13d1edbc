"""A plan and a config go in; a `Slice` for each Linear comes out, and the number of values that the slices train.

A slice says which rows or columns of a Linear an adapter keeps and trains (see `layers.slices`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.linears import bias_of, features
from ..anatomy.modules import linear_of
from ..anatomy.units import Group
from ..layers.compression import KINDS
from ..layers.layer import SensiLayer
from ..layers.slices import Slice, tensor_specs
from ..layers.updates import default_scale
from ..planning.budget import allowance
from ..planning.plan import Plan
from ..utils.errors import BudgetError, SensiError
from ..utils.states import FROZEN, TRIMMED, TUNED
from .config import SensiConfig


Slices = dict[str, tuple[Slice, Group]]  # by the module's name in the base model


def slices_of(model: nn.Module, config: SensiConfig, plan: Plan) -> Slices:
    """The slice and the group of each module that the adapter changes."""
    linears = {name: linear_of(model, name) for group in plan.anatomy.groups for name in group.modules}
    if config.rank is not None:
        largest = max((max(features(linears[name])) for name in plan.targets), default=0)
        if config.rank > largest:
            raise SensiError(
                f"`rank` is {config.rank}, but the longest side of a targeted Linear is {largest}: `rank` must be at "
                f"most {largest}."
            )
    if config.sparse is not None and not config.from_file:  # a file may be of a version that did not check it
        largest = max((math.prod(features(linears[name])) for name in plan.targets), default=0)
        if config.sparse > largest:
            raise SensiError(
                f"`sparse` is {config.sparse}, but the largest targeted Linear has {largest} values: `sparse` must be "
                f"at most {largest}."
            )
    slices = {}
    for group in plan.anatomy.groups:
        states = plan.of(group)
        tuned, frozen = np.flatnonzero(states == TUNED), np.flatnonzero(states == FROZEN)
        for module in group.modules:
            slice_ = _slice(
                _shape_of(model, module), linears[module], module, group, tuned, frozen, config, module in plan.targets
            )
            if not slice_.idle:
                slices[module] = (slice_, group)
    return slices


def config_after(config: SensiConfig, plan: Plan) -> SensiConfig:
    """A copy of the config for a plan with fewer units. Its cuts are finished.

    If all units of a sublayer are trimmed, its output bias stays and has been trained, so `also_train` gets
    "removed_biases".
    """
    after = copy.copy(config)
    after.plan = plan.to_dict()
    also = config.also_train or []
    if "output_biases" in also and any((plan.of(group) == TRIMMED).all() for group in plan.anatomy.trimmable):
        after.also_train = list(dict.fromkeys([*also, "removed_biases"]))
    if config.phase == "cut":
        after.schedule = None  # the other phases can be stepped again in a further training
    return after


def trained_values(slices: Slices) -> int:
    """Number of values that the slices train, or have trained before they were compressed."""
    specs = (spec for slice_, _ in slices.values() for spec in tensor_specs(slice_, decoded=True).values())
    return sum(math.prod(spec.shape) for spec in specs if spec.trained)


def trained_beside_units(model: nn.Module, config: SensiConfig, plan: Plan) -> int:
    """Number of trained values that are no tuned units of the plan: biases, low-rank terms, masks and so on."""
    return trained_values(slices_of(model, config, plan)) - replace(plan, always_trained=0).trainable_params


def fit_rank(model: nn.Module, config: SensiConfig, plan: Plan, always_trained: int) -> None:
    """Fills in the rank and the scale of a low-rank update, as far as the config has none.

    The rank is the largest that the `trainable` limit allows, the same for all targets. `always_trained` is the number
    of values that are trained outside the slices. Other updates are not scaled, because their learning rate is that of
    their dense or sparse part.
    """
    if config.update != "low_rank":
        return
    if config.rank is None:
        config.rank = _largest_rank(model, config, plan, always_trained)
    if config.scale is None:
        config.scale = default_scale(config.rank)


def _largest_rank(model: nn.Module, config: SensiConfig, plan: Plan, always_trained: int) -> int:
    limit = config.limits.trainable
    assert limit is not None  # checked by `SensiConfig`
    rank_1 = copy.copy(config)
    rank_1.rank = 1
    slices = slices_of(model, rank_1, plan)
    shapes = [slice_.kept_shape for slice_, _ in slices.values() if slice_.rank]
    price = sum(sum(shape) for shape in shapes)
    allowed = allowance(limit, plan.anatomy.total_params) - always_trained - (trained_values(slices) - price)
    if not price or allowed < price:
        raise BudgetError(
            f"The limit on trained values allows {max(0, allowed):,}, but a low-rank update of all targets needs at "
            f"least {price:,}.",
            "Raise `trainable`, or choose fewer `target_modules`.",
            limits=["trainable"],
        )
    return min(allowed // price, max(max(shape) for shape in shapes))


def _shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """Shape of a base weight at the time of the wrap: with `keep_base=False`, less may be left of it."""
    module = model.get_submodule(name)
    return (
        (module.out_features, module.in_features)
        if isinstance(module, SensiLayer)
        else features(linear_of(model, name))
    )


def _slice(
    base_shape: tuple[int, int],
    linear: nn.Module,
    name: str,
    group: Group,
    tuned: np.ndarray,
    frozen: np.ndarray,
    config: SensiConfig,
    targeted: bool,
) -> Slice:
    """The slice of one module of a group; `tuned` and `frozen` are the group's units with these states."""
    sides = [side for side in group.sides if side.module == name]
    also_train, update = config.also_train or (), ["dense"] if group.kind == "token" else config.parts
    units = np.concatenate([tuned, frozen])
    # Low-rank terms, single values, masks and whole biases are stored in the order of the units. If nothing is
    # trimmed, that is the base's own order. So the file also fits a quantized base, whose units cannot change places.
    in_order = config.update != "dense" or "biases" in also_train
    if not group.trimmable or (in_order and len(units) == group.size):
        units = np.sort(units)
    kept = np.concatenate([side.positions(units) for side in sides])
    is_tuned = np.concatenate([np.repeat(np.isin(units, tuned), side.width) for side in sides]) & targeted
    count = int(is_tuned.sum())
    whole_bias = "output_biases" if len(tuned) else "removed_biases"
    finished = whole_bias in also_train and sides[0].dim == 1 and not len(frozen)
    options: dict[str, Any] = {}
    if targeted and "low_rank" in update:
        options |= {"rank": config.rank, "scale": 1.0 if config.scale is None else float(config.scale)}
    if targeted and "sparse" in update:
        options |= {"sparse": config.sparse, "support": config.support or "magnitude", "seed": config.seed}
    # A fixed mask (DSEE) is applied to all Linears of the blocks, a learned mask only to targeted Linears.
    masked = targeted or ("mask" not in update and group.in_block)
    if config.sparsity is not None and group.kind != "token" and masked:
        options |= {"sparsity": config.sparsity, "learns_mask": "mask" in update and not config.compressed}
        options["drawn_later"] = config.phase == "draw_mask"
    if config.compressed in KINDS:
        options["compressed"] = config.compressed
    has_bias = bias_of(linear) is not None
    return Slice(
        base_shape=base_shape,
        has_bias=has_bias,
        dim=sides[0].dim,
        kept=torch.from_numpy(kept),
        tuned=count if is_tuned[:count].all() else torch.from_numpy(np.flatnonzero(is_tuned)),
        units=len(units),
        train_bias=has_bias and targeted and (finished or "biases" in also_train),
        gated=config.phase == "cut" and group.trimmable and name == group.output,
        **options,
    )
