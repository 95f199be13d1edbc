"""A file of values against the model that it is to be loaded into, on every path that values can take.

`PeftModel` loads through `SensiConfig.from_pretrained`, so the file is known before a layer is built: names, shapes
and indices are checked then, and nothing is allocated for a file that does not fit. Every PEFT loader then passes the
hook in `SensiModel`. Transformers' own `load_adapter` passes neither: a layer checks what it was given when it is
first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..anatomy.modules import linear_of
from ..layers.layer import SensiLayer
from ..layers.slices import master_dtype, tensor_specs
from ..layers.values import WEIGHTS, check_content, check_specs
from ..utils.errors import SensiLoadError
from ..utils.files import Spec, opened, read_specs
from .checkpoint import PLAN_KEY, check_strays, embeddings_of, meaning
from .config import SensiConfig
from .slicing import Slices


_PREFIX = "base_model.model."


def file_to_check(config: SensiConfig) -> str | None:
    """The file that will be loaded under this config: none if the user has changed what decides about values."""
    path, said = config.weights_file, config.file_meaning
    if path is None or said is None or not os.path.exists(path):
        return None
    return (
        path if {**meaning(config), "fingerprint": said.get("fingerprint")} == {"fingerprint": None, **said} else None
    )


@contextmanager
def errors_of_file(config: SensiConfig) -> Iterator[None]:
    """What a config from a file makes impossible becomes a `SensiLoadError` that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        if not config.from_file:
            raise
        raise SensiLoadError(f"{config.file_name}: {error}") from error


def check_slices(path: str, model: nn.Module, slices: Slices) -> None:
    """Checks the file's tensors of sliced Linears before a Linear is replaced. Raises `SensiLoadError`."""
    expected: dict[str, Spec] = {}
    numels: dict[str, int] = {}
    for name, (slice_, _) in slices.items():
        for part, spec in tensor_specs(slice_, master_dtype(linear_of(model, name))).items():
            expected[f"{name}.sensi_{part}"] = (spec.shape, spec.dtype)
            numels[f"{name}.sensi_{part}"] = slice_.kept_shape.numel()
    with opened(path) as file:
        specs = _own_names(read_specs(path, file), path)
        ours = {name: spec for name, (_, spec) in specs.items() if name in expected or is_part(name)}
        check_specs(ours, expected, path)
        for name in ours:
            check_content(name, file.get_tensor(specs[name][0]), numels[name], path)


def check_saved_modules(path: str, model: nn.Module, adapter_name: str) -> None:
    """Checks the file's other tensors, once the modules that are saved whole are known. Raises `SensiLoadError`."""
    expected: dict[str, Spec] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter_name].state_dict().items():
                expected[f"{name}.{key}"] = (tuple(tensor.shape), tensor.dtype)
    with opened(path) as file:
        specs = _own_names(read_specs(path, file), path)
    found = {name: spec for name, (_, spec) in specs.items() if not is_part(name)}
    resized = {name: spec for name, spec in embeddings_of(model).items() if name in found and name not in expected}
    check_specs(found, {**expected, **resized}, path)


def check_state(tensors: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
    """Checks tensors by the model's own names, as they are about to be loaded. Raises `SensiLoadError`.

    The shapes of modules that are saved whole are left to PyTorch, which PEFT's `ignore_mismatched_sizes` silences.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SensiLayer)}
    saved = f".modules_to_save.{adapter_name}."
    expected: dict[str, Spec] = {}
    for key, value in model.state_dict().items():
        if key.endswith(f".{adapter_name}") and key.split(".")[-2] in SensiLayer.tensor_names:
            expected[key] = (tuple(value.shape), value.dtype)
        elif saved in f".{key}" and key in tensors:
            expected[key] = (tuple(tensors[key].shape), value.dtype)
    coded, codes = ({key for key in keys if "sensi_codes" in key.split(".")[-2:]} for keys in (tensors, expected))
    if bool(coded) != bool(codes):
        raise SensiLoadError(
            f"{WEIGHTS} holds {'compressed' if coded else 'uncompressed'} values and this model's adapter "
            f"{'uncompressed' if coded else 'compressed'} ones. Load the folder with `PeftModel.from_pretrained`; "
            f"training goes on from an uncompressed checkpoint only."
        )
    check_strays(tensors, model)
    embeddings = {name.removeprefix(_PREFIX) for name in embeddings_of(model)}
    found = {k: t for k, t in tensors.items() if k in expected or k.removeprefix(_PREFIX) not in embeddings}
    check_specs({key: (tuple(t.shape), t.dtype) for key, t in found.items()}, expected)
    for key, tensor in tensors.items():
        layer = layers.get(".".join(key.split(".")[:-2]))
        check_content(key, tensor, None if layer is None else layer.sensi_slices[adapter_name].kept_shape.numel())
    for layer in layers.values():
        layer.sensi_unchecked.discard(adapter_name)


def is_part(name: str) -> bool:
    """Whether a tensor's name in a file is that of a part of a sliced Linear."""
    return name.rpartition(".")[2] in SensiLayer.tensor_names


def _own_names(specs: dict[str, Spec], path: str) -> dict[str, tuple[str, Spec]]:
    """Names in the user's own model, with the file's: PEFT reads files with its prefix, and without."""
    names = {key.removeprefix(_PREFIX): (key, spec) for key, spec in specs.items()}
    if len(names) != len(specs):
        raise SensiLoadError(f"{path}: expected every tensor once, found some with and without {_PREFIX!r}.")
    return {name: value for name, value in names.items() if name != PLAN_KEY}
