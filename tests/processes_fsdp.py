"""FSDP2 on two processes: by `fully_shard` itself and by Accelerate's own preparation; and what is refused."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import Rows
from processes_train import STILL
from tiny import tiny_model, wrap
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader


UPDATES = {
    "trim": {"budget": 0.5},
    "both": {"budget": {"flops": 0.6, "trainable": 0.08}},
    "tune": {"budget": {"trainable": 0.05}},
    "low rank": {"update": "low_rank", "rank": 2},
    "sparse": {"budget": 0.7, "update": "low_rank+sparse", "rank": 2, "sparse": 20},
    "mask": {"update": "mask", "granularity": "weight", "sparsity": 0.2},
    "drawn mask": {"update": "low_rank", "rank": 2, "sparsity": 0.3},
}


def fresh(update: str, dtype=None):
    torch.manual_seed(0)
    return wrap(tiny_model(**STILL, dtype=dtype), **UPDATES[update])


def loop(model, steps: int = 6, share: slice = slice(None)) -> list[float]:
    """Some steps of AdamW; `share` takes this process' rows of each global batch of 8."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    model.train()
    for step, batch in enumerate(DataLoader(Rows(64), batch_size=8)):
        if step == steps:
            break
        loss = model(**{k: v[share] for k, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def shard(model):
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def whole(model) -> dict[str, torch.Tensor]:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {n: v for n, v in full.items() if ".sensi_" in n or ".modules_to_save." in n}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict = {"states": {}, "errors": {}}

    def log(what: str) -> None:
        print(f"{time.strftime('%X')} {rank}: {what}", flush=True)

    dist.init_process_group("gloo")
    mine = slice(4 * rank, 4 * rank + 4)
    for update in UPDATES:
        log(update)
        model = shard(fresh(update))
        try:
            loop(model, share=mine)
            found["states"][update] = whole(model)
        except Exception as error:
            import traceback

            traceback.print_exc()
            found["errors"][update] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
