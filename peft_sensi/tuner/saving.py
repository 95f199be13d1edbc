"""What an adapter's file holds beside the tensors of its layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from ..layers.layer import layers_of
from ..layers.marks import LAYER_MARK
from ..utils.errors import SensiError
from ..utils.replicas import has_shards
from .checkpoint import PEFT_PREFIX, PLAN_KEY, plan_to_tensor
from .config import SensiConfig
from .head_settings import head_settings
from .wrapping import root_of


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


def completed(
    tensors: Mapping[str, torch.Tensor], model: nn.Module, config: SensiConfig, adapter_name: str
) -> dict[str, torch.Tensor]:
    """The tensors that PEFT found for an adapter, with its plan. Also sets `config.head_settings`, which PEFT saves
    after the tensors. Raises `SensiError` as `check_present`, and if the tensors are sharded.
    """
    check_present(model, adapter_name)
    if has_shards(tensors.values()):
        raise SensiError(
            "The state dict holds shards of FSDP. Collect it in all processes, and save it in one with "
            "`save_pretrained(folder, state_dict=...)` (see docs/multi_gpu.md)."
        )
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    config.head_settings = head_settings(root_of(model))
    plan = {prefix + PLAN_KEY: plan_to_tensor(config.plan, config)}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(LAYER_MARK)} | plan
