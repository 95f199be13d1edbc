"""Carries an optimizer over a cut: its state follows what the cut does to the parameters.

A cut changes values (see `copies_follow`). Then, if the optimizer can go on with smaller parameters, its state is
sliced like their values. The parameters stay the same objects, so nothing that holds them becomes stale: the groups of
the optimizer, a list that a training loop passes to `clip_grad_norm_`, hooks on parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn, optim

from ..layers.slices import Slice, kept_parts, tensor_specs
from .slicing import Slices


# These update each value from its own gradient and state alone, so closed units have no influence on the others.
# Optimizers that look at whole matrices (Adafactor, Muon, LAMB) or store state in blocks (8 bits) are not among them.
ELEMENTWISE: frozenset[type] = frozenset({
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD, optim.NAdam, optim.RAdam,
    optim.RMSprop, optim.Rprop, optim.SGD,
})  # fmt: skip

# A tensor of the optimizer's state is a copy of a parameter if their distance is less than this share of the
# parameter's norm. Averages of gradients are unrelated to the values, so their distance is about the norm.
CLOSE = 0.5

Before = Mapping[str, tuple[Slice, dict[str, nn.Parameter]]]  # slice and tensors of an adapter by the layer's name


def obstacle(optimizer: Any, layers: Mapping[str, Any], adapter_name: str, slices: Slices) -> str | None:
    """Why `carry_over` to these smaller slices would change the training. `None` if it would not."""
    if optimizer is None:
        return "`Schedule.step` did not get the optimizer"
    optimizer = _inner(optimizer)
    if type(optimizer) not in ELEMENTWISE:
        return f"the state of {type(optimizer).__name__} may not be sliced"
    if any(group.get("capturable") for group in optimizer.param_groups):
        return "the optimizer is capturable, and a CUDA graph would replay the old shapes"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        parts = layer.own_parts(adapter_name)
        if any(p.requires_grad and id(p) not in held for p in parts.values()):
            return "the optimizer does not hold all trained parameters of the adapter"
        slice_ = slices[name][0] if name in slices else None
        if slice_ is not None and slice_.sparse:
            return "single values of closed units would be trained at other positions"
        if slice_ is not None and any(spec.trained and n not in parts for n, spec in tensor_specs(slice_).items()):
            return "the biases of removed sublayers are not trained yet"
    return None


@contextmanager
def copies_follow(optimizer: Any, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """What the block adds to `parameters` is added to the optimizer's copies of them as well.

    Some optimizers compute the next values from a copy in their state: Lookahead (arXiv 1907.08610), schedule-free
    ones (arXiv 2405.15682), or those with float32 copies of 16-bit values. They would undo what a cut does to the
    values.
    """
    state = {} if optimizer is None else _inner(optimizer).state
    held = [p for p in parameters if p in state]
    keys = _keys_of_copies(state, held)
    values = {p: p.detach().clone() for p in held if keys}
    yield
    with torch.no_grad():
        for parameter, before in values.items():
            for key in keys & state[parameter].keys():
                copy = state[parameter][key]
                copy.add_((parameter - before).to(copy))


def _keys_of_copies(state: Mapping[torch.Tensor, Mapping[str, Any]], held: Iterable[torch.Tensor]) -> set[str]:
    """The keys under which the state of every parameter has a copy of it. Parameters of zeros do not count."""
    found: dict[str, bool] = {}
    for parameter in held:
        value = parameter.detach()
        norm = float(value.norm())
        for key, tensor in state[parameter].items():
            # Not a tensor of another class, such as a state of 8 bits, which may have no differences.
            if norm and type(tensor) is torch.Tensor and tensor.shape == value.shape and tensor.is_floating_point():
                is_close = float((tensor.to(value) - value).norm()) < CLOSE * norm
                found[key] = found.get(key, True) and is_close
    return {key for key, is_copy in found.items() if is_copy}


class _Move(NamedTuple):
    """What a parameter becomes."""

    place: nn.ParameterDict  # that of the layer which holds it
    parameter: nn.Parameter
    data: torch.Tensor
    gradient: torch.Tensor | None
    state: dict[str, Any] | None  # `None` if the optimizer has no state for it


def noted(optimizer: Any, before: Before) -> Callable[[], None]:
    """Notes what `carry_over` may change, and returns a function that restores it."""
    optimizer = _inner(optimizer)
    state = optimizer.state
    parameters = [p for _, parts in before.values() for p in parts.values() if p.is_floating_point()]
    undo = [(p, p.data, p.grad, state.get(p)) for p in parameters]
    groups = [dict(group) for group in optimizer.param_groups]

    def restore() -> None:
        for parameter, data, gradient, old_state in undo:
            _assign(parameter, data, gradient)
            if old_state is not None:
                state[parameter] = old_state
        for group, old_group in zip(optimizer.param_groups, groups, strict=True):
            group.update(old_group)

    return restore


def carry_over(optimizer: Any, before: Before, layers: Mapping[str, Any], adapter_name: str) -> None:
    """Puts the parameters of `before` back into the rebuilt `layers`, with the values that are there now.

    Gradients and the optimizer's state are sliced by the same code as the values. Parameters that no layer has any
    more leave the optimizer. See `obstacle` for the optimizers that this works with, and `noted` to undo it.
    """
    optimizer = _inner(optimizer)
    state = optimizer.state
    moves = [
        move
        for name, layer in layers.items()
        if name in before
        for move in _moves(state, *before[name], layer.sensi_slices[adapter_name], layer, adapter_name)
    ]
    stays = {id(move.parameter) for move in moves}
    gone = {id(p): p for _, parts in before.values() for p in parts.values() if id(p) not in stays}
    for move in moves:
        _assign(move.parameter, move.data, move.gradient)
        move.place[adapter_name] = move.parameter
        if move.state is not None:
            state[move.parameter] = move.state
    for parameter in gone.values():
        state.pop(parameter, None)
        parameter.grad = None  # nothing clears it any more, and the user may clip the norm of all gradients
    for group in optimizer.param_groups:
        positions = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        for key in {"params", "param_names"} & group.keys():
            group[key] = [group[key][i] for i in positions]


def _moves(
    state: Mapping[nn.Parameter, dict[str, Any]],
    old: Slice,
    parts: Mapping[str, nn.Parameter],
    new: Slice,
    layer: Any,
    adapter_name: str,
) -> Iterator[_Move]:
    """What becomes of the trained tensors of one layer, from the slice `old` to the slice `new`."""
    now = {part: p.detach() for part, p in layer.own_parts(adapter_name).items() if p.is_floating_point()}
    mine = {part: p for part, p in parts.items() if part in now}

    def sliced(tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors of the shape of a parameter are sliced like its values. Others (a number of steps) stay."""
        same = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.shape == mine[n].shape}
        return {**tensors, **kept_parts(same, old, new)}

    states: dict[str, dict[str, Any]] = {part: {} for part in mine}
    for key in {key for p in mine.values() for key in state.get(p, ())}:
        for part, value in sliced({n: state[p][key] for n, p in mine.items() if key in state.get(p, ())}).items():
            states[part][key] = value
    gradients = sliced({part: p.grad for part, p in mine.items()})
    for part, p in mine.items():
        place = getattr(layer, f"sensi_{part}")
        yield _Move(place, p, now[part], gradients[part], states[part] if p in state else None)


def _assign(parameter: nn.Parameter, data: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Gives a parameter other values and another gradient, which may have another shape."""
    parameter.grad = None
    # While a graph is alive (a training loop may keep its last loss), autograd's node for the parameter stays, and it
    # remembers the old shape. A change of the dtype discards this node.
    parameter.data = parameter.data.new_empty(0, dtype=torch.float16)
    parameter.data = data
    parameter.grad = gradient


def _inner(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
