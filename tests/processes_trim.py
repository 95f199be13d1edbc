"""Run in two processes by test_trim: a trained adapter is trimmed, with different data in each process."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from processes import message_of, save_and_exit
from tiny import made_up_table, snapshot, tiny_batches, tiny_model, train, wrap
from torch.nn.parallel import DistributedDataParallel

from peft_sensi import Schedule
from peft_sensi.tuner import rescoring, stages, wrapping


def broken(batches):
    yield batches[0]
    raise OSError("the disk is gone")


def full(*args, **kwargs):
    raise MemoryError("full")


def errors_of_one_process(model, batches, rank: int) -> dict[str, str | None]:
    """The errors in this process of trims that fail in process 1 only."""
    trim = model.base_model.trim
    errors = {
        "an iterator": message_of(lambda: trim(0.5, broken(batches) if rank else batches)),
        "a name": message_of(lambda: trim(0.5, batches, "other" if rank else "default")),
    }
    inner = wrapping.wrap_module
    wrapping.wrap_module = full if rank else inner
    errors["new layers"] = message_of(lambda: trim(0.5, batches))
    wrapping.wrap_module = inner
    return errors


def cut_with_another_refit(batches, rank: int) -> dict[str, torch.Tensor]:
    """A cut before which process 1 finds that its refit does not pay, because its hardware rounds otherwise."""
    schedule = {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}
    model = wrap(tiny_model(), budget=0.5, calibration=batches, schedule=schedule)
    phases = Schedule(model, 4, calibration=batches[rank::2])
    inner = stages.refit_changes
    stages.refit_changes = lambda *args: inner(*args) if rank == 0 else inner(*args) and {}
    phases.step(done_steps=2)
    stages.refit_changes = inner
    phases.finish()
    return snapshot(model)


def main() -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    batches = tiny_batches(8, seed=3)
    model = wrap(tiny_model(), budget=1.0, calibration=batches)
    train(model)
    wrapped = DistributedDataParallel(model)
    plan = model.base_model.trim(0.5, calibration=batches[rank::2])
    model.train()
    stale = message_of(lambda: wrapped(**batches[0]))
    fresh = DistributedDataParallel(model)
    fresh(**batches[rank]).loss.backward()
    gradient = next(p.grad for n, p in model.named_parameters() if "sensi_weight" in n)
    failed = message_of(lambda: model.base_model.trim(0.3, calibration=batches if rank else None))
    state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    # In stages, which fits all layers together. One process has more batches than the other.
    other = wrap(tiny_model(), budget=1.0, calibration=batches)
    train(other)
    with mock.patch.object(rescoring, "LEAST_JOINT_TOKENS", 1):
        other.base_model.trim(0.25, calibration=batches[rank:][: 5 - rank])
    small = {n: p.detach().clone() for n, p in other.named_parameters() if p.requires_grad}
    third = wrap(tiny_model(), budget=1.0, calibration=batches)
    train(third)
    before = snapshot(third)
    errors = errors_of_one_process(third, batches, rank)
    after = snapshot(third)
    found = {
        "errors": errors,
        "cut": cut_with_another_refit(batches, rank),
        "unchanged": before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before),
        "tables": message_of(lambda: trim_by_own_table(third, rank)),
        "again": third.base_model.trim(0.5, calibration=batches[rank::2]).to_dict(),
        "plan": plan.to_dict(),
        "state": state,
        "stale": stale,
        "gradient": gradient.clone(),
        "failed": failed,
        "small": small,
    }
    save_and_exit(sys.argv[1], found)


def trim_by_own_table(model, rank):
    """Each process gives a table that it has measured itself."""
    table = replace(made_up_table(tiny_model()), device=f"device of process {rank}")
    model.base_model.trim({"latency": 0.9}, latency=table)


if __name__ == "__main__":
    main()
