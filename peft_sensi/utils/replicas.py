"""The same weights in all processes before they are ranked, and models whose weights are in no process.

A base can differ between processes (a fresh head is random in each), be in process 0 only (FSDP's
`cpu_ram_efficient_loading`), or be spread over all of them (sharded). Under `distributed.synchronized` the first is
made alike and the second is filled or left to process 0; the third is refused.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import distributed
from .errors import SensiError


# Share of a model's weights that another process may have to send; where more is missing, process 0 decides alone.
GAPS = 0.2


@contextmanager
def weights_from_rank_0(model: nn.Module, keep: bool = False) -> Iterator[None]:
    """Inside, all processes have the weights of process 0, as after DDP's own broadcast; afterwards their own again.

    A fresh task head is random in each process. With `keep` the weights stay unless the block fails. Processes without
    weights (see `any_process_on_meta`) are left alone.

    Raises `SensiError` when the processes have different models.
    """
    undo: list[Callable[[], object]] = []
    done = False
    try:
        _fill_gaps(model, undo)
        copy_weights_from_rank_0(model, undo)
        yield
        done = True
    finally:
        if not (keep and done):
            with torch.no_grad():
                for step in reversed(undo):
                    step()


def _fill_gaps(model: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Makes room for single weights that are on `meta` here and not in process 0.

    Under FSDP's `cpu_ram_efficient_loading`, Transformers leaves a fresh head there in all processes but the first.
    """
    if distributed.world_size() == 1:
        return
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    first = distributed.gather("looking for gaps", missing)[0]
    gaps = [name for name in missing if name not in first]
    if not gaps or sum(sizes[name] for name in gaps) > GAPS * sum(sizes.values()):
        return
    _make_room(model, gaps, undo)


def allocate_adapter(model: nn.Module) -> None:
    """Takes what an adapter trains off `meta` where its base has weights, here or in process 0.

    The values come from there, or from a file. On `meta`, Accelerate could not tell an optimizer's parameters apart.
    """
    parameters = dict(model.named_parameters())
    on_meta = [name for name, p in parameters.items() if p.is_meta]
    if len(on_meta) < len(parameters) or (distributed.world_size() > 1 and distributed.rank() > 0):
        ours = [name for name in on_meta if "modules_to_save" in name.split(".") or ".sensi_" in name]
        _make_room(model, ours, [])


def _make_room(model: nn.Module, names: list[str], undo: list[Callable[[], object]]) -> None:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for name in names:
        path, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        before = parameters[leaf]
        assert before is not None
        undo.append(functools.partial(parameters.__setitem__, leaf, before))
        parameters[leaf] = nn.Parameter(torch.zeros_like(before, device=device), before.requires_grad)


def copy_weights_from_rank_0(model: nn.Module, undo: list[Callable[[], object]] | None = None) -> None:
    """Copies what differs from process 0, and adds to `undo` how to get the values before back."""
    if distributed.world_size() == 1:
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in named]
    reports = distributed.gather("comparing weights", (shapes, [_mark(t) for _, t in named]))
    for number, (other, _) in enumerate(reports):
        if other != reports[0][0]:
            different = sorted(set(other) ^ set(reports[0][0]))[:1] or other[:1]
            raise SensiError(f"Process {number} has another model than process 0; they differ in {different[0][0]!r}.")
    with torch.no_grad():
        for (_, tensor), marks in zip(named, zip(*(own for _, own in reports), strict=True), strict=True):
            if None not in marks and len(set(marks)) > 1:
                if undo is not None:
                    undo.append(functools.partial(tensor.copy_, tensor.detach().to("cpu", copy=True)))
                distributed.broadcast(tensor)


def _mark(tensor: torch.Tensor) -> bytes | None:
    """Tells different values apart, cheaply: the sum of all, and some of them. `None` on `meta`."""
    if tensor.is_meta:
        return None
    values = tensor.detach().flatten()
    some = values[:: max(1, len(values) // 64)].double()
    return torch.cat([values.sum(dtype=torch.float64).view(1), some]).cpu().numpy().tobytes()


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP (1 or 2) manages the module's parameters: between two forward passes they hold a part only."""
    return getattr(module, "_is_fsdp_managed_module", False) or any(
        hasattr(p, "device_mesh") for p in module.parameters()
    )


def check_not_partitioned(model: nn.Module) -> None:
    """Raises `SensiError` for a model whose weights are spread over processes already, so that none can be ranked."""
    if is_sharded(model):
        raise SensiError("The model is sharded already (FSDP). Wrap it with the adapter first, then shard it.")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise SensiError(
            "The model was partitioned by DeepSpeed ZeRO-3, so no process has whole weights to rank or "
            "trim. Use ZeRO-1 or ZeRO-2, or FSDP2 (see docs/multi_gpu.md)."
        )


def check_launcher(holds_integers: bool) -> None:
    """Raises `SensiError` where the launcher's environment announces an FSDP1 that cannot work.

    FSDP1 flattens the parameters of a block into one, which must have one dtype: `holds_integers` is an adapter with
    positions, masks or gates. Without `use_orig_params` it also hides the parameters that adapters are made of.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "1":
        return
    way_out = "Set `fsdp_version: 2` in Accelerate's config (see docs/multi_gpu.md)."
    if holds_integers:
        raise SensiError(
            f"This adapter stores positions or masks as integers, which FSDP1 cannot flatten together with weights. "
            f"{way_out}"
        )
    if os.environ.get("FSDP_USE_ORIG_PARAMS", "false").lower() not in ("1", "true"):
        raise SensiError(f"FSDP1 can train an adapter only with `fsdp_use_orig_params: true`. {way_out}")


def any_process_on_meta(model: nn.Module) -> bool:
    """Whether some process has its base on `meta`: under FSDP's `cpu_ram_efficient_loading` only process 0 has one."""
    return distributed.world_size() > 1 and any(
        distributed.gather("looking for weights", any(p.is_meta for p in model.parameters()))
    )
