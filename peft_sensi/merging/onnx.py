"""A model goes in; an ONNX file comes out, in float32, for any batch size and length. Only onnxruntime runs it.

The file is checked in onnxruntime before it replaces anything. PyTorch's TorchScript-based exporter writes it, because
this exporter needs no further package. It records what the model does with one batch, so the check also uses batches
of other shapes: they would show a size that was recorded as a constant.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.inputs import positions_of
from ..anatomy.modules import unwrapped
from ..tuner.wrapping import root_of
from ..utils.checks import is_number, shown
from ..utils.errors import SensiError, first_line, how_to_install
from .onnx_agreement import LABELS, Agreement, graph_inputs
from .onnx_graph import file_to_write, folder_beside, move_graph, open_session, pack, parts, quantize
from .save import merged_copy


# Shapes [batch, length] on which the file must agree with the model. The exporter sees the first one only.
_SHAPES = ((2, 7), (1, 12), (3, 5))
_OTHER_INPUTS = {"pixel_values": "images", "input_values": "sounds", "input_features": "sounds"}
OPSET = 17  # the version of ONNX's operators, if the user names no other


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file.

    Attributes:
        path: Where it is.
        bytes: Its size, with its external data.
        difference: The largest absolute difference between its outputs and the model's.
        agreement: The share of decisions on `data` that are those of the model (see `Agreement`); `None` without
            `data`, and for predicted numbers.
        accuracy: The share of decisions that are the labels of `data`; `None` without labels.
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
    """What was written: the names of inputs and outputs, the opset, the file and its int8 copy, if there is one.

    `longest` is the number of tokens of the longest input; `None` if the model has no table of positions.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    file: ExportedFile
    int8: ExportedFile | None = None
    longest: int | None = None

    def __str__(self) -> str:
        lines = [f"opset {self.opset}, inputs {', '.join(self.inputs)}, outputs {', '.join(self.outputs)}"]
        if self.longest is not None:
            lines.append(f"texts have at most {self.longest:,} tokens")
        return "\n".join([*lines, *(str(file) for file in (self.file, self.int8) if file is not None)])


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    opset: int = OPSET,
    tolerance: float = 1e-4,
    int8: bool | str | os.PathLike[str] = False,
    data: Iterable[Mapping[str, Any]] | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Writes a model as an ONNX file, after onnxruntime has computed the same outputs from it as the model.

    The names of the labels are in the file's metadata, as `id2label` (JSON), unless they are only `LABEL_0` and so on.
    So is the longest input, as `max_length`. For a longer text, onnxruntime's error contains this number, because the
    node that fails is named after it.

    Args:
        model: A `PeftModel` with an adapter of this package, or a Transformers model. It does not change: a copy is
            merged and exported.
        path: The `.onnx` file. An existing file is replaced only after the new one has been checked.
        inputs: An example batch of tensors, all of the shape `[batch, length]`. Default: random token ids with a mask,
            and token types if the model has more than one.
        opset: The version of ONNX's operators, from 14 to 20.
        tolerance: The largest absolute difference to the model's outputs that is accepted, on three shapes with
            padding.
        int8: Whether to write a copy with dynamically quantized weights (int8, one scale for each output channel) as
            `name.int8.onnx` beside the file; or the path of this copy.
        data: Batches to measure agreement with the model on, and accuracy if they have `labels`.
        external_data: Whether the weights go into a second file. `None`: only above 2 GB, where they must.

    Returns:
        What was written, and how far its outputs are from the model's.

    Raises:
        SensiError: The extra `onnx` is not installed, an argument is wrong, PyTorch cannot export the model, or
            onnxruntime computes other outputs.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise SensiError(f"`export_onnx` needs onnx and onnxruntime ({error}): {how_to_install('onnx')}") from error
    path = file_to_write("path", path)
    if isinstance(opset, bool) or not isinstance(opset, int) or not 14 <= opset <= 20:
        raise SensiError(f"`opset` must be a whole number from 14 to 20, got {opset!r}.")
    if not is_number(tolerance) or tolerance < 0:
        raise SensiError(f"`tolerance` must be a number of at least 0, got {shown(tolerance)}.")
    small_path = file_to_write("int8", path.with_suffix(".int8.onnx") if int8 is True else int8) if int8 else None
    if small_path is not None and small_path.resolve() == path.resolve():
        raise SensiError("`int8` must be another path than `path`.")
    # The reference still has its adapter, so the comparison checks the merge, too.
    model = unwrapped(model)
    reference = copy.deepcopy(model).float().cpu().eval()
    if isinstance(reference, PeftModel):
        tuner: Any = reference.base_model
        tuner.enable_adapter_layers()  # the adapter is exported, also if it is disabled now
    merged = merged_copy(reference)
    merged = (copy.deepcopy(merged) if merged is reference else merged).eval()
    batches = list(data) if isinstance(data, Iterable) else []
    wrong = isinstance(data, Mapping) or not all(isinstance(batch, Mapping) for batch in batches)
    if wrong or not isinstance(data, Iterable | None):
        raise SensiError("`data` must be batches, each a dict of tensors: `[batch]` for a single one.")
    examples = _examples(merged, inputs)
    names = tuple(examples[0])
    expected = _run_all(reference, examples)
    with ExitStack() as stack:
        folder, small = stack.enter_context(folder_beside(path)), None
        _trace(merged, examples[0], expected, folder / "draft.onnx", opset)
        table = positions_of(merged)
        is_external = pack(folder / "draft.onnx", folder / path.name, external_data, merged.config.id2label, table)
        file = _measure(folder / path.name, path, names, examples, expected, reference, batches)
        if not file.difference <= tolerance:
            raise SensiError(
                f"onnxruntime's outputs differ from the model's by up to {file.difference:.1e}, more than "
                f"{tolerance}: nothing was written to {path}."
            )
        if small_path is not None:
            small_draft = stack.enter_context(folder_beside(small_path)) / small_path.name
            quantize(folder / path.name, folder / "int8.onnx", is_external)
            pack(folder / "int8.onnx", small_draft, external_data)
            small = _measure(small_draft, small_path, names, examples, expected, reference, batches)
            move_graph(small_draft, small_path)
        move_graph(folder / path.name, path)
    return ExportReport(names, tuple(expected[0]), opset, file, small, table[1] if table else None)


def _examples(model: PreTrainedModel, given: Mapping[str, torch.Tensor] | None) -> list[dict[str, torch.Tensor]]:
    """One batch for each of `_SHAPES`: random token ids whose second row is padded, or the given batch.

    Rows and columns of a given batch are repeated or cut to fit the shapes.
    """
    config: Any = model.config.get_text_config()
    accepted = inspect.signature(model.forward).parameters
    other = next((what for name, what in _OTHER_INPUTS.items() if name in accepted), None)
    if other is not None and "input_ids" not in accepted:
        raise SensiError(
            f"{type(model).__name__} takes {other}, and only models of tokens are exported: call "
            f"`merge_and_unload()`, then `torch.onnx.export`."
        )
    if given is not None:
        values = given.items() if isinstance(given, Mapping) else ()
        given = {
            name: value.cpu()
            for name, value in values
            if name in accepted and name not in LABELS and isinstance(value, torch.Tensor)
        }
        if not given or any(v.dim() != 2 or v.shape != next(iter(given.values())).shape for v in given.values()):
            raise SensiError(
                "`inputs` must be one batch: a dict of tensors of one shape [batch, length], as of a tokenizer."
            )
    elif "input_ids" not in accepted:
        raise SensiError(f"{type(model).__name__} does not take `input_ids`: give a batch as `inputs=`.")
    if getattr(config, "is_encoder_decoder", False):
        raise SensiError(
            "Encoder-decoder models cannot be exported as one graph: save the merged model and export it with Optimum."
        )
    generator = torch.Generator("cpu").manual_seed(0)
    examples = []
    for size, length in _SHAPES:
        ids = torch.randint(0, config.vocab_size, (size, length), generator=generator, device="cpu")
        mask = torch.ones_like(ids)
        mask[1::2, length - length // 3 :] = 0
        if (pad := config.pad_token_id) is not None:
            ids = ids.masked_fill(ids == pad, (pad + 1) % config.vocab_size).masked_fill(mask == 0, pad)
        example = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 1) > 1:
            example["token_type_ids"] = torch.zeros_like(ids)
        if given is not None:
            rows, columns = torch.arange(size, device="cpu")[:, None], torch.arange(length, device="cpu")
            example = {name: v[rows % v.shape[0], columns % v.shape[1]] for name, v in given.items()}
        examples.append({name: value for name, value in example.items() if name in accepted})
    return examples


def _outputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inner: Any = root_of(model)
    options: dict[str, Any] = {"return_dict": True}
    if "use_cache" in inspect.signature(inner.forward).parameters:
        options["use_cache"] = False
    outputs = model(**batch, **options)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and name != "loss"}


@torch.no_grad()
def _run(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in _outputs(model, batch).items()}


_ADVICE = (
    "A decoder that classifies needs `model.config.pad_token_id` for batches. For other kinds of input, give an "
    "example as `inputs=`."
)


def _run_all(
    model: nn.Module, examples: Sequence[Mapping[str, torch.Tensor]], advice: str = _ADVICE
) -> list[dict[str, np.ndarray]]:
    """The outputs for each batch. Raises `SensiError`, with this advice, if the model cannot run one."""
    try:
        return [_run(model, example) for example in examples]
    except Exception as error:  # a model can raise anything for a batch that it does not take
        raise SensiError(
            f"{type(root_of(model)).__name__} cannot run a batch of {', '.join(examples[0])}: {first_line(error)} "
            f"{advice}"
        ) from error


class _Graph(nn.Module):
    """The model as a function of tensors to tensors, in a fixed order."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_outputs(self.model, dict(zip(self.names, tensors, strict=True))).values())


def _trace(
    model: Any, example: Mapping[str, torch.Tensor], expected: list[dict[str, np.ndarray]], path: Path, opset: int
) -> None:
    # Fused kernels branch on their inputs, and a trace would record one of the branches only.
    model.set_attn_implementation("eager")
    axes = {name: {0: "batch", 1: "length"} for name in example}
    labels = dict(zip(zip(*_SHAPES, strict=True), ("batch", "length"), strict=True))  # by the sizes in all shapes
    for name in expected[0]:
        sizes = enumerate(zip(*(outputs[name].shape for outputs in expected), strict=True))
        axes[name] = {dim: labels[found] for dim, found in sizes if found in labels}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about constants in the trace, which `_measure` finds
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
    except OSError as error:  # the disk is full, for example
        raise SensiError(f"The ONNX graph could not be written ({error}). Nothing was changed.") from error
    except Exception as error:  # the exporter's errors have no common base class
        raise SensiError(
            f"PyTorch cannot export this {type(model).__name__} to opset {opset}: {first_line(error)}"
        ) from error


def trace_graph(model: Any, batch: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes the graph of a float32 model on the CPU for this batch, unchecked and as its inputs are: not padded.

    Batch size and length are free, as in an exported file. Raises `SensiError` if PyTorch cannot export the model.
    """
    is_text = all(tensor.dim() == 2 for tensor in batch.values())  # the shape of images is fixed
    expected = _run_all(model, _examples(model, batch) if is_text else [batch])
    _trace(model, batch, expected, path, OPSET)


def _measure(
    source: Path,
    path: Path,
    names: tuple[str, ...],
    examples: list[dict[str, torch.Tensor]],
    expected: list[dict[str, np.ndarray]],
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
) -> ExportedFile:
    """Runs a file in onnxruntime and compares. `path` is where the file will be moved to."""
    try:
        session = open_session(source)
        found = [session.run(None, {n: batch[n].numpy() for n in names}) for batch in examples]
    except Exception as error:  # onnxruntime's errors have no common base class either
        raise SensiError(f"onnxruntime cannot run the exported model: {error}") from error
    difference = max(
        float(np.abs(values - wanted).max(initial=0.0)) if values.shape == wanted.shape else float("inf")
        for outputs, wanted_outputs in zip(found, expected, strict=True)
        for values, wanted in zip(outputs, wanted_outputs.values(), strict=True)
    )
    agreement = Agreement(model)
    for batch in batches:
        tensors = graph_inputs(batch, examples[0])
        shape = list(next(iter(tensors.values())).shape)
        own = _run_all(model, [tensors], f"Check this batch of `data`, whose shape is {shape}.")[0]
        theirs = session.run(None, {name: value.numpy() for name, value in tensors.items()})
        agreement.add(own, dict(zip(own, theirs, strict=True)), batch)
    size = sum(file.stat().st_size for file in parts(source))
    return ExportedFile(path, size, difference, *agreement.shares())
