"""Run in two processes by test_processes_fsdp: FSDP2 with `fully_shard` and with Accelerate, FSDP1, and errors."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import Rows
from peft import PeftModel
from processes import log, message_of, save_and_exit
from processes_train import STILL, adamw, state
from tiny import LABELS, tiny_batches, tiny_model, wrap
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

from peft_sensi import Schedule


UPDATES = {
    "trim": {"budget": 0.5},
    "both": {"budget": {"flops": 0.6, "trainable": 0.08}},
    "sparse": {"budget": 0.7, "update": "low_rank+sparse", "rank": 2, "sparse": 20},
    "mask": {"update": "mask", "granularity": "weight", "sparsity": 0.2},
    "drawn mask": {"update": "low_rank", "rank": 2, "sparsity": 0.3},
}
FISHER = {"score": "fisher", "calibration_steps": 4, "priming_steps": 0}
# `trim` scores units with data, `alone` has weights in process 0 only, and `loaded` loads a finished adapter.
BY_ACCELERATE = ("trim", "alone", "sparse", "loaded")


def fresh(update: str):
    torch.manual_seed(0)
    return wrap(tiny_model(**STILL), **UPDATES[update])


def base_of(folder: Path):
    """A base with a fresh head. Under `cpu_ram_efficient_loading`, only process 0 has the head's values."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=LABELS).float()


def drop_weights(model) -> None:
    """Moves all parameters to `meta`, as loaders do where another process sends the weights. Buffers stay."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def calibrated(base, rank: int, count: int):
    return wrap(base, budget=0.5, calibration=tiny_batches(4, seed=3)[rank::count], **FISHER)


def loop(model, steps: int = 6, share: slice = slice(None)) -> None:
    """Steps of AdamW. `share` selects this process' rows of each global batch of 8."""
    optimizer = adamw(model)
    model.train()
    for batch in (2 * [*DataLoader(Rows(), batch_size=8)])[:steps]:
        model(**{k: v[share] for k, v in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model):
    for layer in [m for m in model.modules() if isinstance(m, BertLayer)]:
        fully_shard(layer)
    return fully_shard(model)


def ours(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in found.items() if ".sensi_" in n or ".modules_to_save." in n}


def by_fully_shard(folder: Path, rank: int) -> dict:
    found = {}
    for update in UPDATES:
        log(update)
        model = shard(fresh(update))
        loop(model, share=slice(4 * rank, 4 * rank + 4))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found[update] = ours(get_model_state_dict(model, options=options))
    found["errors"] = errors_when_sharded(folder)
    dropped = wrap(tiny_model(**STILL), budget=0.5, keep_base=False)  # no columns are left of some base weights
    found["dropped"] = ours(get_model_state_dict(shard(dropped), options=options))
    return found


def errors_when_sharded(folder: Path) -> dict[str, str]:
    """What a sharded model refuses. A merge of single values or of a mask would have no effect."""
    model = shard(fresh("mask"))
    small = shard(wrap(tiny_model(**STILL), budget=0.05, min_units=0, update="low_rank", rank=2))
    return {
        "merge": message_of(model.merge_adapter),
        "merge and unload": message_of(model.merge_and_unload),
        "compress": message_of(lambda: model.compress("bits")),
        "trim": message_of(lambda: model.trim(0.5)),
        "save": message_of(lambda: model.save_pretrained(folder / "shards")),
        "no columns": message_of(lambda: loop(small, 1)),
    }


def on_cpu(plugin: FullyShardedDataParallelPlugin) -> Accelerator:
    """An Accelerator with FSDP on CPUs. There Accelerate falls back to DDP, so its state is set to FSDP here."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def by_accelerate(folder: Path, rank: int) -> dict:
    """Accelerate loads with `cpu_ram_efficient_loading`, trains, saves and loads its state, and saves the adapter."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    found = {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = on_cpu(plugin)
    for name in BY_ACCELERATE:
        for resume in (False, True):
            log(f"Accelerate: {name}, resume {resume}")
            base = base_of(folder)
            head = base.classifier.weight
            found["head is missing"] = head.is_meta or not head.any()  # older versions of Transformers leave zeros
            if name == "alone" and rank > 0:
                drop_weights(base)
            torch.manual_seed(0)
            if name in ("trim", "alone"):
                model = calibrated(base, rank, 2)
            elif name == "loaded":
                model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
            else:
                model = wrap(base, **UPDATES["sparse"])
            found[f"{name}, print"] = model.peft_config["default"].fingerprint
            loader = DataLoader(Rows(), batch_size=4)
            optimizer = adamw(model)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            assert any(isinstance(p, DTensor) for p in model.parameters())
            if resume:
                accelerator.load_state(str(folder / "state" / name))
            model.train()
            for epoch in range(int(resume), 2):
                for batch in loader:
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if epoch == 0 and not resume:
                    accelerator.save_state(str(folder / "state" / name))
            full = accelerator.get_state_dict(model)
            found[f"{name}, resumed" if resume else name] = ours(full)
            if accelerator.is_main_process:
                accelerator.unwrap_model(model).save_pretrained(folder / "saved" / name, state_dict=full)
            for prepared in (accelerator._models, accelerator._optimizers, accelerator._dataloaders):
                prepared.clear()
    return found


def with_fsdp1(folder: Path, rank: int) -> dict:
    """FSDP1 with `use_orig_params`, and the settings that are refused."""
    for name in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_VERSION"):
        os.environ.pop(name, None)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_USE_ORIG_PARAMS": "true"}
    found: dict = {"errors": {}}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={BertLayer})
    for update in ("trim", "both"):
        log(f"FSDP1: {update}")
        model = FullyShardedDataParallel(
            fresh(update), use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
        )
        loop(model, share=slice(4 * rank, 4 * rank + 4))
        with FullyShardedDataParallel.summon_full_params(model):
            found[update] = {n.replace("_fsdp_wrapped_module.", ""): v for n, v in state(model).items()}
    found["errors"]["integers"] = message_of(lambda: fresh("sparse"))
    os.environ["FSDP_USE_ORIG_PARAMS"] = "false"
    found["errors"]["flat"] = message_of(lambda: fresh("trim"))
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    found["errors"]["sharded before"] = message_of(lambda: wrap(shard(tiny_model()), **UPDATES["trim"]))
    cut = {"budget": 0.4, "schedule": {"phase": "cut", "start": 0, "end": 0.5, "cuts": 2}}
    found["errors"]["schedule"] = message_of(lambda: Schedule(shard(wrap(tiny_model(), **cut)), 4).step())
    return found


PARTS = {"fully_shard": by_fully_shard, "accelerate": by_accelerate, "fsdp1": with_fsdp1}


def main(folder: Path, parts: list[str]) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    found: dict = {}
    for part in parts:
        try:
            found[part] = PARTS[part](folder, rank)
        except Exception:
            log(traceback.format_exc())
            found[part] = traceback.format_exc()
            if "--keep-going" not in sys.argv:
                raise
    save_and_exit(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [part for part in PARTS if part in sys.argv])
