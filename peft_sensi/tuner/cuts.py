"""Cuts during training. A cut closes units: a gate sets them to zero. Closed units are removed later.

Until then, all tensors keep their shapes. `Schedule` removes the units after the last cut if the optimizer can follow
(see `carry`), otherwise when training is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.linears import matrix
from ..anatomy.modules import linear_of
from ..anatomy.units import Anatomy, Group
from ..layers.functional import Pair
from ..layers.layer import layers_of
from ..layers.slices import Slice, positions_in
from ..planning.allocate import check_fits
from ..planning.budget import Budget, allowance
from ..planning.costs import costs_of
from ..planning.plan import Plan
from ..scoring.calibration import LossFn, preserved
from ..scoring.scores import Scores
from ..utils import distributed
from ..utils.errors import SensiError
from ..utils.states import TRIMMED
from ..utils.undo import surely
from .carry import copies_follow
from .config import SensiConfig
from .in_place import merged_in_place
from .latencies import exceeds, read_latency
from .rescoring import trained_options
from .slicing import config_after, trained_beside_units
from .stages import choose_units, same_everywhere
from .targets import plan_of


def close_units(
    root: nn.Module,
    config: SensiConfig,
    adapter_name: str,
    batches: list[Mapping[str, Any]] | None,
    progress: float,
    trains_on: bool,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Scores:
    """Scores the trained model and closes units until it meets interim limits. Returns the scores.

    The limits go from the whole prunable part (`progress` 0) to the budget (`progress` 1). `trains_on` says whether
    the model is trained afterwards.

    Closed units stay closed. Only the last cut (`progress` 1) may open units again: those that still fit when no
    open unit does, so that the budget is used up. The others are refitted to the model before the cut (see
    `choose_units`), and copies that the `optimizer` holds of their values change with them.
    """
    read_latency(config)
    before = plan_of(root, config)
    gates = gates_of(root, adapter_name)
    opened = before.without(_closed_units(before, gates))
    limits = _on_the_way(config, before.anatomy, before.sequence_length, progress)
    movement = None
    if config.score == "movement":
        movement = Scores(trained_movement(root, before.anatomy, adapter_name), "movement")
    options = trained_options(config, loss_fn)
    refits = (config.schedule or {}).get("refit", config.refit)
    with preserved(root), merged_in_place(root, adapter_name):
        root.eval()
        choice = choose_units(
            root,
            config,
            before,
            limits,
            batches,
            options,
            refits=refits,
            opened=opened,
            may_reopen=progress >= 1,
            trains_on=trains_on,
            given=movement,
        )
    choice = same_everywhere(choice)
    layers = layers_of(root, adapter_name)
    parts = (layers[name].part(part, adapter_name) for name in choice.refitted for part in ("weight", "bias"))
    refitted = [part for part in parts if part is not None]
    with copies_follow(optimizer, refitted), _values_restored_on_error([*gates.values(), *refitted]), torch.no_grad():
        distributed.gather("cutting")  # the copies of the values may have been too large for one process
        for group in before.anatomy.trimmable:
            kept = choice.plan.of(group) != TRIMMED
            if group.output in gates:
                gate = gates[group.output]
                gate.copy_(torch.from_numpy(kept.astype("uint8")))
                distributed.broadcast(gate)
            reopened = kept & (opened.of(group) == TRIMMED)
            for name in group.modules:
                if name in choice.refitted:
                    _add_change(layers[name], adapter_name, group, name, kept, reopened, choice.refitted[name])
        closed = {name: gate.cpu().tolist() for name, gate in gates.items()}
        distributed.check_equal("its cut", closed, "The processes must have the same model.")
    return choice.scores


def check_cut(root: nn.Module, config: SensiConfig, adapter_name: str) -> None:
    """Raises `BudgetError` if a cut cannot meet the limits, or if the latency table of a limit is missing.

    And `SensiError` if the adapter was made without a schedule, so that no unit can be closed.
    """
    if not gates_of(root, adapter_name):
        raise SensiError(
            f"The adapter {adapter_name!r} was made without the phase 'cut', which needs more in each layer: set "
            f"`schedule` in the config that wraps the model, or call `trim` after the training."
        )
    read_latency(config)
    plan = plan_of(root, config)
    check_fits(plan.anatomy, config.limits, plan.sequence_length, latency=config.tables, **config.width_options)


@contextmanager
def _values_restored_on_error(tensors: list[torch.Tensor]) -> Iterator[None]:
    """If the block raises an error or is interrupted, these tensors have their values from before it."""
    values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    try:
        yield
    except BaseException:
        surely(restore)
        raise


def _add_change(
    layer: Any, adapter_name: str, group: Group, name: str, kept: np.ndarray, reopened: np.ndarray, change: Pair
) -> None:
    """Adds the change of a refit to the trained weight of the Linear `name`, on the part of the `kept` units."""
    slice_: Slice = layer.sensi_slices[adapter_name]
    weight, bias = layer.part("weight", adapter_name), layer.part("bias", adapter_name)

    def positions(units: np.ndarray) -> torch.Tensor:
        return positions_in(slice_.tuned_positions, group.positions(name, units)).to(weight.device)

    if name == group.output:  # a unit that is opened again contributed nothing to the model that the refit saw
        weight.index_fill_(1, positions(reopened), 0.0)
    weight.index_add_(slice_.dim, positions(kept), change[0].to(weight))
    distributed.broadcast(weight)
    if change[1] is None:
        return
    if slice_.dim == 0:
        bias.index_add_(0, positions(kept), change[1].to(bias))
    else:
        bias.add_(change[1].to(bias))
    distributed.broadcast(bias)


def gates_of(root: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The gates (uint8, one for each unit) of all output projections, by module name."""
    gates = {name: layer.part("gate", adapter_name) for name, layer in layers_of(root, adapter_name).items()}
    return {name: gate for name, gate in gates.items() if gate is not None}


@torch.no_grad()
def trained_movement(root: nn.Module, anatomy: Anatomy, adapter_name: str) -> dict[str, torch.Tensor]:
    """L1 norm of the change that training made to the weights of each unit so far (FAR, arXiv 2205.01541).

    An update may reach one kind of unit only (DSEE, arXiv 2111.00160, changes queries and values). The groups that it
    does not reach are then ranked by the L1 norm of their weights, scaled to the same mean score for each parameter.

    Returns:
        For each group one number (float32) for each unit.
    """
    layers, values, untouched = layers_of(root, adapter_name), {}, {}
    for group in anatomy.groups:
        moved, size = group.zeros(), group.zeros()
        before = {name: matrix(linear_of(root, name)).float() for name in group.modules}
        # A closed gate must not count as movement.
        after = {n: layers[n].get_adapted_weight(adapter_name, masked=False)[0].float() for n in before if n in layers}
        for side in group.sides:
            if side.module in after:
                change = after[side.module] - before[side.module]
                moved += side.per_unit(change, group.size).abs().sum(1).cpu()
            size += side.per_unit(before[side.module], group.size).abs().sum(1).cpu()
        values[group.name] = moved
        if not moved.any():
            untouched[group.name] = size
    costs = {g.name: g.size * g.unit_params for g in anatomy.groups}
    touched = values.keys() - untouched.keys()
    if touched and untouched:
        rate = sum(float(values[n].sum()) for n in touched) / sum(costs[n] for n in touched)
        other = sum(float(size.sum()) for size in untouched.values()) / sum(costs[n] for n in untouched)
        untouched = {name: size * (rate / max(other, 1e-30)) for name, size in untouched.items()}
    return values | untouched


def open_units(root: nn.Module, config: SensiConfig, adapter_name: str) -> Plan:
    """The plan that trims all closed units; the others keep their states."""
    before = plan_of(root, config)
    closed = _closed_units(before, gates_of(root, adapter_name))
    return recounted(root, config, before, before.without(closed))


def is_cut(root: nn.Module, config: SensiConfig, adapter_name: str, progress: float) -> bool:
    """Whether the open units meet the interim limits of a cut (see `close_units`)."""
    plan = open_units(root, config, adapter_name)
    return not exceeds(plan, config, _on_the_way(config, plan.anatomy, plan.sequence_length, progress))


def _closed_units(plan: Plan, gates: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """For each group with a gate a boolean mask `[units]` of the units that it has closed."""
    return {g.name: gates[g.output].cpu().numpy() == 0 for g in plan.anatomy.trimmable if g.output in gates}


def recounted(root: nn.Module, config: SensiConfig, before: Plan, after: Plan) -> Plan:
    """The plan `after`, which trims more units than `before`, with the trained values counted again."""
    saved_values = before.always_trained - trained_beside_units(root, config, before)
    values = trained_beside_units(root, config_after(config, after), after)
    return replace(after, always_trained=saved_values + values)


def _on_the_way(config: SensiConfig, anatomy: Anatomy, sequence_length: int, progress: float) -> Budget:
    """Limits as counts (for latencies: times): the whole model at progress 0, the budget at progress 1."""
    amounts = {}
    for name, cost in costs_of(config.limits, anatomy, sequence_length, config.tables).items():
        goal = min(cost.whole, allowance(getattr(config.limits, name), cost.whole))
        amounts[name] = goal if progress >= 1 else max(goal, int(cost.whole - progress * (cost.whole - goal)))
    return Budget.of_amounts(amounts)
