"""`measure_latency`: a model goes in; the latency table of a device and a runtime comes out.

For a device without PyTorch, `export_graphs` writes a folder of ONNX graphs, and `merging.latency_graphs` measures it.
`compare_latency` times a merged model and its base, to check a prediction.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.latency import LatencyTable
from ..anatomy.latency_points import kinds_of, points_of
from ..anatomy.modules import check_module
from ..planning.latency_torch import (
    Inputs,
    example_inputs,
    fresh_copy,
    measurable,
    measure_torch,
    model_name,
    number_of_threads,
    plan_keeping,
    start_run,
    tokens_of,
)
from ..planning.trimmed import trimmed
from ..utils.checks import check_threads, is_count, shown
from ..utils.errors import SensiError
from ..utils.files import new_folder, writing
from ..utils.timing import Run, clock_for, started, time_variants
from .latency_graphs import GRAPH_WEIGHTS, graph_name, import_runtime, measure_graphs, start_session, write_graphs
from .onnx import trace_graph
from .onnx_graph import with_external_weights


_SMALLEST_WEIGHT = 1024  # bytes: smaller constants stay in the graph, because a runtime may compute with them


def measure_latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    sequence_length: int = 128,
    runtime: str = "torch",
    threads: int | None = None,
    device: str | torch.device | None = None,
    decode: bool = False,
    inputs: Inputs | None = None,
    rounds: int = 7,
    blocks: Any = None,
) -> LatencyTable:
    """Measures how long each kind of sublayer takes for several numbers of kept units, and the rest of the model.

    Each variant of the model takes turns with the whole model, and their ratio counts (`utils.timing`). With one
    thread on a CPU, processor time is measured, which other programs hardly influence.

    Args:
        model: A model without adapters. It does not change.
        batch_size: Sequences in a batch.
        sequence_length: Tokens of each sequence; with `decode`, tokens in the cache. A model of images has its own.
        runtime: `torch`, or `onnxruntime` (on the CPU, in float32, needs the extra `onnx`).
        threads: Number of threads. Default: as many as PyTorch uses now.
        device: Where to measure. Default: where the model is.
        decode: Measures one step of a decoder with a cache, for the limit `decode_latency`. Only in `torch`.
        inputs: A batch of tensors for models that take neither token ids nor images. It sets the shape of the input;
            `batch_size` and `sequence_length` should describe it.
        rounds: How often each variant takes turns with the whole model; fewer if a slow model's times are precise.
        blocks: [`BlockLayout`] objects for architectures that the library does not know.

    Raises:
        AnatomyError: The model has no heads or neurons to trim.
        SensiError: An argument is wrong, the model cannot run such a batch, onnxruntime is missing, or the machine is
            too busy for precise times.
    """
    counts = {"batch_size": batch_size, "sequence_length": sequence_length, "rounds": rounds}
    _check(model, runtime, counts, threads, decode, device)
    length = tokens_of(model, sequence_length, inputs)
    options: dict[str, Any] = {"batch_size": batch_size, "sequence_length": length, "blocks": blocks}
    if runtime == "torch":
        here = model if device is None else copy.deepcopy(model).to(device)
        return measure_torch(here, threads=threads, decode=decode, inputs=inputs, rounds=rounds, **options)
    import_runtime()
    with tempfile.TemporaryDirectory(prefix="sensi-graphs-") as folder:
        export_graphs(model, folder, inputs=inputs, **options)
        return measure_graphs(folder, threads or torch.get_num_threads(), rounds)


def export_graphs(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    batch_size: int = 1,
    sequence_length: int = 128,
    inputs: Inputs | None = None,
    blocks: Any = None,
) -> None:
    """Writes what a device without PyTorch needs to measure this model: small ONNX graphs without weights.

    Copy the folder to the device and run `peft-sensi measure FOLDER` there. The arguments and errors are those of
    `measure_latency`. PyTorch's exporter needs a few seconds for each graph.
    """
    _check(model, "onnxruntime", {"batch_size": batch_size, "sequence_length": sequence_length}, None)
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SensiError(f"{folder} exists and is not an empty folder: give the path of a new one.")
    small = copy.deepcopy(model).float().cpu().eval()
    anatomy = measurable(small, blocks)
    kinds = kinds_of(anatomy)
    batch = example_inputs(small, batch_size, sequence_length, inputs)
    largest = 0

    def write(name: str) -> None:
        nonlocal largest
        with tempfile.TemporaryDirectory(prefix="sensi-draft-") as place:
            trace_graph(small, batch, Path(place) / "draft.onnx")
            graph, size = with_external_weights(Path(place) / "draft.onnx", GRAPH_WEIGHTS, _SMALLEST_WEIGHT)
        (folder / name).write_bytes(graph)
        largest = max(largest, size)

    with writing(folder), _whole_or_nothing(folder):
        write(graph_name())
        for number, counts in enumerate(points_of(kinds).values()):
            with trimmed(small, plan_keeping(anatomy, counts), anatomy.trimmable):
                write(graph_name(number))
        described = {
            "phase": "prefill",
            "model": model_name(model),
            "dtype": "float32",
            "batch_size": batch_size,
            "sequence_length": tokens_of(model, sequence_length, inputs),
            "versions": {"torch": str(torch.__version__)},
            "weight_bytes": largest,
            "inputs": [_described(name, tensor) for name, tensor in batch.items()],
        }
        write_graphs(folder, described, kinds)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    """Creates a folder. If the block fails, the graphs are removed: some of them are of no use without the others."""
    with new_folder(folder):
        try:
            yield
        except BaseException:
            for file in folder.glob("*.onnx"):
                file.unlink()
            raise


def compare_latency(
    model: nn.Module,
    base: nn.Module,
    *,
    batch_size: int = 1,
    sequence_length: int = 128,
    runtime: str = "torch",
    threads: int | None = None,
    decode: bool = False,
    inputs: Inputs | None = None,
    rounds: int = 7,
) -> tuple[float, float]:
    """Times a merged model and its base, which take turns: milliseconds of the merged model, and of the base.

    The arguments and errors are those of `measure_latency`; there are three times as many rounds.
    """
    counts = {"batch_size": batch_size, "sequence_length": sequence_length, "rounds": rounds}
    for each in (model, base):
        _check(each, runtime, counts, threads, decode)
    with number_of_threads(threads) as threads, tempfile.TemporaryDirectory(prefix="sensi-graphs-") as name:
        if runtime == "torch":
            options = {"batch_size": batch_size, "length": sequence_length, "decode": decode, "inputs": inputs}
            starts = [partial(_start_copy, each, **options) for each in (base, model)]
        else:
            batch = example_inputs(base, batch_size, sequence_length, inputs)
            batch, starts = {key: tensor.cpu() for key, tensor in batch.items()}, []
            arrays = {key: tensor.numpy() for key, tensor in batch.items()}
            for number, each in enumerate((base, model)):
                path = Path(name) / f"{number}.onnx"
                trace_graph(copy.deepcopy(each).float().cpu().eval(), batch, path)
                starts.append(partial(start_session, path, arrays, threads))
        device = next(base.parameters()).device.type if runtime == "torch" else "cpu"
        reference, merged = (partial(started, start) for start in starts)
        # A round of one model takes far less time than a round of a table's models.
        whole, timings = time_variants(reference, {"merged": merged}, clock_for(threads, device), 3 * rounds)
    return timings["merged"].seconds * 1e3, whole.seconds * 1e3


def time_models(
    base: nn.Module, models: Mapping[str, nn.Module], sequence_length: int, rounds: int
) -> tuple[float, dict[str, float]]:
    """Milliseconds of the base for one sequence, and of each model by its name. Each takes turns with the base.

    The errors are those of `measure_latency`. The models are in evaluation mode, and do not change.
    """
    start = partial(_start_copy, batch_size=1, length=sequence_length, decode=False)
    reference, *others = (partial(started, partial(start, each)) for each in (base, *models.values()))
    clock = clock_for(torch.get_num_threads(), next(base.parameters()).device.type)
    whole, timings = time_variants(reference, dict(zip(models, others, strict=True)), clock, rounds)
    return whole.seconds * 1e3, {name: timing.seconds * 1e3 for name, timing in timings.items()}


def _start_copy(model: nn.Module, **options: Any) -> Run:
    return start_run(fresh_copy(model), **options)


def check_prediction(model: nn.Module, base: nn.Module, record: Mapping[str, Any], rounds: int = 7) -> dict[str, Any]:
    """Compares the prediction of an adapter (its `record`) with the merged model's time on this machine, as JSON.

    `off` is the measured share of the base's time divided by the predicted share, minus 1. It is comparable even if
    this machine is another one, or busier, than when the table was measured. Raises `SensiError` if no time at all is
    predicted, which only a table without a rest can do.
    """
    if not record["predicted_ms"]:
        raise SensiError("The plan's predicted latency is zero, so a measured one cannot be compared with it.")
    merged_ms, base_ms = compare_latency(
        model,
        base,
        batch_size=record["batch_size"],
        sequence_length=record["sequence_length"],
        runtime=record["runtime"],
        threads=record["threads"],
        decode=record["phase"] == "decode",
        rounds=rounds,
    )
    predicted = record["predicted_ms"] / record["whole_ms"]
    measured = {"merged_ms": merged_ms, "base_ms": base_ms, "measured_share": merged_ms / base_ms}
    return {**record, **measured, "predicted_share": predicted, "off": merged_ms / base_ms / predicted - 1}


def _check(
    model: nn.Module,
    runtime: str,
    counts: Mapping[str, Any],
    threads: Any,
    decode: bool = False,
    device: Any = None,
) -> None:
    if runtime not in ("torch", "onnxruntime"):
        raise SensiError(f"`runtime` must be 'torch' or 'onnxruntime', got {shown(runtime)}.")
    check_threads(threads)
    for name, value in counts.items():
        if not is_count(value):
            raise SensiError(f"`{name}` must be a positive whole number, got {shown(value)}.")
    check_module(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise SensiError("The model has an adapter: measure the base model, or merge the adapter first.")
    if runtime == "onnxruntime" and not isinstance(model, PreTrainedModel):
        raise SensiError(f"runtime='onnxruntime' exports models of Transformers, not a {type(model).__name__}.")
    if runtime == "onnxruntime" and (decode or device not in (None, "cpu", torch.device("cpu"))):
        raise SensiError("runtime='onnxruntime' measures whole sequences on the CPU: leave out `decode` and `device`.")


def _described(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """An input of the graphs: random values between those of the example."""
    if tensor.is_floating_point():
        low, high, dtype = -1, 2, "float32"
    else:
        low, high, dtype = int(tensor.min()), int(tensor.max()) + 1, "int64"
    return {"name": name, "dtype": dtype, "shape": list(tensor.shape), "low": low, "high": high}
