"""A folder with a merged model goes in; the model comes out. The folder may come from anywhere: everything in it is
checked before it is used."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..anatomy.widths import RECORD_KEY, Widths, apply_widths, classes_for, on_meta
from ..utils.errors import DAMAGED, NOT_FINITE, SensiLoadError
from ..utils.files import open_safetensors, read_json_object, read_specs
from .foreign import (
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    architecture_of,
    check_buffers,
    check_record,
    check_unchanged,
    check_widths,
    config_of,
    few_modules,
    is_weights_name,
    weights_in,
)
from .hashes import HASH_KEY


@dataclass(frozen=True)
class _Folder:
    """What a folder holds, after all checks. `empty` is the model on the `meta` device."""

    path: Path
    empty: PreTrainedModel
    config: Any
    widths: Widths
    state: dict[str, torch.Tensor]


def load_merged(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Loads a merged model: an instance of the Transformers class that was saved, on the CPU, in evaluation mode.

    Args:
        folder: A folder that `save_merged` or `merge_and_unload().save_pretrained(...)` wrote. It need not be trusted:
            only model classes of Transformers itself are built, and only with the shapes of the weights file.

    Returns:
        The model. Every tensor has the dtype that it has in the file.

    Raises:
        SensiLoadError: Something in the folder is missing, damaged, malformed or of a newer format, or was changed
            after the model was saved.
    """
    found = _read(Path(folder))
    return _build(type(found.empty), found)


def load_merged_as(folder: str | os.PathLike[str], auto_class: Any, changes: Mapping[str, Any]) -> PreTrainedModel:
    """`load_merged` for another task: the model class that an auto class has for this family, with a changed config.

    `changes` are fields of the config about the labels. If their number changes, or the class is another one, the head
    is new: what lies outside the base transformer gets random values where its shapes differ or the file lacks it.
    """
    found = _read(Path(folder))
    for name in sorted(changes, key=lambda name: name != "num_labels"):  # `num_labels` resets the names
        setattr(found.config, name, changes[name])
    classes = classes_for(auto_class, type(found.config))
    cls = type(found.empty)
    if not classes:
        raise SensiLoadError(f"{folder} holds a {cls.__name__}, and {auto_class.__name__} knows no class for it.")
    if cls in classes:
        return _build(cls, found, new_head=bool(changes))
    cls = classes[0]
    empty = on_meta(cls, found.config)
    own = set(empty.state_dict())
    state = {_name_in(empty, found.empty, name): tensor for name, tensor in found.state.items()}
    state = {name: tensor for name, tensor in state.items() if name in own}
    widths = _widths_in(empty, found.empty, found.widths)
    return _build(cls, replace(found, widths=widths, state=state), new_head=True)


def without_weights(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of this class on the `meta` device; with the widths of a merged folder, if the config is from one.

    Raises `SensiLoadError` if the record of the widths is malformed.
    """
    config = copy.deepcopy(config)
    record = vars(config).pop(RECORD_KEY, None)
    empty = on_meta(cls, config)
    if record is not None:
        check_record(record)
        source = on_meta(architecture_of(record["architecture"]), config)
        widths = _widths_of(record)
        check_widths(widths, source)
        apply_widths(empty, _widths_in(empty, source, widths))
    return empty


def _name_in(model: PreTrainedModel, source: PreTrainedModel, name: str) -> str:
    """The name that a parameter or module of `source` has in `model`, which may have another head, or none."""
    prefix = model.base_model_prefix
    has_head, had_head = hasattr(model, prefix), hasattr(source, prefix)
    if has_head == had_head:
        return name
    return f"{prefix}.{name}" if has_head else name.removeprefix(f"{prefix}.")


def _widths_in(model: PreTrainedModel, source: PreTrainedModel, widths: Widths) -> Widths:
    """The widths of `source` with the names that they have in `model`. Those of the other head are left out."""
    own = dict(model.named_parameters(remove_duplicate=False))
    shapes = {_name_in(model, source, name): shape for name, shape in widths.shapes.items()}
    numbers = {_name_in(model, source, name): value for name, value in widths.attributes.items()}
    return Widths({name: shape for name, shape in shapes.items() if name in own}, numbers)


def _widths_of(record: Mapping[str, Any]) -> Widths:
    return Widths({name: tuple(shape) for name, shape in record["shapes"].items()}, record["attributes"])


def _read(folder: Path) -> _Folder:
    try:
        values = read_json_object(folder / MODEL_CONFIG)
    except FileNotFoundError:
        if not folder.is_dir():
            raise SensiLoadError(
                f"There is no folder {folder}. Check the path, or download a repository of the Hub first: "
                f"`load_merged(huggingface_hub.snapshot_download(name))`."
            ) from None
        raise SensiLoadError(
            f"{folder} holds no {MODEL_CONFIG}: it is not a merged model, or saving it was interrupted."
        ) from None
    record, weights = values.get(RECORD_KEY), weights_in(values, folder)
    tensors = _open(folder, weights)
    check_unchanged(values, folder, weights)
    for key in (RECORD_KEY, HASH_KEY):
        values.pop(key, None)
    named = values.get("architectures")
    cls = architecture_of(
        record.get("architecture") if record else named[0] if isinstance(named, list) and named else None
    )
    config = config_of(cls, values, tensors)
    widths = _widths_of(record) if record else Widths()
    try:
        with few_modules(len(tensors)):
            empty = on_meta(cls, config)
    except SensiLoadError:
        raise
    except Exception as error:
        raise SensiLoadError(f"No {cls.__name__} can be built from {folder / MODEL_CONFIG}: {error}") from error
    check_widths(widths, empty)
    apply_widths(empty, widths)
    check_buffers(empty, tensors)
    return _Folder(folder, empty, config, widths, _state(empty, tensors, folder / weights))


def _open(folder: Path, weights: str) -> dict[str, torch.Tensor]:
    """The tensors of the file or of its shards, mapped into memory. Their values are read when they are used."""
    tensors: dict[str, torch.Tensor] = {}
    for name in _shards(folder, weights):
        try:
            with open_safetensors(folder / name) as file:
                read_specs(folder / name, file)  # refuses dtypes that no model of this package has
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except FileNotFoundError:
            others = [path.name for path in folder.glob("model.*.safetensors")]  # saved with `variant`
            more = f" Rename {others[0]!r} to {name!r} if these are the weights." if len(others) == 1 else ""
            raise SensiLoadError(f"{folder} lacks the weights {name!r}.{more}") from None
    return tensors


def _shards(folder: Path, weights: str) -> list[str]:
    """The file of the weights; or, where a model's own `save_pretrained` has split it, those that the index names."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if weights != MODEL_WEIGHTS or (folder / weights).exists() or not index.exists():
        return [weights]
    places = read_json_object(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(map(is_weights_name, names)):
        raise SensiLoadError(
            f"{index} must have a `weight_map` with a safetensors file of the folder for each tensor."
        )
    return sorted(set(names))


def _state(empty: PreTrainedModel, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """The state dict, with every name of a tied parameter. Raises `SensiLoadError` for tensors that do not fit."""
    expected = empty.state_dict(keep_vars=True)
    # What `save_pretrained` leaves out, such as Marian's positions, is computed when the model is built.
    left_out = getattr(empty, "_keys_to_ignore_on_save", None) or ()
    for name in set(left_out) - set(tensors):
        expected.pop(name, None)
    if extra := sorted(set(tensors) - set(expected)):
        # These may be the names of the family's published checkpoints, which `from_pretrained` converts. The names are
        # not known here, so only the total sizes of floats and of other numbers are checked.
        different = {id(tensor): tensor for tensor in expected.values()}.values()
        if _sizes(different) != _sizes(tensors.values()):
            raise SensiLoadError(
                f"{file} holds {extra[0]!r}, which the model does not have ({len(extra)} extra). {DAMAGED}"
            )
        for name in tensors:
            _check_finite(name, tensors[name], file)
        return tensors
    by_tensor = {id(expected[name]): tensor for name, tensor in tensors.items()}
    state = {}
    for name, like in expected.items():
        tensor = by_tensor.get(id(like))
        if tensor is None:
            raise SensiLoadError(f"{file} lacks {name!r}. {DAMAGED}")
        if tensor.shape != like.shape:
            raise SensiLoadError(
                f"{file}: {name!r} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}. {DAMAGED}"
            )
        if tensor.is_floating_point() != like.is_floating_point():
            raise SensiLoadError(f"{file}: {name!r} has dtype {tensor.dtype}, expected {like.dtype}. {DAMAGED}")
        if isinstance(like, nn.Parameter):
            _check_finite(name, tensor, file)
        state[name] = tensor
    for path, module in empty.named_modules():
        own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if len({state[name].dtype for name in own if name in state}) > 1:
            raise SensiLoadError(
                f"{file}: the tensors of {path!r} have several dtypes, with which it cannot run. {DAMAGED}"
            )
    return state


def _sizes(tensors: Iterable[torch.Tensor]) -> Counter[bool]:
    """Numbers of values in floating-point tensors (`True`) and in others."""
    sizes: Counter[bool] = Counter()
    for tensor in tensors:
        sizes[tensor.is_floating_point()] += tensor.numel()
    return sizes


def _check_finite(name: str, tensor: torch.Tensor, file: Path) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise SensiLoadError(f"{file}: {name!r} contains NaN or infinity: {NOT_FINITE}")


def _build(cls: type[PreTrainedModel], found: _Folder, new_head: bool = False) -> PreTrainedModel:
    class Built(cls):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            apply_widths(self, found.widths)

    Built.__name__ = cls.__name__  # Transformers reads the task from the class's name
    Built.__module__ = cls.__module__  # and does not convert published names for classes from elsewhere
    folder, state = found.path, found.state
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = max(dict.fromkeys(floating), key=floating.count, default=torch.float32)  # of equally many, the first
    # Copies: a model whose tensors are still mapped from the file would change, or the process end, if somebody writes
    # over this file.
    # Copies of one name each: Transformers may not tie parameters if it is given a value for each.
    values, seen = dict[str, torch.Tensor](), set[int]()
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            values[name] = tensor.clone()
    # `from_pretrained` also computes what is not in the file, such as the frequencies of rotary embeddings.
    try:
        model, info = Built.from_pretrained(
            None, config=found.config, state_dict=values, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=new_head,
        )  # fmt: skip
    except Exception as error:
        raise SensiLoadError(f"{folder} could not be loaded: {error}") from error
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    problems = [*info["missing_keys"], *info["unexpected_keys"], *mismatched]
    if new_head:
        problems = [name for name in problems if name.startswith(f"{cls.base_model_prefix}.")]
    if problems:
        raise SensiLoadError(f"{folder}: {problems[0]!r} could not be loaded ({len(problems)} such tensors).")
    model.__class__ = cls
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            # A model may have several dtypes, such as a float32 head on a bfloat16 base.
            if name in state and tensor.dtype != state[name].dtype:
                tensor.data = state[name].clone()
    if (folder / "generation_config.json").is_file() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise SensiLoadError(f"{folder / 'generation_config.json'} cannot be used: {error}") from error
    model.config.name_or_path = model.name_or_path = str(folder)
    if found.widths:
        setattr(model.config, RECORD_KEY, found.widths.to_record(cls.__name__))
    return model.eval()
