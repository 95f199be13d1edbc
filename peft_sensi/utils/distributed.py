"""Several processes with different data come to the same decision, or all fail with the same error.

Code that needs all processes runs inside `synchronized`. There, processes exchange values with `gather` and the
functions built on it. Each exchange also tells all processes whether one of them has failed, and checks that all of
them are at the same place. So all processes raise the same error, and none waits for a process that has ended.

With a single process, and outside of `synchronized`, these functions exchange nothing.

This module calls PyTorch's collectives, not Accelerate's wrappers: the wrappers silently do nothing if the process
group was started without Accelerate's environment variables.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from . import errors
from .errors import SensiError, not_finite


_synchronized: ContextVar[bool] = ContextVar("synchronized", default=False)


def start() -> int:
    """Starts Accelerate's process group if a launcher prepared one and none is running.

    Returns the number of processes. Raises `SensiError` if `WORLD_SIZE` announces several processes, but no process
    group can be started.
    """
    if not dist.is_available():
        return 1
    if not dist.is_initialized():
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        by_mpi = ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") if on_cpu else ()
        announced = get_int_from_env(("WORLD_SIZE", *(f"{name}_SIZE" for name in by_mpi)), 1)
        if announced < 2:
            return 1
        # Lightning sets LOCAL_RANK before it knows the other variables, and starts the group itself later.
        has_rank = any(name in os.environ for name in ("RANK", *(f"{name}_RANK" for name in by_mpi)))
        if has_rank and (on_cpu or "LOCAL_RANK" in os.environ):
            PartialState(cpu=on_cpu)
        if not dist.is_initialized():
            raise SensiError(
                f"WORLD_SIZE is {announced}, but there is no process group, so the processes would choose different "
                f"units. Start them with `accelerate launch` or `torchrun`, or call "
                f"`torch.distributed.init_process_group` first. In Lightning, wrap the model in `configure_model`, "
                f"which runs after Lightning has started the group."
            )
    return dist.get_world_size()


def world_size() -> int:
    """The number of processes that exchange values: 1 outside of `synchronized`."""
    return dist.get_world_size() if _synchronized.get() else 1


def rank() -> int:
    """The number of this process: 0 outside of `synchronized`."""
    return dist.get_rank() if _synchronized.get() else 0


@contextmanager
def synchronized(task: str) -> Iterator[None]:
    """Inside the block, processes can exchange values. If one of them fails, all of them fail with the same error.

    An error that is the same in all processes is raised unchanged. Other errors become a `SensiError` (or the same
    subclass of it) that names the processes. `task` is used in messages.
    """
    if _synchronized.get() or start() == 1:
        yield
        return
    token = _synchronized.set(True)
    try:
        gather(f"the start of {task}")
        yield
        gather(f"the end of {task}")
    except _FailedTogether as failed:
        assert failed.error is not None  # this process itself has not failed
        raise failed.error from None
    except Exception as error:
        # The other processes learn about this error at their next exchange.
        try:
            _exchange(f"an error in {task}", error=error)
        except _FailedTogether as failed:
            if failed.error is not None:
                raise failed.error from error
        raise
    finally:
        _synchronized.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block, this process exchanges nothing, even within `synchronized`."""
    token = _synchronized.set(False)
    try:
        yield
    finally:
        _synchronized.reset(token)


def gather(where: str, payload: Any = None) -> list[Any]:
    """The payloads of all processes, in the order of their ranks. Payloads can be any values that pickle accepts.

    All processes must call this with the same `where`, a description of the place for messages.
    """
    return _exchange(where, payload) if _synchronized.get() else [payload]


class _FailedTogether(Exception):
    """Leaves the code inside of `synchronized`. All processes then raise `error`, or their own if that is `None`."""

    def __init__(self, error: SensiError | None) -> None:
        self.error = error


def _exchange(where: str, payload: Any = None, error: Exception | None = None) -> list[Any]:
    """Gathers payloads. Raises `_FailedTogether` in all processes if one has failed or is at another place."""
    failure = None
    if error is not None:
        kind = next((c for c in type(error).__mro__ if c.__module__ == errors.__name__), SensiError)
        failure = kind, str(error) if isinstance(error, SensiError) else f"{type(error).__name__}: {error}"
    reports: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(reports, (where, payload, failure))
    except RuntimeError as lost:
        gone = f"Another process has ended or does not respond during {where}. Look for its error: {lost}"
        raise _FailedTogether(SensiError(gone)) from lost
    places, payloads, failures = zip(*reports, strict=True)
    if failed := [(number, *failure) for number, failure in enumerate(failures) if failure is not None]:
        texts: dict[str, list[str]] = {}
        for number, _, text in failed:
            texts.setdefault(text, []).append(str(number))
        if len(failed) == len(reports) and len(texts) == 1:
            raise _FailedTogether(None)
        message = " ".join(
            f"In process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)} of {len(reports)}: {text}"
            for text, numbers in texts.items()
        )
        raise _FailedTogether(failed[0][1](message))
    if len(set(places)) > 1:
        found = ", ".join(f"process {number} is at {place}" for number, place in enumerate(places))
        advice = "Give all of them the same model and settings."
        raise _FailedTogether(SensiError(f"The processes do different things: {found}. {advice}"))
    return list(payloads)


def all_sum(tensors: Sequence[torch.Tensor], where: str) -> None:
    """Replaces each tensor by its sum over all processes, in place."""
    _all_reduce(tensors, where, "SUM")


def all_max(tensors: Sequence[torch.Tensor], where: str) -> None:
    """Replaces each tensor by its elementwise maximum over all processes, in place."""
    _all_reduce(tensors, where, "MAX")


def _all_reduce(tensors: Sequence[torch.Tensor], where: str, operation: str) -> None:
    """`operation` is a name of `dist.ReduceOp`."""
    if world_size() > 1:
        gather(f"{where}, {[tuple(tensor.shape) for tensor in tensors]}" if len(tensors) < 10 else where)
        for tensor in tensors:
            _in_place(tensor, lambda t: dist.all_reduce(t, getattr(dist.ReduceOp, operation)))


def broadcast(tensor: torch.Tensor) -> None:
    """Replaces the tensor by that of process 0, in place. Call `gather` first: it reports errors of others."""
    if world_size() > 1:
        _in_place(tensor, lambda t: dist.broadcast(t, src=0))


def _in_place(tensor: torch.Tensor, collective: Callable[[torch.Tensor], object]) -> None:
    """Runs a collective on contiguous memory of a device that the process group supports, and copies the result."""
    tensor = tensor.detach()
    supported = f"{tensor.device.type}:" in dist.get_backend_config()
    copy = tensor if supported else tensor.to(torch.device("cuda", torch.cuda.current_device()))
    copy = copy.contiguous()
    collective(copy)
    if copy is not tensor:
        tensor.copy_(copy)


def average_gradients(parameters: Sequence[torch.Tensor], weight: float, where: str, batch_name: str) -> None:
    """Replaces gradients by their mean over all processes, in place. The result is the gradient of the joint batch.

    `weight` is the weight of this process in the mean: its number of examples or labeled tokens. A parameter that has
    a gradient in one process has one in all processes afterwards. A gradient that is not finite is a
    `CalibrationError` in all processes, which names the batch.
    """
    if world_size() == 1:
        return
    used = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and not torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all():
        raise not_finite(f"The gradient of {batch_name} is not finite")
    reports = gather(where, (used, weight))
    share = weight / sum(w for _, w in reports)
    for i in sorted(set().union(*(indices for indices, _ in reports))):
        parameter = parameters[i]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _in_place(parameter.grad.mul_(share), dist.all_reduce)


def batch_positions(batches: int) -> list[int]:
    """Positions of this process' batches in the joint list of all processes.

    The joint list takes one batch of each process in turn, as distributed samplers hand them out.
    """
    lengths = gather("counting batches", batches)
    joint = sorted((turn, process) for process, length in enumerate(lengths) for turn in range(length))
    return [position for position, (_, process) in enumerate(joint) if process == rank()]


def check_equal(what: str, value: Mapping[str, Any], advice: str) -> None:
    """Raises `SensiError` in all processes if they have different values. It names the first key that differs."""

    def to_json(part: Any) -> Any:
        return sorted(map(str, part)) if isinstance(part, Iterable) else repr(part)

    texts = {key: json.dumps(part, sort_keys=True, default=to_json) for key, part in value.items()}
    hashes = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}
    first, *others = gather(f"comparing {what}", hashes)
    for number, other in enumerate(others, start=1):
        if different := [key for key in {**first, **other} if other.get(key) != first.get(key)]:
            raise SensiError(f"Process {number} has another `{different[0]}` in {what} than process 0. {advice}")


def broadcast_object(value: Any) -> Any:
    """The value of process 0: anything that pickle accepts, with tensors on the CPU."""
    if world_size() == 1:
        return value
    gather("sending the decision")
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
