"""FSDP in two processes: training equals that of one process, also with Accelerate; what cannot work is an error."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from processes import run_two
from processes_fsdp import BY_ACCELERATE, PARTS, UPDATES, base_of, calibrated, fresh, loop
from processes_train import STILL, state
from tiny import logits, tiny_model, wrap


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    tiny_model(**STILL).bert.save_pretrained(folder / "base")
    wrap(base_of(folder), **UPDATES["both"]).save_pretrained(folder / "adapter")
    return folder, run_two("processes_fsdp.py", folder, *PARTS)


def expected(update: str) -> dict[str, torch.Tensor]:
    loop(model := fresh(update))
    return state(model)


def assert_close(found: dict[str, torch.Tensor], values: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == values.keys()
    for name, value in values.items():
        if value.is_floating_point():
            assert (found[name] - value).norm() <= tolerance * value.norm().clamp_min(1e-12), name
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("update", UPDATES)
def test_fully_shard_trains_as_one_process(sharded, update):
    _, (first, second) = sharded
    assert_close(first["fully_shard"][update], expected(update))
    assert not second["fully_shard"][update]  # only process 0 collects the whole values


def test_an_adapter_without_its_base_can_be_collected(sharded):
    assert_close(sharded[1][0]["fully_shard"]["dropped"], state(wrap(tiny_model(**STILL), budget=0.5)), 0.0)


@pytest.mark.parametrize("name", BY_ACCELERATE)
def test_accelerate_shards_saves_and_resumes(sharded, name):
    folder, processes = sharded
    first, second = (process["accelerate"] for process in processes)
    assert not first["head is missing"] and second["head is missing"]  # cpu_ram_efficient_loading
    assert first[f"{name}, print"] == second[f"{name}, print"] is not None
    assert_close(first[f"{name}, resumed"], first[name], 1e-6)
    base = base_of(folder)
    torch.manual_seed(0)
    if name in ("trim", "alone"):  # with `alone`, process 0 decides with its half of the data
        model = calibrated(base, 0, 1 if name == "trim" else 2)
    else:
        model = wrap(base, **UPDATES["sparse" if name == "sparse" else "both"])
    loop(model, 8)
    assert_close(first[name], state(model))
    loaded = PeftModel.from_pretrained(base_of(folder), folder / "saved" / name)
    assert_close(state(loaded), first[name], 0.0)
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("update", ["trim", "both"])
def test_fsdp1_with_original_parameters(sharded, update):
    for process in sharded[1]:
        assert_close(process["fsdp1"][update], expected(update))


@pytest.mark.parametrize(
    ("way", "case", "message"),
    [
        ("fsdp1", "integers", "stores positions or masks as integers, which FSDP1 cannot flatten"),
        ("fsdp1", "flat", "FSDP1 can train an adapter only with `fsdp_use_orig_params: true`"),
        ("fsdp1", "sharded before", "Wrap it with the adapter first, then shard it"),
        ("fsdp1", "schedule", "sharded by FSDP"),
        ("fully_shard", "merge", "not possible to merge the adapter"),
        ("fully_shard", "merge and unload", "not possible to merge the adapter"),
        ("fully_shard", "compress", "not possible to compress the adapter"),
        ("fully_shard", "trim", "not possible to trim the adapter"),
        ("fully_shard", "save", "holds shards of FSDP"),
        ("fully_shard", "no columns", "cannot collect parameters without columns"),
    ],
)
def test_what_cannot_work_under_fsdp_says_so(sharded, way, case, message):
    for process in sharded[1]:
        found = process[way]["errors"][case]
        assert "SensiError" in found and message in found
