"""`check` finds what is wrong, and says so with its exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import NAMES, save_adapter
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from typer.testing import CliRunner

from peft_sensi.cli.commands import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    save_adapter(folder, names=NAMES, metrics={"versions": {"torch": "0.1.0"}})
    return folder


def check(*arguments) -> tuple[int, dict[str, tuple[str, str]]]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments), "--json"])
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0)
    return result.exit_code, {each["what"]: (each["status"], each["text"]) for each in found["findings"]}


def test_nothing_is_wrong(folder):
    for which in ("adapter", "merged"):
        status, found = check(folder / which)
        assert status == 0 and {state for state, _ in found.values()} <= {"ok", "note"}
        assert found["outputs"][0] == "ok" and found["tokenizer"] == ("ok", "19 tokens")
        assert "to compare with another copy" in found["checksum"][1]  # it is compared with nothing here
        assert len(found["checksum"][1].split()[-1]) == 64
    assert check(folder / "adapter")[1]["base"][0] == "ok"
    assert check(folder / "adapter")[1]["versions"][0] == "note"  # torch 0.1.0 then
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["check", str(folder / "adapter")]).stdout
    assert "Nothing is wrong." in text


@pytest.mark.parametrize("which", ["adapter", "merged"])
def test_values_that_are_not_finite(folder, tmp_path, which):
    copy = shutil.copytree(folder / which, tmp_path / which)
    weights = next(copy.glob("*model*.safetensors"))
    tensors = load_file(weights)
    name = next(n for n, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 1)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    status, found = check(copy)
    assert status == 1 and any(state == "wrong" and "NaN" in text for state, text in found.values()), found


def test_another_base(folder, tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "other")
    status, found = check(folder / "adapter", "--base", tmp_path / "other")
    assert status == 1 and found["base"][0] == "wrong" and "another base" in found["base"][1]


def test_a_base_that_returns_tuples(folder, tmp_path):
    copy = shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    status, found = check(folder / "adapter", "--base", copy)
    assert status == 0 and found["outputs"] == ("ok", "finite")


def test_a_base_that_is_not_here(folder, tmp_path):
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nobody/nothing"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    status, found = check(copy)
    assert status == 0 and found["base"][0] == "note" and "--base" in found["base"][1]
    assert check(copy, "--base", folder / "base")[1]["base"][0] == "ok"
    status, found = check(copy, "--base", "nobody/else")  # the user has asked for this one
    assert status == 1 and found["base"] == ("wrong", "not compared: nobody/else is not here")


def test_files_that_do_not_belong_together(folder, tmp_path):
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["modules_to_save"] = ["classifier"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    status, found = check(copy)
    assert status == 1 and "do not belong together" in found["files"][1]
    merged = shutil.copytree(folder / "merged", tmp_path / "merged")
    values = json.loads((merged / "config.json").read_text())
    values["layer_norm_eps"] = 0.5
    (merged / "config.json").write_text(json.dumps(values))
    status, found = check(merged)
    assert status == 1 and "changed after" in found["files"][1]


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/secret.safetensors", "config.json", None])
def test_a_config_that_names_weights_elsewhere(folder, tmp_path, place):
    """Without this check, `push` would upload another file of this machine."""
    merged = shutil.copytree(folder / "merged", tmp_path / "merged")
    shutil.copy(next(merged.glob("*.safetensors")), tmp_path / "secret.safetensors")
    values = json.loads((merged / "config.json").read_text())
    del values["peft_sensi"], values["peft_sensi_hash"]
    values |= {"saved_by": "peft_sensi", "transformers_weights": place}
    (merged / "config.json").write_text(json.dumps(values))
    status, found = check(merged)
    assert status == 1 and "which is not a safetensors file of this folder" in found["files"][1]
    result = CliRunner().invoke(app, ["push", str(merged), "me/model", "--dry-run"])
    assert result.exit_code == 1 and "which is not a safetensors file of this folder" in result.output


def test_what_is_neither_adapter_nor_merged(folder, tmp_path):
    for place, words in ((folder / "base", "has not merged"), (tmp_path, "neither"), ("nobody/nothing", "not found")):
        status, found = check(place)
        assert status == 1 and words in found["files"][1], found
