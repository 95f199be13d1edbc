"""The commands after a training, on adapters and merged folders: advice for the command, and folders that go on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer.core
import typer.main
from command import call, fails, run
from folders import NAMES, save_adapter
from tiny import only_slow, tiny_model, wrap
from transformers import ViTConfig, ViTForImageClassification

from peft_sensi.cli import measure
from peft_sensi.cli.commands import app
from peft_sensi.cli.data_options import DATA_OPTIONS, VALIDATION_OPTIONS
from peft_sensi.cli.measure import length_for
from peft_sensi.planning.latency_torch import tokens_of
from peft_sensi.reporting.saved_merged import merged_facts, merged_figures, open_saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, names=NAMES, metrics={"model": "me/base", "validation": {"accuracy": 0.5}})
    return folder


def without_base(folder: Path, target: Path, name: str | None) -> Path:
    copy = shutil.copytree(folder / "adapter", target)
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("command", ["merge", "export", "predict", "evaluate"])
@pytest.mark.parametrize("name", ["nobody/nothing", None, *only_slow("/not/here")])
def test_a_machine_without_the_base_is_told_of_the_option(folder, tmp_path, command, name):
    adapter = without_base(folder, tmp_path / "adapter", name)
    other = {"merge": tmp_path / "out", "export": tmp_path / "m.onnx"}.get(command, tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("text,label\ngood film,good\n")
    assert "--base" in fails(command, adapter, other)
    if command != "export" or name is None:
        call(command, adapter, other, "--base", folder / "base")


@pytest.mark.parametrize("command", ["inspect", "card", "check", "merge"])
def test_a_base_of_a_family_that_has_no_such_task_is_named(folder, tmp_path, command):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=12, patch_size=4)).save_pretrained(tmp_path / "images")
    more = [tmp_path / "out"] if command == "merge" else []
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    result = run(command, copy, *more, "--base", tmp_path / "images")
    assert "Traceback" not in result.output and "KeyError" not in result.output, result.output
    assert (result.exit_code == 1) == (command in ("check", "merge")), result.output


def test_advice_is_for_the_command(folder, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    for command in (("merge", tmp_path / "out"), ("export", tmp_path / "m.onnx"), ("predict", tmp_path / "x.csv")):
        (tmp_path / "x.csv").write_text("text\ngood film\n")
        text = fails(command[0], folder / "adapter", command[1], "--base", tmp_path / "other")
        assert "another base" in text and "with --base" in text and "`" not in text
    assert "merged model already" in fails("merge", folder / "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_names_the_base_that_was_used(folder, tmp_path):
    """What an adapter from the Hub says of its training may be the last part of a path, so no name on the Hub."""
    adapter = without_base(folder, tmp_path / "adapter", None)
    (adapter / "metrics.json").write_text(json.dumps({"model": "bert-base-uncased", "validation": {"accuracy": 0.5}}))
    call("merge", adapter, tmp_path / "small", "--base", folder / "base")
    assert json.loads((tmp_path / "small" / "metrics.json").read_text())["model"] == str(folder / "base")
    call("card", tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "base_model:" not in card and "bert-base-uncased" not in card and "path/to/base" in card
    without_base(folder, tmp_path / "other", "me/base")
    call("merge", tmp_path / "other", tmp_path / "small2", "--base", folder / "base")
    assert json.loads((tmp_path / "small2" / "metrics.json").read_text())["model"] == "me/base"


@pytest.mark.parametrize("command", ["train", "trim"])
def test_a_base_in_the_current_folder_is_noted_with_its_place(folder, tmp_path, command, monkeypatch):
    """From another folder, the relative name would look like one on the Hub, also to those who get the adapter."""
    rows = "".join(f"{'good' if i % 2 else 'bad'} film {i},{NAMES[i % len(NAMES)]}\n" for i in range(24))
    (tmp_path / "data.csv").write_text("text,label\n" + rows)
    monkeypatch.chdir(folder)
    epochs = ("--epochs", "0.1") if command == "train" else ()
    call(command, "base", "--data", tmp_path / "data.csv", "--budget", "0.5", *epochs, "--out", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert config["base_model_name_or_path"] == metrics["model"] == str(folder / "base")


def test_a_merge_keeps_the_files_of_the_user(folder, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    (out / "merges.txt").write_text("own")
    assert "merges.txt exists" in fails("merge", folder / "adapter", out)
    assert [path.name for path in out.iterdir()] == ["merges.txt"]
    call("merge", folder / "adapter", out, "--overwrite")  # this tokenizer has no such file
    assert (out / "merges.txt").read_text() == "own" and (out / "tokenizer.json").is_file()


def test_a_merge_leaves_nothing_of_the_model_that_was_there(folder, tmp_path):
    call("merge", folder / "adapter", tmp_path / "small")
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    (tmp_path / "small" / "chat_template.jinja").write_text("old")
    base = shutil.copytree(folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    bare = shutil.copytree(
        folder / "adapter", tmp_path / "adapter", ignore=shutil.ignore_patterns("*token*", "vocab*")
    )
    call("merge", bare, tmp_path / "small", "--base", base, "--overwrite")
    left = {path.name for path in (tmp_path / "small").iterdir()}
    assert not left & {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    call("merge", folder / "adapter", tmp_path / "small", "--overwrite")
    assert (tmp_path / "small" / "tokenizer.json").is_file()


def test_a_merge_writes_the_card_of_the_former_model_again(folder, tmp_path):
    """It kept the results of the former model. What somebody wrote around it stays."""
    merge = ("merge", folder / "adapter", tmp_path / "small", "--overwrite")
    (tmp_path / "small").mkdir()
    readme = tmp_path / "small" / "README.md"
    readme.write_text("---\nnot: [a card\n")
    call(*merge)
    assert readme.read_text() == "---\nnot: [a card\n"  # no card of ours
    readme.unlink()
    (tmp_path / "small" / "metrics.json").write_text(json.dumps({"validation": {"accuracy": 0.123}}))
    call("card", tmp_path / "small")
    readme.write_text(readme.read_text() + "\nMy words.\n")
    assert "0.123" in readme.read_text()
    call(*merge)
    assert "0.123" not in readme.read_text() and readme.read_text().endswith("\nMy words.\n")
    damaged = readme.read_text().replace("---\n", "---\nnot: [a\n", 1)
    readme.write_text(damaged)
    before = sorted((tmp_path / "small").iterdir())
    assert "cannot be read as a model card" in fails(*merge)
    assert sorted((tmp_path / "small").iterdir()) == before and readme.read_text() == damaged


def test_names_of_onnx_files_that_belong_to_others(folder, tmp_path):
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    before = (adapter / "adapter_config.json").read_bytes()
    for name in ("adapter_config.onnx", "metrics.onnx", "config.onnx"):
        assert "is the name of another file" in fails("export", adapter, adapter / name, "--overwrite")
    for name in ("m.int8.onnx", "m.ONNX"):
        assert ".int8.onnx" in fails("export", adapter, tmp_path / name)
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_an_int8_copy_of_an_earlier_export_is_refused(folder, tmp_path):
    call("export", folder / "adapter", tmp_path / "m.onnx", "--int8")
    (tmp_path / "x.csv").write_text("text\ngood film\n")
    call("predict", tmp_path / "m.int8.onnx", tmp_path / "x.csv", "--out", tmp_path / "p.csv")
    call("export", folder / "adapter", tmp_path / "m.onnx", "--overwrite")
    message = fails("predict", tmp_path / "m.int8.onnx", tmp_path / "x.csv", "--out", tmp_path / "p2.csv")
    assert "without --int8" in message


def test_measure_takes_every_folder_or_says_what_to_do(folder, tmp_path, monkeypatch):
    """A plan without a latency table predicts nothing, but its adapter can be timed."""
    timed = []

    def time_once(model, base, **options):
        timed.append((model.num_parameters() < base.num_parameters(), options["sequence_length"]))
        return 1.0, 2.0

    monkeypatch.setattr("peft_sensi.merging.latency.compare_latency", time_once)
    short = ("--sequence-length", "16")
    text = call("measure", folder / "adapter", "--against", folder / "base", *short)
    assert "1 ms of 2 (50.00%)" in text and timed == [(True, 16)]
    call("measure", folder / "adapter", "--against", folder / "base")
    assert timed[1:] == [(True, 40)], "the default is 128, or as many as the model takes"
    long = ("--sequence-length", "41")
    assert "at most 40 tokens" in fails("measure", folder / "adapter", "--against", folder / "base", *long)
    assert "at most 40 tokens" in fails("measure", folder / "base", *long)
    assert "with --against" in fails("measure", folder / "adapter")
    assert "--out is about files" in fails(
        "measure", folder / "adapter", "--against", folder / "base", "--out", "x.json"
    )
    (tmp_path / "file").write_text("")
    assert "--out" in fails("measure", folder / "base", *short, "--out", tmp_path / "file" / "t.json")
    monkeypatch.setattr(
        "peft_sensi.merging.latency.measure_latency", lambda model, **_: pytest.fail(type(model).__name__)
    )
    with pytest.raises(pytest.fail.Exception, match="BertForSequenceClassification"):
        measure.measure(str(folder / "merged"), sequence_length=16)


def test_inspect_an_adapter_that_does_not_name_its_base(folder, tmp_path):
    text = " ".join(run("inspect", without_base(folder, tmp_path / "a", None)).output.split())
    assert "which the adapter does not name: give it with --base" in text and "None" not in text


def test_inspect_a_merged_model(folder):
    found = json.loads(call("inspect", folder / "merged", "--json"))
    assert found["class"] == "BertForSequenceClassification" and found["labels"] == NAMES
    assert found["parameters"] < found["parameters_before"] and not found["loads_without_peft_sensi"]
    adapter = json.loads(call("inspect", folder / "adapter", "--json"))["plan"]["groups"]
    kept = {group["name"]: group["size"] - group["trimmed"] for group in adapter if group["kind"] != "token"}
    assert {group["name"]: group["kept"] for group in found["groups"]} == kept
    text = call("inspect", folder / "merged")
    assert "load_merged" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("id2label", "line"),
    [({"0": "a, b", "1": "c\nd"}, "'a, b', 'c\\nd'"), ({"0": "LABEL_0"}, None), ({"0": "yes"}, None)],
)
def test_inspect_shows_classes_so_that_they_can_be_told_apart(folder, tmp_path, id2label, line):
    """A head with one output predicts a number, and has no classes."""
    merged = shutil.copytree(folder / "merged", tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    figures = merged_figures(
        replace(open_saved(merged), values={**config, "id2label": id2label, "problem_type": None})
    )
    assert merged_facts(figures).get("classes") == line


def test_a_merged_folder_has_what_the_next_command_needs(folder, tmp_path):
    call("merge", folder / "adapter", tmp_path / "small")
    assert {"tokenizer.json", "metrics.json", "config.json"} <= {path.name for path in (tmp_path / "small").iterdir()}
    call("card", tmp_path / "small")
    assert "| accuracy | 0.5 |" in (tmp_path / "small" / "README.md").read_text()
    assert "adapter" not in call("push", tmp_path / "small", "me/small", "--dry-run")


@pytest.mark.parametrize("command", ["inspect", "check", "merge", "export", "card", "push", "predict", "evaluate",
                                     "compare", "sweep"])  # fmt: skip
def test_help_is_plain_and_names_every_default(command):
    text = call(command, "--help")
    assert f"Example: peft-sensi {command}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80 and not re.search(r"`|SensiConfig|kwargs|None\b", text), text
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    shared = {*DATA_OPTIONS, *VALIDATION_OPTIONS}
    for each in options:
        if isinstance(each, typer.core.TyperOption) and each.name not in shared and each.default is None:
            assert each.required or "efault" in each.help or each.is_flag, f"{command}: {each.name} has no default"


def test_a_model_of_images_is_loaded(tmp_path):
    """Its input embedding is a convolution over patches, which has no rows for tokens."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
                       patch_size=8)  # fmt: skip
    base = ViTForImageClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    wrap(base, budget=0.5, task_type=None).save_pretrained(tmp_path / "adapter")
    assert json.loads(call("check", tmp_path / "adapter", "--json"))["ok"]
    call("merge", tmp_path / "adapter", tmp_path / "small")
    assert json.loads(call("check", tmp_path / "small", "--json"))["ok"]
    assert length_for(base, None) == tokens_of(base, 128) == 5
    assert "an image has 5 tokens here" in fails("measure", tmp_path / "base", "--sequence-length", "9")
    # Given by mistake to a command that needs texts.
    (tmp_path / "rows.csv").write_text("text,label\na film,good\na plot,bad\n")
    for command in (("plan", "--score", "random"), ("plan", "--data", tmp_path / "rows.csv"),
                    ("train", "--data", tmp_path / "rows.csv", "--out", tmp_path / "out")):  # fmt: skip
        assert "base (vit) takes no texts" in fails(command[0], tmp_path / "base", *command[1:])
