"""A saved adapter: what its files say without the base model, and putting it onto its base."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..anatomy.modules import task_head
from ..planning.plan import Plan, rows_of
from ..tuner.config import SensiConfig
from ..tuner.targets import plan_of
from ..utils.errors import SensiError, SensiLoadError
from ..utils.files import read_json_object
from ..utils.formatting import human
from ..utils.states import FROZEN, TRIMMED, TUNED


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class SavedAdapter:
    """The pair of files. `tensors` maps names to (dtype, shape); nothing of the values has been read."""

    folder: Path
    config: SensiConfig
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    file_bytes: int

    @property
    def base(self) -> str | None:
        return self.config.base_model_name_or_path

    @property
    def fingerprint(self) -> str | None:
        return short_fingerprint(self.config)


def short_fingerprint(config: SensiConfig) -> str | None:
    """A short name of the base's fingerprint."""
    if config.fingerprint is None:
        return None
    text = json.dumps(config.fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_adapter(name: str | Path) -> SavedAdapter:
    """Reads a folder, or a repository on the Hub. Raises `SensiLoadError` when it holds no adapter of ours."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name))
    if not (folder / CONFIG).is_file():
        raise SensiLoadError(f"{name} holds no {CONFIG}: it is not an adapter.")
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SensiLoadError(f"{folder / CONFIG} is not JSON: {error}.") from None
    if not isinstance(raw, Mapping) or raw.get("peft_type") != "SENSI":
        kind = raw.get("peft_type") if isinstance(raw, Mapping) else None
        raise SensiLoadError(f"{name} is an adapter of the type {kind!r}, not one of peft_sensi.")
    config = SensiConfig.from_pretrained(str(folder))
    try:
        opened = safe_open(str(folder / WEIGHTS), framework="pt")
    except (OSError, SafetensorError) as error:
        raise SensiLoadError(f"{folder / WEIGHTS} cannot be read: {error}.") from None
    with opened as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        tensors = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    return SavedAdapter(folder, config, tensors, (folder / WEIGHTS).stat().st_size)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", WEIGHTS, "*.txt", "README.md", "*.png"]))
    except HFValidationError:
        raise SensiLoadError(f"{name} is neither a folder nor the name of a repository.") from None
    except OSError as error:
        raise SensiLoadError(
            f"{name} is not a folder, and not found on the Hub: {str(error).splitlines()[0]}"
        ) from None


def figures(adapter: SavedAdapter, plan: Plan | None) -> dict[str, Any]:
    """Everything about an adapter as a JSON value; `plan`, where the base is known, adds the shares."""
    from .tables import group_counts, plan_figures

    config = adapter.config
    by_type: dict[str, int] = {}
    for dtype, shape in adapter.tensors.values():
        by_type[dtype] = by_type.get(dtype, 0) + math.prod(shape)
    result = {
        "folder": str(adapter.folder),
        "base_model": adapter.base,
        "task_type": getattr(config.task_type, "value", config.task_type),
        "budget": config.budget,
        "score": config.score,
        "granularity": config.granularity,
        "update": config.update,
        "rank": config.rank,
        "compressed": config.compressed,
        "also_trained": config.also_train,
        "saved_whole": config.modules_to_save,
        "format_version": config.format_version,
        "fingerprint": adapter.fingerprint,
        "file_bytes": adapter.file_bytes,
        "tensors": len(adapter.tensors),
        "values": by_type,
    }
    return result | {"plan": plan_figures(plan) if plan is not None else {"groups": group_counts(config.plan)}}


def facts(adapter: SavedAdapter, plan: Plan | None) -> dict[str, str]:
    """The same for people."""
    from ..utils.formatting import size_of
    from .tables import plan_facts

    config, found_figures = adapter.config, figures(adapter, plan)
    values = ", ".join(f"{human(count)} {dtype}" for dtype, count in sorted(found_figures["values"].items()))
    lines = {
        "base model": adapter.base or "unknown",
        "task": str(found_figures["task_type"] or "not said"),
        "budget asked": budget_words(config.budget),
        "ranked by": f"{config.score}, {config.granularity}s",
        "update": (config.update or "dense")
        + (f" of rank {config.rank}" if config.rank else "")
        + (f", stored as {config.compressed}" if config.compressed else ""),
        "saved whole": saved_whole(adapter) or "nothing",
        "file": f"{size_of(adapter.file_bytes)}, {len(adapter.tensors)} tensors ({values} values)",
        "fingerprint": adapter.fingerprint or "none: any base of the same shapes is accepted",
    }
    return lines | (plan_facts(plan) if plan is not None else unit_facts(config.plan))


def saved_whole(adapter: SavedAdapter) -> str:
    """Names of the modules that are in the file whole, those of all layers as one."""
    keys = [f".{key}" for key in adapter.tensors]
    names = [n for n in adapter.config.modules_to_save or [] if any(f".{n}." in key for key in keys)]
    alike: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\b\d+\b", "*", name)
        alike[pattern] = alike.get(pattern, 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in alike.items())


def unit_facts(plan: Mapping[str, Any]) -> dict[str, str]:
    rows, lines = rows_of(plan), {}
    for kind in dict.fromkeys(row.kind for row in rows):
        mine = [row for row in rows if row.kind == kind]
        kept, tuned, size = (
            sum(row.count(*states) for row in mine) for states in ((TUNED, FROZEN), (TUNED,), (TUNED, FROZEN, TRIMMED))
        )
        lines[f"{kind}s"] = f"{kept:,} of {size:,} kept, {tuned:,} tuned"
    return lines


def budget_words(budget: Any) -> str:
    """`{"params": 0.5, "trainable": 100000}` as `params 50%, trainable 100 k`."""
    if budget is None:
        return "none"
    limits = budget if isinstance(budget, Mapping) else {"params": budget}
    return ", ".join(f"{n} {human(v)}" if isinstance(v, int) and v > 1 else f"{n} {v:.4g}" for n, v in limits.items())


# -- with the base ----------------------------------------------------------------------------------------------------


def plan_without_weights(adapter: SavedAdapter, base: str | None = None) -> Plan | None:
    """The plan with its costs, from the base's config alone; `None` when that cannot be had."""
    try:
        model = _shapes_of(_class_of(adapter), _base_config(adapter, base))
        return plan_of(model, adapter.config)
    except (SensiError, OSError, ValueError, TypeError, AttributeError):
        return None


def number_of_labels(adapter: SavedAdapter, base: str | None = None) -> int | None:
    """That the adapter's head is for; `None` when the base's config cannot be had."""
    try:
        return _base_config(adapter, base).num_labels
    except (SensiError, OSError, ValueError):
        return None


def load_adapter(adapter: SavedAdapter, base: str | None = None) -> PeftModel:
    """The adapter on its base, in evaluation mode. `base` replaces the base that the config names.

    Raises `SensiError` when the base cannot be loaded, `SensiLoadError` when it is another one.
    """
    name = _base_name(adapter, base)
    # The base's own head may be for other labels; the adapter brings its own.
    model = found(_class_of(adapter), name, config=_base_config(adapter, base), ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(model, str(adapter.folder)).eval()


def _base_name(adapter: SavedAdapter, base: str | None) -> str:
    name = base or adapter.base
    if not name:
        raise SensiError("The adapter does not say which base model it belongs to: give it (`--base`).")
    return name


def _class_of(adapter: SavedAdapter) -> Any:
    """By task, or the Transformers class that was adapted. Nothing is imported because a file names it."""
    task = getattr(adapter.config.task_type, "value", adapter.config.task_type)
    name = AUTO_CLASSES.get(task or "") or (adapter.config.auto_mapping or {}).get("base_model_class", "")
    known = getattr(transformers, str(name), None)
    if name not in AUTO_CLASSES.values() and not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
        raise SensiError(f"The adapter's task {task!r} and class {name!r} do not say which model to load.")
    return known


def _shapes_of(model_class: Any, config: PretrainedConfig) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)


def _base_config(adapter: SavedAdapter, base: str | None) -> PretrainedConfig:
    """The base's config with as many labels as the adapter's head has, and their names where they are known."""
    name = _base_name(adapter, base)
    config = found(AutoConfig, name)
    if (labels := _number_of_labels(adapter, config)) and labels != config.num_labels:
        config.num_labels = labels
    # `peft-sensi train` leaves its config there. Read as JSON: a file must not choose what is built.
    left = read_json_object(adapter.folder / "config.json", optional=True)
    names, numbers = left.get("id2label"), range(labels or 0)
    if labels and isinstance(names, dict) and set(names) == {str(i) for i in numbers}:
        config.id2label = {i: str(names[str(i)]) for i in numbers}
        config.label2id = {label: i for i, label in config.id2label.items()}
        if left.get("problem_type") in ("regression", "single_label_classification", "multi_label_classification"):
            config.problem_type = left["problem_type"]
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and type(left.get("pad_token_id")) is int:
        text.pad_token_id = left["pad_token_id"]  # decoders look for the last real token
    return config


def _number_of_labels(adapter: SavedAdapter, config: PretrainedConfig) -> int | None:
    """Read off the saved head: where a head for a strange number of labels has that number, ours has its own."""
    strange, before = 7919, int(config.num_labels or 0)
    if getattr(adapter.config.task_type, "value", adapter.config.task_type) not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    try:
        config.num_labels = strange
        model = _shapes_of(_class_of(adapter), config)
    finally:
        config.num_labels = before
    heads = tuple(f"{name}." for name in task_head(model))
    for name, parameter in model.named_parameters():
        if name.startswith(heads) and parameter.shape[0] == strange:
            for key, (_, shape) in adapter.tensors.items():
                if key == name or key.endswith(f".{name}"):
                    return shape[0]
    return None


def found(auto_class: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` with an error of one line. Raises `SensiError`."""
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, SensiError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise SensiError(f"{name!r} cannot be loaded as a model: {reason}") from error
