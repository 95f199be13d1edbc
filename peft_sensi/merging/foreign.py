"""Checks of a merged folder from anywhere, before anything is built: what its record and its config may ask for."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from ..anatomy.widths import RECORD_KEY, RECORD_VERSION, Widths
from ..utils.checks import is_count, is_number, shown
from ..utils.errors import DAMAGED, SensiLoadError, how_to_install
from .hashes import check_hashes


MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
# Other files that stock loaders take for the weights of a folder.
OTHER_WEIGHTS = ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
OWN_WEIGHTS = re.compile(r"(?:sensi_)?model-[0-9a-f]{16}\.safetensors")

# Fields of a config that make Transformers import or download code, or read weights from another place.
_CODE_KEYS = (
    "auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "quantization_config",
    "fusion_config", "kernel_config", "distributed_config", "transformers_weights", "trust_remote_code",
)  # fmt: skip
# Fields that count layers, labels, groups and other things that are built one by one, and fields that count positions.
_COUNT = re.compile(r"(^|_)(num|n)_|(^|_)(layers?|groups?|labels?|experts|heads|blocks?|stages?|depths?)$")
_NO_COUNT = re.compile(r"token|(^|_)ids?$")
_LAYERS = re.compile(r"(^|_)layers?$")
_POSITIONS = re.compile(r"position|(^|_)(ctx|seq_?len\w*)$")
_FREE_COUNT, _FREE_POSITIONS = 1000, 2**17  # allowed for any file; rotary positions need no table, so they are free
_ALLOWED_BUFFERS = 2**28  # bytes of buffers that are not in the file, see `check_buffers`


def check_record(record: Any) -> None:
    """Raises `SensiLoadError` if the record of the widths has another form than `Widths.to_record` writes."""
    where = f"`{RECORD_KEY}` in {MODEL_CONFIG}"
    if not isinstance(record, dict):
        raise SensiLoadError(f"{where} must be an object. {DAMAGED}")
    version = record.get("format_version")
    if version != RECORD_VERSION or isinstance(version, bool):
        raise SensiLoadError(
            f"{where} has the format_version {version!r}; this version of peft_sensi reads {RECORD_VERSION}. "
            f"Upgrade: {how_to_install(options='-U')}"
        )
    shapes, attributes = record.get("shapes"), record.get("attributes")
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(is_count(size, 0) for size in shape) for shape in shapes.values()
    ):
        raise SensiLoadError(f"{where} must have `shapes`, with a list of whole numbers for each parameter. {DAMAGED}")
    if not isinstance(attributes, dict) or not all(is_number(value) for value in attributes.values()):
        raise SensiLoadError(f"{where} must have `attributes`, with a number for each name. {DAMAGED}")
    weights = record.get("weights", MODEL_WEIGHTS)
    if not isinstance(weights, str) or (weights != MODEL_WEIGHTS and not OWN_WEIGHTS.fullmatch(weights)):
        raise SensiLoadError(f"{where} names {weights!r}, which is not the name of a weights file. {DAMAGED}")


def is_weights_name(name: Any) -> bool:
    """Whether this is the name of a safetensors file, without a path to another folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def weights_in(values: Mapping[str, Any], folder: str | Path) -> str:
    """The name of the weights file of a merged folder, from the object in its config.

    Raises `SensiLoadError` if the record of the widths is malformed, or the name is not that of a file in the folder.
    """
    record = values.get(RECORD_KEY)
    if record is not None:
        check_record(record)
    where, key = (values, "transformers_weights") if record is None else (record, "weights")
    weights = where.get(key, MODEL_WEIGHTS)
    if not is_weights_name(weights):
        raise SensiLoadError(
            f"{folder}: {MODEL_CONFIG} names {weights!r}, which is not a safetensors file of this folder. {DAMAGED}"
        )
    return weights


def check_unchanged(values: Mapping[str, Any], folder: Path, weights: str) -> None:
    """Raises `SensiLoadError` if the config or the weights of a merged folder were changed after it was saved."""
    # A plain checkpoint may have been loaded and saved again without this package. That removes `transformers_weights`
    # and copies the hash, which is of the old config.
    if values.get(RECORD_KEY) is not None or "transformers_weights" in values:
        try:
            check_hashes(folder, dict(values), folder / weights)
        except ValueError as error:
            raise SensiLoadError(str(error)) from None


def architecture_of(name: Any) -> type[PreTrainedModel]:
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


def with_floats(values: Any) -> Any:
    """The values of a config's file, with the numbers that JSON lacks: Transformers writes `{"__float__": "NaN"}`."""
    if isinstance(values, dict):
        if values.keys() == {"__float__"} and values["__float__"] in ("NaN", "Infinity", "-Infinity"):
            return float(values["__float__"])
        return {key: with_floats(value) for key, value in values.items()}
    return [with_floats(value) for value in values] if isinstance(values, list) else values


def config_of(cls: type[PreTrainedModel], values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The config object. Raises `SensiLoadError` for numbers that are too large for the tensors of the file."""
    try:
        check_counts(values, tensors)
        values = with_floats(_without_code(values))
    except RecursionError as error:
        raise SensiLoadError(f"{MODEL_CONFIG} is nested too deeply.") from error
    assert cls.config_class is not None  # see `architecture_of`
    expected = cls.config_class.model_type
    if (found := values.pop("model_type", None)) != expected:
        raise SensiLoadError(f"The config's model_type is {found!r}, but a {cls.__name__} has {expected!r}.")
    try:
        return cls.config_class.from_dict(values)
    except Exception as error:
        raise SensiLoadError(f"The config does not fit a {cls.__name__}: {error}") from error


def check_counts(values: Any, tensors: Mapping[str, torch.Tensor], rotary: bool = False, name: str = "") -> None:
    """Raises `SensiLoadError` for counts in a config that are far larger than anything in the weights file.

    Building a config or a module takes time for each layer, label or position, even without any weights.
    """
    if isinstance(values, (dict, list)):
        # Rotary positions take no room. The text model inside of a model of images and texts has a dict of its own.
        rotary = rotary or (isinstance(values, dict) and any("rope_" in str(key) for key in values))
        items = values.items() if isinstance(values, dict) else ((name, value) for value in values)
        for key, value in items:
            check_counts(value, tensors, rotary, key)
        return
    if type(values) is not int:
        return
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if _LAYERS.search(name) and not name.startswith("max_"):  # each layer has a tensor, or shares one with the others
        allowed = len(tensors)
    elif _POSITIONS.search(name):
        allowed = 2**31 if rotary else max(longest, _FREE_POSITIONS)
    elif _COUNT.search(name) and not _NO_COUNT.search(name):
        allowed = max(longest, len(tensors), _FREE_COUNT)
    else:
        return
    if values > allowed:
        raise SensiLoadError(
            f"The config has `{name}` = {shown(values)}, but the weights file has only {len(tensors)} tensors, and "
            f"the longest side of one is {longest}."
        )


@contextmanager
def few_modules(tensors: int) -> Iterator[None]:
    """Inside, building a model raises `SensiLoadError` at once if it has far more parts than the file has tensors."""
    left, thread = 20 * tensors + 10_000, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise SensiLoadError(
                f"The config asks for far more modules than a file with {tensors} tensors can fill. {DAMAGED}"
            )

    handles = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_buffers(empty: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `SensiLoadError` for huge buffers that the model computes itself, such as tables of positions.

    They are not in the file, so the config alone tells their size.
    """
    stored = set(empty.state_dict())
    computed = sum(b.numel() * b.element_size() for name, b in empty.named_buffers() if name not in stored)
    file = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if computed > max(_ALLOWED_BUFFERS, 4 * file):
        raise SensiLoadError(
            f"The config asks for buffers of {computed:,} bytes, but the weights file has only {file:,} bytes. "
            f"{DAMAGED}"
        )


def check_widths(widths: Widths, empty: PreTrainedModel) -> None:
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    for name, shape in widths.shapes.items():
        if name not in parameters or parameters[name].dim() != len(shape):
            raise SensiLoadError(
                f"The config gives {name!r} the shape {shape}, but {type(empty).__name__} has no such parameter. "
                f"{DAMAGED}"
            )
    modules = dict(empty.named_modules())
    for name in widths.attributes:
        path, _, attribute = name.rpartition(".")
        known = vars(modules[path]) if path in modules else {}
        if attribute.startswith("_") or type(known.get(attribute)) not in (int, float):
            raise SensiLoadError(
                f"The config sets {name!r}, which is not a number of a {type(empty).__name__}. {DAMAGED}"
            )
