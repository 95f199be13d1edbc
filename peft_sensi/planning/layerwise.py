"""Running a model layer by layer: `record_calls` records how it calls its layers, and `run_layer` runs one of them.

A layer's *hidden states* are its first argument. Masks, positions and all others are called its *arguments*.
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
from ..scoring.calibration import LossFn, first_of, observing, run_forward


# A function of the input and the output of a group's output projection, and of the residual sum that the next
# LayerNorm gets, each `[..., features]`.
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Calls:
    """How a model calls its layers for one batch.

    Attributes:
        arguments: For each layer, in the order in which they run, its positional and its keyword arguments.
        entries: The hidden states of each layer that does not simply get the output of the layer before it: the first
            layer of each stack.
        chain: Whether the layers are a chain in which only hidden states are handed on.
    """

    arguments: dict[str, tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    entries: dict[str, torch.Tensor] = field(default_factory=dict)
    chain: bool = True


@dataclass
class Stream:
    """One batch on its way through the layers of the untrimmed and of the trimmed model."""

    batch: Mapping[str, Any]
    untrimmed_calls: Calls
    trimmed_calls: Calls
    holds_out: bool  # the guards compare values with this batch
    fits: bool  # values are fitted to this batch
    untrimmed: Any = None  # hidden states, `[batch, tokens, features]`
    trimmed: Any = None


def record_calls(
    model: nn.Module, layers: list[str], batches: list[Mapping[str, Any]], loss_fn: LossFn | None
) -> list[Calls] | None:
    """Runs the model on each batch and records how it calls these layers; `None` if a layer runs more than once."""
    recorded: list[Calls] = []
    for batch in batches:
        # In a plain chain of layers, the first layer's input and all arguments are independent of what the layers
        # compute, so the layers need not compute anything for the other batches.
        idle = layers if recorded and recorded[-1].chain else []
        calls = _record(model, layers, idle, batch, loss_fn, f"calibration batch {len(recorded)} (refit)")
        if calls is None:
            return None
        recorded.append(calls)
    return recorded


def _record(
    model: nn.Module, layers: list[str], idle: list[str], batch: Mapping[str, Any], loss_fn: LossFn | None, where: str
) -> Calls | None:
    """The calls of one batch, in which the layers `idle` return their input."""
    calls = Calls()
    ran: list[str] = []
    last: tuple[str, Any] = ("", None)  # the layer that finished last, and its output

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = _hidden_states(module, args, kwargs)
        if not ran or last[0] != ran[-1] or hidden is not last[1]:
            calls.entries[name] = hidden
        # The layers will run again, several times. A cache would grow with each run.
        kwargs = {k: v for k, v in kwargs.items() if v is not hidden and k != "use_cache" and not isinstance(v, Cache)}
        calls.arguments[name] = (tuple(None if isinstance(a, Cache) else a for a in args[1:]), kwargs)
        ran.append(name)

    def after(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal last
        hidden = _hidden_states(module, args, kwargs)
        calls.chain &= isinstance(output, torch.Tensor) and output.shape == hidden.shape
        last = (name, first_of(output))

    with ExitStack() as hooks, _returning_their_input(model, idle):
        for name in layers:
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(partial(after, name), with_kwargs=True))
        run_forward(model, batch, loss_fn, where)
    calls.chain &= set(calls.entries) == set(ran[:1])
    return calls if len(ran) == len(set(ran)) else None


def _hidden_states(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A layer's first argument, whatever its name."""
    if args:
        return args[0]
    names = list(inspect.signature(type(layer).forward).parameters)  # of the class, because hooks replace `forward`
    return kwargs["hidden_states" if "hidden_states" in kwargs else names[1]]


@contextmanager
def _returning_their_input(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Inside the block these layers return their hidden states unchanged."""

    def forward(*args: Any, module: nn.Module, **kwargs: Any) -> torch.Tensor:
        return _hidden_states(module, args, kwargs)

    with ExitStack() as restore:
        for module in map(model.get_submodule, layers):
            if "forward" in vars(module):  # set by Accelerate
                restore.callback(setattr, module, "forward", module.forward)
            else:
                restore.callback(delattr, module, "forward")
            module.forward = partial(forward, module=module)
        yield


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
    """Runs one layer as it is now on the hidden states `[batch, tokens, features]`, and returns its hidden states.

    `arguments` are from `Calls`. Each observer is called when its group's sublayer has run. With `stop`, the first
    such call ends the layer, and the result is `None`.
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
