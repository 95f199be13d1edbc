"""Giving the survivors of a cut better values: weighted least squares of the output projections, without labels.

For each sublayer in order, on the already trimmed model, the output projection `W, b` is refitted so that the residual
sum that enters the next LayerNorm is again what it is in the untrimmed model:

    minimize over W, b:  sum_t w_t |r_t + W z_t + b - s_t|^2 + ridge |W - W_0|^2

with `z_t` the kept activations and `r_t` the residual of the trimmed model, `s_t` the sum in the untrimmed model (so
each sublayer also mends what the ones before it lost), and `w_t = 1 / var(s_t)`, because after the LayerNorm that is
the error the next layer sees. Padding is left out. Closed form; the activations are streamed layer by layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache

from ..anatomy.linears import matrix
from ..anatomy.modules import linear_of
from ..anatomy.units import Group
from ..scoring.calibration import LossFn, calibration_loss, device_of, to_device, token_mask
from ..utils import distributed
from ..utils.states import FROZEN, TRIMMED
from .least_squares import GuardErrors, LeastSquares, Values
from .plan import Plan
from .trimmed import cut, put


Refitted = dict[str, Values]  # by module


def refit(
    model: nn.Module,
    plan: Plan,
    batches: list[Mapping[str, Any]],
    loss_fn: LossFn | None = None,
    progress: bool = True,
) -> Refitted:
    """Refits the output projections of all groups whose kept units are all tuned, on the whole base model.

    A quarter of the batches is held out as a guard: a sublayer takes the step (0, 1/2 or 1) whose error after the
    LayerNorm is smallest there, and when the calibration loss of the trimmed model gets worse all is put back.
    """
    groups = [g for g in plan.anatomy.trimmable if g.layer and g.repeats == 1 and _is_refittable(model, plan, g)]
    if not any((plan.of(g) == TRIMMED).any() for g in groups):
        return {}
    device = device_of(model)
    batches = [to_device(batch, device) for batch in batches]
    # As a precaution not under autocast: the refit solves for small differences of activations.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        streams, order = _capture(model, plan, batches, loss_fn)
        if order is None:
            return {}
        # Error feedback needs the sublayers in the order in which they run; a layer runs attention before FFN.
        by_layer = {layer: [g for g in groups if g.layer == layer] for layer in order}
        student = {g.name: _Output(model, plan, g) for g in plan.anatomy.trimmable}
        # By the place of a batch among those of all processes, so that their number changes nothing.
        places = distributed.batch_positions(len(batches))
        total = sum(distributed.gather("counting batches", len(batches)))
        held_out = {i for i, place in enumerate(places) if (place % 4 == 3 if total > 3 else place == 0)}
        for layer in tqdm(order, desc="refit", disable=not progress, leave=False):
            _refit_layer(model, plan, layer, by_layer[layer], student, streams, held_out, total)
        refitted = {g.output: output.fitted for g in groups if (output := student[g.name]).fitted is not None}
        if not refitted:
            return {}
        test = {i: batches[i] for i in sorted(held_out)}
        after = _trimmed_loss(model, plan, student, test, loss_fn)
        for output in student.values():
            output.fitted = None
        before = _trimmed_loss(model, plan, student, test, loss_fn)
    return refitted if after <= before * 1.05 else {}


def _is_refittable(model: nn.Module, plan: Plan, group: Group) -> bool:
    states = plan.of(group)
    return group.output in plan.targets and bool((states != TRIMMED).any()) and not bool((states == FROZEN).any())


@dataclass
class _Output:
    """The output projection of one group as the trimmed model has it."""

    model: nn.Module
    plan: Plan
    group: Group
    columns: torch.Tensor = field(init=False)
    fitted: Values | None = None

    def __post_init__(self) -> None:
        kept = np.flatnonzero(self.plan.of(self.group) != TRIMMED)
        weight = matrix(linear_of(self.model, self.group.output))
        self.columns = torch.from_numpy(self.group.sides[-1].positions(kept)).to(weight.device)

    @property
    def original(self) -> Values:
        linear = linear_of(self.model, self.group.output)
        bias = None if linear.bias is None else linear.bias.detach().float()
        return matrix(linear).detach()[:, self.columns].float(), bias

    def put(self) -> None:
        """Inside `cut`: gives the projection its fitted values, if there are any."""
        if self.fitted is not None:
            put(linear_of(self.model, self.group.output), *self.fitted)


@dataclass
class _Stream:
    """One batch on its way through the layers: hidden states of both models, and how each layer is called."""

    batch: Mapping[str, Any]
    calls: dict[str, tuple[tuple, dict]] = field(default_factory=dict)
    entries: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher: Any = None
    student: Any = None


def _capture(
    model: nn.Module, plan: Plan, batches: list[Mapping[str, Any]], loss_fn: LossFn | None
) -> tuple[list[_Stream], list[str] | None]:
    """How each layer is called for each batch, and the layers' order; `None` where a layer runs more than once."""
    layers = list(dict.fromkeys(g.layer for g in plan.anatomy.trimmable if g.layer))
    streams, order = [], []
    passes = False  # whether layers may hand their input on instead of computing
    for batch in batches:
        stream = _Stream(batch)
        seen: list[str] = []
        last: list[Any] = [None]
        same: list[bool] = []

        def before(module, args, kwargs, name, stream=stream, seen=seen, last=last):
            hidden = _input_of(module, args, kwargs)
            if hidden is not last[0]:
                stream.entries[name] = hidden
            # Layers will be run again, several times: a cache would grow with each.
            kwargs = {
                k: v for k, v in kwargs.items() if v is not hidden and k != "use_cache" and not isinstance(v, Cache)
            }
            stream.calls[name] = (tuple(None if isinstance(a, Cache) else a for a in args[1:]), kwargs)
            seen.append(name)

        def after(module, args, kwargs, output, last=last, same=same):
            hidden = _input_of(module, args, kwargs)
            same.append(isinstance(output, torch.Tensor) and output.shape == hidden.shape)
            last[0] = _first(output)

        handles = []
        for name in layers:
            layer = model.get_submodule(name)
            handles.append(
                layer.register_forward_pre_hook(lambda m, a, k, name=name: before(m, a, k, name), with_kwargs=True)
            )
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
        try:
            with _passing_on(model, layers if passes else []):
                (loss_fn or _call)(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != len(set(seen)):
            return [], None
        streams.append(stream)
        order = seen
        # Where the layers are a plain chain of hidden states, the first one's input and how each is called are all
        # that the other batches have to tell, and that does not depend on what the layers compute.
        passes = all(same) and set(stream.entries) == {order[0]}
    return streams, order


def _call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    return model(**batch)


def _input_of(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the layer works on: its first argument, whatever its name. (Hooks may have replaced its own `forward`.)"""
    if args:
        return args[0]
    names = list(inspect.signature(type(layer).forward).parameters)
    return kwargs["hidden_states" if "hidden_states" in kwargs else names[1]]


@contextmanager
def _passing_on(model: nn.Module, layers: list[str]) -> Iterator[None]:
    modules = [model.get_submodule(name) for name in layers]

    def forward(*args: Any, module: nn.Module, **kwargs: Any) -> torch.Tensor:
        return _input_of(module, args, kwargs)

    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = partial(forward, module=module)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if own is not None:  # Accelerate puts its own there
                module.forward = own


class _Stop(Exception):
    """Raised by a hook when the rest of a layer is not needed."""


def _run(
    model: nn.Module,
    name: str,
    stream: _Stream,
    hidden: torch.Tensor,
    watch: Mapping[str, _Observer | _Recorder],
    stop: bool = False,
) -> torch.Tensor | None:
    """Runs one layer as it is now.

    `watch[group](z, y, s)` is called with the output projection's input and output and with the residual sum.
    """
    layer = model.get_submodule(name)
    watched = [w.group for w in watch.values() if w.group.layer == name]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []

    def at_output(group: Group, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[group.name] = (x, y)

    def at_norm(group: Group, total: torch.Tensor) -> None:
        if group.name in seen:
            # OPT's FFN runs on flat rows.
            z, y = (part.reshape(*total.shape[:-1], part.shape[-1]) for part in seen.pop(group.name))
            watch[group.name](z, y, total)
            if stop:
                raise _Stop

    try:
        for group in watched:
            module = model.get_submodule(group.output)
            handles.append(module.register_forward_hook(lambda m, a, y, group=group: at_output(group, a[0], y)))
            if group.norm:
                norm = model.get_submodule(group.norm)
                handles.append(norm.register_forward_pre_hook(lambda m, a, group=group: at_norm(group, a[0])))
        args, kwargs = stream.calls[name]
        output = _first(layer(hidden, *args, **kwargs))
        for group in watched:
            if not group.norm:
                at_norm(group, output)
        return output
    except _Stop:
        return None
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Recorder:
    """Keeps the residual sums of the untrimmed model for one group, batch by batch."""

    group: Group
    sums: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, z: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
        self.sums.append(total.detach().float())


def _refit_layer(
    model: nn.Module,
    plan: Plan,
    layer: str,
    groups: list[Group],
    student: dict[str, _Output],
    streams: list[_Stream],
    held_out: set[int],
    total: int,
) -> None:
    recorders = {g.name: _Recorder(g) for g in groups}
    before = []
    for stream in streams:
        if layer in stream.entries:
            stream.teacher = stream.student = stream.entries[layer]
        before.append(stream.student)
        stream.teacher = _run(model, layer, stream, stream.teacher, recorders)
    originals = {g.name: student[g.name].original for g in groups}
    with cut(model, plan, [output.group for output in student.values() if output.group.layer == layer]):
        for group in groups:
            output, targets = student[group.name], recorders[group.name].sums
            if len(targets) != len(streams):
                continue  # the layer did not run this sublayer
            system = LeastSquares(*originals[group.name])
            for i, (stream, hidden) in enumerate(zip(streams, before, strict=True)):
                if i not in held_out or total == 1:
                    add = _Observer(group, targets[i], stream.batch, system.add)
                    _run(model, layer, stream, hidden, {group.name: add}, stop=True)
            solution = system.solve()
            if solution is None:
                continue
            errors = GuardErrors(originals[group.name], solution)
            for i in sorted(held_out):
                check = _Observer(group, targets[i], streams[i].batch, errors.add)
                _run(model, layer, streams[i], before[i], {group.name: check}, stop=True)
            output.fitted = errors.best()
            output.put()
        for stream, hidden in zip(streams, before, strict=True):
            stream.student = _run(model, layer, stream, hidden, {})


@dataclass
class _Observer:
    """Hands the tokens of one batch, padding left out, to `receive(z, residual, target)`, each `[tokens, ...]`."""

    group: Group
    target: torch.Tensor
    batch: Mapping[str, Any]
    receive: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

    def __call__(self, z: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
        mask = token_mask(self.batch, total.shape[:-1])
        parts = (z.float(), total.float() - y.float(), self.target)
        self.receive(*(part[mask] if mask is not None else part.flatten(0, -2) for part in parts))


def _trimmed_loss(
    model: nn.Module,
    plan: Plan,
    student: Mapping[str, _Output],
    batches: Mapping[int, Mapping[str, Any]],
    loss_fn: LossFn | None,
) -> float:
    """Sum of the losses of these batches, which are given by their number, and of those of all processes."""
    with cut(model, plan, plan.anatomy.trimmable):
        for output in student.values():
            output.put()
        losses = [calibration_loss(model, b, loss_fn, f"calibration batch {i} (refit)") for i, b in batches.items()]
    return sum(distributed.gather("comparing losses", sum(float(loss) for loss in losses)))


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
