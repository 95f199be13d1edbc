"""Better values for the kept units of a trimmed model: weighted least squares of the output projections, no labels.

For each sublayer in order, on the already trimmed model, the output projection `W, b` is refitted so that the residual
sum that enters the next LayerNorm becomes what it is in the untrimmed model:

    minimize over W, b:  sum_t w_t |r_t + W z_t + b - s_t|^2 + ridge |W - W_0|^2

For each token t, `z_t` are the activations of the kept units, `r_t` is the residual of the trimmed model, and `s_t` is
the sum in the untrimmed model. So each sublayer also corrects the errors of those before it. `w_t = 1 / var(s_t)`,
because the LayerNorm divides the error by this standard deviation. Padding is left out. The solution has a closed
form, and only the activations of one layer are needed at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import linear_of, residual_factor
from ..anatomy.units import Group
from ..scoring.calibration import LossFn, calibration_loss, device_of, to_device
from ..scoring.padding import seen_by, without_padding
from ..utils import distributed
from ..utils.errors import SensiError, not_finite
from ..utils.progress import progress_bar
from ..utils.states import FROZEN, TRIMMED, TUNED
from .joint_fit import fit_layers
from .layer_fit import fit_layer
from .layerwise import Stream, record_calls, run_layer
from .least_squares import GuardErrors, LeastSquares, Values
from .plan import Plan
from .trimmed import assign, kept_values, trimmed


Refitted = dict[str, Values]  # by the Linear's module name; without `rounds`, only output projections

HELD_OUT = range(3, 32, 4)  # positions of the batches with which the guards compare values
MARGIN = 0.02
SMALLEST_FACTOR = 1e-3  # relative to the largest factor of the sublayer
SAME = 1e-2  # relative distance of two ways to compute a layer; 16-bit models round


def on_cpu(refitted: Refitted) -> Refitted:
    """The same values on the CPU, to be sent to other processes."""
    return {n: (w.cpu(), None if b is None else b.cpu()) for n, (w, b) in refitted.items()}


def refit(
    model: nn.Module,
    plan: Plan,
    batches: list[Mapping[str, Any]],
    loss_fn: LossFn | None = None,
    progress: bool = True,
    rounds: int = 0,
    joint: Sequence[Mapping[str, Any]] = (),
) -> Refitted:
    """New values for the output projections of all groups whose kept units are all tuned.

    With `rounds`, each layer is then fitted as a whole (see `layer_fit`), and the result also has new values for the
    other Linears of these groups, as far as the plan targets them. With batches in `joint` as well, all layers are
    then fitted together to these batches, which may be more (see `joint_fit`).

    `model` is the whole base model, in evaluation mode; it is left as it was. Nothing is refitted if nothing is
    trimmed. A layer that runs more than once is not refitted; a warning says so.

    Up to eight batches, every fourth one, are held out for three guards. First, each output projection goes no step,
    half a step or a whole step from its old values to the solution, whichever gives the smallest error after the
    LayerNorm. Second, the fit of a whole layer, and that of all layers, must make the error smaller. Third, if all new
    values together make the loss of the trimmed model worse by more than 2 percent of its absolute value, they are all
    dropped. Raises `CalibrationError` if the model does not accept a batch, or has no finite hidden states or loss for
    it.
    """
    states = {g: plan.of(g) for g in plan.anatomy.trimmable if g.layer and g.repeats == 1 and g.output in plan.targets}
    groups = [g for g, s in states.items() if (s == TUNED).any() and not (s == FROZEN).any()]
    if any(g.repeats > 1 and (plan.of(g) == TRIMMED).any() for g in plan.anatomy.trimmable):
        _warn_of_repeats("Some layers of this model run more than once")
    if not any((states[g] == TRIMMED).any() for g in groups):
        return {}
    device = device_of(model)
    batches = [to_device(batch, device) for batch in batches]
    # Autocast is off because the solution depends on small differences of activations.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        layers = list(dict.fromkeys(g.layer for g in plan.anatomy.trimmable if g.layer))
        recorded = record_calls(model, layers, batches, loss_fn)
        if recorded is None:
            _warn_of_repeats("Some layers run more than once for a batch, as when `loss_fn` calls the model twice")
            return {}
        fits, held_out = _split(len(batches))
        streams = [
            Stream(batch, calls, calls, holds_out=i in held_out, fits=i in fits)
            for i, (batch, calls) in enumerate(zip(batches, recorded, strict=True))
        ]
        refitted: Refitted = {}
        order, trims = list(recorded[-1].arguments), False
        for i, layer in enumerate(progress_bar(order, "refit", show=progress)):
            if i and any(layer in calls.entries for calls in recorded):
                _follow_trimmed_model(model, plan, order[:i], refitted, streams, loss_fn)
            trims |= any((plan.of(g) == TRIMMED).any() for g in plan.anatomy.trimmable if g.layer == layer)
            own = [g for g in groups if g.layer == layer]
            _refit_layer(model, plan, layer, own, refitted, streams, rounds if trims else 0)
        if not refitted:
            return {}
        if rounds and joint:
            parts = [[to_device(joint[i], device) for i in sorted(part)] for part in _split(len(joint))]
            refitted |= fit_layers(model, plan, order, refitted, parts[0], parts[1], loss_fn, rounds, progress)
        test = {i: batches[i] for i in sorted(held_out)}
        after, before = (_trimmed_loss(model, plan, values, test, loss_fn) for values in (refitted, {}))
    # A fresh task head has not learned anything yet, so a good refit may raise its loss a little: by up to 0.5 percent
    # for MiniLM on TREC-6 and SST-2. Losses can be negative, so the margin is a share of the absolute value.
    return refitted if after <= before + MARGIN * abs(before) else {}


def _split(count: int) -> tuple[set[int], set[int]]:
    """Of so many batches of this process, those to which values are fitted, and those with which they are checked."""
    # By a batch's position among those of all processes, so that the number of processes does not matter.
    positions = distributed.batch_positions(count)
    total = sum(distributed.gather("counting batches", count))
    held_out = {i for i, place in enumerate(positions) if (place in HELD_OUT if total > 3 else place == 0)}
    return set(range(count)) - (held_out if total > 1 else set()), held_out


def _warn_of_repeats(what: str) -> None:
    warnings.warn(
        f"{what}, so their kept units are not fitted to the calibration batches. Set `refit=False` to leave the refit "
        f"out without this warning.",
        stacklevel=3,
    )


def _follow_trimmed_model(
    model: nn.Module, plan: Plan, done: list[str], refitted: Refitted, streams: list[Stream], loss_fn: LossFn | None
) -> None:
    """Records how the model calls a new stack of layers after the trimmed and refitted layers `done`."""
    layers = list(streams[0].untrimmed_calls.arguments)
    with trimmed(model, plan, [group for group in plan.anatomy.trimmable if group.layer in done], refitted):
        recorded = record_calls(model, layers, [stream.batch for stream in streams], loss_fn)
    assert recorded is not None
    for stream, calls in zip(streams, recorded, strict=True):
        stream.trimmed_calls = calls


def _check_output(stream: Stream, layer: str, seen: Mapping[str, Any]) -> None:
    """Raises an error if the untrimmed model has no finite hidden states after a layer: nothing could be fitted."""
    hidden = stream.untrimmed
    if not isinstance(hidden, torch.Tensor):
        raise SensiError(
            f"{layer!r} returns a {type(hidden).__name__}, and only layers that return hidden states, alone or first "
            f"in a tuple, can be refitted. Set `refit=False`."
        )
    if not without_padding(seen, hidden).isfinite().all():
        raise not_finite(f"The output of {layer!r} is not finite for a calibration batch (refit)")


def _refit_layer(
    model: nn.Module,
    plan: Plan,
    layer: str,
    groups: list[Group],
    refitted: Refitted,
    streams: list[Stream],
    rounds: int,
) -> None:
    """Adds the fitted values of these groups of one layer to `refitted`, and moves all streams to the next layer."""
    targets: dict[Group, list[torch.Tensor]] = {group: [] for group in groups}
    tokens_first = layer in plan.anatomy.tokens_first

    def keep_sum(group: Group, z: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
        targets[group].append(total.detach().float())

    for stream in streams:
        if layer in stream.untrimmed_calls.entries:
            stream.untrimmed = stream.untrimmed_calls.entries[layer]
            stream.trimmed = stream.trimmed_calls.entries[layer]
        arguments, observers = stream.untrimmed_calls.arguments[layer], {g: partial(keep_sum, g) for g in groups}
        stream.untrimmed = run_layer(model, layer, arguments, stream.untrimmed, observers)
        _check_output(stream, layer, seen_by(layer, model, stream.batch, tokens_first))
    # What is fitted is a part of the residual sum: a weight and a bias, multiplied by the layer's factor.
    factors = {group: residual_factor(model, group) for group in groups}
    # The kept columns of the base model's weights, and its biases.
    kept = {group: kept_values(linear_of(model, group.output), group.output, group, plan) for group in groups}
    originals = {group: _scaled(values, factors[group]) for group, values in kept.items()}

    def run_up_to(group: Group, stream: Stream) -> list[torch.Tensor]:
        """The kept activations and the residual of all tokens of a batch."""
        found: list[torch.Tensor] = []

        def observe(z: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
            found[:] = z, total.float() - factors[group] * y.float()

        run_layer(model, layer, stream.trimmed_calls.arguments[layer], stream.trimmed, {group: observe}, stop=True)
        return found

    with trimmed(model, plan, [group for group in plan.anatomy.trimmable if group.layer == layer]):
        last: list[list[torch.Tensor]] = []  # activations and residuals of the last sublayer
        for group in groups:
            last = []
            if len(targets[group]) != len(streams):  # the layer did not run this sublayer
                if (plan.of(group) == TRIMMED).any():
                    warnings.warn(
                        f"The residual sum after {group.name!r} was not observed once for each calibration batch, so "
                        f"its kept units are not fitted to them. Set `refit=False` to leave the refit out without "
                        f"this warning.",
                        stacklevel=3,
                    )
                continue
            system = LeastSquares(*originals[group])
            held_out: list[list[torch.Tensor]] = []
            for stream, target in zip(streams, targets[group], strict=True):
                z, residual = run_up_to(group, stream)
                seen = seen_by(layer, model, stream.batch, tokens_first)
                tokens = [without_padding(seen, part) for part in (z.float(), residual, target)]
                if stream.fits:
                    system.add(*tokens)
                if stream.holds_out:
                    held_out.append(tokens)
                if group is groups[-1]:
                    last.append([z, residual])
            solution = system.solve()
            if solution is None:
                continue
            errors = GuardErrors(originals[group], solution)
            for tokens in held_out:
                errors.add(*tokens)
            if (best := errors.best()) is not None:
                refitted[group.output] = _unscaled(best, factors[group], kept[group])
                assign(linear_of(model, group.output), *refitted[group.output])
        if rounds:
            names = [name for group in groups for name in group.modules if name in plan.targets]
            fitted = fit_layer(model, layer, names, streams, rounds, tokens_first)
            for name, values in fitted.items():
                refitted[name] = values
                assign(linear_of(model, name), *values)
            last = [] if fitted else last
        _finish_layer(model, layer, groups, last, streams)


def _scaled(values: Values, factor: torch.Tensor) -> Values:
    """The weight `[out, kept]` and the bias of an output projection, multiplied by a factor `[]` or `[out]`."""
    weight, bias = values
    if (factor == 1).all():  # as in most models: without copies
        return weight.float(), None if bias is None else bias.float()
    return weight.float() * factor.view(-1, 1), None if bias is None else bias.float() * factor


def _unscaled(values: Values, factor: torch.Tensor, old: Values) -> Values:
    """The inverse of `_scaled`. Where the factor is almost zero, the values stay the `old` ones.

    There, the sublayer adds almost nothing to the sum, and values that correct the sum would be huge.
    """
    reaches = factor.abs() > SMALLEST_FACTOR * factor.abs().max()
    weight, bias = _scaled(values, torch.where(reaches, 1 / factor, 0.0))
    if reaches.all():
        return weight, bias
    weight = torch.where(reaches.view(-1, 1), weight, old[0].float())
    return weight, None if bias is None or old[1] is None else torch.where(reaches, bias, old[1].float())


def _finish_layer(
    model: nn.Module, layer: str, groups: list[Group], last: list[list[torch.Tensor]], streams: list[Stream]
) -> None:
    """Moves the trimmed model's hidden states of all streams to the next layer.

    `last` has the activations and the residual of the layer's last sublayer, for each stream. In most models, its
    output projection and the norm of the new sum are all that has to run again. The first stream runs the whole layer,
    and shows whether this is so.
    """

    def whole(stream: Stream) -> Any:
        return run_layer(model, layer, stream.trimmed_calls.arguments[layer], stream.trimmed, {})

    first = whole(streams[0])
    ends = []
    if last:
        linear, norm = linear_of(model, groups[-1].output), groups[-1].norm
        factor = residual_factor(model, groups[-1])
        for z, residual in last:
            total = (residual + factor * linear(z).float()).to(first.dtype)
            ends.append(model.get_submodule(norm)(total) if norm else total)
    if not ends or ends[0].shape != first.shape or (ends[0] - first).norm() > SAME * first.norm():
        ends = [first, *(whole(stream) for stream in streams[1:])]
    for stream, hidden in zip(streams, [first, *ends[1:]], strict=True):
        stream.trimmed = hidden


def _trimmed_loss(
    model: nn.Module, plan: Plan, refitted: Refitted, batches: Mapping[int, Mapping[str, Any]], loss_fn: LossFn | None
) -> float:
    """Sum of the trimmed model's losses over these batches (by number) of all processes."""
    with trimmed(model, plan, plan.anatomy.trimmable, refitted):
        losses = [calibration_loss(model, b, loss_fn, f"calibration batch {i} (refit)") for i, b in batches.items()]
    return sum(distributed.gather("comparing losses", sum(float(loss) for loss in losses)))
