"""A folder with a merged model goes in; the model comes out. The folder may come from anywhere: everything in it is
checked before it is used."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.widths import RECORD_KEY, RECORD_VERSION, Widths, apply, on_meta
from ..utils.checks import is_number
from ..utils.errors import SensiLoadError
from ..utils.files import open_safetensors, read_json_object


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Other files that stock loaders take for the weights of a folder.
OTHER_WEIGHTS = ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
OWN_WEIGHTS = re.compile(r"(?:sensi_)?model-[0-9a-f]{16}\.safetensors")

# Fields of a config that make Transformers import or download code, or read weights from another place.
_CODE_KEYS = (
    "auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "quantization_config",
    "fusion_config", "kernel_config", "distributed_config", "transformers_weights", "trust_remote_code",
)  # fmt: skip
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_ALLOWED_BUFFERS = 2**28  # bytes of buffers that are not in the file, see `_check_buffers`


def load_merged(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Loads a merged model: an instance of the Transformers class that was saved, on the CPU, in evaluation mode.

    Args:
        folder: A folder that `save_merged` or `merge_and_unload().save_pretrained(...)` wrote. It need not be trusted:
            only model classes of Transformers itself are built, and only with the shapes of the weights file.

    Returns:
        The model. Every tensor has the dtype that it has in the file.

    Raises:
        SensiLoadError: Something in the folder is missing, damaged, malformed or of a newer format.
    """
    folder = Path(folder)
    try:
        values = read_json_object(folder / CONFIG)
    except FileNotFoundError:
        raise SensiLoadError(
            f"{folder} holds no {CONFIG}: it is not a merged model, or saving it was interrupted."
        ) from None
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
        raise SensiLoadError(f"No {cls.__name__} can be built from {folder / CONFIG}: {error}") from error
    _check_widths(widths, empty)
    apply(empty, widths)
    _check_buffers(empty, tensors)
    return _build(cls, config, widths, _state(empty, tensors, folder / weights), folder)


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
        raise SensiLoadError(f"{where} must have `shapes`, with a list of whole numbers for each parameter.")
    if not isinstance(attributes, dict) or not all(is_number(value) for value in attributes.values()):
        raise SensiLoadError(f"{where} must have `attributes`, with a number for each name.")
    weights = record.get("weights", WEIGHTS)
    if not isinstance(weights, str) or (weights != WEIGHTS and not OWN_WEIGHTS.fullmatch(weights)):
        raise SensiLoadError(f"{where} names {weights!r}, which is not the name of a weights file.")


def _architecture(name: Any) -> type[PreTrainedModel]:
    """The model class of Transformers with this name. A file cannot choose any other class, or what is imported."""
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is not None:
        if cls.__module__.startswith("transformers.") and cls.__name__ == name:
            return cls
    raise SensiLoadError(f"The folder's architecture is {name!r}, which is not a model class of Transformers.")


def _without_code(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_code(value) for key, value in values.items() if key not in _CODE_KEYS}
    return [_without_code(value) for value in values] if isinstance(values, list) else values


def _config_of(cls: type[PreTrainedModel], values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The config object. Raises `SensiLoadError` for numbers that are too large for the tensors of the file."""
    for name in _LAYERS:  # building modules takes time even without weights, and each layer has a tensor in the file
        if type(layers := values.get(name)) is int and layers > len(tensors):
            raise SensiLoadError(
                f"The config has {layers} layers, but the weights file has only {len(tensors)} tensors."
            )
    rows = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if type(labels := values.get("num_labels")) is int and labels > max(rows, 1000):
        raise SensiLoadError(f"The config has {labels} labels, but no tensor of the weights file has so many rows.")
    try:
        values = _without_code(values)
    except RecursionError as error:
        raise SensiLoadError(f"{CONFIG} is nested too deeply.") from error
    assert cls.config_class is not None  # see `_architecture`
    expected = cls.config_class.model_type
    if (found := values.pop("model_type", None)) != expected:
        raise SensiLoadError(f"The config's model_type is {found!r}, but a {cls.__name__} has {expected!r}.")
    try:
        return cls.config_class.from_dict(values)
    except Exception as error:
        raise SensiLoadError(f"The config does not fit a {cls.__name__}: {error}") from error


def _check_buffers(empty: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `SensiLoadError` for huge buffers that the model computes itself, such as tables of positions.

    They are not in the file, so the config alone tells their size.
    """
    stored = set(empty.state_dict())
    computed = sum(b.numel() * b.element_size() for name, b in empty.named_buffers() if name not in stored)
    file = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if computed > max(_ALLOWED_BUFFERS, 4 * file):
        raise SensiLoadError(
            f"The config asks for buffers of {computed:,} bytes, but the weights file has only {file:,} bytes."
        )


def _open(folder: Path, weights: Any) -> dict[str, torch.Tensor]:
    """The tensors of the file, mapped into memory. Their values are read when they are used."""
    if not isinstance(weights, str) or Path(weights).name != weights or not weights.endswith(".safetensors"):
        raise SensiLoadError(f"{folder / CONFIG} names {weights!r}, which is not a safetensors file of this folder.")
    try:
        with open_safetensors(folder / weights) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise SensiLoadError(f"{folder} lacks {weights!r}, the weights that its {CONFIG} names.") from None


def _check_widths(widths: Widths, empty: PreTrainedModel) -> None:
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    for name, shape in widths.shapes.items():
        if name not in parameters or parameters[name].dim() != len(shape):
            raise SensiLoadError(
                f"The config gives {name!r} the shape {shape}, but {type(empty).__name__} has no such parameter."
            )
    modules = dict(empty.named_modules())
    for name in widths.attributes:
        path, _, attribute = name.rpartition(".")
        known = vars(modules[path]) if path in modules else {}
        if attribute.startswith("_") or type(known.get(attribute)) not in (int, float):
            raise SensiLoadError(f"The config sets {name!r}, which is not a number of a {type(empty).__name__}.")


def _state(empty: PreTrainedModel, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """The state dict, with every name of a tied parameter. Raises `SensiLoadError` for tensors that do not fit."""
    expected = empty.state_dict(keep_vars=True)
    if extra := sorted(set(tensors) - set(expected)):
        # These may be the names of the family's published checkpoints, which `from_pretrained` converts. The names are
        # not known here, so only the total size is checked.
        sizes = {id(tensor): tensor.numel() for tensor in expected.values()}
        if sum(sizes.values()) != sum(tensor.numel() for tensor in tensors.values()):
            raise SensiLoadError(f"{file} holds {extra[0]!r}, which the model does not have ({len(extra)} extra).")
        return tensors
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

    Built.__name__ = cls.__name__  # Transformers reads the task from the class's name
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = max(set(floating), key=floating.count, default=torch.float32)
    # `from_pretrained` also computes what is not in the file, such as the frequencies of rotary embeddings.
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
            # A model may have several dtypes, such as a float32 head on a bfloat16 base.
            if name in state and tensor.dtype != state[name].dtype:
                tensor.data = state[name].clone()
    model.config.name_or_path = str(folder)
    if widths:
        setattr(model.config, RECORD_KEY, widths.to_record(cls.__name__))
    return model.eval()
