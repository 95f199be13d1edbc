"""How sensitive the model is to each unit.

All gradient scores use one gate a unit, fixed at 1, on the input of the group's output projection (for the rows of a
lone Linear: on its output). The loss's derivative with respect to the gate of example `i` is `g_i`:

- Taylor (Molchanov et al. 2017, arXiv 1611.06440; Michel et al. 2019, arXiv 1905.10650): `mean_i |g_i|`, the
  first-order change of the loss when the unit is removed.
- Fisher (Kwon et al. 2022, arXiv 2204.09656): `mean_i g_i^2`, the diagonal of the empirical Fisher information.
- Movement (FAR, arXiv 2205.01541): the L1 norm of (primed - initial) over the unit's weights.
- Magnitude: the squared L2 norm of the unit's weights.

A plan divides scores by costs, so a score must add up over what a unit consists of. These do not, and are multiplied
by the unit's parameters first, so that heads and neurons are compared by the numbers themselves:

- Mask (EarlyBERT, arXiv 2101.00063): `|gate|` of gates trained along with the weights during priming, under an L1
  penalty.
- Random: uniform noise from a seed, the control.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..anatomy.build import build_anatomy
from ..anatomy.layouts import BlockLayout
from ..anatomy.linears import oriented
from ..anatomy.modules import input_embedding, linear_of, task_head, unit_weights
from ..anatomy.units import Anatomy, Group
from ..utils import distributed, replicas
from ..utils.errors import CalibrationError, SensiError
from .calibration import LossFn, device_of, materialize, mean_length, preserved
from .gates import apply_gate, gate_gradients, hooked
from .head import head_state
from .outliers import OutlierFinder
from .priming import primed
from .scores import DATA_METHODS, METHODS, Scores


def compute_scores(
    model: nn.Module,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    score: str = "fisher",
    calibration_steps: int = 24,
    priming_steps: int = 40,
    priming_lr: float = 1e-4,
    priming_optimizer: str = "adamw",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    targets: Iterable[str] = (),
    blocks: Iterable[BlockLayout] | None = None,
    progress: bool = True,
) -> Scores:
    """Scores every unit of `model`, its input tokens too; model and random states are left exactly as they were.

    With several processes all of them must call this, each with its own batches; they get the same scores.
    Without `calibration` a gradient score falls back to magnitude, with a warning.

    Args:
        calibration: Batches with labels, as `model(**batch)` takes them; at most `calibration_steps` are scored.
        score: One of `random`, `magnitude`, `taylor`, `fisher`, `mask`, `movement`.
        priming_steps: Length of the short fine-tuning before gradients are taken, from which a task head also gets its
            start, whatever the score; 0 for none.
        priming_optimizer: `adamw`, or `sign`, which needs no memory beside the weights.
        targets: Linears (or embeddings) outside the known blocks whose rows are to be scored too.

    Raises:
        CalibrationError: Empty or unlabeled data, or a loss or gradient that is not finite (the batch is named).
        SensiError: An unknown `score`.
    """
    if score not in METHODS:
        raise SensiError(f"`score` must be one of {', '.join(METHODS)}, got {score!r}.")
    table = input_embedding(model) if calibration is not None and score != "movement" else None
    anatomy = build_anatomy(model, {*targets, *([table] if table else [])}, blocks)
    with distributed.synchronized("scoring"), replicas.weights_from_rank_0(model), preserved(model):
        # A data loader that shuffles draws random numbers, too.
        batches = None
        if calibration is not None:
            batches = materialize(calibration, max(calibration_steps, priming_steps, 1))
        return score_units(
            model,
            anatomy,
            batches,
            score=score,
            calibration_steps=calibration_steps,
            priming_steps=priming_steps,
            priming_lr=priming_lr,
            priming_optimizer=priming_optimizer,
            loss_fn=loss_fn,
            seed=seed,
            progress=progress,
        )


def score_units(
    model: nn.Module,
    anatomy: Anatomy,
    batches: list[Mapping[str, Any]] | None,
    *,
    score: str,
    calibration_steps: int,
    priming_steps: int,
    priming_lr: float,
    priming_optimizer: str = "adamw",
    loss_fn: LossFn | None,
    seed: int,
    progress: bool,
) -> Scores:
    """`compute_scores` on given batches; to be called inside `calibration.preserved`."""
    length = mean_length(batches) if batches else None
    if score in DATA_METHODS and batches is None:
        warnings.warn(
            f"No calibration data was given, so score={score!r} falls back to 'magnitude', which usually loses more "
            f"accuracy. Pass `calibration=` (batches with labels).",
            stacklevel=2,
        )
        score = "magnitude"
    torch.manual_seed(seed + distributed.rank())  # dropout while priming: the same data and seed give the same plan
    priming: dict[str, Any] = {"steps": priming_steps, "lr": priming_lr, "optimizer": priming_optimizer}
    priming |= {"loss_fn": loss_fn, "progress": progress}
    if score not in DATA_METHODS:
        if score == "random":
            values = random_scores(anatomy, seed)
        else:
            values = {g.name: magnitude(model, g) for g in anatomy.groups}
        head = {}
        if batches is not None and priming_steps and task_head(model):
            # The head gets the same start under every score, so that controls differ in the ranking only.
            with primed(model, batches, **priming):
                head = head_state(model)
        return Scores(only_seen(anatomy, values, batches), score, length, head=head)
    assert batches is not None
    if score in ("mask", "movement") and not priming_steps:
        raise SensiError(f"score={score!r} is learned during priming: `priming_steps` must not be 0.")
    outliers = OutlierFinder(model, anatomy)
    if score == "mask":
        device = device_of(model)
        gates = {g.name: torch.ones(g.size, device=device, requires_grad=True) for g in anatomy.groups}
        with (
            hooked(model, anatomy, lambda group, x, ids: apply_gate(x, gates[group.name], ids)),
            primed(model, batches, gates=list(gates.values()), **priming),
        ):
            head = head_state(model)
        learned = {g.name: gates[g.name].detach().abs().cpu() * g.unit_params for g in anatomy.groups}
        return Scores(only_seen(anatomy, learned, batches), score, length, head=head)
    with primed(model, batches, **priming) as originals:
        head = head_state(model) if priming_steps else {}
        if score == "movement":
            return Scores({g.name: movement(model, g, originals) for g in anatomy.groups}, score, length, head=head)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        totals = {g.name: g.zeros() for g in anatomy.groups}
        examples = 0
        bar = tqdm(batches[: max(1, calibration_steps)], desc=f"{score} scores", disable=not progress, leave=False)
        for index, batch in enumerate(bar):
            # As a precaution not under autocast: a gate's gradient is a small difference of large terms.
            with outliers.watching(batch), torch.autocast(device_of(model).type, enabled=False):
                gradients = gate_gradients(model, anatomy, batch, loss_fn, f"calibration batch {index}")
            examples += next(iter(gradients.values())).shape[0]
            for name, gradient in gradients.items():
                total = (gradient.abs() if score == "taylor" else gradient.square()).sum(0).cpu()
                if not torch.isfinite(total).all():
                    raise CalibrationError(f"The scores of {name!r} are not finite for calibration batch {index}.")
                totals[name] += total
    distributed.all_sum(list(totals.values()), "adding up scores")
    examples = sum(distributed.gather("counting examples", examples))
    values = {name: total / examples for name, total in totals.items()}
    return Scores(values, score, length, outliers.found(), head)


def random_scores(anatomy: Anatomy, seed: int) -> dict[str, torch.Tensor]:
    """Noise in proportion to the unit's cost, so that after the division by cost no kind of unit is preferred."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return {g.name: g.zeros().uniform_(generator=generator) * g.unit_params for g in anatomy.groups}


def magnitude(model: nn.Module, group: Group) -> torch.Tensor:
    """Squared L2 norm of all weights of each unit."""
    squares = [unit_weights(model, group, side).square().sum(1) for side in group.sides]
    return torch.stack(squares).sum(0).cpu()


def movement(model: nn.Module, group: Group, originals: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """L1 norm of what priming changed in each unit: `originals` holds the values before, by `id` of the parameter."""
    total = group.zeros()
    for side in group.sides:
        linear = linear_of(model, side.module)
        if id(linear.weight) not in originals:
            continue
        change = oriented(linear, linear.weight.detach().cpu().float() - originals[id(linear.weight)].float())
        total += side.per_unit(change, group.size).abs().sum(1)
        if side.bias and side.dim == 0 and id(linear.bias) in originals:
            change = linear.bias.detach().cpu().float() - originals[id(linear.bias)].float()
            total += side.per_unit(change, group.size).abs().sum(1)
    return total


def only_seen(
    anatomy: Anatomy, values: Mapping[str, torch.Tensor], batches: Iterable[Mapping[str, Any]] | None
) -> dict[str, torch.Tensor]:
    """`values` with zero for tokens that are nowhere in the batches (of all processes), padding left out.

    For scores that do not come from gradients: those are zero by themselves. Without batches everything counts as
    seen.
    """
    groups = [group for group in anatomy.groups if group.kind == "token"]
    if not groups or batches is None:
        return dict(values)
    seen = [group.zeros() for group in groups]
    for batch in batches:
        for name, ids in batch.items():
            if name.endswith("input_ids") and isinstance(ids, torch.Tensor):
                mask = batch.get(name.replace("input_ids", "attention_mask"))
                if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
                    ids = ids[mask.bool()]
                for group, counts in zip(groups, seen, strict=True):
                    known = ids[(ids >= 0) & (ids < group.size)]
                    counts[known.reshape(-1).cpu().unique().long()] = 1.0
    distributed.all_max(seen, "looking for tokens")
    masks = {g.name: mask for g, mask in zip(groups, seen, strict=True)}
    return {name: value * masks[name] if name in masks else value for name, value in values.items()}
