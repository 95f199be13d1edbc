"""Running a model layer by layer: `record_calls` records how it calls its layers, and `run_layer` runs one of them.

A layer's *hidden states* are its first argument. Everything else that it is called with (masks, positions, the
encoder's output) are its *arguments*.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..anatomy.units import Group
from ..scoring.calibration import LossFn, first_of, observing


# Is called with the input and the output of a group's output projection, and with the residual sum that the next
# LayerNorm gets, each `[..., features]`.
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Calls:
    """How a model calls its layers for one batch.

    Attributes:
        arguments: For each layer, in the order in which they run, its positional and its keyword arguments without
            the hidden states.
        entries: The hidden states of each layer that does not simply get the output of the layer before it: the first
            layer of each stack.
    """

    arguments: dict[str, tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    entries: dict[str, torch.Tensor] = field(default_factory=dict)


def record_calls(
    model: nn.Module, layers: list[str], batches: list[Mapping[str, Any]], loss_fn: LossFn | None
) -> list[Calls] | None:
    """Runs the model on each batch and records how it calls these layers; `None` if a layer runs more than once."""
    recorded = []
    idle: list[str] = []  # layers that return their input
    for batch in batches:
        calls, chain = _record(model, layers, idle, batch, loss_fn)
        if calls is None:
            return None
        recorded.append(calls)
        # In a plain chain of layers, the first layer's input and all arguments are independent of what the layers
        # compute, so the layers need not compute anything for the other batches.
        idle = layers if chain else []
    return recorded


def _record(
    model: nn.Module, layers: list[str], idle: list[str], batch: Mapping[str, Any], loss_fn: LossFn | None
) -> tuple[Calls | None, bool]:
    """The calls of one batch, and whether the layers are a chain in which only hidden states are handed on."""
    calls = Calls()
    ran: list[str] = []
    last: tuple[str, Any] = ("", None)  # the layer that finished last, and its output
    same_shape = True

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = _hidden_states(module, args, kwargs)
        if not ran or last[0] != ran[-1] or hidden is not last[1]:
            calls.entries[name] = hidden
        # The layers will run again, several times. A cache would grow with each run.
        kwargs = {k: v for k, v in kwargs.items() if v is not hidden and k != "use_cache" and not isinstance(v, Cache)}
        calls.arguments[name] = (tuple(None if isinstance(a, Cache) else a for a in args[1:]), kwargs)
        ran.append(name)

    def after(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal last, same_shape
        hidden = _hidden_states(module, args, kwargs)
        same_shape &= isinstance(output, torch.Tensor) and output.shape == hidden.shape
        last = (name, first_of(output))

    with ExitStack() as hooks, _returning_their_input(model, idle):
        for name in layers:
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(partial(after, name), with_kwargs=True))
        if loss_fn:
            loss_fn(model, batch)
        else:
            model(**batch)
    if len(ran) != len(set(ran)):
        return None, False
    return calls, same_shape and set(calls.entries) == set(ran[:1])


def _hidden_states(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A layer's first argument, whatever its name."""
    if args:
        return args[0]
    names = list(inspect.signature(type(layer).forward).parameters)  # of the class, because hooks replace `forward`
    return kwargs["hidden_states" if "hidden_states" in kwargs else names[1]]


@contextmanager
def _returning_their_input(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Inside the block these layers return their hidden states unchanged."""
    modules = [model.get_submodule(name) for name in layers]

    def forward(*args: Any, module: nn.Module, **kwargs: Any) -> torch.Tensor:
        return _hidden_states(module, args, kwargs)

    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = partial(forward, module=module)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if own is not None:  # Accelerate sets a `forward` on the instance
                module.forward = own


class _Stop(Exception):
    """Ends a layer early, raised by a hook when the rest of the layer is not needed."""


def run_layer(
    model: nn.Module,
    name: str,
    arguments: tuple[tuple, dict[str, Any]],
    hidden: torch.Tensor,
    observers: Mapping[Group, Observer],
    stop: bool = False,
) -> torch.Tensor | None:
    """Runs one layer as it is now, and returns its hidden states.

    Args:
        arguments: The layer's other arguments, from `Calls`.
        hidden: Its hidden states, `[batch, tokens, features]`.
        observers: Groups of this layer, each with a function that is called when the group's sublayer has run.
        stop: Ends the layer after the first call of an observer; the result is then `None`.
    """

    def observe(group: Group, *tensors: torch.Tensor) -> None:
        observers[group](*tensors)
        if stop:
            raise _Stop

    args, kwargs = arguments
    with observing(model, observers, observe):
        try:
            return first_of(model.get_submodule(name)(hidden, *args, **kwargs))
        except _Stop:
            return None
