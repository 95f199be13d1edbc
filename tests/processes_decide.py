"""Run in two processes by test_processes: scores, wraps, cuts and errors, with different data in each process."""

from __future__ import annotations

import math
import os
import sys
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from processes import log, message_of, save_and_exit
from tiny import clone, snapshot, tiny_batches, tiny_model, wrap

import peft_sensi.tuner.model
from peft_sensi import CalibrationError, Schedule, compute_scores
from peft_sensi.scoring import learned
from peft_sensi.utils import distributed


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that one process can be compared
FISHER = {"budget": 0.4, "score": "fisher"}
ALL = 6  # batches of all processes together


def shares(rank: int, count: int, task: str = "SEQ_CLS") -> list[dict]:
    """The batches of this process, of those that a single process would have."""
    return tiny_batches(ALL, seed=3, task=task)[rank::count]


def joint(task: str = "SEQ_CLS") -> list[dict]:
    """The batches of a single process for the same priming steps: each joins one batch of both processes."""
    alone = tiny_batches(ALL, seed=3, task=task)
    return [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(alone[::2], alone[1::2], strict=True)]


def refitted(rank: int, count: int, **fields):
    """A wrapped model that the refit improves, because the labels are the model's own outputs."""
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
    """The same body in all processes, with different heads, as without a common seed."""
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
    # What was learned is measured on other examples in each process, so one process could take more steps than two.
    with mock.patch.object(learned, "ENOUGH", -math.inf):
        scores = compute_scores(tiny_model(**STILL), batches, **options)
    return {
        "values": scores.values,
        "protected": scores.protected,
        "head": scores.head,
        "length": scores.sequence_length,
        "learned": scores.learned,
    }


def failing(rank: int) -> dict[str, dict]:
    """Config fields for each case. Something is wrong in process 1, or in both."""
    batches = tiny_batches(3, seed=rank)

    def broken():
        yield batches[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield from batches[1:]

    def with_weight(value: float) -> list[dict]:
        mine = clone(batches)
        if rank == 1:
            mine[2]["weight"] = torch.full((4,), value)
        return mine

    def loss_fn(model, batch):
        loss = model(**{k: v for k, v in batch.items() if k != "weight"}).loss
        return loss * batch["weight"].mean() if "weight" in batch else loss

    def sharp(model, batch):  # its loss is finite, its gradient is infinite
        loss = loss_fn(model, {k: v for k, v in batch.items() if k != "weight"})
        return loss + (loss - loss.detach()).clamp_min(0).sqrt() if "weight" in batch else loss

    nan, infinite = (
        {"calibration": with_weight(float("nan")), "loss_fn": loss_fn},
        {"calibration": with_weight(1.0), "loss_fn": sharp},
    )
    return {
        "empty": {"calibration": batches if rank == 0 else []},
        "raises": {"calibration": broken()},
        "no labels": {"calibration": batches if rank == 0 else tiny_batches(3, labels=False)},
        "nan loss while priming": {**nan, "priming_steps": 4},
        "nan loss while scoring": {**nan, "priming_steps": 1},
        "infinite gradient while priming": {**infinite, "priming_steps": 4},
        "infinite gradient while scoring": {**infinite, "priming_steps": 0},
        "other budget": {"calibration": batches, "budget": 0.4 if rank == 0 else 0.5},
        "no data": {"calibration": batches if rank == 0 else None},
        "alike": {"calibration": []},
    }


def attempt(model, **fields) -> tuple[str | None, bool]:
    """The error of a wrap, and whether the model and the random state are as they were before it."""

    def observed() -> tuple:
        flags = [p.requires_grad for p in model.parameters()]
        return snapshot(model), flags, model.training, torch.random.get_rng_state()

    before = observed()
    message = message_of(lambda: wrap(model, **{**FISHER, **fields}))
    after = observed()
    same = before[0].keys() == after[0].keys() and all(torch.equal(after[0][n], v) for n, v in before[0].items())
    return message, same and before[1:3] == after[1:3] and torch.equal(before[3], after[3])


def disagree(error: Exception | None = None, place: str = "") -> None:
    with distributed.synchronized("a test"):
        if error is not None:
            raise error
        distributed.gather(place)


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
    found: dict = {}
    log("scores")
    assert not dist.is_initialized()
    found["fisher"] = scores_of(rank, 2)
    assert dist.is_initialized()
    for score in ("taylor", "movement", "mask"):
        found[score] = scores_of(rank, 2, score=score, priming_steps=3, priming_lr=1e-2)
    log("wraps")
    alike = {**FISHER, "calibration_steps": ALL, "priming_steps": 0}
    found["wrap"] = result(wrap(tiny_model(**STILL), calibration=shares(rank, 2), **alike))
    found["refit"] = result(refitted(rank, 2))
    own = own_model(rank)
    found["own head"] = own.classifier.weight.clone()
    model = wrap(own, calibration=uneven(rank), calibration_steps=9, **FISHER)
    found["uneven"] = result(model)
    found["base"] = model.base_model.model.classifier.original_module.weight.detach().clone()
    log("cuts")
    # The first of the two cuts takes two stages, so it fits whole layers.
    cuts = {**FISHER, "budget": 0.25, "schedule": {"phase": "cut", "start": 0, "end": 0.5, "cuts": 2}}
    model = wrap(tiny_model(), **cuts)
    schedule = Schedule(model, 4, calibration=uneven(rank))
    for _ in range(4):
        schedule.step()
    schedule.finish()
    found["cut"] = result(model)
    errors = {}
    for name, fields in failing(rank).items():
        log(name)
        errors[name] = attempt(own_model(rank), **fields)
    log("an error after the decision")
    wrap_module = peft_sensi.tuner.model.wrap_module

    def full(root, name, *args, **kwargs):
        if rank == 1 and name.endswith("layer.1.output.dense"):
            raise MemoryError("no room for this layer")
        return wrap_module(root, name, *args, **kwargs)

    peft_sensi.tuner.model.wrap_module = full
    errors["no memory"] = attempt(own_model(rank), calibration=uneven(rank))
    peft_sensi.tuner.model.wrap_module = wrap_module
    log("another model in one process")
    errors["other model"] = attempt(tiny_model(num_hidden_layers=2 + rank), calibration=uneven(rank))
    log("a schedule without data in one process")
    model = wrap(tiny_model(), **cuts)
    data = uneven(rank) if rank == 0 else iter(())
    errors["schedule"] = (message_of(lambda: Schedule(model, 4, calibration=data)), True)
    log("other errors and other places")
    errors["both"] = (message_of(lambda: disagree(CalibrationError(f"batch {rank}"))), True)
    errors["places"] = (message_of(lambda: disagree(place=f"place {rank}")), True)
    found["errors"] = errors
    log("no error again")
    found["again"] = result(wrap(tiny_model(**STILL), calibration=shares(rank, 2), **alike))
    save_and_exit(folder, found)


if __name__ == "__main__":
    killed(int(os.environ["RANK"])) if "killed" in sys.argv else main(sys.argv[1])
