"""A merged folder goes in; what its files contain comes out, without the weights, or the model."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from ..anatomy.build import build_anatomy
from ..anatomy.widths import RECORD_KEY, is_merged, on_meta
from ..merging.foreign import MODEL_CONFIG, architecture_of, check_unchanged, weights_in
from ..merging.load import without_weights
from ..utils.errors import SensiError, SensiLoadError
from ..utils.files import read_json_object
from ..utils.formatting import human, listed, size_of
from ..utils.heads import is_regressor, label_names
from ..utils.hub_names import UNFINISHED, is_onnx, not_found
from ..utils.task_types import type_of_class
from .pretrained import TOKENIZER_FILES, TOKENIZER_MARKS, file_in, load_pretrained, pretrained_tokenizer
from .saved import CARD, CONFIG, METRICS, SavedAdapter, Tensors, is_adapter, open_adapter, tensors_in


@dataclass(frozen=True)
class SavedMerged:
    """A merged model on disk: its config and the header of its weights file. The weights are not in memory.

    Attributes:
        name: The name of the repository on the Hub, or of the folder.
        folder: Where the files are.
        values: The object in `config.json`.
        weights: The name of the weights file.
        tensors: What the header of the weights file says.
        file_bytes: The size of the weights file.
    """

    name: str
    folder: Path
    values: dict[str, Any]
    weights: str
    tensors: Tensors
    file_bytes: int

    @property
    def architecture(self) -> str:
        """The name of the model class."""
        record = self.values.get(RECORD_KEY) or {}
        return str(record.get("architecture") or next(iter(self.values.get("architectures") or ()), ""))

    @property
    def is_plain(self) -> bool:
        """Whether any `from_pretrained` loads it."""
        return RECORD_KEY not in self.values

    @property
    def task(self) -> str | None:
        """PEFT's task type."""
        if self.architecture in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():  # Marian's class ends in Model
            return "SEQ_2_SEQ_LM"
        return type_of_class(self.architecture)

    @property
    def labels(self) -> list[str]:
        """Names of the classes; empty if nobody named them."""
        return label_names(self.values.get("id2label"))

    @property
    def predicts_numbers(self) -> bool:
        """Whether its head predicts a number instead of a class."""
        outputs = len(self.values.get("id2label") or ())
        return str(self.task).endswith("_CLS") and is_regressor(self.values.get("problem_type"), outputs)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def open_saved(name: str | Path) -> SavedAdapter | SavedMerged:
    """Reads the config and the tensors' names and shapes of an adapter or a merged model, in a folder or on the Hub.

    Raises:
        SensiLoadError: There is neither an adapter of this package nor a merged model, or it is not complete, or the
            files of a merged model do not belong together.
    """
    if is_adapter(str(name)):
        return open_adapter(name)
    file = file_in(str(name), MODEL_CONFIG)
    values = {} if file is None else read_json_object(file)
    if file is None or not is_merged(values):
        if not Path(name).is_dir():
            return open_adapter(name)  # raises the error that says why it was not found
        if is_onnx(Path(name)):
            raise SensiLoadError(not_found(name, FileNotFoundError()))
        found = f"a model that peft_sensi has not merged ({MODEL_CONFIG})" if file else "neither of the two"
        if (Path(name) / UNFINISHED).is_file():
            found = "an interrupted training: finish it with --resume"
        elif inside := sorted(path.parent.name for path in Path(name).glob(f"*/{CONFIG}")):
            found += f". Give a folder inside it, such as {Path(name) / inside[0]}"
        raise SensiLoadError(
            f"{name} must hold an adapter of peft_sensi (adapter_config.json) or a merged model, and holds {found}."
        )
    weights = weights_in(values, name)
    folder, shown = file.parent, str(name)
    if Path(name).is_dir():
        folder, shown = Path(name), Path(name).resolve().name
    else:
        code = "modeling_sensi_*.py"  # is not executed, but an upload of the model to another repository needs it
        wanted = [MODEL_CONFIG, weights, code, METRICS, "generation_config.json", *TOKENIZER_FILES, CARD, "*.png"]
        folder = Path(snapshot_download(str(name), allow_patterns=wanted))
    if not (folder / weights).is_file():
        raise SensiLoadError(f"{name} lacks {weights!r}, the weights that its {MODEL_CONFIG} names.")
    check_unchanged(values, folder, weights)
    size = (folder / weights).stat().st_size
    return SavedMerged(shown, folder, values, weights, tensors_in(folder / weights), size)


def empty_models(model: SavedMerged) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model and, with the full widths of its config, the model before it was trimmed; both without weights.

    In a plain checkpoint, the config has the new widths, and both are the same.
    """
    cls = architecture_of(model.architecture)
    config = load_pretrained(AutoConfig, str(model.folder))
    whole = copy.deepcopy(config)
    vars(whole).pop(RECORD_KEY, None)
    return without_weights(cls, config), on_meta(cls, whole)


def merged_figures(model: SavedMerged) -> dict[str, Any]:
    """What is known about a merged model, as a JSON value. `groups` has the units of each sublayer."""
    small, whole = empty_models(model)
    before = sum(parameter.numel() for parameter in whole.parameters())
    sizes = {group.name: group.size for group in build_anatomy(small).groups if group.in_block}
    groups = [
        {"name": group.name, "kind": group.kind, "size": group.size, "kept": sizes.get(group.name, 0)}
        for group in build_anatomy(whole).groups
        if group.in_block
    ]
    return {
        "folder": str(model.folder),
        "class": model.architecture,
        "task_type": model.task,
        "predicts_numbers": model.predicts_numbers,
        "labels": model.labels,
        "parameters": model.parameters,
        "parameters_before": None if model.is_plain else before,
        "file_bytes": model.file_bytes,
        "loads_without_peft_sensi": model.is_plain,
        "groups": groups,
    }


def merged_facts(figures: dict[str, Any]) -> dict[str, str]:
    """The most important figures of a merged model as texts, by label."""
    count, before = figures["parameters"], figures["parameters_before"]
    facts = {
        "model class": figures["class"],
        "task": figures["task_type"] or "unknown",
        "classes": listed(figures["labels"], most=20) or "without names",
        "parameters": human(count) + (f" of {human(before)} ({count / before:.1%})" if before else ""),
        "file": size_of(figures["file_bytes"]),
        "loads with": "AutoModel...from_pretrained, without peft_sensi"
        if figures["loads_without_peft_sensi"]
        else "peft_sensi.load_merged(folder), or trust_remote_code=True",
    }
    if figures["predicts_numbers"] or not str(figures["task_type"]).endswith("_CLS"):
        facts.pop("classes")
    return facts


def tokenizer_of(saved: SavedAdapter | SavedMerged, base: str | None = None) -> Any:
    """The tokenizer beside the model, or that of its base; `None` if there is none.

    Raises `SensiError` if the one beside the model is damaged.
    """
    if any((saved.folder / name).is_file() for name in TOKENIZER_MARKS):
        return pretrained_tokenizer(str(saved.folder))
    other = base or (saved.base if isinstance(saved, SavedAdapter) else None)
    with contextlib.suppress(SensiError):
        return None if other is None else pretrained_tokenizer(other)
    return None
