"""Puts a model back together after a failed operation: its modules, its attributes and its config, but no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


CONTAINERS = (dict, list, set)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Notes how a model is made up, and returns a function that restores it.

    This covers which modules, parameters, buffers and hooks it has, every other attribute of its modules (also the
    content of dicts, lists and sets), the fields of its Transformers config, and `requires_grad` and `grad` of its
    parameters. Objects keep their identity. Values of tensors are not covered: code that changes them must restore
    them.
    """
    modules = list(model.modules())
    values = [value for module in modules for value in vars(module).values()]
    configs = list({id(value): value for value in values if isinstance(value, PreTrainedConfig)}.values())
    attributes = [(vars(owner), dict(vars(owner))) for owner in (*modules, *configs)]
    containers = {id(v): v for _, before in attributes for v in before.values() if isinstance(v, CONTAINERS)}
    # Most are empty dicts of hooks, ten in each module. They share one empty content.
    contents: list[tuple[Any, Any]] = [
        (c, () if not c else dict(c) if isinstance(c, dict) else list(c)) for c in containers.values()
    ]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def restore() -> None:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad, grad in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad

    return restore


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises an error or is interrupted, the model is as it was before (see `snapshot`)."""
    restore = snapshot(model)
    try:
        yield
    except BaseException:
        surely(restore)
        raise


def surely(restore: Callable[[], None]) -> None:
    """Calls a function that restores something. If the user interrupts it, it is called again before the error."""
    try:
        restore()
    except BaseException:
        restore()
        raise
