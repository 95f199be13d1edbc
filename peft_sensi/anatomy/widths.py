"""The widths of a trimmed Transformers model, and whether its config can express them.

The model is compared with a fresh model of the same class on the `meta` device. No plan is needed, so this also works
for models that were trimmed twice or loaded from a merged folder.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..utils.errors import SensiError
from .linears import LINEARS, update_features


logger = logging.getLogger(__name__)

# The key of a config for what its own fields cannot express.
RECORD_KEY = "peft_sensi"
RECORD_VERSION = 1
# In the config of a merged model whose own fields say everything, to tell it from a base model.
SAVED_BY = {"saved_by": "peft_sensi"}

_HEAD_KEYS = ("num_attention_heads", "num_heads", "n_head")
_HEAD_SIZE_KEYS = ("head_dim", "d_kv")


@dataclass(frozen=True)
class Widths:
    """What differs from the stock class: shapes of parameters, and numbers that are attributes of modules."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, int | float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes)

    def to_record(self, architecture: str) -> dict[str, Any]:
        """A JSON object for the config, from which `load_merged` rebuilds the model."""
        return {
            "format_version": RECORD_VERSION,
            "load_with": "peft_sensi.load_merged",
            "architecture": architecture,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": dict(self.attributes),
        }


def stock_class(model: nn.Module) -> type[PreTrainedModel]:
    """The model's class in Transformers. Raises `SensiError` if there is none.

    A merged model that was loaded with `trust_remote_code` has a class of our modeling file, which only adds widths.
    """
    cls = type(model)
    if cls.__module__.startswith("transformers_modules."):
        cls = next((parent for parent in cls.__bases__ if cls.__name__ == f"Sensi{parent.__name__}"), cls)
    if not isinstance(model, PreTrainedModel) or getattr(transformers, cls.__name__, None) is not cls:
        parents = (c.__name__ for c in cls.__mro__[1:] if getattr(transformers, c.__name__, None) is c)
        parent = next((name for name in parents if name != "PreTrainedModel"), None)
        raise SensiError(
            f"{cls.__module__}.{cls.__qualname__} is not a model class of Transformers, so no other process could "
            f"rebuild it. Save the adapter and merge after loading, or save the `state_dict()` yourself."
            + (f" If it computes what a {parent} computes, load and adapt a {parent} instead." if parent else "")
        )
    return cls


def on_meta(make: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model that a class or function makes of a config, on the `meta` device: without memory for weights."""
    with torch.device("meta"):
        return make(copy.deepcopy(config))


def find_widths(model: PreTrainedModel, stock: PreTrainedModel, within: frozenset[str] = frozenset()) -> Widths:
    """The differences of `model` from `stock`. Raises `SensiError` if they are more than shapes and numbers.

    Numbers are compared only for modules that are in `within` or contain a parameter of another shape.
    """
    own, theirs = (
        dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers(remove_duplicate=False))
        for m in (model, stock)
    )
    if different := sorted(set(own) ^ set(theirs)):
        raise SensiError(
            f"This {type(model).__name__} and a fresh one do not have the same tensors: {different[0]!r} is only in "
            f"{'the fresh one' if different[0] in theirs else 'this one'} ({len(different)} such tensors). Call "
            f"`merge_and_unload()` first. A model with quantized or otherwise replaced layers cannot be saved."
        )
    shapes = {n: tuple(own[n].shape) for n in theirs if own[n].shape != theirs[n].shape}
    if moved := [n for n in shapes if n not in dict(model.named_parameters(remove_duplicate=False))]:
        raise SensiError(
            f"The buffer {moved[0]!r} has another shape than in a fresh {type(model).__name__}, and only "
            f"parameters may differ. Save the adapter and merge after loading, or save the `state_dict()` yourself."
        )
    modules, within = dict(model.named_modules()), within | changed_modules(shapes)
    numbers: dict[str, Any] = {}
    for path, module in stock.named_modules():
        if path in within and not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                number = vars(modules[path]).get(name)
                if not name.startswith("_") and {type(value), type(number)} <= {int, float} and number != value:
                    numbers[f"{path}.{name}" if path else name] = number
    return Widths(shapes, numbers)


def changed_modules(shapes: Mapping[str, Any]) -> frozenset[str]:
    """The names of all modules that contain one of these parameters."""
    parts = [name.split(".") for name in shapes]
    return frozenset(".".join(path[:depth]) for path in parts for depth in range(len(path)))


def apply_widths(model: nn.Module, widths: Widths) -> None:
    """Gives a fresh model these widths. The changed parameters are not initialized."""
    for name, shape in widths.shapes.items():
        path, _, leaf = name.rpartition(".")
        module, old = model.get_submodule(path), model.get_parameter(name)
        module._parameters[leaf] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        if isinstance(module, LINEARS):
            update_features(module)
    for name, value in widths.attributes.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)


def config_fields(model: PreTrainedModel, widths: Widths) -> dict[str, Any] | None:
    """Fields of the config with which the stock class builds exactly this model, or `None` if there are none.

    Candidates are tried out, so no table of families is needed, and a field is not used if it changes anything
    else (BERT's head count also changes the head size).
    """
    if not widths:
        return {}
    seen: dict[str, tuple[int, ...]] = {}
    if any(seen.setdefault(re.sub(r"\.\d+\.", ".*.", name), shape) != shape for name, shape in widths.shapes.items()):
        return None  # the same parameter has other shapes in other layers
    cls, within, config = type(model), changed_modules(widths.shapes), copy.deepcopy(model.config)
    before = dict(on_meta(cls, config).named_parameters(remove_duplicate=False))
    shapes = [(before[name].shape, shape) for name, shape in widths.shapes.items() if before[name].dim() == len(shape)]
    pairs = dict.fromkeys(pair for old, new in shapes for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    left, edits = widths, dict[str, Any]()
    for edit in _edits(config, list(pairs)):
        trial = copy.deepcopy(config)
        try:
            for key, value in edit.items():
                setattr(trial, key, value)
            if hasattr(trial, "validate"):
                trial.validate()
            stock = on_meta(cls, trial)
            if 0 in edit.values():  # T5 divides by a width when it initializes weights, also before it loads them
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch's, about tensors without elements
                    stock.apply(stock._init_weights)
            after = find_widths(model, stock, within)
        except Exception:  # a class may refuse a combination of numbers with any error
            continue
        if len(after.shapes) < len(left.shapes):
            config, edits = trial, edits | edit
            # A module may keep a copy of the config's `intermediate_size`, which did not follow the trim.
            numbers = {n: v for n, v in after.attributes.items() if n.rpartition(".")[2] not in edits}
            left = Widths(after.shapes, numbers)
    return None if left else edits


def classes_for(auto_class: Any, config_class: Any) -> tuple[Any, ...]:
    """The model classes that an auto class has for a config class."""
    mapping = getattr(auto_class, "_model_mapping", None)
    found = mapping.get(config_class, ()) if mapping is not None else ()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def is_merged(config: Mapping[str, Any]) -> bool:
    """Whether the values of a config.json are those of a model that `save_merged` wrote."""
    return RECORD_KEY in config or SAVED_BY.items() <= config.items()


def note_widths(model: nn.Module) -> None:
    """Writes the widths of a merged model into its config, so that `save_pretrained` saves a complete description.

    What the config's own fields cannot express is written under `RECORD_KEY`, which `load_merged` reads. The model
    gets a config of its own, because others may have been made from the same one. Models that are not Transformers'
    own are left unchanged.
    """
    try:
        cls = stock_class(model)
        assert isinstance(model, PreTrainedModel)
        _give_own_config(model)
        if hasattr(model.config, RECORD_KEY):
            delattr(model.config, RECORD_KEY)
        widths = find_widths(model, on_meta(cls, model.config))
        edits = config_fields(model, widths)
    except Exception as error:
        logger.info("The widths of %s cannot be described in its config: %s", type(model).__name__, error)
        return
    if edits is None:
        setattr(model.config, RECORD_KEY, widths.to_record(cls.__name__))
    else:
        for key, value in edits.items():
            setattr(model.config, key, value)


def _give_own_config(model: PreTrainedModel) -> None:
    """Replaces the config by a copy, in all modules that hold it or a part of it."""
    copies: dict[int, Any] = {}  # of the config and all its parts, by the identity of the original
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(held := module.__dict__.get("config")) in copies:
            module.config = copies[id(held)]


def _edits(config: Any, pairs: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Changes of config fields that could explain these pairs of lengths: in the stock model, and in this one."""
    counts: dict[str, Any] = {key: getattr(config, key, None) for key in (*_HEAD_KEYS, "num_key_value_heads")}
    # Many classes read a `head_dim` that their config does not declare.
    size_key = next((key for key in _HEAD_SIZE_KEYS if isinstance(getattr(config, key, None), int)), "head_dim")
    for key in _HEAD_KEYS:
        if not isinstance(counts[key], int):
            continue
        for old, new in pairs:
            size = getattr(config, size_key, None) or old // counts[key]
            if not size or old != size * counts[key] or new % size:
                continue
            edit = {key: new // size, size_key: size}
            grouped = counts["num_key_value_heads"]
            if isinstance(grouped, int) and grouped:
                kept = dict(pairs).get(grouped * size, 0)
                edit["num_key_value_heads"] = kept // size
            yield edit
    for old, new in pairs:
        for key, value in config.to_dict().items():
            if type(value) is int and value == old:
                yield {key: new}
        if getattr(config, "n_inner", 0) is None:  # in GPT-2's config, `None` means four times the hidden size
            yield {"n_inner": new}
