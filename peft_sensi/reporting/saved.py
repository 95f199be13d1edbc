"""A saved adapter goes in; what its files contain comes out, or a model: the adapter on its base."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..anatomy.modules import embedding_of
from ..anatomy.task_heads import task_head
from ..anatomy.widths import classes_for
from ..merging.load import without_weights
from ..planning.plan import Plan
from ..tuner.config import SensiConfig
from ..tuner.head_settings import settings_of
from ..tuner.targets import plan_of
from ..utils.errors import SensiError, SensiLoadError
from ..utils.files import open_safetensors, read_json_object
from ..utils.formatting import short_repr
from ..utils.hub_names import not_found
from ..utils.task_types import describe_type
from .pretrained import TOKENIZER_CONFIG, TOKENIZER_FILES, file_in, load_pretrained, pretrained_tokenizer


CONFIG, WEIGHTS, METRICS = "adapter_config.json", "adapter_model.safetensors", "metrics.json"
CARD, PICTURE = "README.md", "plan.png"
# For each tensor's name its dtype, as safetensors spells it (`"F32"`), and its shape.
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, repr=False)
class SavedAdapter:
    """The config of an adapter and the header of its weights file. The weights are not in memory.

    `name` is that of the repository on the Hub, or of the folder.
    """

    name: str
    folder: Path
    config: SensiConfig
    tensors: Tensors
    file_bytes: int

    __repr__ = short_repr

    @property
    def base(self) -> str | None:
        return self.config.base_model_name_or_path

    @property
    def task(self) -> str | None:
        """PEFT's task type."""
        return task_of(self.config)


def task_of(config: SensiConfig) -> str | None:
    """PEFT's task type as a string."""
    return getattr(config.task_type, "value", config.task_type)


def short_fingerprint(config: SensiConfig) -> str | None:
    """The first 12 digits of a hash of the base model's fingerprint."""
    if config.fingerprint is None:
        return None
    text = json.dumps(config.fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_adapter(name: str | Path) -> SavedAdapter:
    """Reads the config and the tensors' names and shapes of an adapter in a folder or on the Hub.

    Raises `SensiLoadError` if there is no such folder or repository, or no complete adapter of this package in it.
    """
    folder = Path(name)
    if not folder.is_dir():
        files = [CONFIG, WEIGHTS, METRICS, "config.json", *TOKENIZER_FILES, CARD, "*.png"]
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=files))
        except (HFValidationError, OSError) as error:
            raise SensiLoadError(not_found(name, error)) from None
    if not (folder / CONFIG).is_file():
        raise SensiLoadError(f"{name} holds no {CONFIG}: it is not an adapter.")
    if (kind := read_json_object(folder / CONFIG).get("peft_type")) != "SENSI":
        raise SensiLoadError(f"{name} is an adapter of the type {kind!r}, not one of peft_sensi.")
    config = SensiConfig.from_pretrained(str(folder))
    if not (folder / WEIGHTS).is_file():
        raise SensiLoadError(f"{name} holds no {WEIGHTS}: the adapter is not complete.")
    shown = folder.resolve().name if Path(name).is_dir() else str(name)
    weights = folder / WEIGHTS
    return SavedAdapter(shown, folder, config, tensors_in(weights), weights.stat().st_size)


def tensors_in(path: Path) -> Tensors:
    """What the header of a safetensors file says. Raises `SensiLoadError` if the file is damaged."""
    with open_safetensors(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


def plan_without_weights(adapter: SavedAdapter, base: str | None = None) -> Plan | None:
    """The adapter's plan with its costs. These depend on the base model's shapes, so the base's config is loaded.

    Returns `None` if that config cannot be loaded or does not fit the plan. `base` replaces the adapter's base model.
    """
    try:
        return plan_of(_without_weights(adapter, base_config(adapter, base)), adapter.config)
    except (SensiError, OSError, ValueError, TypeError, AttributeError):
        return None


def is_adapter(name: str) -> bool:
    """Whether a folder, or a repository of the Hub, holds an adapter and not a whole model."""
    return file_in(name, CONFIG) is not None


def load_adapter(adapter: SavedAdapter, base: str | None = None, is_trainable: bool = False) -> PeftModel:
    """Loads the base model (`base`, or the one that the adapter names) with the adapter, in evaluation mode.

    The base's vocabulary is made larger if the adapter was trained with tokens that the base does not have.

    Raises `SensiError` if the base model cannot be loaded, or is not the one that the adapter was made for.
    """
    config = base_config(adapter, base)
    # The base may have a head for other labels. The adapter contains its own head.
    name = base or str(adapter.base)
    model = load_pretrained(_class_of(adapter), name, config=config, ignore_mismatched_sizes=True)
    table = embedding_of(model, "input")  # for images, it is a convolution over patches
    if isinstance(table, nn.Embedding):
        rows = max(table.weight.shape[0], _tokens_of(adapter, model, table))
        if rows > table.weight.shape[0]:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(rows)
        # Decoders look for the last token that is not padding. Not set before: the base may lack this token.
        pad = head_settings_of(adapter).get("pad_token_id")
        if pad is not None and 0 <= pad < rows:
            model.config.get_text_config().pad_token_id = pad
    return PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=is_trainable).eval()


def _tokens_of(adapter: SavedAdapter, model: PreTrainedModel, embedding: Any) -> int:
    """The size of the vocabulary that the adapter was trained with, or 0 if it does not tell.

    The adapter's file has the embeddings if they were resized, and the plan counts the tokens if some are trained.
    Otherwise the tokenizer in the adapter's folder is asked, as `AutoPeftModel` does.
    """
    name = next(name for name, module in model.named_modules() if module is embedding)
    stored = [shape[0] for key, (_, shape) in adapter.tensors.items() if f".{key}".endswith(f".{name}.weight")]
    if stored:
        return stored[0]
    groups = (adapter.config.plan or {}).get("groups", {})
    if f"{name}.tokens" in groups:
        return int(groups[f"{name}.tokens"]["size"])
    if (adapter.folder / TOKENIZER_CONFIG).is_file():
        with contextlib.suppress(SensiError):
            return len(pretrained_tokenizer(str(adapter.folder)))
    return 0


def _class_of(adapter: SavedAdapter) -> Any:
    """The auto class of the task, or the Transformers class of the model that was adapted.

    A file cannot choose what is imported: only classes that Transformers itself exports are accepted.
    """
    task = adapter.task
    auto = describe_type(task).auto_class
    name = auto or str((adapter.config.auto_mapping or {}).get("base_model_class", ""))
    known = getattr(transformers, name.removeprefix("Sensi"), None)  # the prefix of classes in our modeling files
    if not auto and not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
        raise SensiError(f"The adapter's task {task!r} and class {name!r} do not tell which model class to load.")
    return known


def _without_weights(adapter: SavedAdapter, config: PretrainedConfig) -> Any:
    """The adapter's base model on the meta device."""
    cls = _class_of(adapter)
    if hasattr(cls, "_model_mapping"):
        known = classes_for(cls, type(config))
        if not known:
            raise SensiError(
                f"{cls.__name__} has no class for a {config.model_type}: give the base that the adapter was made for."
            )
        cls = known[0]
    return without_weights(cls, config)


def base_config(adapter: SavedAdapter, base: str | None) -> PretrainedConfig:
    """The base model's config, with the number of labels of the adapter's head.

    The labels have the names that the adapter was saved with. Without names, they keep the base's if the base has as
    many labels.
    """
    if not (name := base or adapter.base):
        raise SensiError("The adapter does not name its base model: give it as `base`.")
    config = load_pretrained(AutoConfig, name)
    saved = head_settings_of(adapter)
    if count := _labels_of_head(adapter, config):
        if len(names := saved.get("labels") or []) == count:
            config.id2label = dict(enumerate(names))
            config.label2id = {name: i for i, name in config.id2label.items()}
        else:
            config.num_labels = count  # replaces the names only if their number is another one
        config.problem_type = saved.get("problem_type") or config.problem_type
    return config


def head_settings_of(adapter: SavedAdapter) -> dict[str, Any]:
    """`SensiConfig.head_settings`, or what adapters of the first versions have in a `config.json` beside them."""
    if adapter.config.head_settings is not None:
        return dict(adapter.config.head_settings)
    found = read_json_object(adapter.folder / "config.json", optional=True)
    return settings_of(*(found.get(key) for key in ("id2label", "problem_type", "pad_token_id")))


def _labels_of_head(adapter: SavedAdapter, config: PretrainedConfig) -> int | None:
    """The number of labels of the saved task head; `None` for models without labels.

    A model for an unlikely number of labels is built without weights. The parameter of its head that has this number
    of rows is the one whose rows are counted in the adapter's file.
    """
    if _class_of(adapter).__name__.endswith("QuestionAnswering"):
        return 2  # the start and the end; the base may have a head for other labels
    if not _class_of(adapter).__name__.endswith("Classification"):
        return None
    unlikely = 7919
    probe = copy.deepcopy(config)  # setting `num_labels` replaces the names of the labels
    probe.num_labels = unlikely
    model = _without_weights(adapter, probe)
    heads = tuple(f"{name}." for name in task_head(model))
    names = [n for n, parameter in model.named_parameters() if n.startswith(heads) and parameter.shape[0] == unlikely]
    rows = (
        shape[0] for name in names for key, (_, shape) in adapter.tensors.items() if f".{key}".endswith(f".{name}")
    )
    return next(rows, None)
