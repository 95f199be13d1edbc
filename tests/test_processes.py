"""Two real processes with different data make the decision of a single process, or both raise the same error."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from processes import environment, free_port, on_free_port, run_script, run_two
from processes_decide import ALL, FISHER, STILL, joint, refitted, scores_of
from tiny import tiny_batches, tiny_model, wrap

from peft_sensi import compute_scores
from peft_sensi.scoring import learned, priming
from peft_sensi.scoring.calibration import materialize, weight_of


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    return run_two("processes_decide.py", tmp_path_factory.mktemp("decide"))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-12)
        assert difference < tolerance, f"{name}: {difference}"


def one_process(name: str) -> dict:
    if name == "fisher":
        return scores_of(0, 1)
    options = {"priming_steps": 3, "priming_lr": 1e-2, "calibration_steps": ALL, "progress": False}
    # Each of the two processes has 4 examples in a batch, and uses them all.
    with mock.patch.object(priming, "EXAMPLES", 8), mock.patch.object(learned, "ENOUGH", -math.inf):
        scores = compute_scores(tiny_model(**STILL), joint(), score=name, **options)
    return {"values": scores.values, "protected": scores.protected, "head": scores.head}


@pytest.mark.parametrize("name", ["fisher", "taylor", "movement", "mask"])
def test_scores_are_those_of_one_process_with_all_data(decided, name):
    """This includes priming: a step of two processes equals one step on the joint batch."""
    expected = one_process(name)
    for found in (process[name] for process in decided):
        assert found["values"].keys() == expected["values"].keys() and found["length"] == 12
        # AdamW divides by the size of the gradient, which enlarges rounding errors.
        assert_close(found["values"], expected["values"], 1e-5 if name == "fisher" else 1e-3)
        assert_close(found["head"], expected["head"], 1e-3)
        assert all(torch.equal(found["protected"][n], expected["protected"][n]) for n in expected["protected"])
    assert all(torch.equal(decided[0][name]["values"][n], v) for n, v in decided[1][name]["values"].items())
    shares = {process[name]["learned"] for process in decided}
    # The scores by fisher are made without priming here.
    assert len(shares) == 1 and (shares == {None}) == (name == "fisher")


def test_plan_and_refit_are_those_of_one_process_with_all_data(decided):
    fields = {**FISHER, "priming_steps": 0, "calibration_steps": ALL}
    plan = wrap(tiny_model(**STILL), calibration=tiny_batches(ALL, seed=3), **fields).base_model.plan().to_dict()
    model, plain = refitted(0, 1), refitted(0, 1, refit=False)
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    output = next(n for n in expected if "output.dense.sensi_weight" in n)
    assert not torch.allclose(expected[output], plain.get_parameter(output), rtol=1e-2), "nothing was refitted"
    for found in decided:
        assert found["wrap"]["plan"] == found["again"]["plan"] == plan  # `again` was made after all the errors
        assert_close(found["refit"]["state"], expected, 1e-4)


@pytest.mark.parametrize("case", ["uneven", "cut", "wrap"])
def test_different_data_and_heads_give_one_start(decided, case):
    one, other = (process[case] for process in decided)
    assert one["plan"] == other["plan"] and one["print"] == other["print"]
    assert one["state"].keys() == other["state"].keys()
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
    assert '"none"' not in str(one["plan"])


def test_processes_start_from_the_weights_of_the_first(decided):
    assert not torch.equal(decided[0]["own head"], decided[1]["own head"])
    assert all(torch.equal(process["base"], decided[0]["own head"]) for process in decided)


ERRORS = {
    "empty": "CalibrationError: In process 1 of 2: `calibration` is empty",
    "raises": "SensiError: In process 1 of 2: OSError: the disk is gone",
    "no labels": "CalibrationError: In process 1 of 2: The model returned no loss for calibration batch 0",
    "nan loss while priming": "CalibrationError: In process 1 of 2: The loss of calibration batch 2 (priming step 2)",
    "nan loss while scoring": "CalibrationError: In process 1 of 2: The loss of calibration batch 2 is nan",
    "infinite gradient while priming": "The gradient of calibration batch 2 (priming step 2) is not finite",
    "infinite gradient while scoring": "is not finite for calibration batch 2",
    "other budget": "SensiError: Process 1 has another `budget` in its configuration",
    "no data": "SensiError: Process 1 has another `calibration` in its configuration",
    "alike": "CalibrationError: `calibration` is empty",
    "no memory": "SensiError: In process 1 of 2: MemoryError: no room for this layer",
    "other model": "SensiError: Process 1 has another model than process 0; they differ in 'bert.encoder.layer.2",
    "both": "CalibrationError: In process 0 of 2: batch 0 In process 1 of 2: batch 1",
    "places": "SensiError: The processes do different things: process 0 is at place 0, process 1 is at place 1.",
    "schedule": "CalibrationError: In process 1 of 2: `calibration` is empty",
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_in_one_process_ends_both_alike(decided, case):
    messages, unharmed = zip(*(process["errors"][case] for process in decided), strict=True)
    assert messages[0] == messages[1] and ERRORS[case] in messages[0]
    assert all(unharmed), "the model or the random state was not left as it was"
    assert set(ERRORS) == set(decided[0]["errors"])


@pytest.mark.parametrize(
    "extra",
    [{}, {"LOCAL_RANK": "1"}, {"LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}],
    ids=["none", "Lightning", "CPU"],
)
def test_world_size_without_a_process_group_is_refused(extra, tmp_path):
    """Lightning starts a second script with LOCAL_RANK alone, and its process group only after `__init__`."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tiny import tiny_batches, tiny_model, wrap\n"
        "wrap(tiny_model(), budget=0.5, score='fisher', calibration=tiny_batches())"
    )
    env = {k: v for k, v in environment().items() if k not in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": "2", **extra}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"} if extra else {}
    code, output = run_script([str(script)], tmp_path, env)
    assert code == 1
    last = output.splitlines()[-1]
    assert "SensiError: WORLD_SIZE is 2, but there is no process group" in last and "`configure_model`" in last


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    """The killed process cannot report an error, but the other one does not wait for it."""
    with pytest.raises(AssertionError, match=r"Exit codes \[1, 9\]") as failure:
        run_two("processes_decide.py", tmp_path, "killed")
    assert "SensiError: Another process has ended or does not respond" in str(failure.value)


def test_a_port_that_another_test_has_taken_is_replaced():
    ports = []

    def run(port, failure):
        ports.append(port)
        assert len(ports) > 1, failure

    on_free_port(lambda port: run(port, "code: -98, name: EADDRINUSE"))
    assert len(set(ports)) == 2
    ports.clear()
    with pytest.raises(AssertionError, match="another reason"):
        on_free_port(lambda port: run(port, "another reason"))
    assert len(ports) == 1


def test_weight_of_a_batch():
    batch = tiny_batches(1, task="TOKEN_CLS")[0]
    assert weight_of(batch, own_loss=False) == int((batch["labels"] >= 0).sum()) < batch["labels"].numel()
    assert weight_of(batch, own_loss=True) == len(batch["labels"])
    assert weight_of(tiny_batches(1, size=5)[0], own_loss=False) == 5


def test_nothing_is_exchanged_in_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert materialize(iter(tiny_batches(2)), 1) and not torch.distributed.is_initialized()
