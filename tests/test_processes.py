"""Several processes with different data come to one plan."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_batches, tiny_model, wrap

from peft_sensi import Schedule


def _wrap_and_report(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        batches = tiny_batches(4, seed=rank)
        model = wrap(tiny_model(), budget=0.4, score="fisher", calibration=batches)
        state = {n: p for n, p in model.named_parameters() if p.requires_grad}
        cut = wrap(
            tiny_model(), budget=0.4, score="fisher", schedule={"phase": "cut", "start": 0, "end": 0, "cuts": 1}
        )
        schedule = Schedule(cut, 4, calibration=batches)
        schedule.step()
        schedule.finish()
        plans = [m.base_model.plan().to_dict() for m in (model, cut)]
        torch.save((plans, state), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_all_processes_get_one_plan_the_same_start_and_the_same_cuts(tmp_path):
    port = 20000 + os.getpid() % 20000
    mp.start_processes(_wrap_and_report, args=(port, str(tmp_path)), nprocs=2, start_method="spawn")
    (plans, state), (other_plans, other_state) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert plans == other_plans and plans[0] != plans[1]
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)
