"""Building a merged model again from a folder, of which nothing is believed before it is checked."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.widths import RECORD_KEY, RECORD_VERSION, Widths, apply, on_meta
from ..utils.checks import is_number
from ..utils.errors import SensiLoadError


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What else stock loaders take for the weights of a folder.
OTHER_WEIGHTS = ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
OWN_WEIGHTS = re.compile(r"(?:sensi_)?model-[0-9a-f]{16}\.safetensors")

# Fields of a config that make Transformers import or download code, or read weights from elsewhere.
_CODE_KEYS = (
    "auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "quantization_config",
    "fusion_config", "kernel_config", "distributed_config", "transformers_weights", "trust_remote_code",
)  # fmt: skip
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_TABLES = 2**28  # bytes that tables beside the file may have in any case


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
    named = values.get("architectures")
    cls = _architecture(
        record.get("architecture") if record else named[0] if isinstance(named, list) and named else None
    )
    config = _config_of(cls, values, tensors)
    widths = Widths({n: tuple(s) for n, s in record["shapes"].items()}, record["attributes"]) if record else Widths()
    try:
        empty = on_meta(cls, config)
    except Exception as error:
        raise SensiLoadError(f"{folder / CONFIG} describes no {cls.__name__}: {error}") from error
    _check_widths(widths, empty)
    apply(empty, widths)
    _check_tables(empty, tensors)
    if not set(tensors) <= set(empty.state_dict()):
        state = _older_names(empty, tensors, folder / weights)
    else:
        state = _whole_state(empty, tensors, folder / weights)
    return _build(cls, config, widths, state, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SensiLoadError(
            f"{folder} holds no {CONFIG}: it is no merged model, or its saving was cut off."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
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
    if not isinstance(attributes, dict) or not all(is_number(value) for value in attributes.values()):
        raise SensiLoadError(f"{where} needs `attributes`: for each name a number.")
    weights = record.get("weights", WEIGHTS)
    if not isinstance(weights, str) or (weights != WEIGHTS and not OWN_WEIGHTS.fullmatch(weights)):
        raise SensiLoadError(f"{where} names {weights!r}, which is no weights file of this folder.")


def _architecture(name: Any) -> type[PreTrainedModel]:
    """Transformers' own class of this name, and nothing else: a file must not choose what is imported."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is not None:
        if cls.__module__.startswith("transformers.") and cls.__name__ == name:
            return cls
    raise SensiLoadError(f"The folder's architecture is {name!r}, which is no model class of Transformers.")


def _without_code(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_code(value) for key, value in values.items() if key not in _CODE_KEYS}
    return [_without_code(value) for value in values] if isinstance(values, list) else values


def _config_of(cls: type[PreTrainedModel], values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """Raises `SensiLoadError` also for what would take long to build: nothing is large that is not in the file."""
    for name in _LAYERS:  # each has a tensor; modules cost time even without weights
        if type(layers := values.get(name)) is int and layers > len(tensors):
            raise SensiLoadError(f"The config has {layers} layers, but the weights file only {len(tensors)} tensors.")
    rows = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if type(labels := values.get("num_labels")) is int and labels > max(rows, 1000):
        raise SensiLoadError(f"The config has {labels} labels, but no tensor of the weights file has so many rows.")
    try:
        values = _without_code(values)
    except RecursionError as error:
        raise SensiLoadError(f"{CONFIG} is nested too deeply.") from error
    assert cls.config_class is not None  # see `_architecture`
    expected = cls.config_class.model_type
    if values.pop("model_type", None) != expected:
        raise SensiLoadError(f"The config is not one of a {cls.__name__}, whose model_type is {expected!r}.")
    try:
        config = cls.config_class.from_dict(values)
    except Exception as error:
        raise SensiLoadError(f"The config is not one of a {cls.__name__}: {error}") from error
    return config


def _check_tables(empty: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `SensiLoadError` for tables that are in no file (of positions) and would be built much larger than it."""
    stored = set(empty.state_dict())
    built = sum(b.numel() * b.element_size() for name, b in empty.named_buffers() if name not in stored)
    file = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if built > max(_TABLES, 4 * file):
        raise SensiLoadError(f"The config asks for tables of {built:,} bytes beside a weights file of {file:,}.")


def _open(folder: Path, weights: Any) -> dict[str, torch.Tensor]:
    """The tensors of the file, mapped and not yet read."""
    if not isinstance(weights, str) or Path(weights).name != weights or not weights.endswith(".safetensors"):
        raise SensiLoadError(f"{folder / CONFIG} names {weights!r}, which is no safetensors file of this folder.")
    if not (folder / weights).is_file():
        raise SensiLoadError(f"{folder} lacks {weights!r}, the weights of its {CONFIG}.")
    try:
        with safe_open(folder / weights, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
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


def _older_names(empty: PreTrainedModel, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in a family's published format, which stock loading converts."""
    sizes = {id(tensor): tensor.numel() for tensor in empty.state_dict(keep_vars=True).values()}
    if sum(sizes.values()) != sum(tensor.numel() for tensor in tensors.values()):
        names = sorted(set(tensors) - set(empty.state_dict()))
        raise SensiLoadError(f"{file} holds {names[0]!r}, which the model does not have ({len(names)} extra).")
    return tensors


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
    try:
        model, info = Built.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise SensiLoadError(f"{folder} could not be loaded: {error}") from error
    if problems := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise SensiLoadError(f"{folder}: {problems[0]!r} could not be loaded ({len(problems)} such tensors).")
    model.__class__ = cls
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if (
                name in state and tensor.dtype != state[name].dtype
            ):  # a model may mix types: a head in float32 on a bf16 base
                tensor.data = state[name].clone()
    model.config.name_or_path = str(folder)
    if widths:
        setattr(model.config, RECORD_KEY, widths.to_record(cls.__name__))
    return model.eval()
