"""Run in two processes by test_trim: a trained adapter is trimmed, with different data in each process."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from processes import message_of, save_and_exit
from tiny import tiny_batches, tiny_model, train, wrap
from torch.nn.parallel import DistributedDataParallel

from peft_sensi.tuner import rescoring


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
    rescoring.LEAST_JOINT_TOKENS = 1
    other = wrap(tiny_model(), budget=1.0, calibration=batches)
    train(other)
    other.base_model.trim(0.25, calibration=batches[rank:][: 5 - rank])
    small = {n: p.detach().clone() for n, p in other.named_parameters() if p.requires_grad}
    found = {
        "plan": plan.to_dict(),
        "state": state,
        "stale": stale,
        "gradient": gradient.clone(),
        "failed": failed,
        "small": small,
    }
    save_and_exit(sys.argv[1], found)


if __name__ == "__main__":
    main()
