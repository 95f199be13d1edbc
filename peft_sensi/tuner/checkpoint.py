"""Data that is saved beside the trained values (plan and mark), and checks of it when an adapter is loaded.

An adapter has PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`; `FORMAT.md` describes both. The
config holds the plan, so that every loader can build the right shapes before it reads a weight. The weights file holds
the plan too, as the tensor `sensi_plan`, with a hash (the *mark*) of the config's fields that give values a meaning:

- `Trainer` resumes by loading weights into a wrapped model, whose plan may differ, and never reads the checkpoint's
  config.
- PEFT writes the weights before the config. An interrupted save is detected because the marks of the two files differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from torch import nn

from ..anatomy.modules import embedding_of, is_base_parameter
from ..layers.values import FLOATS, WEIGHTS, check_finite
from ..planning.packing import check_plan_dict
from ..utils.checks import is_number, shown
from ..utils.errors import SensiLoadError
from ..utils.files import Spec, open_safetensors, read_json_object, read_specs


FORMAT_VERSION = 1
PLAN_KEY = "sensi_plan"
PEFT_PREFIX = "base_model.model."  # of the names in a file that PEFT's model has saved

# The fields that say what the values mean. `None` is left out of the mark, so that a new field with this default does
# not change the marks of older files.
_MEANING = (
    "also_train",
    "blocks",
    "compressed",
    "exclude_modules",
    "fingerprint",
    "format_version",
    "granularity",
    "modules_to_save",
    "plan",
    "rank",
    "scale",
    "schedule",
    "sparse",
    "sparsity",
    "target_modules",
    "update",
)
# The settings that change what values mean, although neither names nor shapes of tensors show it.
_HIDDEN = ("scale", "sparsity")
_LARGEST_PLAN = 2**26  # bytes; a model of 70 billion parameters needs one megabyte


def meaning(config: Any) -> dict[str, Any]:
    """The config's fields that say what the values mean, as they are after a round trip through JSON."""
    fields = ((name, getattr(config, name)) for name in _MEANING)
    return {name: sorted(v) if isinstance(v, (set, frozenset)) else v for name, v in fields if v is not None}


def config_mark(config: Any) -> str:
    """SHA-256 of `meaning`, in hexadecimal. The order of names in a list has no influence."""
    values = meaning(config)
    for name in ("also_train", "exclude_modules", "modules_to_save", "target_modules"):
        if name in values and not isinstance(values[name], str):
            values[name] = sorted(values[name])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class StoredPlan(NamedTuple):
    """What `sensi_plan` holds: the plan (see `Plan.to_dict`), the config's mark, and the settings in `_HIDDEN`.

    The mark is `None` in files of the first versions. Settings that the adapter does not have are left out.
    """

    plan: dict[str, Any]
    mark: str | None
    hidden: dict[str, float]


def plan_to_tensor(plan: Mapping[str, Any], config: Any = None) -> torch.Tensor:
    """The content of a `StoredPlan` as JSON in a uint8 vector. Without the config, it is the plan alone."""
    values = {**plan}
    if config is not None:
        values["config"] = config_mark(config)
        values |= {name: value for name in _HIDDEN if (value := getattr(config, name)) is not None}
    return torch.frombuffer(bytearray(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8)


def plan_from_tensor(tensor: torch.Tensor, where: str = WEIGHTS) -> StoredPlan:
    """The content of a tensor of `plan_to_tensor`. Raises `SensiLoadError`."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > _LARGEST_PLAN:
        raise SensiLoadError(
            f"{where}: {PLAN_KEY!r} must be a vector of bytes, got {tensor.dtype} {tuple(tensor.shape)}."
        )
    try:
        values = json.loads(tensor.cpu().numpy().tobytes())
        extra = {key: values.pop(key) for key in ("config", *_HIDDEN) if isinstance(values, dict) and key in values}
        mark = extra.pop("config", None)
        if not isinstance(mark, str | None):
            raise ValueError("its `config` is not a hash")
        if wrong := [name for name, value in extra.items() if not is_number(value)]:
            raise ValueError(f"its `{wrong[0]}` is not a number")
        check_plan_dict(values)
    except (ValueError, RecursionError) as error:
        raise SensiLoadError(f"{where}: {PLAN_KEY!r} does not hold a plan: {error}") from None
    return StoredPlan(values, mark, extra)


def check_pair(stored: torch.Tensor, config: Any, where: str = WEIGHTS) -> None:
    """Checks that a config and a weights file were saved together: the plan and the mark in both must be the same."""
    plan, mark, _ = plan_from_tensor(stored, where)
    if plan != config.plan or (mark is not None and mark != config.file_mark):
        what = "hold different plans" if plan != config.plan else "were saved with different settings"
        raise SensiLoadError(
            f"{where}: adapter_config.json and adapter_model.safetensors {what}: they do not belong together. A save "
            f"may have been interrupted between them; load an older checkpoint."
        )


def check_hidden(stored: Mapping[str, float], config: Any) -> None:
    """Checks the settings in `_HIDDEN` of a file against those of a wrapped model."""
    for name, absent in (("scale", 1.0), ("sparsity", config.sparsity)):  # earlier versions wrote no sparsity
        own = getattr(config, name)
        found, expected = stored.get(name, absent), absent if own is None else own
        if found != expected:
            raise SensiLoadError(
                f"{WEIGHTS}: its values were trained with `{name}` = {found}, but the model has {expected}. Wrap the "
                f"model with `{name}={found}`."
            )


def check_config_file(path: str | os.PathLike, forbidden: Iterable[str] = ()) -> None:
    """Raises `SensiLoadError` if a file is no config of PEFT, for which PEFT itself would raise the errors of `json`.

    The message begins with the name of the file, without its folder.
    """
    try:
        values = read_json_object(path)
    except SensiLoadError as error:
        raise SensiLoadError(str(error).replace(os.fspath(path), CONFIG_NAME)) from error
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise SensiLoadError(f"{CONFIG_NAME} has the peft_type {shown(kind)}, expected 'SENSI'.")
    for name in values.keys() & set(forbidden):
        raise SensiLoadError(f"{CONFIG_NAME}: `{name}` exists at run time only and cannot come from a file.")


def check_values(path: str, config: Any) -> None:
    """Checks a weights file as far as possible without a model: its header, its plan, and that floats are finite."""
    with open_safetensors(path) as file:
        specs = read_specs(path, file)
        check_pair(file.get_tensor(plan_key(specs, path)), config, path)
        for key, (_, dtype) in specs.items():
            if dtype in FLOATS:
                check_finite(key, file.get_tensor(key), path)


def plan_key(names: Iterable[str], where: str = WEIGHTS) -> str:
    """The name of the tensor `sensi_plan` in a file. Raises `SensiLoadError` if there is not exactly one."""
    keys = [name for name in names if name.rpartition(".")[2] == PLAN_KEY]
    if len(keys) != 1:
        raise SensiLoadError(
            f"{where}: expected one tensor {PLAN_KEY!r}, found {len(keys)}. This is no adapter of peft_sensi."
        )
    return keys[0]


def embedding_specs(model: nn.Module) -> dict[str, Spec]:
    """The parameters of the base that a file may hold: PEFT saves embeddings that were resized."""
    tables = [embedding_of(model, "input"), embedding_of(model, "output")]
    embeddings = {id(p) for table in tables if table is not None for p in table.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: (tuple(p.shape), p.dtype) for name, p in named if id(p) in embeddings}


def check_strays(found: Iterable[str], model: nn.Module) -> None:
    """Checks that a file holds no tensors of the base itself, which loading would overwrite.

    This happens if the file's adapter saves a module whole and the model's adapter does not.
    """
    allowed = set(embedding_specs(model))
    for name in found:
        if is_base_parameter(name) and not {name, name.removeprefix(PEFT_PREFIX)} & allowed:
            raise SensiLoadError(
                f"{WEIGHTS} holds {name!r}, which this model does not save. The file was made with another "
                f"`also_train` or `modules_to_save`: wrap the model with the same."
            )


def described_by(configs: Mapping[str, Any], config: Any, adapter_name: str) -> str | None:
    """The other adapter of a model that `config` describes, if it is that adapter's own config or a copy of it.

    A new adapter then starts from its values. TRL makes its reference adapter in this way, and then copies the
    parameters with `.default.` in their names, which ours do not have.
    """
    for name, other in configs.items():
        same = config.adapter_id is not None and getattr(other, "adapter_id", None) == config.adapter_id
        # PEFT has added names of heads to `modules_to_save`.
        fields = [{**meaning(c), "modules_to_save": None} for c in (other, config)] if same else []
        if name != adapter_name and same and fields[0] == fields[1]:
            return name
    return None
