"""Several processes with different data come to one decision, or fail together.

Whatever needs all processes happens inside `synchronized`. There, everything that processes exchange goes through
`gather`, which first tells everybody whether anybody has failed, and where everybody is: a process that fails says so
at the meeting that the others come to next, all of them raise the same error, and nobody waits for one
that is gone.

Outside of `synchronized`, and with one process, all functions here do nothing that can be seen.

PyTorch's own collectives are used and not Accelerate's wrappers around them: those quietly do nothing in a process
group that was started without Accelerate's environment variables. Accelerate starts the group where there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from . import errors
from .errors import CalibrationError, SensiError


_joined: ContextVar[bool] = ContextVar("joined", default=False)


class _FailedTogether(Exception):
    """Carries the error that all processes know already from the meeting to the end of `synchronized`."""

    def __init__(self, error: SensiError, own: bool) -> None:
        super().__init__(str(error))
        self.error, self.own = error, own


def start() -> int:
    """The number of processes of this job; starts Accelerate's process group where a launcher has set one up.

    Raises `SensiError` when `WORLD_SIZE` promises several processes and no group can be started.
    """
    if not dist.is_available():
        return 1
    if not dist.is_initialized():
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        by_mpi = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") if on_cpu else ()
        promised = get_int_from_env(("WORLD_SIZE", *by_mpi), 1)
        if promised < 2:
            return 1
        if by_mpi or "LOCAL_RANK" in os.environ:
            PartialState(cpu=on_cpu)
        if not dist.is_initialized():
            raise SensiError(
                f"WORLD_SIZE is {promised}, but there is no process group, so the processes would choose different "
                f"units. Start them with `accelerate launch` or `torchrun`, or call "
                f"`torch.distributed.init_process_group` first."
            )
    return dist.get_world_size()


def world_size() -> int:
    """How many processes work on this together; 1 outside of `synchronized`."""
    return dist.get_world_size() if _joined.get() else 1


def rank() -> int:
    return dist.get_rank() if _joined.get() else 0


@contextmanager
def synchronized(task: str) -> Iterator[None]:
    """Inside, processes may exchange values; when one of them fails, all end with the same error.

    `task` is for messages. An error that all processes have alike is raised as it is, others as the `SensiError` (or
    subclass) that names the process.
    """
    if _joined.get() or start() == 1:
        yield
        return
    token = _joined.set(True)
    try:
        try:
            gather(f"the start of {task}")
            yield
            gather(f"the end of {task}")
        except _FailedTogether:
            raise
        except Exception as error:
            # The others learn it at whatever meeting they come to next.
            try:
                _exchange(f"an error in {task}", None, error)
            except _FailedTogether as failed:
                raise (error if failed.own else failed.error) from error
            raise
    except _FailedTogether as failed:
        raise failed.error from None
    finally:
        _joined.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process exchanges nothing, although it is in `synchronized`."""
    token = _joined.set(False)
    try:
        yield
    finally:
        _joined.reset(token)


def gather(where: str, payload: Any = None) -> list[Any]:
    """The payloads (any picklable values) of all processes, by rank. `where` must be the same everywhere."""
    return _exchange(where, payload, None) if _joined.get() else [payload]


def _exchange(where: str, payload: Any, error: Exception | None) -> list[Any]:
    report = (where, payload, None if error is None else (_public_class(error), _text(error)))
    reports: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(reports, report)
    except RuntimeError as lost:
        gone = f"Another process is gone or hangs, so {where} cannot be reached: {lost}"
        raise _FailedTogether(SensiError(gone), own=False) from lost
    failed = [(number, report[2]) for number, report in enumerate(reports) if report[2] is not None]
    if failed:
        texts: dict[str, list[int]] = {}
        for number, (_, text) in failed:
            texts.setdefault(text, []).append(number)
        message = " ".join(
            f"In process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of {len(reports)}: {text}"
            for text, numbers in texts.items()
        )
        same = len(failed) == len(reports) and len(texts) == 1
        raise _FailedTogether(getattr(errors, failed[0][1][0])(message), own=same)
    places = [report[0] for report in reports]
    if len(set(places)) > 1:
        places_text = ", ".join(f"process {number} is at {place}" for number, place in enumerate(places))
        raise _FailedTogether(
            SensiError(
                f"The processes do not do the same: {places_text}. Give all of them the same model and settings."
            ),
            own=False,
        )
    return [report[1] for report in reports]


def _public_class(error: Exception) -> str:
    return next(c.__name__ for c in [*type(error).__mro__, SensiError] if getattr(errors, c.__name__, None) is c)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, SensiError) else f"{type(error).__name__}: {error}"


# -- tensors ----------------------------------------------------------------------------------------------------------


def all_sum(tensors: Sequence[torch.Tensor], where: str) -> None:
    """Replaces each tensor by its sum over all processes, in place."""
    _reduce(tensors, where, "SUM")


def all_max(tensors: Sequence[torch.Tensor], where: str) -> None:
    """Replaces each tensor by its elementwise maximum over all processes, in place."""
    _reduce(tensors, where, "MAX")


def _reduce(tensors: Sequence[torch.Tensor], where: str, operation: str) -> None:
    if world_size() == 1:
        return
    gather(f"{where}, {[tuple(tensor.shape) for tensor in tensors]}" if len(tensors) < 10 else where)
    for tensor in tensors:
        _on_the_wire(tensor, lambda t: dist.all_reduce(t, getattr(dist.ReduceOp, operation)))


def broadcast(tensor: torch.Tensor) -> None:
    """Replaces the tensor by that of process 0, in place. To be called right after a `gather`."""
    if world_size() > 1:
        _on_the_wire(tensor, lambda t: dist.broadcast(t, src=0))


def _on_the_wire(tensor: torch.Tensor, collective: Any) -> None:
    """Runs a collective in place, on a device that the process group can reach and on contiguous memory."""
    tensor = tensor.detach()
    reachable = f"{tensor.device.type}:" in dist.get_backend_config()
    copy = tensor if reachable else tensor.to(torch.device("cuda", torch.cuda.current_device()))
    copy = copy.contiguous()
    collective(copy)
    if copy is not tensor:
        tensor.copy_(copy)


def average_gradients(
    parameters: Sequence[torch.Tensor], weight: float, where: str, batch_name: str = "a calibration batch"
) -> None:
    """Replaces the gradients of all processes by their mean, weighted by `weight` (examples, or labeled tokens).

    It is the gradient of the mean loss over the joint batch. A parameter that has a gradient somewhere gets one
    everywhere. Raises `CalibrationError` in all processes when a gradient is not finite in one.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and not torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all():
        raise CalibrationError(f"The gradient of {batch_name} is not finite.")
    used = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
    reports = gather(where, (used, weight))
    share = weight / sum(w for _, w in reports)
    for i in sorted(set().union(*(indices for indices, _ in reports))):
        parameter = parameters[i]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad.mul_(share)
        _on_the_wire(gradient, dist.all_reduce)


def weight_of(batch: Mapping[str, Any], own_loss: bool = False) -> float:
    """How much a batch weighs in a mean over the batches of all processes.

    Its number of labeled positions where the loss is a mean over these, otherwise its number of examples.
    """
    labels = batch.get("labels")
    if not own_loss and isinstance(labels, torch.Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        return float((labels >= 0).sum())
    return float(max((v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), default=1))


def batch_positions(batches: int) -> list[int]:
    """Where this process' batches are in the list that deals all processes one batch in turn, as samplers do."""
    lengths = gather("counting batches", batches)
    dealt = sorted((turn, process) for process, length in enumerate(lengths) for turn in range(length))
    return [place for place, (_, process) in enumerate(dealt) if process == rank()]


# -- decisions --------------------------------------------------------------------------------------------------------


def check_equal(what: str, value: Mapping[str, Any], advice: str) -> None:
    """Raises `SensiError` in all processes unless they hold the same `value`, and names the first key that differs."""
    texts = {key: json.dumps(part, sort_keys=True, default=_showable) for key, part in value.items()}
    hashes = gather(
        f"comparing {what}", {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}
    )
    for number, other in enumerate(hashes):
        if different := [key for key in {**hashes[0], **other} if other.get(key) != hashes[0].get(key)]:
            raise SensiError(f"Process {number} has another `{different[0]}` in {what} than process 0. {advice}")


def _showable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, Iterable) else repr(value)


def broadcast_object(value: Any) -> Any:
    """The value (any picklable one, tensors on the CPU) that process 0 has."""
    if world_size() == 1:
        return value
    gather("sending the decision")
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
