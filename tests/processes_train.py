"""Training with Trainer and with a loop of Accelerate, for one process and for two."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import Rows
from peft import get_peft_model
from processes import log, save_and_exit
from tiny import tiny_batches, tiny_model, wrap
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_sensi import SensiCallback, SensiConfig, recipes


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PHASED = ("cuts", "learners", "dsee", "structured dsee")
UPDATES = {
    "dense": {"budget": {"flops": 0.6, "trainable": 0.08}},
    "sparse": {"budget": 0.7, "update": "low_rank+sparse", "rank": 2, "sparse": 20},
}


# Without it, AdamW makes a full step of a gradient that is zero up to rounding, such as that of the keys' biases.
EPSILON = 1e-3


def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, eps=EPSILON)


def state(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".sensi_" in n or ".modules_to_save." in n}


def calibration(rank: int, count: int = 3) -> list[dict]:
    return tiny_batches(count + rank, size=3 + rank, seed=20 + rank)


def fresh(update: str = "dense"):
    torch.manual_seed(0)  # low-rank terms start from random values
    return wrap(tiny_model(**STILL), **UPDATES[update])  # without data, one process and two have the same plan


def by_trainer(folder: Path, model, processes: int, resume: str | None = None, epochs: int = 2, **changes) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8 // processes,
        "num_train_epochs": epochs,
        "learning_rate": 5e-3,
        "adam_epsilon": EPSILON,
        # Otherwise Transformers multiplies a loss that is a mean over examples by the number of processes.
        "average_tokens_across_devices": False,
        "save_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **changes,
    }
    callback = SensiCallback(calibration(dist.get_rank() if processes == 2 else 0))
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_loop(folder: Path, update: str, resume: bool = False) -> dict[str, torch.Tensor]:
    """Two epochs of a plain loop, with Accelerate's checkpoint after the first. `resume` runs only the second."""
    accelerator = Accelerator(cpu=True)
    model = fresh(update)
    loader = DataLoader(Rows(), batch_size=8 // accelerator.num_processes)
    optimizer = adamw(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(str(folder))
    model.train()
    for epoch in range(int(resume), 2):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 0 and not resume:
            accelerator.save_state(str(folder))
    return state(accelerator.unwrap_model(model))


def phased(name: str, rank: int):
    """Models of the recipes with a schedule. Each process has different data."""
    data = {"calibration": calibration(rank), "priming_steps": 3, "calibration_steps": 3, "task_type": "SEQ_CLS"}
    configs = {
        "cuts": SensiConfig(budget=0.5, schedule={"phase": "cut", "start": 0.2, "end": 0.6, "cuts": 2}, **data),
        "learners": recipes.learners(4, 1, task_type="SEQ_CLS"),
        "dsee": recipes.dsee(2, 16, mask="unstructured", sparsity=0.5, task_type="SEQ_CLS"),
        "structured dsee": recipes.dsee(2, 16, mask="structured", sparsity=0.3, task_type="SEQ_CLS"),
    }
    torch.manual_seed(rank)  # the result must not depend on the seed
    return get_peft_model(tiny_model(**STILL), configs[name])


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict = {"states": {}, "resumed": {}, "loop": {}, "loop resumed": {}, "phased": {}}

    log("wrapping before anything of Accelerate's")
    own = wrap(tiny_model(**STILL), budget=0.5, score="fisher", calibration=calibration(rank))
    for update in UPDATES:
        log(f"Trainer, {update}")
        model = fresh(update)
        by_trainer(folder / update, model, 2)
        found["states"][update] = state(model)
        log("resumed from one process")
        model = fresh(update)
        by_trainer(folder / "again" / update, model, 2, resume=str(folder / "one" / update / "checkpoint-4"))
        found["resumed"][update] = state(model)
        log("loop")
        found["loop"][update] = by_loop(folder / "loop" / update, update)
        found["loop resumed"][update] = by_loop(folder / "loop" / update, update, resume=True)
    log("own data")
    by_trainer(folder / "own", own, 2)
    found["own"] = state(own)
    for name in PHASED:
        log(name)
        model = phased(name, rank)
        by_trainer(folder / name, model, 2, save_strategy="no")
        found["phased"][name] = (state(model), model.base_model.plan().to_dict())
    save_and_exit(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
