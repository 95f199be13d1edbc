"""TODO docstring."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.linears import bias_of, features
from ..anatomy.modules import (
    linear_of,
)
from ..anatomy.units import Group, Side
from ..layers.compression import KINDS
from ..layers.slices import Slice
from ..planning.budget import allowance
from ..planning.plan import Plan
from ..utils.errors import BudgetError, SensiError
from ..utils.states import FROZEN, TUNED
from .config import SensiConfig


def slices_of(model: nn.Module, config: SensiConfig, plan: Plan) -> dict[str, tuple[Slice, Group]]:
    """For each module that the plan concerns: its slice and its group."""
    slices = {}
    if config.rank is not None:
        largest = max((max(features(linear_of(model, name))) for name in plan.targets), default=0)
        if config.rank > largest:
            raise SensiError(f"`rank` must be at most {largest}, the longest side of a targeted Linear.")
    for group in plan.anatomy.groups:
        states = plan.of(group)
        tuned, frozen = np.flatnonzero(states == TUNED), np.flatnonzero(states == FROZEN)
        for module in group.modules:
            sides = [side for side in group.sides if side.module == module]
            slice_ = _slice(model, group, sides, tuned, frozen, config, module in plan.targets)
            if not slice_.idle:
                slices[module] = (slice_, group)
    return slices


def trained_values(model: nn.Module, slices: dict[str, tuple[Slice, Group]]) -> int:
    """Number of values that the slices train."""
    total = 0
    for name, (slice_, _) in slices.items():
        linear = linear_of(model, name)
        out, into = slice_.kept_shape(torch.Size(features(linear)))
        total += slice_.tuned_count * (into if slice_.dim == 0 else out)
        if bias_of(linear) is not None:
            total += out if slice_.train_bias else slice_.tuned_count * (slice_.dim == 0)
        total += slice_.rank * (out + into) + min(slice_.sparse, out * into)
        total += out * into * slice_.learns_mask
    return total


def fit_rank(model: nn.Module, config: SensiConfig, plan: Plan, always_trained: int) -> None:
    """Fills in the rank of a low-rank update that follows from a `trainable` limit."""
    if config.update == "low_rank" and config.rank is None:
        config.rank = rank_that_fits(model, config, plan, always_trained)


def rank_that_fits(model: nn.Module, config: SensiConfig, plan: Plan, always_trained: int) -> int:
    """The largest rank on all targets that a `trainable` limit allows. Raises `BudgetError` when there is none."""
    limit = config.limits.trainable
    assert limit is not None
    one = copy.copy(config)
    one.rank = 1
    slices = slices_of(model, one, plan)
    shapes = [p.kept_shape(torch.Size(features(linear_of(model, name)))) for name, (p, _) in slices.items() if p.rank]
    price = sum(sum(shape) for shape in shapes)
    biases = trained_values(model, slices) - price
    allowed = allowance(limit, plan.anatomy.total_params) - always_trained - biases
    if not price or allowed < price:
        raise BudgetError(
            f"The `trainable` limit allows {max(0, allowed):,} values, but a low-rank update of all targets needs at "
            f"least {price:,}: raise it, or choose fewer `target_modules`."
        )
    return min(allowed // price, max(max(shape) for shape in shapes))


def trained_beside_units(model: nn.Module, config: SensiConfig, plan: Plan) -> int:
    """What the slices train more than the plan's tuned units: biases, low-rank terms, single values, scores."""
    return trained_values(model, slices_of(model, config, plan)) - replace(plan, always_trained=0).trainable_params


def _slice(
    model: nn.Module,
    group: Group,
    sides: list[Side],
    tuned: np.ndarray,
    frozen: np.ndarray,
    config: SensiConfig,
    targeted: bool,
) -> Slice:
    linear = linear_of(model, sides[0].module)
    units = np.concatenate([tuned, frozen])
    # What is not trained row by row or column by column is stored in the order of units. Where nothing is trimmed,
    # that is the base's own, so that the same file fits a quantized base, whose units cannot change places.
    in_order = config.update != "dense" or "biases" in (config.also_train or ())
    if not group.trimmable or (in_order and len(units) == group.size):
        units = np.sort(units)
    kept = np.concatenate([side.positions(units) for side in sides])
    is_tuned = np.concatenate([np.repeat(np.isin(units, tuned), side.width) for side in sides]) & targeted
    count = int(is_tuned.sum())
    prefix = bool(is_tuned[:count].all())
    also, update = config.also_train or (), (config.update or "dense").split("+")
    finished = ("output_biases" if len(tuned) else "removed_biases") in also and sides[0].dim == 1 and not len(frozen)
    sizes: dict[str, Any] = {}
    if group.kind == "token":
        update = ["dense"]
    if targeted and "low_rank" in update:
        sizes["rank"] = config.rank
    if targeted and "sparse" in update:
        sizes |= {"sparse": config.sparse, "support": config.support or "magnitude", "seed": config.seed}
    # A mask on the base (DSEE) reaches all Linears of the blocks; one that is learned only those that are targeted.
    if (
        config.sparsity is not None
        and group.kind != "token"
        and (targeted or ("mask" not in update and group.in_block))
    ):
        sizes |= {"sparsity": config.sparsity, "learns_mask": "mask" in update and not config.compressed}
        sizes["drawn_later"] = bool(config.schedule and config.schedule["phase"] == "draw_mask")
    cuts = bool(config.schedule and config.schedule["phase"] == "cut")
    if config.compressed in KINDS:
        sizes["compressed"] = config.compressed
    return Slice(
        gated=cuts and group.trimmable and sides[0].module == group.output,
        dim=sides[0].dim,
        size=features(linear)[sides[0].dim],
        kept=torch.from_numpy(kept),
        tuned=count if prefix else torch.from_numpy(np.flatnonzero(is_tuned)),
        units=len(units),
        train_bias=bias_of(linear) is not None and targeted and (finished or "biases" in also),
        **sizes,
    )
