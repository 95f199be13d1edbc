"""An adapter, a merged model or an ONNX file goes in; predictions for rows come out, in the order of the rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..reporting.task_record import checked_record, saved_record
from ..utils.errors import SensiError, first_line, how_to_install
from ..utils.task_types import Kind, kind_of_model
from .kinds import decode
from .labels import Labels, labels_of_config, labels_of_head
from .models import agree_on_padding, load_tokenizer
from .options import MAX_ANSWER_LENGTH
from .task import Rows, collator_of


# The outputs that each kind needs, by their names in Transformers.
OUTPUTS = {"text": ("logits",), "words": ("logits",), "answers": ("start_logits", "end_logits")}
CHUNK = 1024  # inputs whose logits are in memory at the same time


@dataclass(frozen=True)
class Predictor:
    """A model that is ready to predict.

    Attributes:
        name: What the user called it.
        kind: `"text"`, `"words"` or `"answers"`.
        labels: The labels of its head. Those of answers have no names.
        tokenizer: Its tokenizer, with a padding token.
        run: Computes `OUTPUTS[kind]`, each `[batch, ...]`, from a padded batch of tensors.
        source: The folder or the name on the Hub that the tokenizer is loaded from.
        config: The model's config, or what stands for it.
        bytes: The size of the model on disk; for an adapter, of its own file.
        parameters: The number of parameters of the merged model; `None` for an ONNX file.
        record: What the training noted about the data (`Task.record`); may be empty.
    """

    name: str
    kind: Kind
    labels: Labels
    tokenizer: Any
    run: Callable[[Mapping[str, Any]], tuple[np.ndarray, ...]]
    source: str
    config: Any
    bytes: int
    parameters: int | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def outputs(self, rows: Rows, batch_size: int) -> Any:
        """The logits of all inputs, in their order, padded to the longest: as `Task.metrics` takes them."""
        collate = collator_of(self.kind, self.tokenizer)
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows.inputs]
        # Batches of similar lengths need the least padding.
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]["input_ids"]), reverse=True)
        found: list[np.ndarray] = []
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            for number, values in enumerate(self.run(_collated(collate, [inputs[i] for i in places]))):
                if start == 0:  # the longest inputs come first
                    found.append(np.full((len(order), *values.shape[1:]), -1e4, dtype=np.float32))
                index: Any = (places, *(slice(size) for size in values.shape[1:]))
                found[number][index] = values
        return found[0] if len(found) == 1 else tuple(found)

    def predictions(
        self, rows: Rows, batch_size: int, max_answer_length: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """One prediction for each raw row (see `kinds.decode`), computed while they are read.

        `max_answer_length` is that of the training by default.
        """
        longest = max_answer_length or int(self.record.get("max_answer_length") or MAX_ANSWER_LENGTH)
        silent = bool(self.record.get("silent"))
        for part in chunks(rows, max(CHUNK, batch_size)):
            yield from decode(self.kind, self.outputs(part, batch_size), part, self.labels, longest, silent)


def chunks(rows: Rows, size: int) -> Iterator[Rows]:
    """Parts of the rows with about `size` inputs each. All windows of a raw row are in the same part."""
    owners: Any = [row for row, _ in rows.places] or range(len(rows.inputs))
    start = 0
    while start < len(owners):
        end = min(start + size, len(owners))
        while end < len(owners) and owners[end] == owners[end - 1]:
            end += 1
        first, last = owners[start], owners[end - 1]
        places = [(row - first, place) for row, place in rows.places[start:end]]
        yield Rows(rows.inputs[start:end], rows.raw[first : last + 1], places)
        start = end


def open_predictor(name: str, base: str | None = None) -> Predictor:
    """Loads an adapter (with its base), a merged model or an exported ONNX file for predictions.

    Args:
        name: A folder, a name on the Hub, or the path of an `.onnx` file that `peft-sensi export` wrote.
        base: The base model, if it is not the one that the adapter names.

    Raises:
        SensiError: There is no such model, it cannot be loaded, or it predicts nothing for rows of data.
    """
    import torch

    from ..merging.load import load_merged
    from ..reporting.onnx_folder import find_onnx
    from ..reporting.pretrained import TOKENIZER_CONFIG
    from ..reporting.saved import load_adapter
    from ..reporting.saved_merged import SavedMerged, open_saved

    if (file := find_onnx(Path(name))) is not None:
        return _of_onnx(file)
    saved = open_saved(name)
    task = saved.task
    kind = _checked(name, kind_of_model(task), task)
    if isinstance(saved, SavedMerged):
        model: Any = load_merged(saved.folder)
        other = None
    else:
        model, other = load_adapter(saved, base).float().merge_and_unload(), base or saved.base  # as in training
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cpu":  # many CPUs compute slowly in 16 bits
        model = model.float()
    model = model.eval().to(device)
    has_tokenizer = (saved.folder / TOKENIZER_CONFIG).is_file()
    if not has_tokenizer and other is None:
        raise SensiError(f"{name} has no tokenizer: save that of the base model into the same folder.")
    source = str(saved.folder) if has_tokenizer else str(other)
    tokenizer = load_tokenizer(kind, source, model.config)
    agree_on_padding(model, tokenizer)
    accepted = set(inspect.signature(model.forward).parameters)

    def run(batch: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            found = model(**{key: value.to(device) for key, value in batch.items() if key in accepted})
        return tuple(getattr(found, output).float().cpu().numpy() for output in OUTPUTS[kind])

    record = saved_record(saved.folder)
    return Predictor(
        name, kind, labels_of_config(kind, model.config), tokenizer, run, source, model.config, saved.file_bytes,
        model.num_parameters(), record,
    )  # fmt: skip


def _of_onnx(file: Path) -> Predictor:
    from ..merging.onnx_graph import bytes_of, open_session
    from ..reporting.onnx_folder import read_companion

    values = read_companion(file)
    kind = _checked(str(file), values.get("kind"), values.get("model_class"))
    try:
        session = open_session(file)
    except ImportError as error:
        raise SensiError(f"{file} needs onnxruntime ({error}): {how_to_install('onnx')}.") from error
    except Exception as error:  # onnxruntime has its own classes, which have no common one
        raise SensiError(
            f"{file} is damaged, or not a file of onnxruntime: {first_line(error)} Export it again."
        ) from error
    names = [entry.name for entry in session.get_inputs()]
    shapes = {entry.name: entry.shape for entry in session.get_outputs()}
    classes = len(values["labels"]) or 1
    if any(name not in shapes or (kind != "answers" and shapes[name][-1] != classes) for name in OUTPUTS[kind]):
        raise SensiError(f"{file} and the JSON file beside it do not belong together. Export the model again.")

    def run(batch: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        arrays = {key: value.numpy() for key, value in batch.items()}
        # What a model assumes for inputs that the tokenizer does not give: no padding, and one type of tokens.
        assumed = {name: np.full_like(arrays["input_ids"], name == "attention_mask") for name in names}
        return tuple(session.run(list(OUTPUTS[kind]), {name: (assumed | arrays)[name] for name in names}))

    labels = Labels([]) if kind == "answers" else labels_of_head(values["labels"], values.get("problem_type"))
    config = _Family()
    tokenizer = load_tokenizer(kind, str(file.parent), config)
    record = checked_record(values.get("task")) | {"max_length": values.get("max_length")}
    size = bytes_of(file)
    return Predictor(str(file), kind, labels, tokenizer, run, str(file.parent), config, size, None, record)


@dataclass(frozen=True)
class _Family:
    """Stands for the config of an ONNX file. The tokenizer beside the file was saved as its family needs it."""

    model_type: str = ""

    def get_text_config(self) -> _Family:
        return self


def _checked(name: str, kind: Any, task: Any) -> Kind:
    if kind not in OUTPUTS:
        raise SensiError(
            f"{name} is for {task or 'an unknown task'}: predictions are made for classes and numbers, for tags of "
            f"words, and for answers to questions."
        )
    return kind


def _collated(collate: Any, inputs: list[dict[str, Any]]) -> Mapping[str, Any]:
    """A padded batch. Places of windows and other lists that are no inputs of a model are left out."""
    known = ("input_ids", "attention_mask", "token_type_ids")
    return collate([{key: row[key] for key in known if key in row} for row in inputs])
