"""Cuts during training: units are closed by masks at fixed shapes, and leave the model once at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..anatomy.linears import matrix
from ..anatomy.modules import linear_of
from ..anatomy.units import Anatomy
from ..layers.layer import SensiLayer
from ..planning.allocate import make_plan
from ..planning.budget import Budget, allowance
from ..planning.plan import Plan
from ..scoring.calibration import LossFn, preserved
from ..scoring.compute import score_units
from ..scoring.options import ScoringOptions
from ..scoring.scores import Scores
from ..utils import distributed
from ..utils.states import TRIMMED
from .config import SensiConfig
from .slicing import trained_beside_units
from .targets import anatomy_of, plan_of, targets_of


def gates_of(root: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The gates (uint8, one a unit) of all output projections, by module."""
    layers = ((name, m) for name, m in root.named_modules() if isinstance(m, SensiLayer))
    gates = ((name, layer.part("gate", adapter_name)) for name, layer in layers)
    return {name: gate for name, gate in gates if gate is not None}


def close_units(
    root: nn.Module,
    config: SensiConfig,
    adapter_name: str,
    batches: list[Mapping[str, Any]] | None,
    progress: float,
    loss_fn: LossFn | None = None,
) -> None:
    """Rescores the model as it is and closes units until the share `progress` of the way to the budget is gone.

    Units that are closed stay closed, but for the last cut: it may open some again where no other one would fit, so
    that the budget is used up.
    """
    targets = targets_of(root, config)
    anatomy = anatomy_of(root, config, targets)
    if config.score == "movement":
        scores = Scores(trained_movement(root, anatomy, adapter_name), "movement")
    else:
        with preserved(root):
            root.eval()
            options = ScoringOptions(
                score=config.score,
                calibration_steps=config.calibration_steps,
                priming_steps=0,
                loss_fn=loss_fn,
                seed=config.seed,
                progress=False,
            )
            scores = score_units(root, anatomy, batches, options)
    gates = gates_of(root, adapter_name)
    opened = {g.name: gates[g.output].cpu().numpy() > 0 for g in anatomy.groups if g.output in gates}
    values = {name: value.numpy() * opened.get(name, 1) for name, value in scores.values.items()}
    length = plan_of(root, config).sequence_length
    plan = make_plan(
        anatomy,
        values,
        _on_the_way(config.limits, anatomy, length, progress),
        targets=targets,
        protected={name: mask.numpy() & opened.get(name, True) for name, mask in scores.protected.items()},
        available=opened if progress < 1 else None,
        sequence_length=length,
        multiple_of=config.multiple_of,
        min_units=config.units_to_stay,
        uniform=config.widths == "uniform",
    )
    distributed.gather("cutting")
    with torch.no_grad():
        for group in anatomy.trimmable:
            if group.output in gates:
                gate = gates[group.output]
                gate.copy_(torch.from_numpy((plan.of(group) != TRIMMED).astype("uint8")))
                distributed.broadcast(gate)
    closed = {name: gate.cpu().tolist() for name, gate in gates.items()}
    distributed.check_equal("its cut", closed, "The processes must have the same model.")


def trained_movement(root: nn.Module, anatomy: Anatomy, adapter_name: str) -> dict[str, torch.Tensor]:
    """L1 norm of what training has changed in the weights of each unit so far.

    Where an update reaches one kind of unit only (DSEE, arXiv 2111.00160: queries and values), the others are ranked
    among themselves by the L1 norm of their weights, at the same mean score per parameter.
    """
    values, untouched = {}, {}
    for group in anatomy.groups:
        moved, size = group.zeros(), group.zeros()
        weights = {name: _before_and_after(root, name, adapter_name) for name in group.modules}
        for side in group.sides:
            before, after = weights[side.module]
            moved += side.per_unit(after - before, group.size).abs().sum(1).cpu()
            size += side.per_unit(before, group.size).abs().sum(1).cpu()
        values[group.name] = moved
        if not moved.any():
            untouched[group.name] = size
    costs = {g.name: g.size * g.unit_params for g in anatomy.groups}
    rest = values.keys() - untouched.keys()
    if rest and untouched:
        rate = sum(float(values[n].sum()) for n in rest) / sum(costs[n] for n in rest)
        other = sum(float(size.sum()) for size in untouched.values()) / sum(costs[n] for n in untouched)
        untouched = {name: size * (rate / max(other, 1e-30)) for name, size in untouched.items()}
    return values | untouched


@torch.no_grad()
def _before_and_after(root: nn.Module, name: str, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A Linear's weight `[out, in]` in the base and with the adapter, float32."""
    layer, before = root.get_submodule(name), matrix(linear_of(root, name)).float()
    if isinstance(layer, SensiLayer) and adapter_name in layer.sensi_slices:
        return before, layer.get_adapted_weight(adapter_name)[0].float()
    return before, before


def open_units(root: nn.Module, config: SensiConfig, adapter_name: str) -> Plan:
    """The plan that trims all closed units and tunes the others.

    Where nothing is left of a sublayer, its output bias is, and it has been trained: `also_train` says so from now on.
    """
    before = plan_of(root, config)
    gates = gates_of(root, adapter_name)
    states = []
    for group in before.anatomy.groups:
        state = before.of(group).copy()
        if group.trimmable and group.output in gates:
            state[gates[group.output].cpu().numpy() == 0] = TRIMMED
        states.append(state.tobytes())
    after = replace(before, states=tuple(states))
    saved_whole = before.always_trained - trained_beside_units(root, config, before)
    also = config.also_train or []
    if "output_biases" in also and any((after.of(group) == TRIMMED).all() for group in after.anatomy.trimmable):
        config.also_train = list(dict.fromkeys([*also, "removed_biases"]))
    return replace(after, always_trained=saved_whole + trained_beside_units(root, config, after))


def exceeds(plan: Plan, limits: Budget) -> bool:
    """Whether the plan keeps more than the limits allow."""
    wholes = _wholes(plan.anatomy, plan.sequence_length)
    kept = {"params": plan.kept_params, "flops": plan.kept_flops}
    given = {name: limit for name in wholes if (limit := getattr(limits, name)) is not None}
    return any(kept[name] > allowance(limit, wholes[name]) for name, limit in given.items())


def _on_the_way(limits: Budget, anatomy: Anatomy, sequence_length: int, progress: float) -> Budget:
    """Limits as counts: the whole at progress 0, the budget at progress 1."""
    counts = {}
    for name, whole in _wholes(anatomy, sequence_length).items():
        if (limit := getattr(limits, name)) is not None:
            goal = min(whole, allowance(limit, whole))
            counts[name] = goal if progress >= 1 else max(goal, int(whole - progress * (whole - goal)))
    return Budget(**counts)


def _wholes(anatomy: Anatomy, sequence_length: int) -> dict[str, int]:
    """What shares of each limit are shares of."""
    return {"params": anatomy.prunable_params, "flops": 2 * anatomy.prunable_macs(sequence_length)}
