"""Checks that a weights file fits the model that it is loaded into.

There are three checks, because loaders differ:

- `PeftModel.from_pretrained` reads the config first. So the file is checked before a layer is built, and nothing is
  allocated for a file that does not fit (`check_slices`).
- Every PEFT loader calls a hook of `SensiModel` with the tensors (`check_state`).
- Transformers' `load_adapter` does neither. For a local folder, `peft_calls` gives it the config, so that the file is
  checked like that of `PeftModel.from_pretrained`. Otherwise a layer checks its tensors when it is first used
  (`SensiLayer.check_loaded`).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..anatomy.modules import linear_of
from ..layers.layer import SensiLayer, layers_of
from ..layers.slices import master_dtype, tensor_specs
from ..layers.values import WEIGHTS, check_content, check_specs
from ..layers.whole_modules import saved_modules
from ..utils.errors import OtherBaseError, SensiError, SensiLoadError
from ..utils.files import Spec, open_safetensors, read_specs
from ..utils.replicas import check_not_partitioned
from .checkpoint import PEFT_PREFIX, PLAN_KEY, check_strays, embedding_specs, meaning
from .config import SensiConfig
from .scheduled import unfreeze_dense
from .slicing import Slices


def file_to_check(config: SensiConfig) -> str | None:
    """Path of the weights file beside the config; `None` if the user has changed what its values mean."""
    path, original = config.weights_file, config.file_meaning
    if path is None or original is None or not os.path.exists(path):
        return None
    # The fingerprint may differ: users switch its check off.
    now = {**meaning(config), "fingerprint": original.get("fingerprint")}
    return path if now == {"fingerprint": None, **original} else None


def prefix_of(config: SensiConfig, model: nn.Module) -> str:
    """The prefix of the module names in the file's plan, if `model` is only the base of the one it was made for.

    Otherwise an empty string.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    groups = (config.plan or {}).get("groups", {})
    is_inside = bool(groups) and not hasattr(model, prefix[:-1]) and all(name.startswith(prefix) for name in groups)
    return prefix if is_inside and prefix != "." and config.blocks is None else ""


def named_as_in(model: nn.Module, config: SensiConfig) -> SensiConfig:
    """The config of a file for the base model inside of the one that the adapter was made for, without the head.

    Other configs are returned as they are. Transformers' loader itself finds the tensors, as in whole checkpoints.
    """
    if not (prefix := prefix_of(config, model)):
        return config
    config = copy.deepcopy(config)
    config.task_type = "FEATURE_EXTRACTION"

    def inside(names: Any) -> Any:
        """The names of modules inside of the base model."""
        return None if names is None else {n.removeprefix(prefix) for n in names if n.startswith(prefix)}

    config.plan = {**config.plan, "groups": {n.removeprefix(prefix): g for n, g in config.plan["groups"].items()}}
    config.target_modules, config.exclude_modules = inside(config.target_modules), inside(config.exclude_modules)
    config.modules_to_save = sorted(inside(config.modules_to_save) or ()) or None
    if config.fingerprint is not None:
        named = {key: value for key, value in config.fingerprint.items() if key in ("shapes", "vectors")}
        named = {key: {n.removeprefix(prefix): v for n, v in value.items()} for key, value in named.items()}
        config.fingerprint = {**config.fingerprint, **named}
    return config


@contextmanager
def errors_of_file(config: SensiConfig) -> Iterator[None]:
    """Errors inside become a `SensiLoadError` that names the config's file, if the config comes from one."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        if not config.from_file:
            raise
        if isinstance(error, OtherBaseError):
            raise OtherBaseError(f"{config.file_name}: {error.problem}", error.advice) from error
        raise SensiLoadError(f"{config.file_name}: {error}") from error


def check_task(model: nn.Module, config: SensiConfig) -> None:
    """Checks that the model can do the task: PEFT finds this out after the layers have been replaced."""
    task = str(config.task_type).rpartition(".")[2]
    generates = hasattr(model, "prepare_inputs_for_generation")  # PEFT calls this method
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not generates:
        raise SensiError(
            f"`task_type` is {task!r}, but {type(model).__name__} generates no text: give a model that does, or "
            f"the task type of this model (or None)."
        )


def warn_of_pending_cut(config: SensiConfig) -> None:
    """Warns of an adapter that is loaded for use only, if the cut of its schedule has not come yet."""
    if config.inference_mode and config.phase == "cut":
        warnings.warn(
            f"{config.file_name} was saved before its schedule had removed any unit, so the model is as large as its "
            f"base. To make it smaller, load the adapter with `is_trainable=True` and train on, or merge it: "
            f"`merge_and_unload` makes the cut.",
            stacklevel=2,
        )


def check_slices(path: str, model: nn.Module, slices: Slices) -> None:
    """Checks the file's tensors that start with `sensi_`, before a Linear is replaced."""
    expected: dict[str, Spec] = {}
    numels: dict[str, int] = {}
    for name, (slice_, _) in slices.items():
        for part, spec in tensor_specs(slice_, master_dtype(linear_of(model, name))).items():
            expected[f"{name}.sensi_{part}"] = (spec.shape, spec.dtype)
            numels[f"{name}.sensi_{part}"] = slice_.kept_shape.numel()
    with open_safetensors(path) as file:
        specs = _own_names(read_specs(path, file), path)
        ours = {name: spec for name, (_, spec) in specs.items() if name in expected or _is_part(name)}
        check_specs(ours, expected, path)
        for name in ours:
            check_content(name, file.get_tensor(specs[name][0]), numels[name], path)


def check_saved_modules(path: str, model: nn.Module, adapter_name: str) -> None:
    """Checks the file's tensors of modules that are saved whole, after these modules have been wrapped."""
    expected: dict[str, Spec] = {
        f"{name}.{key}": (tuple(tensor.shape), tensor.dtype)
        for name, wrapper in saved_modules(model, adapter_name).items()
        for key, tensor in wrapper.modules_to_save[adapter_name].state_dict().items()
    }
    with open_safetensors(path) as file:
        specs = _own_names(read_specs(path, file), path)
    found = {name: spec for name, (_, spec) in specs.items() if not _is_part(name)}
    resized = {name: spec for name, spec in embedding_specs(model).items() if name in found and name not in expected}
    check_specs(found, {**expected, **resized}, path)


# PyTorch writes all tensors that fit, and raises its error about the others afterwards.
_sizes_must_fit = ContextVar("sizes_must_fit", default=False)


@contextmanager
def sizes_must_fit(wanted: bool) -> Iterator[None]:
    """Inside the block, `check_state` also checks the shapes of modules that are saved whole, if this is wanted.

    Otherwise PEFT may leave out those that differ (`ignore_mismatched_sizes`).
    """
    token = _sizes_must_fit.set(wanted)
    try:
        yield
    finally:
        _sizes_must_fit.reset(token)


def check_state(tensors: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Checks tensors with the model's own names just before they are loaded. Returns them under all these names.

    A model may hold one module under several names, such as an encoder for questions and for answers. PEFT saves its
    tensors under the first, and PyTorch expects them under all.

    Outside of `sizes_must_fit`, PyTorch checks the shapes of modules that are saved whole.
    """
    check_not_partitioned(model)
    layers = layers_of(model)
    saved = f".modules_to_save.{adapter_name}."
    expected: dict[str, Spec] = {}
    first: dict[int, str] = {}
    names = {key: first.setdefault(id(tensor), key) for key, tensor in model.state_dict(keep_vars=True).items()}
    for key, value in model.state_dict().items():
        if names[key] != key:
            continue
        if key.endswith(f".{adapter_name}") and key.split(".")[-2] in SensiLayer.tensor_names:
            expected[key] = (tuple(value.shape), value.dtype)
        elif saved in f".{key}" and key in tensors:
            expected[key] = (tuple((value if _sizes_must_fit.get() else tensors[key]).shape), value.dtype)
    in_file, in_model = (any("sensi_codes" in key.split(".")[-2:] for key in keys) for keys in (tensors, expected))
    if in_file != in_model:
        raise SensiLoadError(
            f"{WEIGHTS} holds {'compressed' if in_file else 'uncompressed'} values, but this model's adapter is "
            f"{'compressed' if in_model else 'uncompressed'}. Load the folder with `PeftModel.from_pretrained`. To "
            f"continue training, use an uncompressed checkpoint."
        )
    check_strays(tensors, model)
    embeddings = {name.removeprefix(PEFT_PREFIX) for name in embedding_specs(model)}
    found = {k: t for k, t in tensors.items() if k in expected or k.removeprefix(PEFT_PREFIX) not in embeddings}
    check_specs({key: (tuple(t.shape), t.dtype) for key, t in found.items()}, expected)
    for key, tensor in tensors.items():
        layer = layers.get(".".join(key.split(".")[:-2]))
        check_content(key, tensor, None if layer is None else layer.sensi_slices[adapter_name].kept_shape.numel())
    unfreeze_dense(model, adapter_name)  # an optimizer may be made before the first step freezes the part again
    for layer in layers.values():
        layer.sensi_unchecked.discard(adapter_name)
        layer.sensi_peers = {}
    return {key: tensors[name] for key, name in names.items() if name in tensors} | {**tensors}


def _is_part(name: str) -> bool:
    """Whether a name in a file is that of a tensor of `SensiLayer`."""
    return name.rpartition(".")[2] in SensiLayer.tensor_names


def _own_names(specs: dict[str, Spec], path: str) -> dict[str, tuple[str, Spec]]:
    """The file's names and specs by the names in the user's own model. PEFT's prefix is optional in a file."""
    names = {key.removeprefix(PEFT_PREFIX): (key, spec) for key, spec in specs.items()}
    if len(names) != len(specs):
        raise SensiLoadError(f"{path}: expected every tensor once, found some with and without {PEFT_PREFIX!r}.")
    return {name: value for name, value in names.items() if name != PLAN_KEY}
