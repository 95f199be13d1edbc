"""The criteria: each function takes a model, its units and calibration batches, and returns a score for each unit.

In the formulas, a gate is a factor on the activation of a unit, fixed at 1 (see `gates`), `L_i` is the loss of example
`i`, and `g_i = dL_i / dgate`. A plan divides scores by the units' costs. Scores that do not grow with the size of a
unit (mask, random) are therefore multiplied by the unit's number of parameters.

To add a criterion, write one function, and add one line to `CRITERIA` and its name to `methods.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..anatomy.linears import oriented
from ..anatomy.modules import linear_of, unit_weights
from ..anatomy.task_heads import task_head
from ..anatomy.units import Anatomy, Group
from ..utils import distributed
from ..utils.errors import not_finite
from ..utils.progress import progress_bar
from .calibration import ScoringOptions, device_of
from .examples import examples_in
from .gates import apply_gate, find_weighting, gate_gradients, hooked
from .head import head_state
from .learned import primed_until_learned
from .outliers import OutlierFinder


Batches = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """What a criterion returns; the fields are those of `Scores`."""

    values: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    protected: dict[str, torch.Tensor] = field(default_factory=dict)
    learned: float | None = None


def random(model: nn.Module, anatomy: Anatomy, batches: Batches | None, options: ScoringOptions) -> Found:
    """Uniform noise in [0, 1) from `options.seed`, times the unit's parameters: the control for all other scores."""
    generator = torch.Generator("cpu").manual_seed(options.seed)
    values = {g.name: g.zeros().uniform_(generator=generator) * g.unit_params for g in anatomy.groups}
    return Found(only_seen(anatomy, values, batches), _primed_head(model, batches, options))


def magnitude(model: nn.Module, anatomy: Anatomy, batches: Batches | None, options: ScoringOptions) -> Found:
    """`sum w^2` over all weights `w` of the unit: the squared L2 norm (Han et al. 2015, arXiv 1506.02626)."""
    values = {}
    for group in anatomy.groups:
        squares = [unit_weights(model, group, side).square().sum(1) for side in group.sides]
        values[group.name] = torch.stack(squares).sum(0).cpu()
    return Found(only_seen(anatomy, values, batches), _primed_head(model, batches, options))


def taylor(model: nn.Module, anatomy: Anatomy, batches: Batches, options: ScoringOptions) -> Found:
    """`mean_i |g_i|`: the first-order change of the loss when the unit is removed.

    Sources: Molchanov et al. 2017 (arXiv 1611.06440), Michel et al. 2019 (arXiv 1905.10650).
    """
    return _mean_over_examples(torch.abs, model, anatomy, batches, options)


def fisher(model: nn.Module, anatomy: Anatomy, batches: Batches, options: ScoringOptions) -> Found:
    """`mean_i g_i^2`: the diagonal of the empirical Fisher information (Kwon et al. 2022, arXiv 2204.09656)."""
    return _mean_over_examples(torch.square, model, anatomy, batches, options)


def mask(model: nn.Module, anatomy: Anatomy, batches: Batches, options: ScoringOptions) -> Found:
    """`|gate|` times the unit's parameters, after priming with an L1 penalty on it (EarlyBERT, arXiv 2101.00063)."""
    device = device_of(model)
    gates = {
        g.name: torch.ones(g.size, dtype=torch.float32, device=device, requires_grad=True) for g in anatomy.groups
    }
    with (
        hooked(model, anatomy, lambda group, x, ids: apply_gate(x, gates[group.name], ids)),
        primed_until_learned(model, batches, options, list(gates.values())) as (_, learned),
    ):
        head = head_state(model)
    values = {g.name: gates[g.name].detach().abs().cpu() * g.unit_params for g in anatomy.groups}
    return Found(only_seen(anatomy, values, batches), head, learned=learned)


def movement(model: nn.Module, anatomy: Anatomy, batches: Batches, options: ScoringOptions) -> Found:
    """`sum |w_primed - w_initial|` over the weights of the unit (FAR, arXiv 2205.01541)."""
    with primed_until_learned(model, batches, options) as (originals, learned):
        values = {g.name: _moved(model, g, originals) for g in anatomy.groups}
        return Found(values, head_state(model), learned=learned)


class Criterion(NamedTuple):
    """One row of `CRITERIA`: a function of model, anatomy, batches and options, and what this function needs."""

    function: Callable[[nn.Module, Anatomy, Any, ScoringOptions], Found]
    needs_data: bool = True
    needs_priming: bool = False


CRITERIA = {
    "random": Criterion(random, needs_data=False),
    "magnitude": Criterion(magnitude, needs_data=False),
    "taylor": Criterion(taylor),
    "fisher": Criterion(fisher),
    "mask": Criterion(mask, needs_priming=True),
    "movement": Criterion(movement, needs_priming=True),
}
DATA_METHODS = tuple(name for name, criterion in CRITERIA.items() if criterion.needs_data)
# A trained model is not primed again, so it has only these scores.
UNPRIMED_METHODS = tuple(name for name, criterion in CRITERIA.items() if not criterion.needs_priming)


def _mean_over_examples(
    function: Callable[[torch.Tensor], torch.Tensor],
    model: nn.Module,
    anatomy: Anatomy,
    batches: Batches,
    options: ScoringOptions,
) -> Found:
    """The mean of `function(g_i)` over the examples of all processes, taken on the primed model."""
    outliers = OutlierFinder(model, anatomy)
    with primed_until_learned(model, batches, options) as (_, learned):
        head = head_state(model) if options.priming_steps else {}
        model.requires_grad_(False)
        totals = {g.name: g.zeros() for g in anatomy.groups}
        examples, read = 0, batches
        batches = batches[: max(1, options.calibration_steps)]
        # A gate's gradient is a small difference of large terms, so autocast is switched off as a precaution.
        with torch.autocast(device_of(model).type, enabled=False):
            weighting = find_weighting(model, anatomy, batches, options.loss_fn)
            bar = progress_bar(batches, f"{options.score} scores", show=options.progress)
            for index, batch in enumerate(bar):
                where = f"calibration batch {index}"
                with outliers.watching(batch):
                    gradients = gate_gradients(model, anatomy, batch, options.loss_fn, where, weighting)
                examples += examples_in(batch)
                for name, gradient in gradients.items():
                    total = function(gradient).sum(0).cpu()
                    if not torch.isfinite(total).all():
                        raise not_finite(f"The scores of {name!r} are not finite for {where}")
                    totals[name] += total
    distributed.all_sum(list(totals.values()), "adding up scores")
    examples = sum(distributed.gather("counting examples", examples))
    values = {name: total / examples for name, total in totals.items()}
    return Found(_with_unscored_tokens(anatomy, values, read), head, outliers.found(), learned)


def _with_unscored_tokens(
    anatomy: Anatomy, values: dict[str, torch.Tensor], batches: Batches
) -> dict[str, torch.Tensor]:
    """Gives tokens that occur only in batches without scores the smallest positive score, so that they are trained."""
    least = {}
    for group in anatomy.groups:
        positive = values[group.name][values[group.name] > 0]
        if group.kind == "token" and len(positive):
            least[group.name] = torch.full_like(values[group.name], float(positive.min()))
    floors = only_seen(anatomy, least, batches)
    return values | {name: torch.maximum(values[name], floor) for name, floor in floors.items()}


def _primed_head(model: nn.Module, batches: Batches | None, options: ScoringOptions) -> dict[str, torch.Tensor]:
    """The task head after priming, for scores that need no priming: all scores then start with the same head."""
    if batches is None or not options.priming_steps or not task_head(model):
        return {}
    with primed_until_learned(model, batches, options):
        return head_state(model)


def _moved(model: nn.Module, group: Group, originals: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """`movement` of one group; `originals` holds the values before priming, by `id` of the parameter."""
    total = group.zeros()
    for side in group.sides:
        linear = linear_of(model, side.module)
        for parameter in (linear.weight, linear.bias if side.bias and side.dim == 0 else None):
            if parameter is not None and id(parameter) in originals:
                change = parameter.detach().cpu().float() - originals[id(parameter)].float()
                change = oriented(linear, change) if parameter is linear.weight else change
                total += side.per_unit(change, group.size).abs().sum(1)
    return total


def only_seen(
    anatomy: Anatomy, values: Mapping[str, torch.Tensor], batches: Iterable[Mapping[str, Any]] | None
) -> dict[str, torch.Tensor]:
    """`values`, with zeros for tokens that do not occur in the batches of any process (padding does not count).

    Gradient scores do not need this, because the gradient of an unseen token is zero. Without batches, every token
    counts as seen.
    """
    groups = [group for group in anatomy.groups if group.kind == "token"]
    if not groups or batches is None:
        return dict(values)
    seen = {group.name: group.zeros() for group in groups}
    for batch in batches:
        for name, ids in batch.items():
            if name.endswith("input_ids") and isinstance(ids, torch.Tensor):
                attention = batch.get(name.replace("input_ids", "attention_mask"))
                if isinstance(attention, torch.Tensor) and attention.shape == ids.shape:
                    ids = ids[attention.bool()]
                for group in groups:
                    known = ids[(ids >= 0) & (ids < group.size)]
                    seen[group.name][known.reshape(-1).cpu().unique().long()] = 1.0
    distributed.all_max(list(seen.values()), "looking for tokens")
    return {name: value * seen[name] if name in seen else value for name, value in values.items()}
