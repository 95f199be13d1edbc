"""Gives all processes the same base weights before units are ranked, and refuses models that are sharded.

A base model can differ between processes in three ways. Weights can have different values: a fresh task head is random
in each process. They can be in process 0 only, and on `meta` in the others: FSDP's `cpu_ram_efficient_loading` does
that. Or they can be sharded already. The first two are handled here, inside of `distributed.synchronized`; the third
is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0

from . import distributed
from .errors import SensiError


# The largest share of a model's weights that process 0 sends to a process without them. If a larger share is missing,
# process 0 decides alone.
MOST_MISSING = 0.2


@contextmanager
def weights_from_rank_0(model: nn.Module, keep: bool = False) -> Iterator[None]:
    """Inside the block, all processes have the weights of process 0. Afterwards, they have their own weights again.

    With `keep`, the weights of process 0 stay unless the block raises an error. A process whose base is on `meta`
    stays without weights (see `any_process_on_meta`). Different models are an error.
    """
    with ExitStack() as undo:
        # Under FSDP's `cpu_ram_efficient_loading`, Transformers leaves a fresh head on `meta` in all other processes.
        # So the few weights that are on `meta` here, but not in process 0, are allocated.
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        on_meta = [name for name, p in model.named_parameters() if p.is_meta]
        on_meta_in_first = distributed.gather("looking for missing weights", on_meta)[0]
        missing = [name for name in on_meta if name not in on_meta_in_first]
        if sum(sizes[name] for name in missing) <= MOST_MISSING * sum(sizes.values()):
            _allocate(model, missing, undo)
        copy_weights_from_rank_0(model, undo)
        yield
        if keep:
            undo.pop_all()


def allocate_adapter(model: nn.Module) -> None:
    """Moves an adapter's trained parameters from `meta` to a device, if its base has weights here or in process 0.

    Their values come from process 0 or from a file later. If they stayed on `meta`, Accelerate could not match the
    parameters in an optimizer with those of the model.
    """
    parameters = dict(model.named_parameters())
    on_meta = [name for name, p in parameters.items() if p.is_meta]
    if len(on_meta) < len(parameters) or distributed.rank() > 0:
        trained = [name for name in on_meta if "modules_to_save" in name.split(".") or ".sensi_" in name]
        _allocate(model, trained, ExitStack())


def _allocate(model: nn.Module, names: list[str], undo: ExitStack) -> None:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for name in names:
        path, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        before = parameters[leaf]
        assert before is not None
        undo.callback(parameters.__setitem__, leaf, before)
        parameters[leaf] = nn.Parameter(torch.zeros_like(before, device=device), before.requires_grad)


@torch.no_grad()
def copy_weights_from_rank_0(model: nn.Module, undo: ExitStack | None = None) -> None:
    """Copies the weights and buffers that differ from those of process 0. `undo` puts the old values back.

    Raises `SensiError` if the processes have different models: some weight differs in its name, shape or dtype.
    """
    if distributed.world_size() == 1:
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in named]
    reports = distributed.gather("comparing weights", (shapes, [_sample(t) for _, t in named]))
    first = reports[0][0]
    for number, (other, _) in enumerate(reports):
        if other != first:
            different = sorted(set(other) ^ set(first)) or other
            raise SensiError(
                f"Process {number} has another model than process 0; they differ in {different[0][0]!r}. Load the "
                f"same model in all processes."
            )
    for (_, tensor), samples in zip(named, zip(*(own for _, own in reports), strict=True), strict=True):
        if None not in samples and len(set(samples)) > 1:
            if undo is not None:
                undo.callback(torch.no_grad()(tensor.copy_), tensor.detach().to("cpu", copy=True))
            distributed.broadcast(tensor)


def _sample(tensor: torch.Tensor) -> bytes | None:
    """The sum of all values and about 64 single values, to recognize different tensors. `None` on `meta`."""
    if tensor.is_meta:
        return None
    values = tensor.detach().flatten()
    some = values[:: max(1, len(values) // 64)].double()
    return torch.cat([values.sum(dtype=torch.float64).view(1), some]).cpu().numpy().tobytes()


def new_parameters_are_empty() -> bool:
    """Whether new parameters are created on `meta`.

    Under `low_cpu_mem_usage` PEFT builds the tuner inside Accelerate's `init_empty_weights`. No flag says so, but a
    new parameter shows it.
    """
    return nn.ParameterList([torch.empty(1)])[0].is_meta


def weights_come_later() -> bool:
    """Whether FSDP will send this process the weights (`cpu_ram_efficient_loading`).

    Until then, newer versions of Transformers leave its parameters on `meta`, and older ones fill them with zeros.
    """
    return is_fsdp_enabled() and not is_local_dist_rank_0()


def any_process_on_meta(model: nn.Module) -> bool:
    """Whether a process has weights on `meta`, as all but process 0 have with FSDP's `cpu_ram_efficient_loading`."""
    on_meta = any(p.is_meta for p in model.parameters())
    return distributed.world_size() > 1 and any(distributed.gather("looking for weights", on_meta))


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds only a part of the parameters, which FSDP1 manages or `has_shards` recognizes."""
    return getattr(module, "_is_fsdp_managed_module", False) or has_shards(module.parameters())


def has_shards(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether each process holds only a part of at least one tensor: FSDP2, tensor parallelism, DeepSpeed ZeRO-3."""
    return any(hasattr(tensor, "device_mesh") or is_partitioned(tensor) for tensor in tensors)


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has spread a parameter over the processes, which leaves it without values.

    In forward passes and inside of `deepspeed.zero.GatheredParameters` it has its values, and is not partitioned.
    """
    return hasattr(tensor, "ds_shape") and tensor.ds_shape != tensor.shape  # a lazy parameter has no shape


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 manages a parameter, whether it is partitioned now or not."""
    return hasattr(tensor, "ds_id")


def is_copied(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed trains a parameter. Its optimizer holds a float32 copy, and writes it over the parameter after
    each step, so other changes of the values are lost.
    """
    return hasattr(tensor, "_hp_mapping") or is_spread(tensor)


def check_gathered(model: nn.Module, action: str) -> None:
    """Raises `SensiError` if the parameters are sharded: what follows would use old ones, or a shard."""
    if is_sharded(model):
        raise SensiError(
            f"The model is sharded by FSDP or DeepSpeed ZeRO-3, so it is not possible to {action}. Collect the state "
            f"dict and save the adapter with it (see docs/multi_gpu.md), then load the adapter in one process."
        )


def check_columns(parameters: Iterable[torch.Tensor]) -> None:
    """Raises `SensiError` if FSDP2 could not collect the state dict after the training.

    It takes the shards of a parameter `[out, 0]` for `[0, 0]` (PyTorch 2.13), and cannot join them.
    """
    if any(p.ndim > 1 and len(p) > 0 and p.numel() == 0 for p in parameters):
        raise SensiError(
            "The plan keeps no unit of a sublayer, and PyTorch's FSDP2 cannot collect parameters without columns, so "
            "the trained adapter could not be saved. Train it under DDP, or leave `min_units=0` out."
        )


def check_not_partitioned(model: nn.Module) -> None:
    """Raises `SensiError` if DeepSpeed ZeRO-3 has partitioned a parameter."""
    if any(map(is_partitioned, model.parameters())):
        raise SensiError(
            "DeepSpeed ZeRO-3 has partitioned the model, so no process has whole weights. Load the model and add or "
            "load the adapter before `TrainingArguments` (or `HfDeepSpeedConfig`) gets the settings of DeepSpeed, or "
            "inside of `deepspeed.zero.GatheredParameters(list(model.parameters()))` (see docs/multi_gpu.md)."
        )


def check_values(model: nn.Module) -> None:
    """Raises `SensiError` if DeepSpeed ZeRO-3 has to gather a parameter without values from several processes."""
    if torch.compiler.is_compiling():  # a guard for each parameter would be slow
        return
    # ZeRO-3 manages all parameters or none. Without it, a forward pass must not walk through all of them.
    first = next(model.parameters(), None)
    if first is None or not is_spread(first):
        return
    if any(getattr(p, "ds_numel", 1) == 0 for p in model.parameters()) and dist.get_world_size() > 1:
        raise SensiError(
            "DeepSpeed ZeRO-3 cannot gather parameters without values, which `keep_base=False` leaves, or a plan "
            "without any unit in a sublayer (`min_units=0`). Leave these options out, or use ZeRO-2."
        )


def check_whole(model: nn.Module) -> None:
    """Raises `SensiError` if FSDP, tensor parallelism or DeepSpeed ZeRO-3 has spread the weights over processes, or
    Accelerate offloads them.

    Units can be ranked only in a process that has whole weights. A `device_map` without offloading is allowed.
    """
    # PEFT takes the hooks off before it loads an adapter, but leaves the map.
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    mapped = "disk" in devices or ("cpu" in devices and len(devices) > 1)
    if (mapped and any(p.is_meta for p in model.parameters())) or any(
        _offloads(getattr(module, "_hf_hook", None)) for module in model.modules()
    ):
        raise offloaded()
    check_not_partitioned(model)
    if is_sharded(model):
        raise SensiError(
            "The model is sharded already, by FSDP or tensor parallelism (`tp_plan`). Wrap it with the adapter first, "
            "then shard it."
        )


def offloaded() -> SensiError:
    """The error for a model whose weights Accelerate keeps elsewhere."""
    return SensiError(
        "Parts of the model are offloaded to the CPU or to disk, so the model does not hold their weights. Load the "
        "model without offloading: on the CPU (`device_map='cpu'`), or over enough GPUs (see docs/scale.md)."
    )


def _offloads(hook: Any) -> bool:
    """Whether a hook of Accelerate keeps a module's weights elsewhere, and the module's own on `meta`."""
    return any(_offloads(inner) for inner in getattr(hook, "hooks", ())) or bool(getattr(hook, "offload", False))


def check_launcher(has_integers: bool) -> None:
    """Raises `SensiError` if the launcher's environment asks for an FSDP1 that cannot train this adapter.

    FSDP1 flattens the parameters of a block into one, which has a single dtype. So it cannot hold integer parameters
    (`has_integers`). Without `use_orig_params`, it also hides the parameters of the adapter.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or os.environ.get("FSDP_VERSION", "1") != "1":
        return
    advice = "Set `fsdp_version: 2` in Accelerate's config (see docs/multi_gpu.md)."
    if has_integers:
        raise SensiError(
            f"This adapter stores positions or masks as integers, which FSDP1 cannot flatten together with weights. "
            f"{advice}"
        )
    if not parse_flag_from_env("FSDP_USE_ORIG_PARAMS"):
        raise SensiError(f"FSDP1 can train an adapter only with `fsdp_use_orig_params: true`. {advice}")
