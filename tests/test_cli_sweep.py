"""`sweep`: one ranking, several budgets, one table and one picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import call, fails, run
from folders import save_tokenizer
from interruptions import assert_same_adapter, interrupted
from tiny import tiny_model

from peft_sensi import SensiError
from peft_sensi.cli import train
from peft_sensi.cli.sweep import budgets_of
from peft_sensi.plotting.sweeps import plot_sweep


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_model(num_labels=2).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    rows = [f"the film is {('bad', 'good')[i % 2]}{' very' * (i % 3)}\t{('no', 'yes')[i % 2]}" for i in range(40)]
    (folder / "data.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return folder


def test_one_ranking_serves_all_budgets(work, monkeypatch):
    calls, compute = [], train.compute_scores
    monkeypatch.setattr(train, "compute_scores", lambda *a, **k: calls.append(1) or compute(*a, **k))
    out = work / "out"
    arguments = ("sweep", work / "base", "--data", work / "data.tsv", "--budgets", "0.5", "0.8", "--out", out,
                 "--epochs", "1", "--batch-size", "8", "--validation-share", "0.3", "--rounds", "2")  # fmt: skip
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert calls == [1] and found == json.loads((out / "sweep.json").read_text())
    assert [point["budget"] for point in found["points"]] == [0.8, 0.5] and found["metric"] == "accuracy"
    large, small = found["points"]
    assert small["parameters"] < large["parameters"] < found["base_parameters"]
    assert (found["base_ms"] is None) == (small["ms"] is None) and found["sequence_length"] == 40
    for point in found["points"]:
        metrics = json.loads((out / f"{point['budget']:g}" / "metrics.json").read_text())
        assert (
            metrics["validation"]["accuracy"] == point["value"] and metrics["plan"]["params_share"] <= point["budget"]
        )
        assert point["interval"][0] <= point["value"] <= point["interval"][1]
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG" and (out / "scores.safetensors").is_file()
    again = run(*arguments)
    assert again.exit_code == 1 and "--overwrite" in again.output and calls == [1]


def test_what_cannot_be_done_is_found_before_the_ranking(work, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compute_scores", lambda *a, **k: pytest.fail("ranked in vain"))
    arguments = ("sweep", work / "base", "--data", work / "data.tsv", "--out", tmp_path / "out", "--budgets", "0.5")
    assert "Give a larger --budget" in fails(*arguments, "10")  # a count, of which the share says nothing
    assert "The model takes at most 40 tokens" in fails(*arguments, "--sequence-length", "41")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_sweep_keeps_what_is_finished(work, tmp_path, monkeypatch):
    """Ctrl-C in the second training: the ranking, the first adapter and a checkpoint of the second are used."""

    def untimed(points, *rest):
        for point in points:
            point |= {"parameters": 1, "ms": None}

    monkeypatch.setattr("peft_sensi.cli.sweep.add_times", untimed)
    arguments = ("sweep", work / "base", "0.8", "0.5", "--data", work / "data.tsv", "--epochs", "1",
                 "--batch-size", "8", "--validation-share", "0.3")  # fmt: skip
    whole = json.loads(call(*arguments, "--out", tmp_path / "whole", "--json"))
    half = (*arguments, "--out", tmp_path / "half")
    assert "--resume" in interrupted(monkeypatch, 6, *half)  # a training has 4 steps
    assert "--resume" in fails(*half)
    assert "--seed was not given, and is 3 now" in fails(*half, "--resume", "--seed", "3")
    rows = (work / "data.tsv").read_text()
    (work / "data.tsv").write_text(rows + rows.splitlines()[1] + "\n")
    assert "data.tsv has changed since the training began" in fails(*half, "--resume")
    (work / "data.tsv").write_text(rows)
    first = (tmp_path / "half" / "0.8" / "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(train, "compute_scores", None)  # would fail
    metrics = tmp_path / "half" / "0.8" / "metrics.json"
    kept = metrics.read_text()
    metrics.write_text("{}")
    assert "metrics.json is damaged" in fails(*half, "--resume")
    metrics.write_text(kept)
    again = json.loads(call(*half, "--resume", "--json"))
    assert (tmp_path / "half" / "0.8" / "adapter_model.safetensors").stat().st_mtime_ns == first
    assert [point["value"] for point in again["points"]] == [point["value"] for point in whole["points"]]
    assert_same_adapter(tmp_path / "whole" / "0.5", tmp_path / "half" / "0.5")
    assert not (tmp_path / "half" / "unfinished.json").exists()


def test_budgets_are_read_before_anything_slow(work):
    assert budgets_of(["0.25,0.75", "50%"]) == [0.75, 0.5, 0.25]
    for wrong in ("half", "2.5", "0"):
        with pytest.raises(SensiError):
            budgets_of([wrong])


def test_a_sweep_without_budgets_says_so(work):
    result = run("sweep", work / "base", "--data", work / "data.tsv", "--out", work / "no")
    assert result.exit_code == 1 and "--budgets needs at least one share" in " ".join(result.output.split())
    result = run("sweep", "nowhere", "--data", work / "data.tsv", "--budgets", "0", "--out", work / "no")
    assert result.exit_code == 1 and "--budgets must be a share in (0, 1]" in " ".join(result.output.split())
    assert not (work / "no").exists()


def test_the_picture_needs_no_times(tmp_path):
    plot_sweep(tmp_path / "s.svg", "F1", [0.9, 0.8], [(0.85, 0.95), None], ["0.5", "0.25"], {"share": [0.7, 0.5]})
    assert "F1 under each budget" in (tmp_path / "s.svg").read_text()
