"""ONNX files of merged models, checked in onnxruntime before they get their name.

The file has a dynamic batch and a dynamic length, is float32 whatever the model is, and needs nothing but onnxruntime
to run. It is written by PyTorch's TorchScript-based exporter: it needs no further package, and its graphs are checked
here on shapes other than the one that was traced, which is where a traced constant would show.
"""

from __future__ import annotations

import copy
import inspect
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..utils.errors import SensiError
from ..utils.files import flush
from .save import merged_copy


# Shapes [batch, length] on which the file must agree with the model; the first is traced.
_SHAPES = ((2, 7), (1, 12), (3, 5))
_LARGEST_PROTOBUF = 2**31 - 2**20


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file. `bytes` counts its external data, too.

    `difference` is the largest absolute one to the model's outputs; `agreement` (share of equal arg maxima) and
    `accuracy` (share of those that equal `labels`) are of the `data` that was given, else `None`.
    """

    path: Path
    bytes: int
    difference: float
    agreement: float | None = None
    accuracy: float | None = None

    def __str__(self) -> str:
        shares = [f", {n} {v:.1%}" for n in ("agreement", "accuracy") if (v := getattr(self, n)) is not None]
        return f"{self.path}: {self.bytes / 1e6:.2f} MB, largest difference {self.difference:.1e}{''.join(shares)}"


@dataclass(frozen=True)
class ExportReport:
    """What was written: names of inputs and outputs, the opset, the file and, if wanted, its int8 copy."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    file: ExportedFile
    int8: ExportedFile | None = None

    def __str__(self) -> str:
        lines = [f"opset {self.opset}, inputs {', '.join(self.inputs)}, outputs {', '.join(self.outputs)}"]
        return "\n".join([*lines, *(str(file) for file in (self.file, self.int8) if file is not None)])


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    opset: int = 17,
    tolerance: float = 1e-4,
    int8: bool | str | os.PathLike[str] = False,
    data: Iterable[Mapping[str, Any]] | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Exports a merged copy of `model`, checks it in onnxruntime, and only then puts it at `path`.

    Args:
        model: A `PeftModel` with an adapter of this package, or a Transformers model; stays as it is.
        path: Of the `.onnx` file. A file that is there stays until the new one is complete and checked.
        inputs: An example batch whose tensors are all `[batch, length]`; by default random token ids with a mask, and
            token types where the model has more than one.
        opset: Of the operators, at least 14.
        tolerance: Largest absolute difference to the model's own outputs, on three shapes with padding.
        int8: Whether a copy with dynamically quantized weights (int8, one scale an output channel) is written, or its
            path; by default beside the other, as `name.int8.onnx`.
        data: Batches by which agreement with the model, and accuracy where they have `labels`, are measured.
        external_data: Whether weights go into a file of their own beside the other; `None` is only where they must (a
            protobuf ends at 2 GB).

    Raises:
        SensiError: The extra `onnx` is not installed, the model cannot be exported, or onnxruntime finds other values.
    """
    _packages()
    path = Path(path)
    if path.suffix != ".onnx":
        raise SensiError(f"`path` must end in .onnx, got {str(path)!r}.")
    if isinstance(opset, bool) or not isinstance(opset, int) or not 14 <= opset <= 20:
        raise SensiError(f"`opset` must be a whole number from 14 to 20, got {opset!r}.")
    if path.is_dir():
        raise SensiError(f"{path} is a folder; give the path of a file.")
    # The copy that is compared with has its adapters still, so that merging is checked as well.
    reference = copy.deepcopy(model).float().cpu().eval()
    merged = merged_copy(reference)
    merged = (copy.deepcopy(merged) if merged is reference else merged).eval()
    batches = [dict(batch) for batch in data] if data is not None else []
    examples = _examples(merged, inputs)
    names = tuple(examples[0])
    expected = [_run(reference, example) for example in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sensi-", dir=path.parent) as folder:
        draft = Path(folder) / "draft.onnx"
        _trace(merged, examples[0], expected, draft, opset)
        is_external = _pack(draft, Path(folder) / path.name, external_data)
        file = _measure(Path(folder) / path.name, path, names, examples, expected, reference, batches)
        if not file.difference <= tolerance:
            raise SensiError(
                f"onnxruntime's outputs differ from the model's by up to {file.difference:.1e}, more than "
                f"{tolerance}: nothing was written to {path}."
            )
        small = None
        if int8:
            small_path = path.with_suffix(".int8.onnx") if int8 is True else Path(int8)
            if small_path.resolve() == path.resolve():
                raise SensiError("`int8` must be another path than `path`.")
            small_path.parent.mkdir(parents=True, exist_ok=True)
            small_draft = Path(folder) / "int8" / small_path.name
            small_draft.parent.mkdir()
            _quantize(Path(folder) / path.name, Path(folder) / "int8.onnx", is_external)
            _pack(Path(folder) / "int8.onnx", small_draft, external_data)
            small = _measure(small_draft, small_path, names, examples, expected, reference, batches)
            _put(small_draft, small_path)
        _put(Path(folder) / path.name, path)
    return ExportReport(names, tuple(expected[0]), opset, file, small)


def _packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise SensiError(
            f"`export_onnx` needs onnx and onnxruntime ({error}): pip install 'peft-sensi[onnx]'."
        ) from error


def _examples(model: nn.Module, given: Mapping[str, torch.Tensor] | None) -> list[dict[str, torch.Tensor]]:
    """Batches of the shapes above, every second row padded."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    if given is not None:
        given = {name: value for name, value in given.items() if name in accepted and isinstance(value, torch.Tensor)}
        given = {n: v.cpu() for n, v in given.items() if n not in ("labels", "start_positions", "end_positions")}
        if not given or any(v.dim() != 2 or v.shape != next(iter(given.values())).shape for v in given.values()):
            raise SensiError("`inputs` must be tensors of one shape [batch, length], as a tokenizer returns them.")
    elif "input_ids" not in accepted:
        raise SensiError(f"{type(model).__name__} does not take `input_ids`: give a batch as `inputs=`.")
    if getattr(config, "is_encoder_decoder", False):
        raise SensiError("Encoder-decoder models cannot be exported as one graph; use Optimum on the merged model.")
    generator = torch.Generator().manual_seed(0)
    examples = []
    for size, length in _SHAPES:
        ids = torch.randint(0, config.vocab_size, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, length - length // 3 :] = 0
        if (pad := config.pad_token_id) is not None:
            ids = ids.masked_fill(ids == pad, (pad + 1) % config.vocab_size).masked_fill(mask == 0, pad)
        example = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 1) > 1:
            example["token_type_ids"] = torch.zeros_like(ids)
        if given is not None:
            rows, columns = (torch.arange(n) % m for n, m in zip((size, length), _shape(given), strict=True))
            example = {name: value[rows][:, columns].contiguous() for name, value in given.items()}
        examples.append({name: value for name, value in example.items() if name in accepted})
    return examples


def _shape(batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    rows, columns = next(iter(batch.values())).shape
    return rows, columns


def _outputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = {"return_dict": True}
    if "use_cache" in inspect.signature(_inner(model).forward).parameters:
        options["use_cache"] = False
    found = model(**batch, **options)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor) and name != "loss"}


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def _run(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in _outputs(model, batch).items()}


class _Graph(nn.Module):
    """Tensors in, tensors out, by place."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_outputs(self.model, dict(zip(self.names, tensors, strict=True))).values())


def _trace(
    model: Any,
    example: Mapping[str, torch.Tensor],
    expected: list[dict[str, np.ndarray]],
    path: Path,
    opset: int,
) -> None:
    # The plain formula of attention: fused kernels bring branches that a trace takes for one of them only.
    model.set_attn_implementation("eager")
    axes = {name: {0: "batch", 1: "length"} for name in example}
    for name, first in expected[0].items():
        axes[name] = {}
        for dim in range(first.ndim):
            sizes = [outputs[name].shape[dim] for outputs in expected]
            for axis, label in enumerate(("batch", "length")):
                if sizes == [shape[axis] for shape in _SHAPES]:
                    axes[name][dim] = label
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about constants in the trace: other shapes are checked afterwards
            torch.onnx.export(
                _Graph(model, example),
                tuple(example.values()),
                str(path),
                input_names=list(example),
                output_names=list(expected[0]),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:  # the exporter's errors have no common class
        message = str(error).strip().partition("\n")[0]
        raise SensiError(f"PyTorch cannot export this {type(model).__name__} to opset {opset}: {message}") from error


def _pack(draft: Path, path: Path, external: bool | None) -> bool:
    """Writes the draft as one file, or as one file and one for its weights. Whether it was two."""
    import onnx

    graph = onnx.load(draft)
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if not (weights >= _LARGEST_PROTOBUF if external is None else external):
        onnx.save_model(graph, path)
        return False
    # A name of its own, so that what is at the path now stays whole until the new graph replaces it.
    name = f"{path.stem}-{secrets.token_hex(8)}.onnx_data"
    onnx.save_model(graph, path, save_as_external_data=True, all_tensors_to_one_file=True, location=name)
    return True


def _quantize(source: Path, target: Path, external: bool) -> None:
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice about a preprocessing step that changes nothing here
    try:
        quantize_dynamic(
            source, target, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=external
        )
    finally:
        logging.disable(level)


def _measure(
    source: Path,
    path: Path,
    names: tuple[str, ...],
    examples: list[dict[str, torch.Tensor]],
    expected: list[dict[str, np.ndarray]],
    model: nn.Module,
    batches: list[dict[str, Any]],
) -> ExportedFile:
    """Runs a file in onnxruntime. `path` is where it is going to be."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        found = [session.run(None, {n: batch[n].numpy() for n in names}) for batch in examples]
    except Exception as error:  # onnxruntime's errors have no common class either
        raise SensiError(f"onnxruntime cannot run the exported model: {error}") from error
    difference = max(
        float(np.abs(values - wanted).max(initial=0.0)) if values.shape == wanted.shape else float("inf")
        for values_of, wanted_of in zip(found, expected, strict=True)
        for values, wanted in zip(values_of, wanted_of.values(), strict=True)
    )
    equal, right, count, labeled = 0, 0, 0, 0
    for batch in batches if next(iter(expected[0].values())).shape[-1] > 1 else ():  # one output is a regression
        tensors = _inputs(batch, names)
        own = next(iter(_run(model, tensors).values())).argmax(-1)
        theirs = session.run(None, {name: value.numpy() for name, value in tensors.items()})[0].argmax(-1)
        labels = np.asarray(torch.as_tensor(batch["labels"]).cpu()) if "labels" in batch else None
        counts = np.ones(own.shape, dtype=bool)
        if labels is not None and labels.shape == own.shape:
            counts = labels >= 0  # Transformers' mark of places without a label is -100
            right, labeled = right + int((theirs == labels)[counts].sum()), labeled + int(counts.sum())
        equal, count = equal + int((own == theirs)[counts].sum()), count + int(counts.sum())
    return ExportedFile(
        path,
        sum(file.stat().st_size for file in _parts(source)),
        difference,
        equal / count if count else None,
        right / labeled if labeled else None,
    )


def _inputs(batch: Mapping[str, Any], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """A batch as the graph takes it; what a tokenizer left out is what the model would assume."""
    tensors = {name: torch.as_tensor(batch[name]).cpu() for name in names if name in batch}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in names and name not in tensors and "input_ids" in tensors:
            tensors[name] = torch.full_like(tensors["input_ids"], value)
    if missing := set(names) - set(tensors):
        raise SensiError(f"A batch of `data` lacks {sorted(missing)[0]!r}, which the graph takes.")
    return {name: tensors[name] for name in names}


def _parts(path: Path) -> list[Path]:
    """The files that belong to a graph, itself last."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    names = {
        entry.value for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return [*(path.parent / name for name in sorted(names) if Path(name).name == name), path]


def _put(source: Path, path: Path) -> None:
    """Moves a graph and its data into place, the graph last; then removes data that only the old graph had."""
    try:
        old = set(_parts(path)) if path.exists() else set()
    except Exception:  # whatever is there is no graph, and is replaced
        old = set()
    new = set()
    for file in _parts(source):
        flush(file)
        target = path if file == source else path.parent / file.name
        os.replace(file, target)
        new.add(target)
    flush(path.parent)
    for file in old - new:
        if file.name.endswith((".onnx_data", ".onnx.data")):
            file.unlink(missing_ok=True)
