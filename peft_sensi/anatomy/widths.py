"""How a trimmed Transformers model differs from what its class builds, and whether its config can say so.

A merged model is an ordinary model of its family whose parameters have other shapes. What is needed to rebuild it is
found by comparison with a fresh model of the same class on `meta`, and not from a plan, so it also holds for models
that were trimmed twice or loaded from a merged folder.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..utils.errors import SensiError


logger = logging.getLogger(__name__)

# Under this key a config holds what its own fields cannot express.
RECORD_KEY = "peft_sensi"
RECORD_VERSION = 1

_HEAD_KEYS = ("num_attention_heads", "num_heads", "n_head")
_HEAD_SIZE_KEYS = ("head_dim", "d_kv")


@dataclass(frozen=True)
class Widths:
    """Shapes of parameters, and numbers that parent modules hold, where they are not those of the stock class."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, int | float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes)

    def to_record(self, architecture: str) -> dict[str, Any]:
        """A JSON value for the config."""
        return {
            "format_version": RECORD_VERSION,
            "load_with": "peft_sensi.load_merged",
            "architecture": architecture,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": dict(self.attributes),
        }


def stock_class(model: nn.Module) -> type[PreTrainedModel]:
    """The model's class, if it is one of Transformers' own. Raises `SensiError`."""
    cls = type(model)
    if not isinstance(model, PreTrainedModel) or getattr(transformers, cls.__name__, None) is not cls:
        raise SensiError(
            f"{cls.__module__}.{cls.__qualname__} is not a model class of Transformers, so no other process could "
            f"rebuild it. Save the adapter and merge after loading, or save the `state_dict()` yourself."
        )
    return cls


def on_meta(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of this class without memory for its weights."""
    with torch.device("meta"):
        return cls(copy.deepcopy(config))


def compare(model: PreTrainedModel, stock: PreTrainedModel, within: frozenset[str] = frozenset()) -> Widths:
    """What `model` has that `stock` has otherwise. Raises `SensiError` when shapes alone do not explain it.

    Numbers of modules count where some parameter below the module differs, or where the module is in `within`.
    """
    own, theirs = _tensors(model), _tensors(stock)
    if different := sorted(set(own) ^ set(theirs)):
        raise SensiError(
            f"{different[0]!r} is {'not ' if different[0] in theirs else ''}in this {type(model).__name__}, unlike in "
            f"a fresh one ({len(different)} such tensors): only a merged model whose layers are all its class's own "
            f"can be saved. Call `merge_and_unload()` first; quantized and otherwise replaced layers cannot be kept."
        )
    shapes = {n: tuple(own[n].shape) for n in theirs if own[n].shape != theirs[n].shape}
    if moved := [n for n in shapes if n not in dict(model.named_parameters(remove_duplicate=False))]:
        raise SensiError(f"The buffer {moved[0]!r} has another shape than in a fresh {type(model).__name__}.")
    return Widths(shapes, dict(_numbers(model, stock, within | changed_modules(shapes))))


def changed_modules(shapes: Mapping[str, Any]) -> frozenset[str]:
    """All modules that have one of these parameters below them."""
    parts = [name.split(".") for name in shapes]
    return frozenset(".".join(path[:depth]) for path in parts for depth in range(len(path)))


def apply(model: nn.Module, widths: Widths) -> None:
    """Gives a fresh model these widths; the values of the parameters concerned are undefined afterwards."""
    for name, shape in widths.shapes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for name, value in widths.attributes.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)


def expressed(model: PreTrainedModel, widths: Widths) -> dict[str, Any] | None:
    """Fields of the config under which the stock class builds exactly this model; `None` if there are none.

    Fields are tried, and what the class builds from them is compared: no table of families is needed, and a field that
    also changes something else (BERT's head count changes the head size) is never taken.
    """
    if not widths:
        return {}
    if not _uniform(widths.shapes):
        return None
    cls, within = type(model), changed_modules(widths.shapes)
    config, stock, edits = copy.deepcopy(model.config), on_meta(type(model), model.config), dict[str, Any]()
    left = widths
    pairs = _changes(model, stock, widths)

    def without_namesakes(found: Widths, fields: Mapping[str, Any]) -> Widths:
        # A module's own `intermediate_size` merely repeats the config's, and nothing made it follow the cut.
        numbers = {n: v for n, v in found.attributes.items() if n.rpartition(".")[2] not in fields}
        return Widths(found.shapes, numbers)

    for edit in _edits(config, pairs):
        trial = copy.deepcopy(config)
        try:
            for key, value in edit.items():
                setattr(trial, key, value)
            if hasattr(trial, "validate"):
                trial.validate()
            after = without_namesakes(compare(model, on_meta(cls, trial), within), edits | edit)
        except Exception:  # any class may refuse any combination of numbers, each with an error of its own
            continue
        if len(after.shapes) < len(left.shapes):
            config, left = trial, after
            edits |= edit
    return None if left else edits


def note_widths(model: nn.Module) -> None:
    """Writes into a merged model's config what its widths are, so that `save_pretrained` saves a whole description.

    In the config's own fields where they can express it; otherwise under a key that `load_merged` reads. Does nothing
    for models that are not Transformers' own.
    """
    try:
        cls = stock_class(model)
        assert isinstance(model, PreTrainedModel)
        if hasattr(model.config, RECORD_KEY):
            delattr(model.config, RECORD_KEY)
        widths = compare(model, on_meta(cls, model.config))
        edits = expressed(model, widths)
    except Exception as error:
        logger.info("The widths of %s cannot be described in its config: %s", type(model).__name__, error)
        return
    if edits is None:
        setattr(model.config, RECORD_KEY, widths.to_record(cls.__name__))
    else:
        for key, value in edits.items():
            setattr(model.config, key, value)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def _numbers(model: nn.Module, stock: nn.Module, within: frozenset[str]) -> Iterator[tuple[str, int | float]]:
    modules = dict(model.named_modules())
    for path, module in stock.named_modules():
        if path not in within or type(module).__module__.startswith("torch."):
            continue
        for name, value in vars(module).items():
            own = vars(modules[path]).get(name)
            if name.startswith("_") or type(value) not in (int, float) or own == value:
                continue
            if type(own) is int or type(own) is float:
                yield f"{path}.{name}" if path else name, own


def _uniform(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether parameters with the same name in different layers have the same shape."""
    seen: dict[str, tuple[int, ...]] = {}
    return all(seen.setdefault(re.sub(r"\.\d+\.", ".*.", name), shape) == shape for name, shape in shapes.items())


def _changes(model: nn.Module, stock: nn.Module, widths: Widths) -> list[tuple[int, int]]:
    """Pairs of a length in the stock model and the length that it has here."""
    before = dict(stock.named_parameters(remove_duplicate=False))
    pairs = (
        pair
        for name, shape in widths.shapes.items()
        if before[name].dim() == len(shape)
        for pair in zip(before[name].shape, shape, strict=True)
    )
    return list(dict.fromkeys((old, new) for old, new in pairs if old != new))


def _edits(config: Any, pairs: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Changes of the config that could explain such changes of lengths."""
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
        if getattr(config, "n_inner", 0) is None:  # GPT-2's way to say four times the hidden size
            yield {"n_inner": new}
