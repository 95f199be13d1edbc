"""SIGKILL while files are written, and disks that are full: the old files, the new ones, or a clear refusal."""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import PATIENCE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from test_contract import is_plain
from test_trainer import state, trainer, wrapped
from tiny import BOTH, TRIM, TUNE, assert_same_tensors, logits, tiny_batches, tiny_model, train, trained, wrap
from tqdm import tqdm

from peft_sensi import Scores, SensiConfig, SensiError, SensiLoadError, compute_scores
from peft_sensi.merging.load import load_merged
from peft_sensi.merging.save import save_merged
from peft_sensi.reporting.card import write_card
from peft_sensi.reporting.saved import open_adapter


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs `work` in a fork, with a file to write to. Returns the process id and the file to read what it writes.

    A fork of a process with threads can hang. Then it prints where, and ends after `PATIENCE` seconds.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # Not `dump_traceback_later`: pytest may have called it, and a fork would wait for its thread forever.
            faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
            signal.alarm(int(PATIENCE))
            os.close(reader)
            work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    return pid, reader


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a fork that has begun when this returns its process id."""

    def begin(writer: int) -> None:
        os.write(writer, b"!")
        work()

    pid, reader = fork(begin)
    os.read(reader, 1)
    os.close(reader)
    return pid


def seconds_of(work: Callable[[], object]) -> float:
    """How long something takes here and now. Kills in this time hit all parts of it on fast and slow machines."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def kill_after(pid: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def kill_at_a_change(pid: int, folder: Path) -> None:
    """Kills as soon as a file in the folder has been replaced, however fast the machine is."""

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("adapter_*")}

    before = times()
    while times() == before:
        pass  # a sleep would miss the short time between two files
    kill_after(pid, 0)


def test_a_fork_that_is_killed_with_the_lock_of_tqdm_blocks_nothing():
    def die_with_the_lock() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(die_with_the_lock), 0)
    lock = tqdm.get_lock()
    assert lock.acquire(timeout=60)
    lock.release()


def kill_savers(folder: Path, kills: int, least: Mapping[str, int] | None = None) -> collections.Counter:
    """Adapters of two plans, and one of them trained further, are written over each other until the kill.

    On a busy machine most kills may come on one side. Up to four times as many follow until both have `least` ones.
    """
    models = [trained(**TRIM), trained(**BOTH), trained(**TRIM)]
    train(models[2], tiny_batches(2, seed=31), steps=2)
    expected = [logits(model) for model in models]
    assert not torch.equal(expected[0], expected[2])
    draw, outcomes, base = random.Random(kills), collections.Counter(), tiny_model()

    def save_forever() -> None:
        for i in range(10_000):
            models[(i + 1) % 3].save_pretrained(folder)

    models[0].save_pretrained(folder)
    for kill in range(4 * kills):
        if kill >= kills and all(outcomes[side] >= count for side, count in (least or {}).items()):
            break
        seconds = seconds_of(lambda: models[0].save_pretrained(folder / "another"))
        if kill % 2:  # between the files of one save
            kill_at_a_change(in_child(save_forever), folder)
        else:
            kill_after(in_child(save_forever), draw.uniform(0, 2) * seconds)
        try:
            model = PeftModel.from_pretrained(base, folder)
        except SensiLoadError as error:
            outcomes["refused"] += 1
            assert str(folder) in str(error) and is_plain(base)
            models[0].save_pretrained(folder)
        else:
            found = logits(model)
            outcomes["loaded"] += 1
            assert sum(torch.equal(found, one) for one in expected) == 1
            base = model.unload()
    print(f"{outcomes.total()} kills of save_pretrained: {dict(outcomes)}")
    return outcomes


def test_a_killed_save(tmp_path):
    assert kill_savers(tmp_path, 12)["loaded"]


@pytest.mark.slow
def test_many_killed_saves(tmp_path):
    least = {"loaded": 21, "refused": 6}
    outcomes = kill_savers(tmp_path, 150, least)
    assert all(outcomes[side] >= count for side, count in least.items())


def kill_mergers(folder: Path, kills: int) -> collections.Counter:
    """Merged models that need a record of their widths, and one that is a plain checkpoint, over each other."""
    models = [trained(**TRIM), trained(**TUNE), trained(**BOTH)]
    expected = [logits(load_after_save(model, folder / "probe")) for model in models]
    draw, outcomes, place = random.Random(kills), collections.Counter(), folder / "merged"

    def save_forever() -> None:
        for i in range(10_000):
            save_merged(models[(i + 1) % 3], place)

    save_merged(models[0], place)
    for _ in range(kills):
        seconds = seconds_of(lambda: save_merged(models[0], folder / "another"))
        kill_after(in_child(save_forever), draw.uniform(0, 2) * seconds)
        found = logits(load_merged(place))
        assert sum(torch.equal(found, one) for one in expected) == 1
        outcomes["loaded"] += 1
    print(f"{kills} kills of save_merged: {dict(outcomes)}")
    return outcomes


def load_after_save(model: PeftModel, folder: Path) -> torch.nn.Module:
    save_merged(model, folder)
    return load_merged(folder)


def test_a_killed_save_of_a_merged_model(tmp_path):
    kill_mergers(tmp_path, 4)


@pytest.mark.slow
def test_many_killed_saves_of_merged_models(tmp_path):
    kill_mergers(tmp_path, 60)


def run_and_kill(rows, folder: Path, seconds: float) -> None:
    model = wrapped(rows, **TRIM)
    run = trainer(model, rows, folder, save_strategy="steps", save_steps=1)
    pid = in_child(run.train)
    while not any(folder.glob("checkpoint-*")):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "The training ended without a checkpoint."
        time.sleep(0.001)
    kill_after(pid, seconds)


def kill_trainers(rows, folder: Path, kills: int) -> collections.Counter:
    """Training is killed, resumed from the newest checkpoint that can be resumed, and must end like the whole run."""
    torch.manual_seed(0)
    whole = wrapped(rows, **TRIM)
    seconds = seconds_of(trainer(whole, rows, folder / "whole", save_strategy="steps", save_steps=1).train)
    draw, outcomes = random.Random(kills), collections.Counter()
    for kill in range(kills):
        place = folder / str(kill)
        torch.manual_seed(0)
        run_and_kill(rows, place, draw.uniform(0, 1) * seconds)
        checkpoints = sorted(place.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
        for checkpoint in checkpoints:
            if not (checkpoint / "trainer_state.json").exists():
                outcomes["no state yet"] += 1  # Trainer writes this file last
                continue
            torch.manual_seed(0)
            model = wrapped(rows, **TRIM)
            run = trainer(model, rows, place, save_strategy="steps", save_steps=1)
            try:
                run.train(resume_from_checkpoint=str(checkpoint))
            except (ValueError, EOFError, RuntimeError, OSError) as error:
                outcomes[f"refused: {type(error).__name__}"] += 1
                continue
            assert_same_tensors(state(model), state(whole))
            outcomes["resumed"] += 1
            break
        shutil.rmtree(place)
    print(f"{kills} kills of a Trainer: {dict(outcomes)}")
    return outcomes


def test_a_killed_training(rows, tmp_path):
    assert kill_trainers(rows, tmp_path, 3)


@pytest.mark.slow
def test_many_killed_trainings(rows, tmp_path):
    assert kill_trainers(rows, tmp_path, 40)["resumed"] > 10


# -- pairs of files that do not belong together -----------------------------------------------------------------------


def mix(folder: Path, config_of: Path, weights_of: Path) -> Path:
    shutil.copytree(config_of, folder)
    shutil.copyfile(weights_of / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    return folder


def test_the_plan_alone_does_not_tie_the_files(tmp_path):
    """Two bases, one plan: values of one base under the config of the other pass every check but the mark."""
    calm = {"budget": {"params": 1.0}, "min_units": 1}
    first = trained(**calm)
    first.save_pretrained(tmp_path / "first")
    other = tiny_model(seed=1)
    second = wrap(other, **calm)
    second.save_pretrained(tmp_path / "second")
    assert first.peft_config["default"].plan == second.peft_config["default"].plan
    folder = mix(tmp_path / "mixed", tmp_path / "first", tmp_path / "second")
    with pytest.raises(SensiLoadError, match="different settings.*do not belong together"):
        PeftModel.from_pretrained(tiny_model(), folder)


def test_files_from_before_the_mark_are_loaded(tmp_path):
    model = trained(**TRIM)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load(path.read_bytes())
    key = "base_model.model.sensi_plan"
    plan = json.loads(tensors[key].numpy().tobytes())
    assert plan.pop("config")
    tensors[key] = torch.frombuffer(bytearray(json.dumps(plan).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


# -- full disks -------------------------------------------------------------------------------------------------------


def with_full_disk(work: Callable[[], None]) -> None:
    """Runs `work` in a fork in which no file can grow beyond a few bytes; expects our error."""

    def fail(writer: int) -> None:
        result = "no error"
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        try:
            work()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, result.encode()[:4000])

    pid, reader = fork(fail)
    result = os.read(reader, 4096).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    assert result.startswith("SensiError") and "could not be written" in result, result


def test_a_full_disk_keeps_the_old_scores(tmp_path):
    path = tmp_path / "scores.safetensors"
    scores = compute_scores(tiny_model(), score="magnitude")
    scores.save(path)
    before = path.read_bytes()
    with_full_disk(lambda: compute_scores(tiny_model(), score="random").save(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    assert Scores.load(path).values.keys() == scores.values.keys()


def test_a_full_disk_keeps_the_old_config(tmp_path):
    SensiConfig(budget=0.4).save_pretrained(tmp_path)
    with_full_disk(lambda: SensiConfig(budget=0.3).save_pretrained(tmp_path))
    assert os.listdir(tmp_path) == ["adapter_config.json"]
    assert SensiConfig.from_pretrained(tmp_path).budget == 0.4


def test_a_full_disk_keeps_what_somebody_wrote_into_a_card(tmp_path):
    model = trained(**TUNE)
    model.save_pretrained(tmp_path)
    text = "---\nlicense: mit\n---\n" + "Mine.\n" * 100
    (tmp_path / "README.md").write_text(text)
    with_full_disk(lambda: write_card(open_adapter(tmp_path)))
    assert (tmp_path / "README.md").read_text() == text

    def save() -> None:
        with pytest.raises(SafetensorError):  # after the card
            model.save_pretrained(tmp_path)
        raise SensiError("could not be written")

    with_full_disk(save)
    assert (tmp_path / "README.md").read_text() == text
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_other_users_may_read_what_was_saved(tmp_path):
    mask = os.umask(0o022)
    try:
        SensiConfig().save_pretrained(tmp_path)
        compute_scores(tiny_model(), score="random").save(tmp_path / "scores.safetensors")
        model = wrap(tiny_model(), budget=0.5)
        model.add_adapter("other", SensiConfig(budget=0.4))
        model.save_pretrained(tmp_path / "adapter")
        save_merged(model.merge_and_unload(), tmp_path / "merged")
    finally:
        os.umask(mask)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.name == "adapter_model.safetensors"]) == 2
    assert len(files) >= 9 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


BAD_SCORES = {
    "nan": lambda t: t["values:bert.encoder.layer.0.heads"].fill_(float("nan")),
    "matrix": lambda t: t.update({"values:bert.encoder.layer.0.heads": torch.ones(2, 2)}),
    "whole numbers": lambda t: t.update({"values:bert.encoder.layer.0.heads": torch.ones(4, dtype=torch.int32)}),
    "stray protection": lambda t: t.update({"protected:nowhere": torch.ones(4, dtype=torch.bool)}),
    "protection of another size": lambda t: t.update(
        {"protected:bert.encoder.layer.0.heads": torch.ones(5, dtype=torch.bool)}
    ),
    "unknown kind": lambda t: t.update({"others:x": torch.ones(4)}),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_broken_scores_are_refused(name, tmp_path):
    path = tmp_path / "scores.safetensors"
    compute_scores(tiny_model(), score="magnitude").save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load(path.read_bytes())
    BAD_SCORES[name](tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(SensiLoadError, match="scores.safetensors"):
        Scores.load(path)
