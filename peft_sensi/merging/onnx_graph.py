"""ONNX graphs on disk: packing one into one or two files, quantizing it, moving it to its place, and running it."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.errors import SensiError
from ..utils.files import move_files, new_folder, writing
from ..utils.heads import label_names


LARGEST_PROTOBUF = 2**31 - 2**20


def file_to_write(option: str, path: str | os.PathLike[str]) -> Path:
    """The path of a file to write, which an option gave. Raises `SensiError` if it cannot be one."""
    path = Path(path)
    if path.suffix != ".onnx":
        raise SensiError(f"`{option}` must end in .onnx, got {str(path)!r}.")
    if path.is_dir():
        raise SensiError(f"{path} is a folder: give the path of a file.")
    return path


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `path`, so that a file in it can be renamed to `path`.

    The folder of `path` is created. If nothing is written into it, it is removed again.
    """
    parent = path.parent
    with writing(path), new_folder(parent), tempfile.TemporaryDirectory(prefix=".sensi-", dir=parent) as name:
        yield Path(name)


def pack(
    draft: Path,
    path: Path,
    external: bool | None,
    labels: Mapping[int, str] | None = None,
    positions: tuple[str, int] | None = None,
) -> bool:
    """Writes the draft as one file, or as two: the graph and its weights. Returns whether there are two.

    `labels` and the longest input become metadata. `positions` is the name of the table of positions and the longest
    input, in tokens.
    """
    import onnx

    graph = onnx.load(draft)
    metadata = {}
    if label_names(labels):
        metadata["id2label"] = json.dumps(labels)
    if positions:
        metadata["max_length"] = str(positions[1])
        _name_after_limit(graph.graph, *positions)
    known = {entry.key for entry in graph.metadata_props}
    for key, value in metadata.items():
        if key not in known:
            entry = graph.metadata_props.add()
            entry.key, entry.value = key, value
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if not (weights >= LARGEST_PROTOBUF if external is None else external):
        onnx.save_model(graph, path)
        return False
    # A new name: the graph that is at the path now still needs its own weights.
    name = f"{path.stem}-{secrets.token_hex(8)}.onnx_data"  # `bytes_of` finds it by this name
    onnx.save_model(graph, path, save_as_external_data=True, all_tensors_to_one_file=True, location=name)
    return True


def _name_after_limit(graph: Any, table: str, longest: int) -> None:
    """Names the nodes that read the table of positions, and those that use their output, after the longest input.

    One of them fails for a longer text, and onnxruntime's error contains the node's name.
    """
    inputs = {tensor.name for tensor in graph.initializer if tensor.name.endswith(f"{table}.weight")}
    readers = [node for node in graph.node if inputs & set(node.input)]
    outputs = {name for node in readers for name in node.output}
    users = [node for node in graph.node if outputs & set(node.input)]
    for number, node in enumerate([*readers, *users]):
        node.name = f"a text may have at most {longest} tokens ({node.op_type} {number})"


def with_external_weights(path: Path, location: str, smallest: int) -> tuple[bytes, int]:
    """A graph whose large float tensors refer to a file `location`, one after another, and the bytes of that file.

    Constants of less than `smallest` bytes stay in the graph.
    """
    import onnx

    graph, size = onnx.load(path), 0
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.raw_data) >= smallest:
            length = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", size), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            size += -(-length // 4096) * 4096  # aligned, so that a runtime can map the file into memory
    return graph.SerializeToString(), size


def quantize(source: Path, target: Path, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice about a preprocessing step that changes nothing here
    try:
        quantize_dynamic(
            source, target, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=external
        )
    finally:
        logging.disable(level)


def open_session(path: Path, threads: int | None = None) -> Any:
    """onnxruntime's session of a graph on the CPU, which prints errors only.

    A file that is no graph raises errors of onnxruntime, which have no common base class.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Idle threads of one session would take the cores from a session that takes turns with it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def parts(path: Path) -> list[Path]:
    """The files of a graph: its external data, and the graph itself as the last one."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    names = {
        entry.value for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return [*(path.parent / name for name in sorted(names) if Path(name).name == name), path]


def bytes_of(path: Path) -> int:
    """The size of a graph that `pack` wrote, and of the file of its weights. It needs no `onnx`."""
    own = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}\.onnx_data")
    files = [path, *(file for file in path.parent.iterdir() if own.fullmatch(file.name))]
    return sum(file.stat().st_size for file in files)


def move_graph(source: Path, path: Path) -> None:
    """Moves a graph and its data to its place, and removes data that only the old graph there used."""
    try:
        old = parts(path) if path.exists() else []
    except Exception:  # the old file is not a graph
        old = []
    files = parts(source)
    move_files(files, path.parent)
    for file in {part.name for part in old} - {part.name for part in files}:
        if file.endswith((".onnx_data", ".onnx.data")):
            (path.parent / file).unlink(missing_ok=True)
