"""What is measured for a latency table, and the table that follows from the measured times. Needs NumPy only.

Each kind of sublayer is measured inside the whole model: all sublayers of the kind keep the same number of units, and
all others stay whole. A sublayer that runs alone would find its weights in the processor's cache, and the times would
be too short. The difference from the whole model, divided by the number of sublayers, is the time that one saves.

These savings do not add up exactly: for example, a model that is small everywhere may fit into a cache that is too
small for the others. So models in which all kinds are trimmed together are measured too, and the savings are scaled
until their sums agree with those models.

A plan takes the counts that look cheap. Among noisy times these are the ones that were measured too short, and the
plan would be slower than predicted. So the times of a kind become a smooth curve, as far as their errors allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.errors import SensiError
from ..utils.timing import LARGEST_ERROR, Timing
from .latency import LatencyTable, SublayerTimes, shape_of


if TYPE_CHECKING:
    from .units import Anatomy


STEPS = 8  # measured numbers of units above zero
TOGETHER = (0.0, 0.25, 0.5, 0.75)  # kept shares at which all kinds are measured together

Counts = dict[str, int]  # kept units by the shape of the sublayers; those of other shapes are whole


@dataclass(frozen=True)
class Kind:
    """Sublayers of one shape, and the numbers of kept units to measure, ascending; the last one is `units`."""

    shape: str
    groups: int
    units: int
    counts: tuple[int, ...]


def kinds_of(anatomy: Anatomy) -> list[Kind]:
    """The kinds of sublayers of a model that can be trimmed, in the order in which they first occur.

    Heads are measured one by one if there are few of them. Neurons are measured at multiples of an eighth, rounded to
    multiples of 8. The smallest number above zero is measured as well: a sublayer that is gone saves the overhead of
    its operations, which one with a few units has. Between two measured numbers, a time is interpolated.
    """
    kinds: dict[str, Kind] = {}
    for group in anatomy.trimmable:
        if group.repeats:  # cross-attention of a decoder that is used alone never runs
            shape, before = shape_of(group), kinds.get(shape_of(group))
            step = 8 if group.kind == "neuron" and group.size >= 64 else 1
            points = np.append(np.rint(np.linspace(0, group.size, STEPS + 1) / step) * step, step)
            counts = np.unique(np.append(np.clip(points, group.least, group.size), group.size)).astype(int).tolist()
            kinds[shape] = Kind(shape, 1 + (before.groups if before else 0), group.size, tuple(counts))
    return list(kinds.values())


def points_of(kinds: list[Kind]) -> dict[str, Counts]:
    """The models to measure beside the whole one, by name: each kind alone at each count, then all kinds together."""
    points = [{kind.shape: count} for kind in kinds for count in kind.counts[:-1]]
    if len(kinds) > 1:
        points += [_together(kinds, share) for share in TOGETHER]
    return {_point_name(counts): counts for counts in points}


def _point_name(counts: Counts) -> str:
    return ", ".join(f"{shape}: {count}" for shape, count in counts.items())


def _together(kinds: list[Kind], share: float) -> Counts:
    """For each kind, the measured number of units that is nearest to this share of them."""
    return {kind.shape: min(kind.counts, key=lambda count: abs(count - share * kind.units)) for kind in kinds}


def table_from(
    kinds: list[Kind], whole: Timing, points: Mapping[str, Timing], described: Mapping[str, Any]
) -> LatencyTable:
    """The table of measured times. `points` has the times of all models that `points_of` names, and `described` the
    other fields of `LatencyTable`.

    Raises `SensiError` if the times are nonsense: sublayers that take longer than the whole model.
    """
    measured = [[points[_point_name({k.shape: count})] for count in k.counts[:-1]] + [whole] for k in kinds]
    # Each error comes from few values and says little; together, they tell how precise the times are.
    error = math.sqrt(float(np.mean([(t.error / max(t.seconds, 1e-12)) ** 2 for t in points.values()])))
    times = [_sublayer_ms(kind, timings, error) for kind, timings in zip(kinds, measured, strict=True)]
    factors = _factors(kinds, times, whole, points, error)
    sublayers = []
    for kind, timings, ms, factor in zip(kinds, measured, times, factors, strict=True):
        scaled = monotone(-factor * (ms[-1] - ms), np.ones(len(ms)))
        spread = np.array([timing.spread for timing in timings]) * 1e3 / kind.groups
        columns = (tuple(round(float(v), 6) for v in column) for column in (scaled - scaled[0], spread))
        sublayers.append(SublayerTimes(kind.shape, kind.groups, kind.units, kind.counts, *columns))
    rest = whole.seconds * 1e3 - sum(kind.groups * kind.ms[-1] for kind in sublayers)
    if rest <= 0:
        raise SensiError(
            "The measured times are nonsense: the sublayers take longer than the whole model. Stop other programs and "
            "measure again, with more rounds (`rounds`, --rounds)."
        )
    values = {**described, "rest_ms": round(rest, 6), "rest_spread_ms": round(whole.spread * 1e3, 6)}
    return LatencyTable(**values, sublayers=tuple(sublayers))


def _sublayer_ms(kind: Kind, timings: list[Timing], error: float) -> np.ndarray:
    """What one sublayer takes at each count `[counts]`, in ms more than at the smallest one. Only this kind is trimmed
    in the models that were timed, with this relative error; the last one is the whole model.
    """
    seconds = np.array([timing.seconds for timing in timings])
    # The whole model was timed far more often than each variant.
    weights = np.array([1.0] * (len(timings) - 1) + [len(timings)])
    # A sublayer that is gone has no overhead: from there to the next count, a step is real.
    first = int(kind.counts[0] == 0)
    shares = np.array(kind.counts[first:]) / kind.units
    seconds[first:] = smooth(shares, seconds[first:], error * seconds[first:] / np.sqrt(weights[first:]))
    seconds = monotone(seconds, weights)
    return (seconds - seconds[0]) * 1e3 / kind.groups


def _factors(
    kinds: list[Kind], times: list[np.ndarray], whole: Timing, points: Mapping[str, Timing], error: float
) -> list[np.ndarray]:
    """What the savings of each kind are multiplied with at each count, so that sums agree with the models in which all
    kinds are trimmed together, as far as the relative error of the times allows. Between the measured shares the
    factors are interpolated.
    """
    if len(kinds) < 2:
        return [np.ones(len(ms)) for ms in times]
    factors, errors = [], []
    for share in TOGETHER:
        counts = _together(kinds, share)
        saved = sum(
            kind.groups * float(ms[-1] - ms[kind.counts.index(counts[kind.shape])])
            for kind, ms in zip(kinds, times, strict=True)
        )
        together = points[_point_name(counts)].seconds
        # A saving as small as its error says nothing about a factor.
        is_clear = saved > 2 * LARGEST_ERROR * whole.seconds * 1e3
        factors.append(max(whole.seconds - together, 0.0) * 1e3 / saved if is_clear else 1.0)
        errors.append(error * together * 1e3 / saved if is_clear else 1.0)
    factors = smooth(np.array(TOGETHER), np.array(factors), np.array(errors)).tolist()
    return [np.interp(np.array(kind.counts) / kind.units, TOGETHER, factors) for kind in kinds]


def smooth(places: np.ndarray, values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The smoothest sequence that differs from `values` by no more than their standard errors explain, all `[n]`.

    It has the smallest sum of squared second differences for which the mean squared difference, in units of the
    errors, is at most one (Reinsch 1967). `places` ascend. Values without errors stay as they are.
    """
    if len(values) < 3 or not errors.all():
        return values
    errors = np.maximum(np.abs(errors), 1e-3 * np.abs(errors).max())  # a nearly exact value would outweigh all others
    steps = np.diff(places)
    bends = np.zeros((len(values) - 2, len(values)))  # second divided differences
    for row, (left, right) in enumerate(zip(steps, steps[1:], strict=False)):
        bends[row, row : row + 3] = [1 / left, -1 / left - 1 / right, 1 / right]
    fits = np.diag(1 / errors)
    scale = np.sqrt(np.square(fits).sum() / np.square(bends).sum())
    wanted = np.concatenate([values / errors, np.zeros(len(bends))])

    def curve(strength: float) -> np.ndarray:
        # Not by the normal equations: they are singular in floats if the errors differ much.
        return np.linalg.lstsq(np.vstack([fits, np.sqrt(strength) * scale * bends]), wanted, rcond=None)[0]

    low, high = -8.0, 8.0  # of the exponent: nearly the values themselves, and nearly a line
    for _ in range(40):
        middle = (low + high) / 2
        is_near = np.mean(((curve(10**middle) - values) / errors) ** 2) <= 1
        low, high = (middle, high) if is_near else (low, middle)
    return curve(10**low)


def monotone(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The never falling sequence with the smallest weighted sum of squared differences from `values`, both `[n]`.

    Pool adjacent violators (Ayer et al. 1955): values that fall are replaced by their weighted mean. SciPy has this
    since version 1.12, but devices that measure need not have SciPy.
    """
    blocks: list[list[float]] = []  # mean, weight and length of each run of equal results
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, wa, na), (b, wb, nb) = blocks[-2:]
            blocks[-2:] = [[(a * wa + b * wb) / (wa + wb), wa + wb, na + nb]]
    return np.repeat([mean for mean, _, _ in blocks], [int(length) for _, _, length in blocks])
