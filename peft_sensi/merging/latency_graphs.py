"""Measures a latency table from a folder of ONNX graphs. Needs onnxruntime and NumPy, and nothing else.

`merging.latency.export_graphs` makes the folder: one graph for each model that is measured, without weights, and
`graphs.json`, which describes them. The time of a model does not depend on its weights, so they are random numbers in
one file, which exists during the measurement only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..anatomy.latency import AGAIN, FORMAT, LatencyTable, check_format
from ..anatomy.latency_points import Kind, points_of, table_from
from ..utils.checks import check_threads, shown
from ..utils.errors import SensiError, SensiLoadError, first_line
from ..utils.files import read_json_object, write_text_atomically
from ..utils.timing import clock_for, processor_name, started, time_variants
from .onnx_graph import open_session


GRAPHS = "graphs.json"
GRAPHS_FORMAT = "peft_sensi.graphs.2"
GRAPH_WEIGHTS = "weights.bin"
_LARGEST = 2**37  # bytes of weights
_OF_TABLE = ("phase", "model", "dtype", "batch_size", "sequence_length", "versions")  # fields of the table
_EXPORT = "Export the graphs again (`peft-sensi measure --export`)."


def measure_graphs(folder: str | os.PathLike, threads: int | None = None, rounds: int = 7) -> LatencyTable:
    """The latency table of the model whose graphs are in this folder, for onnxruntime on this machine's CPU.

    Args:
        folder: What `export_graphs` (or `peft-sensi measure MODEL --export FOLDER`) has written.
        threads: Number of threads. Default: one for each core.
        rounds: How often each model is measured, see `utils.timing`.

    Raises:
        SensiLoadError: The folder or its description is damaged.
        SensiError: onnxruntime is missing or cannot run a graph, or the machine is too busy.
    """
    check_threads(threads)
    described, kinds = read_graphs(folder)
    threads = threads or os.cpu_count() or 1
    onnxruntime = import_runtime()
    with tempfile.TemporaryDirectory(prefix="sensi-graphs-") as name:
        place = Path(name)
        try:
            for file in Path(folder).glob("*.onnx"):
                shutil.copyfile(file, place / file.name)
            _write_weights(place / GRAPH_WEIGHTS, described["weight_bytes"])
        except OSError as error:
            size = described["weight_bytes"]
            raise SensiError(f"The graphs need room for {size:,} bytes of random weights: {error}.") from None
        batch = _batch(described["inputs"])
        start = partial(start_session, batch=batch, threads=threads)

        files = {name: place / graph_name(number) for number, name in enumerate(points_of(kinds))}
        points = {name: partial(started, partial(start, file)) for name, file in files.items()}
        reference = partial(started, partial(start, place / graph_name()))
        whole, timings = time_variants(reference, points, clock_for(threads), rounds)
    fields = {name: described[name] for name in _OF_TABLE}
    fields |= {"device": processor_name(), "runtime": "onnxruntime", "threads": threads}
    fields["versions"] = {"onnxruntime": onnxruntime.__version__, **described["versions"]}
    return table_from(kinds, whole, timings, fields)


def import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise SensiError(f"Measuring in onnxruntime needs onnxruntime ({error}): pip install onnxruntime.") from error
    return onnxruntime


def start_session(path: Path, batch: Mapping[str, np.ndarray], threads: int) -> Callable[[], object]:
    """A function that runs a graph once. Raises `SensiError` if onnxruntime cannot run it."""
    import_runtime()
    try:
        session = open_session(path, threads)
        session.run(None, dict(batch))
    except Exception as error:  # onnxruntime's errors have no common base class
        raise SensiError(f"onnxruntime cannot run the graph {path.name}: {first_line(error)}") from error
    return partial(session.run, None, dict(batch))


def graph_name(point: int | None = None) -> str:
    """The file of the graph of a model, by its place in `points_of`; without a place, the whole model's."""
    return "whole.onnx" if point is None else f"point{point}.onnx"


def write_graphs(folder: Path, described: Mapping[str, Any], kinds: list[Kind]) -> None:
    """Writes `graphs.json`. `described` has all of its keys except `format` and `kinds`."""
    listed = [{"shape": k.shape, "groups": k.groups, "units": k.units, "counts": list(k.counts)} for k in kinds]
    text = json.dumps({"format": GRAPHS_FORMAT, **described, "kinds": listed}, indent=1) + "\n"
    write_text_atomically(folder / GRAPHS, text)


def read_graphs(folder: str | os.PathLike) -> tuple[dict[str, Any], list[Kind]]:
    """The checked content of `graphs.json`, and the kinds of sublayers in it. Raises `SensiLoadError`."""
    path = Path(folder) / GRAPHS
    if not path.is_file():
        raise SensiLoadError(
            f"{folder} holds no {GRAPHS}: it is not a folder of graphs. `peft-sensi measure MODEL --export FOLDER` "
            f"makes one, on a machine with PyTorch."
        )
    values = read_json_object(path)
    names = {*_OF_TABLE, "weight_bytes", "inputs", "kinds"}
    try:
        check_format(values, GRAPHS_FORMAT, names, GRAPHS, AGAIN)
        # The description has the fields of a table whose times are not known yet.
        entries = [{**kind, "ms": [1.0] * len(kind["counts"])} for kind in values["kinds"]]
        table = LatencyTable.from_dict(
            {
                **{name: values[name] for name in _OF_TABLE},
                **{"format": FORMAT, "device": "", "runtime": "onnxruntime", "threads": 1},
                **{"rest_ms": 1.0, "rest_spread_ms": 0.0},
                "sublayers": [{**entry, "spread_ms": entry["ms"]} for entry in entries],
            }
        )
        if type(values["weight_bytes"]) is not int or not 0 < values["weight_bytes"] <= _LARGEST:
            raise SensiLoadError(f"`weight_bytes` is {shown(values['weight_bytes'])}")
        for entry in values["inputs"]:
            _check_input(entry)
    except SensiLoadError as error:
        what = str(error).removesuffix(AGAIN).rstrip(" .")
        raise SensiLoadError(f"{path}: {what}. {_EXPORT}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise SensiLoadError(f"{path} is malformed: {type(error).__name__}: {error}. {_EXPORT}") from None
    return values, [Kind(kind.shape, kind.groups, kind.units, kind.counts) for kind in table.sublayers]


def _check_input(entry: Any) -> None:
    """An input of the graphs: its name, dtype, shape, and the range [low, high) of its random values."""
    good = (
        isinstance(entry, dict)
        and set(entry) == {"name", "dtype", "shape", "low", "high"}
        and isinstance(entry["name"], str)
        and entry["dtype"] in ("int64", "float32")
        and isinstance(entry["shape"], list)
        and all(type(n) is int and 1 <= n < 2**24 for n in entry["shape"])
        and np.prod(entry["shape"], dtype=float) < 2**28
        and all(type(entry[side]) is int and abs(entry[side]) < 2**31 for side in ("low", "high"))
        and entry["low"] < entry["high"]
    )
    if not good:
        raise SensiLoadError(f"`inputs` has the malformed entry {shown(entry)}")


def _batch(inputs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Random inputs for the graphs; the same ones on every device."""
    random = np.random.default_rng(0)
    return {e["name"]: random.integers(e["low"], e["high"], e["shape"]).astype(e["dtype"]) for e in inputs}


def _write_weights(path: Path, size: int) -> None:
    """Fills a file with `size` bytes of small random float32 numbers."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        while size > 0:
            block = (random.standard_normal(min(2**22, -(-size // 4)), dtype=np.float32) * 0.02).tobytes()
            file.write(block[:size])
            size -= len(block)
