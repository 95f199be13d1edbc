"""`LatencyTable`: the measured time of each kind of sublayer for each number of kept units, and its file.

The time of a model is the time of the *rest*, which nothing can trim, plus the times of its sublayers. Sublayers of
equal shapes are one *kind*. This module needs NumPy only, because tables are also made on devices without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.checks import MOST_THREADS, is_count, is_number, is_threads, shown
from ..utils.errors import SensiError, SensiLoadError
from ..utils.files import read_json_object, write_json_atomically
from ..utils.formatting import data_frame, html_table


if TYPE_CHECKING:
    from .units import Anatomy, Group


FORMAT = "peft_sensi.latency.1"
AGAIN = "Measure the model again."
LIMIT_OF = {"prefill": "latency", "decode": "decode_latency"}  # phase -> name of the limit in a budget
LABELS = {"latency": "predicted latency", "decode_latency": "predicted latency of a decoding step"}
RUNTIMES = ("torch", "onnxruntime")
_MOST_MS = 1e9
_MOST = 10_000  # kinds of sublayers, and measured numbers of units of each
_LONGEST = 1000  # characters of a text


@dataclass(frozen=True)
class SublayerTimes:
    """The times of one kind of sublayer.

    Attributes:
        shape: The kind and the shapes, see `shape_of`.
        groups: Number of these sublayers in the model.
        units: Number of heads or neurons of each.
        counts: The numbers of kept units that were measured, ascending; the last one is `units`.
        ms: The time of one sublayer for each of these numbers in milliseconds, never falling. What does not depend on
            the number of units belongs to the rest, so the first time is usually 0.
        spread_ms: Half of the interquartile range of each measurement.
    """

    shape: str
    groups: int
    units: int
    counts: tuple[int, ...]
    ms: tuple[float, ...]
    spread_ms: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class LatencyTable:
    """The latency of a model on one device, for one shape of its input. `measure_latency` makes it.

    `print(table)` shows all times, and `table.to_frame()` is a table of them for pandas.

    Attributes:
        phase: `prefill`: one pass over whole sequences. `decode`: one step with a cache of `sequence_length` tokens.
        model: The model's type.
        device, runtime, versions, threads, dtype: Where and how it was measured.
        batch_size, sequence_length: The shape of the input.
        rest_ms: The time of what is never trimmed: embeddings, norms, head, and what the runtime adds.
        rest_spread_ms: Half of the interquartile range of the whole model's time.
        sublayers: The times of each kind of sublayer.
    """

    phase: str
    model: str
    device: str
    runtime: str
    versions: dict[str, str]
    threads: int
    dtype: str
    batch_size: int
    sequence_length: int
    rest_ms: float
    rest_spread_ms: float
    sublayers: tuple[SublayerTimes, ...]

    @property
    def limit(self) -> str:
        """The name of the limit in a budget that this table is for: `latency` or `decode_latency`."""
        return LIMIT_OF[self.phase]

    @property
    def rest(self) -> int:
        """The time of what is never trimmed, in nanoseconds."""
        return _nanoseconds(self.rest_ms)

    @property
    def whole(self) -> int:
        """The predicted time of the untrimmed model, in nanoseconds."""
        return self.rest + sum(kind.groups * _nanoseconds(kind.ms[-1]) for kind in self.sublayers)

    @property
    def whole_ms(self) -> float:
        """The predicted time of the untrimmed model, in milliseconds."""
        return self.whole / 1e6

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 of the table's content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def times(self, group: Group, counts: np.ndarray) -> np.ndarray:
        """The time of a sublayer in nanoseconds (int64), for each of these numbers of kept units.

        Between the measured numbers, the time is interpolated linearly. A sublayer that never runs takes no time.
        """
        kind = next((kind for kind in self.sublayers if kind.shape == shape_of(group)), None)
        if kind is None:
            return np.zeros(len(counts), dtype=np.int64)
        # A whole sublayer may be a single unit (`Group.as_one_unit`).
        units = np.asarray(counts) * (kind.units / group.size)
        return np.rint(np.interp(units, kind.counts, np.array(kind.ms) * 1e6)).astype(np.int64)

    def check_fits(self, anatomy: Anatomy) -> None:
        """Raises `SensiError` if the table was measured for a model with other sublayers."""
        running = [group for group in anatomy.trimmable if group.repeats]
        wanted = Counter(map(shape_of, running))
        sizes = {(shape_of(group), group.size) for group in running}
        found = {kind.shape: kind.groups for kind in self.sublayers}
        if wrong := sorted(shape for shape in wanted.keys() | found if wanted[shape] != found.get(shape, 0)):
            shape = wrong[0]
            raise SensiError(
                f"The latency table was measured for another model ({self.model}): this one has {wanted[shape]} "
                f"sublayers {shape!r}, and the table {found.get(shape, 0)}. Measure this model."
            )
        for kind in self.sublayers:  # a whole sublayer may be one unit (see `times`)
            if sizes.isdisjoint({(kind.shape, kind.units), (kind.shape, 1)}):
                raise SensiError(
                    f"The latency table gives sublayers {kind.shape!r} {kind.units} units, and those of this model "
                    f"have another number: the table was edited, or is for another model. Measure this model."
                )
        if anatomy.model_type and self.model != anatomy.model_type:
            warnings.warn(
                f"The latency table was measured for a model of the type {self.model!r}, and this one is a "
                f"{anatomy.model_type!r}. Its sublayers are as large, but everything else may take another time: "
                f"measure this model if the two are not built alike.",
                stacklevel=2,
            )

    def record(self, predicted: int) -> dict[str, Any]:
        """What an adapter remembers: the fingerprint and the figures, with the predicted nanoseconds of its plan."""
        own = {name: getattr(self, name) for name in _IN_RECORD}
        return {"table": self.fingerprint, **own, "whole_ms": self.whole_ms, "predicted_ms": predicted / 1e6}

    def to_dict(self) -> dict[str, Any]:
        """The table as a JSON value."""
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, values: Any) -> LatencyTable:
        """The inverse of `to_dict`. Raises `SensiLoadError` if the value is not a complete and sensible table."""
        names = {field.name for field in fields(cls)}
        check_format(values, FORMAT, names, "The latency table", AGAIN)
        for name in names - {"sublayers"}:
            _check(values, name, "The latency table")
        kinds = values["sublayers"]
        if not isinstance(kinds, list) or len(kinds) > _MOST:
            raise SensiLoadError(f"The latency table's `sublayers` must be a list, got {shown(kinds)}. {AGAIN}")
        table = cls(**{n: values[n] for n in names - {"sublayers"}}, sublayers=tuple(map(_sublayer, kinds)))
        shapes = [kind.shape for kind in table.sublayers]
        if len(set(shapes)) < len(shapes):
            raise SensiLoadError(f"The latency table has two entries for the same shape of sublayers. {AGAIN}")
        if table.whole <= 0:
            raise SensiLoadError(f"The latency table gives the whole model no time at all. {AGAIN}")
        if not _is_ms(table.whole_ms):
            raise SensiLoadError(f"The latency table gives the whole model {table.whole_ms:.3g} ms: too much. {AGAIN}")
        return table

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as JSON, under a temporary name first. Raises `SensiError` if that fails."""
        write_json_atomically(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Reads a file that `save` wrote. Raises `FileNotFoundError`, or `SensiLoadError` if it is no such file."""
        values = read_json_object(path)
        try:
            return cls.from_dict(values)
        except SensiLoadError as error:
            raise SensiLoadError(f"{path}: {error}") from None

    def __repr__(self) -> str:
        return f"<LatencyTable of {self.model}, {conditions(asdict(self))}: {self.whole_ms:.3f} ms>"

    def _repr_html_(self) -> str:
        rows = [
            [kind.shape, f"{kind.groups}", f"{count:,}", f"{ms:.3f}"]
            for kind in self.sublayers
            for count, ms in zip(kind.counts, kind.ms, strict=True)
        ]
        return html_table(["sublayer", "in the model", "units kept", "ms"], rows, caption=repr(self))

    def to_frame(self) -> Any:
        """The measurements as a pandas DataFrame: `shape`, `groups`, `kept`, `ms` and `spread_ms`.

        Raises `SensiError` if pandas is not installed.
        """
        return data_frame([
            {"shape": kind.shape, "groups": kind.groups, "kept": count, "ms": ms, "spread_ms": spread}
            for kind in self.sublayers
            for count, ms, spread in zip(kind.counts, kind.ms, kind.spread_ms, strict=True)
        ])  # fmt: skip

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.model}, {conditions(asdict(self))}; {self.dtype}; {versions}",
            f"whole model {self.whole_ms:.3f} ms, of which {self.rest_ms:.3f} ms cannot be trimmed",
        ]
        for kind in self.sublayers:
            points = ", ".join(f"{count}: {ms:.3f}" for count, ms in zip(kind.counts, kind.ms, strict=True))
            lines.append(f"{kind.groups} x {kind.shape}: ms by units kept: {points}")
        return "\n".join(lines)


def shape_of(group: Group) -> str:
    """The kind of a group's sublayer as text: equal texts mean equal work.

    `head x 12: 384x384, 384x384, 384x384, 384x384` has the kind, the width of the attention (or the number of
    neurons) and the sides of each weight.
    """
    sides = ", ".join(f"{side.width * group.size}x{side.fan}" for side in group.sides)
    kind = "cross-attention" if group.name.endswith(".cross_heads") else group.kind
    width = group.attention_width * group.size
    more = f", {group.repeats} times" if group.repeats != 1 else ""
    # A sublayer that needs a unit to run cannot be measured without units.
    return f"{kind}{f' of width {width}' if width else ''}: {sides}{more}{', never empty' if group.least else ''}"


def conditions(record: Mapping[str, Any]) -> str:
    """Where a table was measured and for which input, from its record or its fields."""
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    size, length = record["batch_size"], record["sequence_length"]
    shape = f"{size} x {length} tokens" if record["phase"] == "prefill" else f"batch {size}, {length} cached tokens"
    return f"{record['runtime']} on {record['device']}, {threads}, {shape}"


def latency_facts(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The records of an adapter or a plan as text, by label."""
    return {
        LABELS[limit]: f"{r['predicted_ms']:.3g} ms of {r['whole_ms']:.3g} ({r['predicted_ms'] / r['whole_ms']:.2%}; "
        f"{conditions(r)})"
        for limit, r in records.items()
    }


def check_records(records: Any) -> None:
    """Checks the records of an adapter's config, which may come from a file. Raises `SensiError`."""
    names = {"table", *_IN_RECORD, "whole_ms", "predicted_ms"}
    if not isinstance(records, Mapping) or not records or set(records) - set(LABELS):
        raise SensiError(f"`latency` must hold records for {' and '.join(LABELS)}, got {shown(records)}.")
    for limit, record in records.items():
        if not isinstance(record, Mapping) or set(record) != names:
            raise SensiError(f"`latency`: the record of {limit!r} must have {sorted(names)}, got {shown(record)}.")
        for name in names:
            _check(record, name, f"`latency`: the record of {limit!r}", SensiError)
        if LIMIT_OF[record["phase"]] != limit or not 0 < record["whole_ms"] >= record["predicted_ms"]:
            raise SensiError(f"`latency`: the record of {limit!r} is not possible: {shown(record)}.")


def check_format(values: Any, form: str, names: Collection[str], what: str, advice: str) -> None:
    """Raises `SensiLoadError` unless a JSON value has this `format` and exactly these other fields."""
    if not isinstance(values, Mapping) or values.get("format") != form:
        found = shown(values.get("format") if isinstance(values, Mapping) else values)
        raise SensiLoadError(f"{what} must have `format` = {form!r}, got {found}. {advice}")
    if wrong := sorted(map(str, values.keys() ^ {*names, "format"})):
        how = "lacks" if wrong[0] in names else "has the unknown field"
        raise SensiLoadError(f"{what} {how} {wrong[0]!r}. {advice}")


_IN_RECORD = ("phase", "device", "runtime", "threads", "batch_size", "sequence_length")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()


def _is_ms(value: Any) -> bool:
    return is_number(value) and 0 <= value <= _MOST_MS


# For each field: a function that says whether a value is accepted, and a description for the message.
_TYPES = {
    "phase": (lambda v: isinstance(v, str) and v in LIMIT_OF, " or ".join(LIMIT_OF)),
    "runtime": (lambda v: isinstance(v, str) and v in RUNTIMES, " or ".join(RUNTIMES)),
    "versions": (
        lambda v: isinstance(v, Mapping) and len(v) <= 100 and all(map(_is_text, [*v, *v.values()])),
        "an object of short strings",
    ),
    **dict.fromkeys(("table", "model", "device", "dtype", "shape"), (_is_text, "a short string")),
    "threads": (is_threads, f"a whole number from 1 to {MOST_THREADS}"),
    **dict.fromkeys(("batch_size", "sequence_length", "groups", "units"), (is_count, "a positive whole number")),
    **dict.fromkeys(("rest_ms", "rest_spread_ms", "whole_ms", "predicted_ms"), (_is_ms, "a number of milliseconds")),
}


def _check(values: Mapping[str, Any], name: str, where: str, error: type[SensiError] = SensiLoadError) -> None:
    is_good, expected = _TYPES[name]
    if not is_good(values[name]):
        raise error(f"{where}: `{name}` must be {expected}, got {shown(values[name])}.")


def _sublayer(values: Any) -> SublayerTimes:
    """One entry of a table's `sublayers`."""
    names = [field.name for field in fields(SublayerTimes)]
    if not isinstance(values, Mapping) or set(values) != set(names):
        raise SensiLoadError(
            f"An entry of the latency table's `sublayers` must have {names}, got {shown(values)}. {AGAIN}"
        )
    for name in ("shape", "groups", "units"):
        _check(values, name, "The latency table's `sublayers`")
    where = f"The latency table's entry {shown(values['shape'])}"
    counts, ms, spread = (values[name] for name in ("counts", "ms", "spread_ms"))
    if not all(isinstance(v, list) and 1 <= len(v) <= _MOST for v in (counts, ms, spread)):
        raise SensiLoadError(f"{where} needs lists of `counts`, `ms` and `spread_ms`. {AGAIN}")
    if not (len(counts) == len(ms) == len(spread)) or not all(map(_is_ms, [*ms, *spread])):
        raise SensiLoadError(
            f"{where} needs one number of milliseconds in `ms` and `spread_ms` for each count. {AGAIN}"
        )
    good = all(type(n) is int and 0 <= n for n in counts) and all(a < b for a, b in pairwise(counts))
    if not good or counts[-1] != values["units"]:
        raise SensiLoadError(
            f"{where}: `counts` must be whole numbers that rise to `units`, got {shown(counts)}. {AGAIN}"
        )
    if any(a > b for a, b in pairwise(ms)):
        raise SensiLoadError(f"{where}: `ms` must not fall when more units are kept, got {shown(ms)}. {AGAIN}")
    return SublayerTimes(values["shape"], values["groups"], values["units"], tuple(counts), tuple(ms), tuple(spread))


def _nanoseconds(ms: float) -> int:
    return math.floor(ms * 1e6 + 0.5)
