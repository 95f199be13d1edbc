"""What an adapter's file holds beside the tensors of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from ..anatomy.modules import is_base_parameter
from ..layers.layer import layers_of
from ..layers.marks import LAYER_MARK
from ..utils.errors import SensiError
from ..utils.files import open_safetensors
from ..utils.replicas import has_shards, is_spread
from .checkpoint import PEFT_PREFIX, PLAN_KEY, plan_to_tensor
from .config import SensiConfig
from .head_settings import head_settings
from .wrapping import check_unmerged, root_of


def check_present(model: nn.Module, adapter_name: str) -> None:
    """Raises `SensiError` if the adapter has been merged or unloaded.

    PEFT's model remembers its config all the same, and would save a file without its values.
    """
    if not layers_of(model, adapter_name):
        raise SensiError(
            f"The model has no layers of the adapter {adapter_name!r} any more: it was merged or unloaded. Save an "
            f"adapter before that, and load one on a fresh base. To save the merged model, use what "
            f"`merge_and_unload()` returns, with `save_merged` or its own `save_pretrained`."
        )


def check_takes_values(model: nn.Module, adapter_name: str) -> None:
    """Raises `SensiError` as `check_present`, and if the adapter is merged: its Linears would keep the old values."""
    check_present(model, adapter_name)
    check_unmerged(model, "the values of an adapter are loaded")


def check_collected(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raises `SensiError` if a state dict holds shards of adapters, or what ZeRO-3 leaves in a single process."""
    ours = {name: p for name, p in model.named_parameters() if name in state_dict and not is_base_parameter(name)}
    if has_shards(state_dict[name] for name in ours) or any(
        getattr(p, "ds_shape", state_dict[name].shape) != state_dict[name].shape for name, p in ours.items()
    ):
        raise SensiError(
            "The state dict holds shards of FSDP or DeepSpeed ZeRO-3. Collect it in all processes, and save it in one "
            "with `save_pretrained(folder, state_dict=...)` (see docs/multi_gpu.md)."
        )


def warn_of_unsaved(model: nn.Module, files: Iterable[Path]) -> None:
    """Warns of weights of the base that are trained outside of the adapters' layers, and are in none of their files.

    In layers that have an adapter, the base gets no gradients, and forward passes warn of it.
    """
    inside = (*(f"{name}." for name in layers_of(model)),)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and is_base_parameter(n)]
    trained = [name for name in trained if not name.startswith(inside) and "original_module" not in name.split(".")]
    if not trained:
        return
    saved = set[str]()  # if the vocabulary was resized, PEFT saves the embeddings
    for path in files:
        with open_safetensors(path) as file:
            saved.update(file.keys())
    if unsaved := [name for name in trained if name not in saved]:
        warnings.warn(
            f"Weights of the base require gradients outside of the adapter's layers, such as {unsaved[0]!r} "
            f"({len(unsaved)} in all). The adapter is saved without them, so on a fresh base they have their old "
            f"values. To train and save them, name their modules in `modules_to_save`; otherwise freeze them.",
            stacklevel=3,
        )


def completed(
    tensors: Mapping[str, torch.Tensor], model: nn.Module, config: SensiConfig, adapter_name: str
) -> dict[str, torch.Tensor]:
    """The tensors that PEFT found for an adapter, with its plan. Also sets `config.head_settings`, which PEFT saves
    after the tensors. Raises `SensiError` as `check_present`.
    """
    check_present(model, adapter_name)
    if tensors:
        tensors = {**tensors, **_left_out(tensors, model, adapter_name)}
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    config.head_settings = head_settings(root_of(model))
    plan = {prefix + PLAN_KEY: plan_to_tensor(config.plan, config)}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(LAYER_MARK)} | plan


def _left_out(tensors: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The integers that `Trainer` has left out of an adapter's tensors under ZeRO-3, because nothing trains them."""
    found = {}
    for path, layer in layers_of(model, adapter_name).items():
        noted = layer.sensi_integers.get(adapter_name)
        for part, parameter in layer.own_parts(adapter_name).items():
            name = f"{path}.sensi_{part}.{adapter_name}"
            if name in tensors or not is_spread(parameter):
                continue
            if noted is None or part not in noted.copies:
                raise SensiError(
                    f"The state dict lacks {name!r}. Collect the whole state dict, with what is not trained: "
                    f"`accelerator.get_state_dict(model)` (see docs/multi_gpu.md)."
                )
            found[name] = noted.copies[part]
    return found
