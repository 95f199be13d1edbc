"""Run as two processes by test_processes: wraps, failures and cuts with different data in each."""

from __future__ import annotations

import os
import sys
import time
import warnings

import torch
import torch.distributed as dist
from tiny import clone, snapshot, tiny_batches, tiny_model, wrap

import peft_sensi.tuner.model
from peft_sensi import Schedule, compute_scores


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that one process can be compared
FISHER = {"budget": 0.4, "score": "fisher"}
ALL = 6  # batches of all processes together
FAILURES: dict[str, tuple[dict, dict]] = {}


def shares(rank: int, count: int, task: str = "SEQ_CLS") -> list[dict]:
    """Every second batch of those that one process has."""
    return tiny_batches(ALL, seed=3, task=task)[rank::count]


def joint(task: str = "SEQ_CLS") -> list[dict]:
    """The batches on which one process takes the priming steps of two: padded alike, two become one."""
    alone = tiny_batches(ALL, seed=3, task=task)
    return [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(alone[::2], alone[1::2], strict=True)]


def refitted(rank: int, count: int, **fields):
    """A wrap whose refit has something to win: the labels are the model's own outputs."""
    model = tiny_model(problem_type="regression")
    batches = tiny_batches(11, size=8, seed=5)
    with torch.no_grad():
        for batch in batches:
            batch["labels"] = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    options = {"budget": 0.6, "score": "magnitude", "priming_steps": 0, "calibration_steps": 11}
    return wrap(model, calibration=batches[rank::count], **options, **fields)


def result(model) -> dict:
    state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "plan": model.base_model.plan().to_dict(),
        "state": state,
        "print": model.peft_config["default"].fingerprint,
    }


def own_model(rank: int, **changes):
    """The same body, and a head that differs, as in processes without a common seed."""
    model = tiny_model(**STILL, **changes)
    with torch.no_grad():
        torch.manual_seed(100 + rank)
        model.classifier.weight.normal_()
        model.classifier.bias.zero_()
    return model


def uneven(rank: int) -> list[dict]:
    return [tiny_batches(1, size=3 + rank, length=8 + 3 * i, seed=10 * rank + i)[0] for i in range(2 + 3 * rank)]


def scores_of(rank: int, count: int, **options) -> dict:
    batches = shares(rank, count) if count == 2 else tiny_batches(ALL, seed=3)
    options = {"priming_steps": 0, "calibration_steps": ALL, "progress": False, **options}
    scores = compute_scores(tiny_model(**STILL), batches, **options)
    return {
        "values": scores.values,
        "protected": scores.protected,
        "head": scores.head,
        "length": scores.sequence_length,
    }


def failing(rank: int) -> dict[str, dict]:
    """Config fields by case; something is wrong in process 1 (or in both, or in process 0)."""
    batches = tiny_batches(3, seed=rank)

    def broken():
        yield batches[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield from batches[1:]

    def with_value(value: float, name: str = "labels") -> list[dict]:
        mine = clone(batches)
        if rank == 1:
            mine[2][name] = torch.full((4,), value)
        return mine

    def loss_fn(model, batch):
        loss = model(**{k: v for k, v in batch.items() if k != "weight"}).loss
        return loss * batch["weight"].mean() if "weight" in batch else loss

    def sharp(model, batch):  # finite loss, infinite gradient
        loss = loss_fn(model, {k: v for k, v in batch.items() if k != "weight"})
        return loss + (loss - loss.detach()).clamp_min(0).sqrt() if "weight" in batch else loss

    return {
        "empty": {"calibration": batches if rank == 0 else []},
        "raises": {"calibration": broken()},
        "no labels": {"calibration": batches if rank == 0 else tiny_batches(3, labels=False)},
        "nan loss while priming": {
            "calibration": with_value(float("nan"), "weight"), "loss_fn": loss_fn, "priming_steps": 4
        },
        "nan loss while scoring": {
            "calibration": with_value(float("nan"), "weight"), "loss_fn": loss_fn, "priming_steps": 1
        },
        "infinite gradient while priming": {
            "calibration": with_value(1.0, "weight"), "loss_fn": sharp, "priming_steps": 4
        },
        "infinite gradient while scoring": {
            "calibration": with_value(1.0, "weight"), "loss_fn": sharp, "priming_steps": 0
        },
        "other budget": {"calibration": batches, "budget": 0.4 if rank == 0 else 0.5},
        "no data": {"calibration": batches if rank == 0 else None},
        "alike": {"calibration": []},
    }  # fmt: skip


def killed(rank: int) -> None:
    def batches():
        yield from tiny_batches(2)
        if rank == 1:
            os._exit(9)

    wrap(tiny_model(), calibration=batches(), **FISHER)


def main(folder: str) -> None:
    rank = int(os.environ["RANK"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict = {"errors": {}}

    def log(what: str) -> None:
        print(f"{time.strftime('%X')} {rank}: {what}", flush=True)

    log("no group yet")
    assert not dist.is_initialized()
    found["fisher"] = scores_of(rank, 2)
    assert dist.is_initialized()
    found["taylor"] = scores_of(rank, 2, score="taylor", priming_steps=3, priming_lr=1e-2)
    log("other scores")
    found["movement"] = scores_of(rank, 2, score="movement", priming_steps=3, priming_lr=1e-2)
    found["mask"] = scores_of(rank, 2, score="mask", priming_steps=3, priming_lr=1e-2)
    log("wraps")
    whole = wrap(
        tiny_model(**STILL), calibration=shares(rank, 2), calibration_steps=ALL, **FISHER | {"priming_steps": 0}
    )
    found["wrap"] = result(whole)
    found["refit"] = result(refitted(rank, 2))
    own = own_model(rank)
    head = own.classifier.weight.clone()
    model = wrap(own, calibration=uneven(rank), calibration_steps=9, **FISHER)
    found["uneven"] = result(model)
    found["base"] = model.base_model.model.classifier.original_module.weight.detach().clone()
    found["own head"] = head
    log("cuts")
    cut = wrap(tiny_model(), **FISHER, schedule={"phase": "cut", "start": 0, "end": 0.5, "cuts": 2})
    schedule = Schedule(cut, 4, calibration=uneven(rank))
    for _ in range(4):
        schedule.step()
    schedule.finish()
    found["cut"] = result(cut)
    for name, fields in failing(rank).items():
        log(name)
        model = own_model(rank)
        before = snapshot(model)
        flags = [p.requires_grad for p in model.parameters()]
        generator = torch.random.get_rng_state()
        try:
            wrap(model, **{**FISHER, **fields})
            message: str | None = None
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        after = snapshot(model)
        same = all(torch.equal(after[n], before[n]) for n in before) and before.keys() == after.keys()
        same &= flags == [p.requires_grad for p in model.parameters()] and not model.training
        same &= torch.equal(generator, torch.random.get_rng_state())
        found["errors"][name] = (message, same)
    log("errors after the decision")
    model = own_model(rank)
    wrap_module = peft_sensi.tuner.model.wrap_module

    def full(root, name, *args, **kwargs):
        if rank == 1 and name.endswith("layer.1.output.dense"):
            raise MemoryError("no room for this layer")
        return wrap_module(root, name, *args, **kwargs)

    peft_sensi.tuner.model.wrap_module = full
    before = snapshot(model)
    try:
        wrap(model, calibration=uneven(rank), **FISHER)
        message = None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    peft_sensi.tuner.model.wrap_module = wrap_module
    after = snapshot(model)
    same = before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before)
    found["errors"]["no memory"] = (message, same)
    log("another model")
    try:
        wrap(tiny_model(num_hidden_layers=2 + rank), calibration=uneven(rank), **FISHER)
        message = None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    found["errors"]["other model"] = (message, True)
    log("a schedule without data in one")
    model = wrap(tiny_model(), **FISHER, schedule={"phase": "cut", "start": 0, "end": 0.5, "cuts": 2})
    try:
        Schedule(model, 4, calibration=uneven(rank) if rank == 0 else iter(()))
        message = None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    found["errors"]["schedule"] = (message, True)
    log("all is well again")
    found["again"] = result(
        wrap(tiny_model(**STILL), calibration=shares(rank, 2), calibration_steps=ALL, **FISHER | {"priming_steps": 0})
    )
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process whose interpreter goes down in order


if __name__ == "__main__":
    killed(int(os.environ["RANK"])) if "killed" in sys.argv else main(sys.argv[1])
