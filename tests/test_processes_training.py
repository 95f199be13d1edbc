"""Two processes train as one with the same global batch, save once, and resume from each other's checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from processes import launch_two, run_two
from processes_train import PHASED, UPDATES, by_trainer, fresh, state
from tiny import logits, tiny_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    one = {}
    for update in UPDATES:
        by_trainer(folder / "one" / update, model := fresh(update), 1)
        one[update] = state(model)
    return folder, one, run_two("processes_train.py", folder)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance and value.is_floating_point():
            start = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
            assert start <= tolerance, f"{name}: {start}"
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("update", UPDATES)
def test_training_equals_one_process_with_the_same_global_batch(trained, update):
    _, one, two = trained
    assert_same(two[0]["states"][update], two[1]["states"][update])
    assert_same(two[0]["states"][update], one[update], 1e-4)
    start = state(fresh(update))
    assert any((one[update][n] - v).norm() > 1e-3 * v.norm() for n, v in start.items() if v.is_floating_point())


@pytest.mark.parametrize("update", UPDATES)
def test_checkpoints_are_saved_once_and_resume_on_one_and_on_two_processes(trained, update):
    folder, one, two = trained
    names = sorted(path.name for path in (folder / update).iterdir())
    assert names == ["checkpoint-4", "checkpoint-8"]
    saved = sorted(path.name for path in (folder / update / "checkpoint-8").iterdir())
    assert [n for n in saved if n.startswith("adapter")] == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / update / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    loaded = PeftModel.from_pretrained(tiny_model(), folder / update / "checkpoint-8")
    assert_same(state(loaded), two[0]["states"][update])
    # One process goes on from the checkpoint of two, and two from that of one.
    by_trainer(folder / "on" / update, model := fresh(update), 1, str(folder / update / "checkpoint-4"))
    assert_same(state(model), one[update], 1e-4)
    for process in two:
        assert_same(process["resumed"][update], one[update], 1e-4)


@pytest.mark.parametrize("update", UPDATES)
def test_a_plain_accelerate_loop_and_its_checkpoints(trained, update):
    _, _, two = trained
    assert_same(two[0]["loop"][update], two[1]["loop"][update])
    for process in two:
        assert_same(process["loop resumed"][update], process["loop"][update])
    assert not torch.equal(*(next(iter(two[0][k][update].values())) for k in ("loop", "states")))


@pytest.mark.parametrize("name", PHASED)
def test_phases_decide_alike_in_all_processes(trained, name):
    (one, plan), (other, other_plan) = (process["phased"][name] for process in trained[2])
    assert plan == other_plan
    assert_same(one, other)
    if "cuts" in name or "structured" in name:
        assert any(group["kept"] != "all" for group in plan["groups"].values())
    else:
        assert any("sensi_bits" in key or "sensi_down" in key for key in one)


def test_an_adapter_calibrated_on_both_trains_alike(trained):
    folder, _, two = trained
    assert_same(two[0]["own"], two[1]["own"])
    loaded = PeftModel.from_pretrained(tiny_model(), folder / "own" / "checkpoint-8")
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.slow
def test_accelerate_launch_gives_the_same(trained, tmp_path):
    folder, _, two = trained
    (tmp_path / "one").symlink_to(folder / "one")
    for launched, started in zip(launch_two("processes_train.py", tmp_path), two, strict=True):
        for update in UPDATES:
            assert_same(launched["states"][update], started["states"][update])
            assert_same(launched["loop"][update], started["loop"][update])
