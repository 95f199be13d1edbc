"""Times functions on a machine that may be busy: each one takes turns with a reference, and their ratio counts.

Other work slows both of them alike, so their ratio is far steadier than their times. This module needs NumPy only.
"""

from __future__ import annotations

import ctypes
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import SensiError


Run = Callable[[], object]
# Prepares a run from anew: the same model in other places of the memory. The run is used inside the context.
Prepare = Callable[[], AbstractContextManager[Run]]
Clock = Callable[[], float]

# The largest standard error of the times, as a share of the reference's time.
LARGEST_ERROR = 0.02
# If the reference takes long, a turn has one run, and rounds end when the error is as small as this. The time of a
# fast model varies with its place in the memory, which is another one in each round. So it takes all rounds.
PRECISE, _LONG = 0.005, 0.25
_FEWEST_ROUNDS, _FEWEST_FREE = 4, 4  # from fewer rounds or degrees of freedom, the error is not known
# A function that is fast is run several times in each turn, for this many seconds.
_SECONDS_PER_TURN = 0.1
_FEWEST, _MOST = 2, 200  # runs in each turn

# Parameters of glibc's `mallopt` (malloc.h), and the largest values to which glibc itself raises the first two.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_GROWN = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _MMAP_MAX: 65_536}


@dataclass(frozen=True)
class Timing:
    """The time of one run: mean, half of the interquartile range, and standard error of the mean, in seconds."""

    seconds: float
    spread: float
    error: float = 0.0


def clock_for(threads: int, device: str = "cpu") -> Clock:
    """The clock for a measurement, in seconds.

    With one thread on a CPU it is the processor time of this thread. It is the same as the elapsed time on an idle
    machine, and does not count the time in which other programs have the core.
    """
    is_fine = time.get_clock_info("thread_time").resolution <= 1e-6  # on Windows it is 16 ms
    return time.thread_time if threads == 1 and device == "cpu" and is_fine else time.perf_counter


def processor_name() -> str:
    """The name of this machine's processor, or of its board."""
    for path, key in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if lines := [line for line in text.split("\n") if line.startswith(key)]:
            name = "".join(c for c in lines[0].rpartition(":")[2] if c.isprintable()).strip()
            return name[:200]
    return platform.processor() or platform.machine() or "unknown"


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block, the C library keeps freed memory for the next run. It does nothing without glibc.

    Otherwise glibc returns large tensors to the system, and the next run waits for the system to clear the pages. How
    often it does so depends on what the process did before, so one and the same model has different times. Afterwards,
    glibc has the thresholds that a process that frees large tensors reaches.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for name, value in _GROWN.items():
            mallopt(name, value)


@contextmanager
def started(start: Callable[[], Run]) -> Iterator[Run]:
    """A run for `time_variants` that leaves nothing behind."""
    yield start()


@kept_memory()
def time_variants(
    reference: Prepare, variants: Mapping[str, Prepare], clock: Clock, rounds: int = 7
) -> tuple[Timing, dict[str, Timing]]:
    """Times the reference and each variant. In each round, each variant has a turn with the reference.

    Both are prepared again for each turn. One and the same model can be a tenth slower when its weights and buffers
    lie elsewhere in the memory, so a turn has one value, however many runs it has. If the results are not precise
    enough after `rounds` rounds, up to twice as many more follow. If they are precise sooner, the rest is left out.

    Returns:
        The reference's time, and the time of each variant by name, as it would be while the reference takes that time.

    Raises:
        SensiError: If the machine is too busy for a standard error of at most `LARGEST_ERROR`.
    """
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    of_reference: list[float] = []
    for count in range(1, 3 * rounds + 1):
        for name, prepare in variants.items():
            with reference() as base, prepare() as run:
                run()  # the first run allocates memory and chooses kernels
                pairs = _turn(base, run, clock)
            of_reference.append(float(np.median(pairs[:, 0])))
            ratios[name].append(float(np.median(pairs[:, 1] / np.maximum(pairs[:, 0], 1e-12))))
        error, is_long = _mean_error(ratios.values()), float(np.median(of_reference)) >= _LONG
        is_precise = is_long and error <= PRECISE and _is_known(count, len(variants))
        if is_precise or (count % rounds == 0 and error <= LARGEST_ERROR):
            whole = _summary(of_reference, 1.0)
            return whole, {name: _summary(values, whole.seconds) for name, values in ratios.items()}
    raise SensiError(
        f"The measured times are too noisy: after {3 * rounds} rounds, their standard error is {error:.1%} of the "
        f"whole model's time, and at most {LARGEST_ERROR:.0%} is useful. Stop other programs, use one thread, or "
        f"measure more rounds (`rounds`, --rounds)."
    )


def _is_known(count: int, variants: int) -> bool:
    """Whether the mean error after so many rounds says something; see `_summary` for the values that count."""
    return count >= _FEWEST_ROUNDS and variants * (count - 1 - 2 * _cut(count)) >= _FEWEST_FREE


def _mean_error(ratios: Iterable[list[float]]) -> float:
    """The root mean square of the standard errors. The largest of many estimates from few values says little."""
    return math.sqrt(float(np.mean([_summary(values, 1.0).error ** 2 for values in ratios])))


def _turn(reference: Run, run: Run, clock: Clock) -> np.ndarray:
    """The seconds of the reference and of the run, which alternate, `[runs, 2]`."""
    seconds = _time(reference, clock)  # not counted, as the first run of the other one
    fewest = 1 if seconds >= _LONG else _FEWEST
    repeats = min(_MOST, max(fewest, math.ceil(_SECONDS_PER_TURN / max(seconds, 1e-9))))
    return np.array([[_time(reference, clock), _time(run, clock)] for _ in range(repeats)])


def _time(run: Run, clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def _summary(values: list[float], unit: float) -> Timing:
    """Mean, spread and standard error of these values, times `unit`, without about a tenth of them at either end.

    The ends are turns in which other programs ran. The times form two clusters, because a model is fast in some places
    of the memory and slow in the others, so a median would jump between the clusters.
    Error of a trimmed mean: Tukey & McLaughlin 1963.
    """
    ordered, count = np.sort(values), len(values)
    cut = _cut(count)
    low, high = ordered[cut], ordered[count - 1 - cut]
    deviation = float(np.clip(ordered, low, high).std(ddof=min(1, count - 1)))
    error = deviation / ((1 - 2 * cut / count) * math.sqrt(count))
    lower, upper = np.quantile(ordered, [0.25, 0.75])
    return Timing(
        float(ordered[cut : count - cut].mean()) * unit, float(upper - lower) / 2 * unit, float(error) * unit
    )


def _cut(count: int) -> int:
    """How many of so many values are left out at either end."""
    return min(math.ceil(count / 10), (count - 1) // 2)
