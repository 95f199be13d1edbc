"""Merged models on disk: saving a trimmed model whole, and building it again from checked widths.

A folder is one of two things. Where the config's own fields can express the widths, it is a plain checkpoint, which
stock `from_pretrained` loads. Otherwise `config.json` holds a record of all widths (see `widths`) and the name of the
weights file, which is one that stock loaders do not look for: without this package (or the generated modeling file)
they find no weights and raise, whatever `ignore_mismatched_sizes` says.

`config.json` is what makes a save valid: it is renamed into place last and names its own weights file, so a folder
holds either the old model or the new one, whenever the process is killed.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .errors import SensiError, SensiLoadError
from .layer import SensiLayer
from .model import SensiModel
from .modeling_file import auto_map, modeling_file
from .widths import RECORD_KEY, RECORD_VERSION, Widths, apply, compare, expressed, on_meta, stock_class


CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TEMPORARY = ".sensi-"
_OWN_WEIGHTS = re.compile(r"(?:sensi_)?model-[0-9a-f]{16}\.safetensors")

# Fields of a config that make Transformers import or download code, or read weights from elsewhere.
_CODE_KEYS = (
    "auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "quantization_config",
    "fusion_config", "kernel_config", "distributed_config", "transformers_weights", "trust_remote_code",
)  # fmt: skip


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """A merged copy of a `PeftModel`, or the model itself where it already is merged. The argument stays as it was.

    Raises `SensiError` for adapters of other methods and for models that are not Transformers' own.
    """
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, SensiModel):
            raise SensiError(
                f"The model's adapter is a {type(model.base_model).__name__}, not one of this package: call "
                f"`merge_and_unload()` and the model's own `save_pretrained`."
            )
        model = copy.deepcopy(model).merge_and_unload()
    elif any(isinstance(module, SensiLayer) for module in model.modules()):
        raise SensiError("The model has adapters in place: load them with `PeftModel.from_pretrained` and pass that.")
    stock_class(model)
    assert isinstance(model, PreTrainedModel)
    return model


def save_merged(model: nn.Module, folder: str | os.PathLike[str], modeling: bool = True) -> bool:
    """Saves a merged model: weights as safetensors, its config, and what rebuilds the widths of its layers.

    Args:
        model: A `PeftModel` with an adapter of this package (stays as it is; a copy is merged), or what
            `merge_and_unload` returned.
        folder: Made if need be. Its old content stays valid until the new one is complete; files that have nothing to
            do with it (a tokenizer, a card) stay.
        modeling: Whether a small modeling file is written with which `trust_remote_code=True` loads the folder where
            this package is not installed. Plain checkpoints need none.

    Returns:
        Whether the folder is a plain checkpoint, which stock `from_pretrained` loads.

    Raises:
        SensiError: The model cannot be rebuilt from a file, or the folder holds something that would be mixed up with
            it.
    """
    folder = Path(folder)
    _check_folder(folder)
    model = merged_copy(model)
    config = copy.deepcopy(model.config)
    if hasattr(config, RECORD_KEY):
        delattr(config, RECORD_KEY)
    widths = compare(model, on_meta(type(model), config))
    edits = expressed(model, widths)
    for key, value in (edits or {}).items():
        setattr(config, key, value)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return edits is not None  # one process writes
    folder.mkdir(parents=True, exist_ok=True)
    plain = edits is not None
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as name:
        temporary = Path(name)
        # Stock code writes dtypes, tied weights and generation settings as the installed Transformers reads them.
        type(model).save_pretrained(model, temporary, max_shard_size=2**62, save_original_format=plain)
        values = _json_of(config, temporary)
        weights = f"{'' if plain else 'sensi_'}model-{secrets.token_hex(8)}.safetensors"
        os.replace(temporary / WEIGHTS, temporary / weights)
        if plain:
            values["transformers_weights"] = weights
        else:
            values[RECORD_KEY] = widths.to_record(type(model).__name__) | {"weights": weights}
            if modeling:
                file_name, text = modeling_file(type(model))
                (temporary / file_name).write_text(text, encoding="utf-8")
                values["auto_map"] = auto_map(type(model), file_name)
        (temporary / CONFIG).write_text(_dumps(values), encoding="utf-8")
        _move_in(temporary, folder)
        if plain:
            _standard_name(folder, weights, values)
    _remove_old(folder, keep=WEIGHTS if plain else weights)
    return plain


def load_merged(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Loads a merged model: an instance of the Transformers class that was saved, on the CPU, in evaluation mode.

    Reads what `save_merged` wrote and what `merge_and_unload().save_pretrained(...)` did. Only classes of Transformers
    itself are built, and only from shapes that the weights file has.

    Raises:
        SensiLoadError: Something is missing, damaged, of a newer format, or not what it must be.
    """
    folder = Path(folder)
    values = _read_config(folder)
    record = values.pop(RECORD_KEY, None)
    weights = values.get("transformers_weights", WEIGHTS)
    if record is not None:
        _check_record(record)
        weights = record.get("weights", WEIGHTS)
    tensors = _open(folder, weights)
    cls = _architecture(record["architecture"] if record else (values.get("architectures") or [None])[0])
    config = _config_of(cls, values, len(tensors))
    widths = Widths({n: tuple(s) for n, s in record["shapes"].items()}, record["attributes"]) if record else Widths()
    try:
        empty = on_meta(cls, config)
    except Exception as error:
        raise SensiLoadError(f"{folder / CONFIG} describes no {cls.__name__}: {error}") from error
    _check_widths(widths, empty)
    apply(empty, widths)
    state = _whole_state(empty, tensors, folder / weights)
    return _build(cls, config, widths, state, folder)


# -- writing ----------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SensiError(f"{folder} is a file; give a folder.")
    for name in (
        "adapter_config.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ):
        if (folder / name).exists():
            raise SensiError(
                f"{folder} already holds {name!r}, which loaders would take for this model: give another folder."
            )


def _json_of(config: Any, temporary: Path) -> dict[str, Any]:
    """The config as stock code writes it, with what saving has set on the model's own."""
    saved = json.loads((temporary / CONFIG).read_text(encoding="utf-8"))
    config.save_pretrained(temporary)
    values = json.loads((temporary / CONFIG).read_text(encoding="utf-8"))
    values |= {key: saved[key] for key in ("architectures", "dtype") if key in saved}
    values.pop("auto_map", None)
    return values


def _dumps(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _move_in(temporary: Path, folder: Path) -> None:
    """Moves all files into the folder, the config last, each of them on the disk before it has its name."""
    names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == CONFIG)
    for name in names:
        _flush(temporary / name)
    for name in names:
        if name == CONFIG:
            _flush(folder)
        os.replace(temporary / name, folder / name)
    _flush(folder)


def _standard_name(folder: Path, weights: str, values: dict[str, Any]) -> None:
    """Gives the weights of a plain checkpoint the name that all tools expect; valid at every step."""
    spare = folder / f"{weights}.tmp"
    try:
        os.link(folder / weights, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(folder / weights, spare)
        _flush(spare)
    os.replace(spare, folder / WEIGHTS)
    _flush(folder)
    spare = folder / f"{CONFIG}.tmp"
    spare.write_text(_dumps({k: v for k, v in values.items() if k != "transformers_weights"}), encoding="utf-8")
    _flush(spare)
    os.replace(spare, folder / CONFIG)
    _flush(folder)


def _remove_old(folder: Path, keep: str) -> None:
    """Weights that no config names any more (a stock loader would take some for this model's), and cut-off saves."""
    for path in folder.iterdir():
        if path.name.startswith(_TEMPORARY) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        if path.name != keep and (path.name == WEIGHTS or _OWN_WEIGHTS.fullmatch(path.name.removesuffix(".tmp"))):
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SensiLoadError(
            f"{folder} holds no {CONFIG}: it is no merged model, or its saving was cut off."
        ) from None
    except (OSError, ValueError) as error:
        raise SensiLoadError(f"{folder / CONFIG} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise SensiLoadError(f"{folder / CONFIG} does not hold a config.")
    return values


def _check_record(record: Any) -> None:
    where = f"`{RECORD_KEY}` in {CONFIG}"
    if not isinstance(record, dict):
        raise SensiLoadError(f"{where} must be an object.")
    version = record.get("format_version")
    if version != RECORD_VERSION or isinstance(version, bool):
        raise SensiLoadError(
            f"{where} has the format_version {version!r}; this version of peft_sensi reads {RECORD_VERSION}. Upgrade "
            f"with `pip install -U peft-sensi`."
        )
    shapes, attributes = record.get("shapes"), record.get("attributes")
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**31 for size in shape)
        for shape in shapes.values()
    ):
        raise SensiLoadError(f"{where} needs `shapes`: for each parameter a list of whole numbers.")
    if not isinstance(attributes, dict) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in attributes.values()
    ):
        raise SensiLoadError(f"{where} needs `attributes`: for each name a number.")
    weights = record.get("weights", WEIGHTS)
    if not isinstance(weights, str) or (weights != WEIGHTS and not _OWN_WEIGHTS.fullmatch(weights)):
        raise SensiLoadError(f"{where} names {weights!r}, which is no weights file of this folder.")


def _architecture(name: Any) -> type[PreTrainedModel]:
    """Transformers' own class of this name, and nothing else: a file must not choose what is imported."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    good = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel
    if not good or not cls.__module__.startswith("transformers.") or cls.__name__ != name:
        raise SensiLoadError(f"The folder's architecture is {name!r}, which is no model class of Transformers.")
    return cls


def _config_of(cls: type[PreTrainedModel], values: dict[str, Any], tensors: int) -> Any:
    values = {key: value for key, value in values.items() if key not in _CODE_KEYS}
    expected = getattr(cls.config_class, "model_type", None)
    if values.pop("model_type", None) != expected:
        raise SensiLoadError(f"The config is not one of a {cls.__name__}, whose model_type is {expected!r}.")
    try:
        config = cls.config_class.from_dict(values)
    except Exception as error:
        raise SensiLoadError(f"The config is not one of a {cls.__name__}: {error}") from error
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:  # each has a tensor; modules cost time even without weights
        raise SensiLoadError(f"The config has {layers} layers, but the weights file only {tensors} tensors.")
    return config


def _open(folder: Path, weights: Any) -> dict[str, torch.Tensor]:
    """The tensors of the file, mapped and not yet read."""
    if not isinstance(weights, str) or Path(weights).name != weights or not weights.endswith(".safetensors"):
        raise SensiLoadError(f"{folder / CONFIG} names {weights!r}, which is no safetensors file of this folder.")
    if not (folder / weights).is_file():
        raise SensiLoadError(f"{folder} lacks {weights!r}, the weights of its {CONFIG}.")
    try:
        with safe_open(folder / weights, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SensiLoadError(f"{folder / weights} is no intact safetensors file: {error}.") from error


def _check_widths(widths: Widths, empty: PreTrainedModel) -> None:
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    for name, shape in widths.shapes.items():
        if name not in parameters or parameters[name].dim() != len(shape):
            raise SensiLoadError(
                f"The record gives {name!r} the shape {shape}, but {type(empty).__name__} has no such parameter."
            )
    modules = dict(empty.named_modules())
    for name in widths.attributes:
        path, _, attribute = name.rpartition(".")
        known = vars(modules[path]) if path in modules else {}
        if attribute.startswith("_") or type(known.get(attribute)) not in (int, float):
            raise SensiLoadError(f"The record sets {name!r}, which is no number of a {type(empty).__name__}.")


def _whole_state(empty: PreTrainedModel, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Checks the file against the shapes, and gives tied parameters all their names."""
    expected = empty.state_dict(keep_vars=True)
    if extra := sorted(set(tensors) - set(expected)):
        raise SensiLoadError(f"{file} holds {extra[0]!r}, which the model does not have ({len(extra)} extra).")
    by_tensor = {id(expected[name]): tensor for name, tensor in tensors.items()}
    state = {}
    for name, like in expected.items():
        tensor = by_tensor.get(id(like))
        if tensor is None:
            raise SensiLoadError(f"{file} lacks {name!r}.")
        if tensor.shape != like.shape:
            raise SensiLoadError(f"{file}: {name!r} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}.")
        if tensor.is_floating_point() != like.is_floating_point():
            raise SensiLoadError(f"{file}: {name!r} has dtype {tensor.dtype}, expected {like.dtype}.")
        if tensor.is_floating_point() and isinstance(like, nn.Parameter) and not torch.isfinite(tensor).all():
            raise SensiLoadError(f"{file}: {name!r} contains NaN or infinity.")
        state[name] = tensor
    return state


def _build(
    cls: type[PreTrainedModel], config: Any, widths: Widths, state: dict[str, torch.Tensor], folder: Path
) -> PreTrainedModel:
    class Built(cls):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            apply(self, widths)

    Built.__name__ = cls.__name__  # Transformers looks for the task in it
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = max(set(floating), key=floating.count, default=torch.float32)
    # Stock loading also fills what no file holds, such as the frequencies of rotary embeddings.
    model, info = Built.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
    )
    if problems := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise SensiLoadError(f"{folder}: {problems[0]!r} could not be loaded ({len(problems)} such tensors).")
    model.__class__ = cls
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.dtype != state[name].dtype:  # a model may mix types: a head in float32 on a bf16 base
                tensor.data = state[name].clone()
    model.config.name_or_path = str(folder)
    if widths:
        setattr(model.config, RECORD_KEY, widths.to_record(cls.__name__))
    return model.eval()
