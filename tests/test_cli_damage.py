"""Damaged, missing and foreign files: a command ends with one line and writes nothing, or says what it left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import call, fails, run
from folders import NAMES, save_adapter, save_tokenizer
from safetensors import SafetensorError
from tiny import tiny_model

from peft_sensi.cli.resuming import check_same_options, resumed_state
from peft_sensi.utils.errors import SensiError
from peft_sensi.utils.files import read_json_object


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An adapter, a merged model and an ONNX file, with a file of texts."""
    folder = tmp_path_factory.mktemp("damage")
    save_adapter(folder, names=NAMES, metrics={"task": {"kind": "text", "max_length": 20}})
    call("export", folder / "adapter", folder / "onnx" / "m.onnx")
    (folder / "new.csv").write_text("text\na good film\na poor plot\n")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("*token*"), folder / "vocab.txt"]:
        path.unlink(missing_ok=True)


DAMAGE = {
    "half of the weights": ("adapter", lambda f: cut(f / WEIGHTS), "not a whole safetensors file"),
    "no weights": ("adapter", lambda f: (f / WEIGHTS).unlink(), "not complete"),
    "a folder as the weights": (
        "adapter", lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "cannot be read: Is a directory."
    ),
    "half of the config": ("adapter", lambda f: cut(f / CONFIG), "not JSON"),
    "a number as the base": ("adapter", lambda f: edited(f / CONFIG, base_model_name_or_path=7), "must be a string"),
    "no folder of the base": (
        "adapter", lambda f: edited(f / CONFIG, base_model_name_or_path="./no/such"), "There is no folder ./no/such."
    ),
    "half of the tokenizer": ("adapter", lambda f: cut(f / "tokenizer.json"), "The tokenizer of"),
    "a merged model's tokenizer": ("merged", lambda f: cut(f / "tokenizer.json"), "The tokenizer of"),
    "a text as the longest input": (
        "merged", lambda f: edited(f / "tokenizer_config.json", model_max_length="40"), "has the longest input '40'"
    ),
    "a merged model without one": ("merged", without_tokenizer, "has no tokenizer"),
    "half of the graph": ("onnx", lambda f: cut(f / "m.onnx"), "Export it again"),
    "no graph": ("onnx", lambda f: (f / "m.onnx").write_bytes(b""), "Export it again"),
    "half of its JSON": ("onnx", lambda f: cut(f / "m.json"), "m.json cannot be read"),
    "a number as labels": ("onnx", lambda f: edited(f / "m.json", labels=3), "Export the model again"),
    "a list as kind": ("onnx", lambda f: edited(f / "m.json", kind=["text"]), "Export the model again"),
    "no config of its tokenizer": ("onnx", lambda f: (f / "tokenizer_config.json").unlink(), "has no padding token"),
    "labels of another model": ("onnx", lambda f: edited(f / "m.json", labels=["a"]), "do not belong together"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_predicts_nothing(case, work, tmp_path):
    which, damage, words = DAMAGE[case]
    copy = shutil.copytree(work / which, tmp_path / "copy")
    damage(copy)
    assert words in fails("predict", copy, work / "new.csv", "--out", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_damaged_tokenizer_is_found_before_anything_is_written(work, tmp_path):
    copy = shutil.copytree(work / "adapter", tmp_path / "copy")
    cut(copy / "tokenizer.json")
    assert "The tokenizer of" in fails("merge", copy, tmp_path / "merged")
    assert "The tokenizer of" in fails("export", copy, tmp_path / "onnx" / "m.onnx")
    assert "The tokenizer of" in fails("check", copy)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_base_without_a_tokenizer_is_not_trained(work, tmp_path):
    """Transformers would make a tokenizer to which all words are unknown."""
    tiny_model(num_labels=2).save_pretrained(tmp_path / "base")
    (tmp_path / "data.csv").write_text("text,label\n" + "a good film,yes\na poor film,no\n" * 20)
    for command in ("plan", "train", "trim"):
        out = () if command == "plan" else ("--out", tmp_path / "out")
        text = fails(command, tmp_path / "base", "--data", tmp_path / "data.csv", "--budget", "0.5", *out)
        assert "has no tokenizer: save the one" in text
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_tokenizer_is_trimmed_with_that_of_its_base(work, tmp_path):
    copy = shutil.copytree(work / "adapter", tmp_path / "copy")
    without_tokenizer(copy)
    rows = "".join(f'a good film,{name}\na poor film,"bad"\n' for name in ("good", '"it\'s ""so"""')) * 10
    (tmp_path / "data.csv").write_text("text,label\n" + rows)
    trim = ("trim", copy, "--data", tmp_path / "data.csv", "--budget", "0.3")
    found = json.loads(call(*trim, "--out", tmp_path / "out", "--json"))
    assert found["plan"]["params_share"] <= 0.3
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (work / "base" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("text", ["", "[1]", '{"task": '])
def test_metrics_that_cannot_be_read_are_not_silently_left_out(text, work, tmp_path):
    copy = shutil.copytree(work / "adapter", tmp_path / "copy")
    (copy / "metrics.json").write_text(text)
    result = run("predict", copy, work / "new.csv")
    assert result.exit_code == 0 and "metrics.json" in result.stderr and "It is not used" in result.stderr


def test_a_card_that_cannot_be_read_leaves_the_picture_as_it_was(work, tmp_path):
    copy = shutil.copytree(work / "adapter", tmp_path / "copy")
    (copy / "plan.png").write_bytes(b"old")
    for damage in (lambda f: f.write_text("---\ntags: [\n---\n"), lambda f: (f.unlink(), f.mkdir())):
        damage(copy / "README.md")
        assert "README.md cannot be read as a model card" in fails("card", copy)
        assert (copy / "plan.png").read_bytes() == b"old"


def test_an_exported_model_is_recognized_where_it_cannot_be_used(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "m.onnx").write_bytes(b"x")
    for name in ("x", "x/m.onnx"):
        for command in (("inspect",), ("push", "me/x", "--dry-run"), ("merge", tmp_path / "o"), ("measure",)):
            if command != ("measure",) or name != "x":  # a folder of graphs is measured
                said = fails(command[0], tmp_path / name, *command[1:])
                assert f"{name} is an exported ONNX model, which only `peft-sensi predict`" in said


def test_names_that_are_not_found(work, tmp_path, monkeypatch):
    """A relative path looks like the name of a repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("x")
    save_tokenizer(tmp_path / "models" / "tokens")
    (tmp_path / "labeled.csv").write_text("text,label\na good film,1\na poor plot,0\n")
    data = ("--data", tmp_path / "labeled.csv")
    for name, words in (
        ("file", "file is a file, not the folder of a model"),
        ("models/tokens/tokenizer_config.json", "is a file, not the folder of a model"),
        ("models/nothing", "There is no folder models/nothing."),
        ("a/b/c", "There is no folder a/b/c."),
        ("./nothing", "There is no folder ./nothing. Check the path."),
        ("https://huggingface.co/me/x", "is a web address: give a path, or the name of a repository on the Hub"),
        ("nothing", "There is no folder nothing here, and it was not found on the Hub: HF_HUB_OFFLINE forbids"),
        ("me/nothing", "There is no folder me/nothing here, and it was not found on the Hub: HF_HUB_OFFLINE forbids"),
    ):
        for command in (("plan", name, "--score", "random"), ("train", name, *data, "--out", "o", "--budget", "0.5"),
                        ("trim", name, *data, "--out", "o"), ("measure", name), ("inspect", name),
                        ("predict", name, work / "new.csv")):  # fmt: skip
            assert words in fails(*command), command
    assert not (tmp_path / "o").exists()
    assert "There is no file no.onnx. Check the path." in fails("predict", "no.onnx", work / "new.csv")
    for name, words in (
        ("no.csv", "There is no file no.csv. Check the path."),
        ("./no", "There is no file or folder ./no. Check the path."),
        (
            "me/rows",
            "There is no file or folder me/rows here, and it was not found on the Hub: HF_HUB_OFFLINE forbids",
        ),
    ):
        assert words in fails("predict", work / "adapter", name)


def test_a_disk_without_room_is_noticed_before_the_training(tmp_path, monkeypatch):
    tiny_model(num_labels=2).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "data.csv").write_text("text,label\n" + "a good film,yes\na poor film,no\n" * 20)
    out = tmp_path / "out"
    line = ("train", tmp_path / "base", "--data", tmp_path / "data.csv", "--budget", "0.5", "--out", out)
    with monkeypatch.context() as full:
        full.setattr("peft_sensi.cli.run.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        full.setattr("peft_sensi.cli.run.Trainer.train", lambda *_, **__: pytest.fail("trained"))
        assert re.search("would write .* kB, and the disk has 1.00 kB left. Make room", fails(*line))
    assert sorted(path.name for path in out.iterdir()) == ["scores.safetensors"]

    def save(*_):
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as full:
        full.setattr("peft_sensi.cli.run.Trainer.save_model", save)
        text = fails(*line, "--epochs", "1", "--overwrite")  # of the scores
    assert "error: The adapter could not be written to" in text and "unexpected" not in text
    assert "Make room." in text and "instead" not in text
    assert "replace it with --overwrite" in fails(*line), "there is no checkpoint that --resume could use"


def test_an_interrupted_training_is_named_where_its_adapter_is_needed(tmp_path):
    (tmp_path / "unfinished.json").write_text(json.dumps({"options": {"--lr": None, "--epochs": 3}}))
    for command in (("predict", tmp_path, tmp_path / "new.csv"), ("push", tmp_path, "me/x", "--dry-run")):
        assert "holds an interrupted training: finish it with --resume" in fails(*command)
    for damaged in ({"options": []}, {"seconds": "x"}, {"finished": "x"}, {"score": 1}, {"stage": "heal"}):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "unfinished.json").write_text(json.dumps(damaged))
        with pytest.raises(SensiError, match="unfinished.json is damaged: start again with --overwrite"):
            resumed_state(tmp_path / "damaged", {})
    with pytest.raises(SensiError, match="--lr was not given, and is 0.1 now"):
        check_same_options(read_json_object(tmp_path / "unfinished.json"), {"--lr": 0.1, "--epochs": 3})
