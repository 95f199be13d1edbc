"""A model class goes in; a modeling file for `trust_remote_code=True` comes out. With it in the folder, Transformers
loads a merged model without this package."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ..anatomy.widths import classes_for, on_meta
from .hashes import check_hashes, hashes_of, read_header


_TEXT = '''"""A {architecture} without some of its attention heads and FFN neurons; written by peft_sensi.

Load it with `AutoModel...from_pretrained(folder, trust_remote_code=True)`. If peft_sensi is installed,
`peft_sensi.load_merged(folder)` returns a plain {architecture} and checks everything that it reads.
"""

import hashlib
import json
import os
import re
from typing import Any

import torch
from torch import nn
from transformers import {imports}
from transformers.utils import cached_file

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


{functions}


def _find(folder, file, options):
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return cached_file(folder, file, **{{name: options[name] for name in names if options.get(name) is not None}})


def _read_config(folder, options):
    with open(_find(folder, "config.json", options), encoding="utf-8") as file:
        return json.load(file)


def _weights(values):
    return (values.get("peft_sensi") or {{}}).get("weights", "model.safetensors")


def _record(config, architecture):
    record = getattr(config, "peft_sensi", None) or {{"shapes": {{}}, "attributes": {{}}}}
    saved = record.get("architecture", architecture)
    if saved == architecture:
        return record
    # The other one of the two classes below was saved: the names differ by the place of the base model in the other.
    prefix, own = "{prefix}", dict(record, architecture=architecture)
    for key in ("shapes", "attributes"):
        if architecture == "{base}":
            inside = {{name: value for name, value in record[key].items() if name.startswith(prefix)}}
            own[key] = {{name.removeprefix(prefix): value for name, value in inside.items()}}
        else:
            own[key] = {{prefix + name: value for name, value in record[key].items()}}
    return own


class Sensi{config}({config}):
    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        values = _read_config(folder, kwargs)
        check_hashes(folder, values, None)
        found = super().from_pretrained(folder, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        vars(config).pop("peft_sensi_hash", None)  # the next save may be of another config
        # The weights file has a name of its own. Loaders that ignore this class do not find it and raise, instead of
        # filling in random weights where widths differ.
        config.transformers_weights = _weights(values)
        return found


class _Widths:
    fresh = ()  # tensors that a saved model need not have
    inside = None  # the name under which the saved model holds this one, where Transformers does not know it

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        if folder is not None:
            values = _read_config(folder, kwargs)
            check_hashes(folder, values, _find(folder, _weights(values), kwargs))
            if hasattr(config, "peft_sensi"):
                config.transformers_weights = _weights(values)  # a save has removed it
        options = {{**kwargs, "output_loading_info": True}}
        if cls.inside is not None:
            options.setdefault("key_mapping", {{"^" + re.escape(cls.inside + "."): ""}})
        model, info = super().from_pretrained(folder, *args, config=config, **options)
        if missing := sorted(set(info["missing_keys"]).difference(cls.fresh)):
            raise OSError(f"{{folder}} lacks the tensor {{missing[0]!r}} ({{len(missing)}} missing).")
        for name, tensor in model.named_parameters():
            if tensor.dtype in _FLOATS and not tensor.is_meta and not tensor.isfinite().all():
                raise OSError(f"{{folder}}: the tensor {{name!r}} contains NaN or infinity.")
        return (model, info) if kwargs.get("output_loading_info") else model

    def __init__(self, config, *args, **kwargs):
        # Some classes build the base model in them by the class of the config. Transformers does not know ours, and
        # would ask the user again whether to run this file. Others check that the class is that of their config.
        own = type(config)
        config.__class__ = vars(self)["config_class"] = {config}
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = own
            del vars(self)["config_class"]
        record = _record(config, type(self).__name__.removeprefix("Sensi"))
        if hasattr(config, "peft_sensi"):
            self.config.peft_sensi = record
        for name, shape in record["shapes"].items():
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            module._parameters[leaf] = nn.Parameter(module._parameters[leaf].new_empty(shape))
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        for name, value in record["attributes"].items():
            path, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(path), attribute, value)

    def save_pretrained(self, folder, *args, **kwargs):
        record = _record(self.config, type(self).__name__.removeprefix("Sensi"))
        if kwargs.get("push_to_hub") or kwargs.get("variant"):
            raise ValueError("`push_to_hub` and `variant` are not supported here: call `model.push_to_hub(name)`.")
        # The weights stay in one file, whose name the config has.
        super().save_pretrained(folder, *args, **{{**kwargs, "max_shard_size": 2**62}})
        weights = os.path.join(folder, "model.safetensors")
        if not record["shapes"] and not record["attributes"] or not os.path.exists(weights):
            return  # a plain checkpoint, or not the process that writes
        name = record.setdefault("weights", "sensi_model-0000000000000000.safetensors")
        os.replace(weights, os.path.join(folder, name))
        path = os.path.join(folder, "config.json")
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        values["peft_sensi"]["weights"] = name
        values["peft_sensi_hash"] = hashes_of(values, os.path.join(folder, name))
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
        os.replace(path + ".tmp", path)


class Sensi{architecture}(_Widths, {architecture}):
    config_class = Sensi{config}
'''

# For `AutoModel`, as stock checkpoints of a model with a head have it.
_BASE = """

class Sensi{base}(_Widths, {base}):
    config_class = Sensi{config}
    fresh = {fresh}
    inside = {inside}
"""


def write_modeling_file(empty: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Writes the file for the class of a model, and for that of the base model in it, if `AutoModel` builds this one.

    `empty` is a fresh model of the class, on `meta`. The file contains no widths: the config does.

    Returns the config's `auto_map`: for each of Transformers' auto classes that knows a class, the one in the file.
    """
    cls = type(empty)
    assert cls.config_class is not None  # Transformers' abstract classes have none
    module, config = f"modeling_sensi_{cls.__name__.lower()}", cls.config_class.__name__
    known = {
        name: classes_for(getattr(transformers, name), cls.config_class)
        for name in transformers.__all__  # type: ignore[attr-defined]  # `dir` takes a third of a second
        if name.startswith("AutoModel")
    }
    base, prefix = _base_model(empty, known["AutoModel"])
    functions = "\n\n".join(inspect.getsource(function) for function in (read_header, hashes_of, check_hashes))
    names = {"architecture": cls.__name__, "config": config, "base": base.__name__, "prefix": prefix}
    imports = ", ".join(dict.fromkeys([cls.__name__, base.__name__, config]))
    text = _TEXT.format(**names, imports=imports, functions=functions.rstrip())
    if base is not cls:
        saved = {name.removeprefix(prefix) for name in empty.state_dict() if name.startswith(prefix)}
        fresh = set(on_meta(base, empty.config).state_dict()) - saved
        inside = None if base.base_model_prefix == cls.base_model_prefix else cls.base_model_prefix  # as in CLIP
        text += _BASE.format(**names, fresh=tuple(sorted(fresh)), inside=repr(inside))
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    entries = {"AutoConfig": f"{module}.Sensi{config}"}
    for name, classes in known.items():
        if found := next((c for c in (cls, base) if c in classes), None):
            entries[name] = f"{module}.Sensi{found.__name__}"
    return entries


def _base_model(empty: PreTrainedModel, classes: Sequence[type[PreTrainedModel]]) -> tuple[type[PreTrainedModel], str]:
    """The one of `AutoModel`'s classes that is in a model, and the prefix of its tensors there.

    It is a submodule in most models. T5 with a head has its parts without one. The model's own class if there is none.
    """
    inner = getattr(empty, empty.base_model_prefix, None)
    if isinstance(inner, PreTrainedModel) and type(inner) in classes:
        return type(inner), f"{empty.base_model_prefix}."
    if inner is None:
        names = set(empty.state_dict())
        found = (c for c in classes if names.issuperset(on_meta(c, empty.config).state_dict()))
        return next(found, type(empty)), ""
    return type(empty), ""
