"""The command as people use it: every command, at 80 columns, without color, with mistakes in the arguments."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call, fails, run
from rich.console import Console
from tiny import VOCABULARY, tiny_config, tiny_model, wrap
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, LlamaForSequenceClassification
from typer.testing import CliRunner

import peft_sensi
from peft_sensi import Scores, SensiError, load_merged, recipes, save_merged
from peft_sensi.cli import main, terminal
from peft_sensi.cli.arguments import limits_of, number
from peft_sensi.cli.commands import app
from peft_sensi.cli.resuming import last_checkpoint, remove_checkpoints
from peft_sensi.reporting.saved import load_adapter, open_adapter
from peft_sensi.tasks import texts
from peft_sensi.tasks.columns import label_columns, text_columns
from peft_sensi.tasks.kinds import read_task
from peft_sensi.tasks.labels import find_labels
from peft_sensi.tasks.metrics import beats_baseline
from peft_sensi.tasks.predicting import open_predictor
from peft_sensi.tasks.reading import read_rows
from peft_sensi.utils import precision
from peft_sensi.utils.errors import DataError, how_to_install
from peft_sensi.utils.files import write_text_atomically


WORDS = ["good", "fine", "great", "bad", "poor", "awful", "a", "film", "story", "plot", "the", "is", "very"]
FAST = ["--priming-steps", "2", "--calibration-steps", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny base with a tokenizer, and texts that it can learn, in several kinds of file."""
    folder = tmp_path_factory.mktemp("cli")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    AutoModelForSequenceClassification.from_config(tiny_config("bert")).save_pretrained(folder / "base")
    generator = random.Random(0)
    rows = []
    for i in range(60):
        label = i % 2
        words = generator.choices(WORDS[6:], k=4) + [generator.choice(WORDS[:3] if label else WORDS[3:6])]
        rows.append({"sentence": " ".join(words), "label": ("bad", "good")[label]})
    (folder / "data.tsv").write_text("sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in rows))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"a": r["sentence"], "b": "the film", "score": i / 7 + 0.5} for i, r in enumerate(rows)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


@pytest.fixture(scope="module")
def adapter(work) -> Path:
    call("train", work / "base", "--data", work / "data.tsv", "--budget", "0.5", "--trainable", "0.2", "--epochs", "1",
         "--batch-size", "16", "--lr", "1e-3", "--out", work / "adapter")  # fmt: skip
    return work / "adapter"


def without_head_settings(folder: Path) -> None:
    """Turns an adapter's config into one of the first versions."""
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["head_settings"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


COMMANDS = ["plan", "train", "trim", "sweep", "predict", "evaluate", "compare", "measure", "inspect", "check", "merge",
            "export", "card", "push", "recipes"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(command):
    text = call(command, "--help")
    assert f"Example: peft-sensi {command}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert "--help" in text and "<bool>" not in text, "flags take no value"


@pytest.mark.parametrize("columns", [40, 60])
@pytest.mark.parametrize("command", ["plan", "train", "trim", "sweep", "compare"])
def test_help_keeps_the_names_of_options_on_a_narrow_terminal(command, columns):
    wide, text = call(command, "--help"), run(command, "--help", COLUMNS=str(columns)).stdout
    assert max(map(len, text.splitlines())) <= columns
    narrow = re.sub(r"-\n +", "-", text)  # sentences may break at hyphens
    options = set(re.findall(r"--[a-z0-9][a-z0-9-]+", wide))
    assert options <= set(re.findall(r"--[a-z0-9][a-z0-9-]+", narrow)) and "…" not in narrow


def test_paragraphs_of_the_help_are_wrapped_as_one():
    text = " ".join(line.strip() for line in call("check", "--help").splitlines())
    assert "versions, the tokenizer, the base of an adapter (is it the one" in text
    assert not re.search(r"of an$", call("check", "--help"), re.MULTILINE)


def test_a_long_message_ends_its_lines_between_words_on_a_terminal_only(monkeypatch):
    text = "name the column that holds the labels with --label-column; there are words and /a/long/path/of/a/folder-1"
    for is_terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, width=60, force_terminal=is_terminal, color_system=None, highlight=False)
        monkeypatch.setattr(terminal, "err", console)
        terminal.print_warning(text)
        lines = shown.getvalue().splitlines()
        assert " ".join(lines) == f"warning: {text}" and len(lines) == (3 if is_terminal else 1)


def test_the_commands_are_listed():
    text = call("--help")
    assert "<bool>" not in text
    assert all(f" {command} " in text for command in COMMANDS)
    assert call("--version") == f"peft-sensi {peft_sensi.__version__}\n"


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_prints_a_table_and_writes_scores_and_a_picture(work):
    before = (work / "base" / "model.safetensors").read_bytes()
    text = call("plan", work / "base", "--data", work / "data.tsv", "--budget", "0.5", "--save-scores", work / "s.st",
                "--plot", work / "plan.png", *FAST)  # fmt: skip
    assert "heads kept" in text and "prunable parameters kept" in text and "\x1b" not in text
    assert max(map(len, text.splitlines()[:-2])) <= 80
    assert (work / "plan.png").read_bytes()[:4] == b"\x89PNG"
    blocks = {f"bert.encoder.layer.{i}.{k}" for i in (0, 1) for k in ("heads", "neurons")}
    assert set(Scores.load(work / "s.st").values) == {*blocks, "bert.embeddings.word_embeddings.tokens"}
    assert (work / "base" / "model.safetensors").read_bytes() == before


def test_one_scoring_serves_many_budgets(work):
    data, scores = work / "data.jsonl", work / "s2.st"
    call("plan", work / "base", "--data", data, "--budget", "50%", "--save-scores", scores, *FAST)
    shares = []
    for budget in ("0.3", "0.7"):
        text = call("plan", work / "base", "--scores", scores, "--budget", budget, "--json")
        found = json.loads(text)
        shares.append(found["plan"]["params_share"])
        assert found["score"] == "fisher" and found["budget"] == {"params": float(budget)}
        assert shares[-1] <= float(budget)
    assert shares[0] < shares[1]


def test_plan_without_data_and_with_counts(work):
    text = call("plan", work / "base", "--score", "magnitude", "--flops", "0.6", "--trainable", "2000", "--json")
    found = json.loads(text)["plan"]
    assert found["flops_share"] <= 0.6 and found["trainable_params"] <= 2000
    text = fails("plan", work / "base", "--score", "magnitude", "--trainable", "0.00001")
    assert "limit on trained values" in text and text.rstrip().endswith("Give a larger --trainable."), text
    assert "raise" not in text.lower(), text


# -- train, inspect, merge, card --------------------------------------------------------------------------------------


def test_train_saves_what_is_needed_to_load(adapter):
    metrics = json.loads((adapter / "metrics.json").read_text())
    assert metrics["classes"] == ["bad", "good"] and 0 <= metrics["validation"]["accuracy"] <= 1
    assert metrics["rows"] == {"train": 54, "validation": 6} and metrics["plan"]["params_share"] <= 0.5
    assert len({path.stat().st_mode for path in adapter.iterdir()}) == 1  # a server can read the weights, too
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "config.json" not in names  # loaders would take the folder for a whole model
    assert not [name for name in names if name.endswith(".bin")], "a pickle"


def test_without_epochs_no_training_is_described(work, tmp_path):
    """The metrics and the card had a learning rate, a batch size and a training time of 0 s."""
    trim = ("--data", work / "data.tsv", "--validation-share", "0", "--budget", "0.7")
    train = ("train", work / "base", *trim, "--epochs", "0", "--out", tmp_path / "a")
    call(*train)
    text = call("trim", tmp_path / "a", *trim, "--out", tmp_path / "b")
    assert "trimmed" not in text  # there are no columns without rows
    for name in ("a", "b"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["learning_rate"] is metrics["batch_size"] is None
        call("card", tmp_path / name)
        assert not re.search("learning rate|batch size|training time", (tmp_path / name / "README.md").read_text())


def test_the_line_on_the_learning_rate_is_that_of_the_help(work, tmp_path):
    given = ("train", work / "base", "--data", work / "data.tsv", "--epochs", "0", "--out")
    said = " ".join(run(*given, tmp_path / "a", "--budget", "1").output.split())
    assert "learning rate 5e-05, the default if all heads and neurons are tuned (--lr)" in said
    said = " ".join(run(*given, tmp_path / "b", "--budget", "0.5").output.split())
    assert "the default for a dense update of" in said


def test_the_default_budget_is_noted_as_one_that_was_asked_for(work, tmp_path):
    no_rows = ("--validation-share", "0", "--epochs", "0", "--out", tmp_path / "out")
    text = call("train", work / "base", "--data", work / "data.tsv", *no_rows)
    assert "baseline" not in text  # there is no metric to compare with one
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = json.loads(call("inspect", tmp_path / "out", "--json"))
    assert metrics["budget"] == found["budget"] == {"params": 0.5} and found["plan"]["params_share"] <= 0.5
    assert "| prunable parameters kept | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads(call("plan", work / "base", "--score", "random", "--json"))["budget"] == {"params": 0.5}


def test_train_learns_and_says_so(work):
    files = ("--data", work / "data.tsv", "--validation", work / "data.jsonl", "--out", work / "learned")
    rates = ("--epochs", "25", "--lr", "3e-3", "--batch-size", "16")
    text = call("train", work / "base", *files, "--budget", "0.9", *rates, "--json")
    assert json.loads(text)["validation"]["accuracy"] > 0.9


def test_train_on_pairs_with_amounts_and_by_a_recipe(work):
    files = ("--data", work / "pairs.json", "--label-column", "score", "--out", work / "pairs")
    text = call(
        "train", work / "base", *files, "--recipe", "learners", "--epochs", "1", "--batch-size", "16", "--json"
    )
    assert set(json.loads(text)["validation"]) == {"pearson", "spearman", "mse"}


def test_precision_follows_the_hardware_unless_it_is_given(work, tmp_path, monkeypatch):
    train = ("train", work / "base", "--data", work / "data.tsv", "--budget", "1", "--epochs", "0.1", "--json")
    for pays, given, expected in ((True, (), True), (True, ("--no-bf16",), False),
                                  (False, (), False), (False, ("--bf16",), True)):  # fmt: skip
        monkeypatch.setattr(precision, "bf16_pays", lambda: pays)  # noqa: B023
        assert json.loads(call(*train, *given, "--out", tmp_path, "--overwrite"))["bf16"] is expected


def test_inspect_agrees_with_the_training(adapter):
    found = json.loads(call("inspect", adapter, "--json"))
    metrics = json.loads((adapter / "metrics.json").read_text())
    assert found["plan"] == metrics["plan"] and found["budget"] == {"params": 0.5, "trainable": 0.2}
    assert found["file_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    text = call("inspect", adapter)
    assert "params 0.5, trainable 0.2" in text and found["fingerprint"] in text
    assert "classifier" in text and "score," not in text  # PEFT's list of names that a head may have is not shown
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80


def test_inspect_without_the_base(adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nobody/nothing"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    result = run("inspect", tmp_path)
    assert result.exit_code == 0 and "heads" in result.stdout and "need the base model" in result.stderr


def test_merge_gives_a_model_that_loads(adapter, work):
    from peft_sensi.merging.load import load_merged

    found = json.loads(call("merge", adapter, work / "merged", "--json"))
    model = load_merged(work / "merged")
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]
    assert model.config.id2label == {0: "bad", 1: "good"} and (work / "merged" / "tokenizer.json").exists()


def test_export_writes_a_checked_file(adapter, work):
    pytest.importorskip("onnxruntime")
    found = json.loads(call("export", adapter, work / "out" / "model.onnx", "--json"))
    assert (work / "out" / "model.onnx").stat().st_size > 0 and found["file"]["difference"] < 1e-4
    assert found["opset"] == 17 and "input_ids" in found["inputs"]
    companion = next(Path(each) for each in found["beside"] if each.endswith(".json"))
    assert json.loads(companion.read_text())["model_class"] == "BertForSequenceClassification"


def test_the_number_of_labels_is_read_off_the_head(work):
    (work / "three.jsonl").write_text(
        "\n".join(json.dumps({"text": w, "label": f"c{i % 3}"}) for i, w in enumerate(WORDS * 3))
    )
    call("train", work / "base", "--data", work / "three.jsonl", "--budget", "0.5", "--epochs", "1", "--out",
         work / "three", "--score", "magnitude")  # fmt: skip
    without_head_settings(work / "three")
    (work / "three" / "metrics.json").unlink()
    assert json.loads(call("merge", work / "three", work / "three-merged", "--json"))["parameters"] > 0


def test_card_names_its_files(adapter):
    found = json.loads(call("card", adapter, "--license", "mit", "--results", adapter / "metrics.json", "--json"))
    assert [Path(path).name for path in found["files"]] == ["README.md", "plan.png"]
    assert "| accuracy |" in (adapter / "README.md").read_text()


def test_recipes_lists_all():
    assert [recipe["name"] for recipe in json.loads(call("recipes", "--json"))] == list(recipes.RECIPES)
    assert "learners" in call("recipes")


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_end_with_one_line_that_says_what_to_do(work, adapter, tmp_path):
    base, data = work / "base", work / "data.tsv"
    assert "a limit is a share such as 0.5" in fails("plan", base, "--data", data, "--budget", "half")
    assert "--budget must be a share in (0, 1]" in fails("plan", base, "--data", data, "--budget", "1.5")
    assert "share in (0, 1]" in fails("plan", base, "--data", data, "--budget", "0")
    small = fails("plan", base, "--score", "magnitude", "--budget", "0.01")
    assert "too small" in small and "parameters. Give a larger --budget." in small
    swept = fails("sweep", base, "--data", data, "--budgets", "0.01", "--out", tmp_path / "sweep")
    assert re.search(r"needs [\d,]*\d parameters\. Give a larger --budgets\.", swept)
    both = fails("plan", base, "--score", "magnitude", "--budget", "0.01", "--flops", "0.01")
    assert re.search(r"needs [\d,]*\d parameters, [\d,]*\d FLOPs\. Give a larger --budget or --flops\.", both)
    assert "Give --data" in fails("plan", base)
    assert "There is no folder" in fails("plan", tmp_path / "no", "--score", "magnitude")
    assert "There is no file" in fails("plan", base, "--data", tmp_path / "no.tsv")
    assert "no column 'x'" in fails("plan", base, "--data", data, "--text-column", "x")
    assert "--plot writes .png, .svg" in fails("plan", base, "--score", "magnitude", "--plot", tmp_path / "a.what")
    assert "not a file of scores" in fails("plan", base, "--scores", adapter / "adapter_model.safetensors")
    assert "holds neither of the two" in fails("inspect", tmp_path)
    shutil.copytree(adapter, tmp_path / "runs" / "first")
    assert f"such as {tmp_path / 'runs' / 'first'}" in fails("inspect", tmp_path / "runs")
    assert "not found on the Hub" in fails("inspect", "nobody/nothing")
    assert "There is no folder a/b/c/d." in fails("inspect", "a/b/c/d")
    assert "ends in .onnx" in fails("export", adapter, tmp_path / "model.pt")
    assert "tokenizer.json, which goes beside it" in fails("export", adapter, tmp_path / "tokenizer.onnx")
    tiny_model(seed=5, num_labels=2).save_pretrained(work / "other")
    assert "another base" in fails("merge", adapter, tmp_path / "m", "--base", work / "other")
    assert "not a name for a repository" in fails("push", adapter, "a b/c")
    assert "not a name for a repository" in fails("card", adapter, "--repo", "a b/c")
    assert "sensi_bert needs" in fails(
        "train", base, "--data", data, "--out", tmp_path / "o", "--recipe", "sensi_bert"
    )


@pytest.mark.parametrize("text", ["0,5", "12,5", "1,00", "0,500", "0,5%", "1,000.5", "1,0000", "1000,000", ",5", "5,"])
def test_decimal_commas_are_refused(text):
    for option in ("--budget", "--flops", "--trainable"):
        message = fails("plan", "nowhere", "--score", "magnitude", option, text)
        assert f"{option} {text}: write decimals with a point" in message


def test_times_of_the_budget():
    assert limits_of("0.5", None, None, "12ms", "40%") == {
        "params": 0.5,
        "latency": "12ms",
        "decode_latency": 0.4,
    }
    for wrong in ("12", "fast", "0ms", "1.5"):
        with pytest.raises(SensiError, match="latency"):
            limits_of(None, None, None, wrong)


def test_numbers_of_the_budget():
    counts = {
        "40000000": 40_000_000,
        "40_000_000": 40_000_000,
        "1,000,000": 10**6,
        "12,500": 12_500,
        "4e7": 40_000_000,
    }
    shares = {"0.5": 0.5, "50%": 0.5, "12.5%": 0.125, ".5": 0.5, "1.0": 1.0}
    for text, value in (counts | shares).items():
        found = number("budget", text)
        assert found == value and type(found) is type(value)
    with pytest.raises(SensiError, match="--budget half: a limit is a share"):
        number("budget", "half")


def test_wrong_arguments_are_told_from_failures(work):
    assert "No such option" in fails("plan", work / "base", "--bugdet", "0.5", status=2)
    assert "fisher" in fails("plan", work / "base", "--score", "luck", status=2)
    assert "Missing" in fails("train", work / "base", "--data", "x.tsv", status=2)


def test_debug_shows_the_traceback(work, capfd):
    result = run("plan", work / "base", "--budget", "half", "--debug")
    assert result.exit_code == 1 and "Traceback" in result.output + capfd.readouterr().err


def test_an_adapter_of_another_method(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "of the type 'LORA'" in fails("inspect", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "is not JSON" in fails("inspect", tmp_path)


def test_without_typer_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "peft_sensi.cli.commands")
    monkeypatch.delitem(sys.modules, "peft_sensi.cli.terminal")
    with pytest.raises(SystemExit, match=re.escape(f"the command needs typer: {how_to_install('cli')}")):
        main(["recipes"])


# -- data -------------------------------------------------------------------------------------------------------------


def test_files_are_read_as_they_are(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nsay "hi\t1\nnull\t0\n')
    assert read_rows(tmp_path / "a.tsv").rows == [
        {"sentence": 'say "hi', "label": "1"},
        {"sentence": "null", "label": "0"},
    ]
    (tmp_path / "a.csv").write_text('text,label\n"a, b",x\n')
    assert read_rows(tmp_path / "a.csv").rows == [{"text": "a, b", "label": "x"}]
    for name, content in {"a.txt": "x", "b.tsv": "a\tb\nc\n", "c.json": "[1]", "d.json": "{", "e.jsonl": ""}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_rows(tmp_path / name)


def test_data_that_cannot_be_meant(work, tmp_path):
    def with_rows(rows) -> str:
        (tmp_path / "d.json").write_text(json.dumps(rows))
        return fails("plan", work / "base", "--data", tmp_path / "d.json", "--budget", "0.5")

    rows = [{"text": f"a film {i}", "label": i % 2} for i in range(8)]
    assert "has no label" in with_rows([*rows, {"text": "the plot"}])
    assert "has no label" in with_rows([*rows, {"text": "the plot", "label": None}])
    assert "nothing to learn" in with_rows([row | {"label": "x"} for row in rows])
    assert "different labels" in with_rows([row | {"label": f"id{i}"} for i, row in enumerate(rows)])
    assert "no text in 'text'" in with_rows([*rows * 20, {"text": 5, "label": 1}])
    assert "labels need another one" in with_rows([{"text": "a"}])
    text = fails("plan", work / "base", "--data", work / "data.tsv", "--regression", "--budget", "0.5")
    assert "as --regression needs" in text


def test_whole_numbers_can_be_amounts(work):
    rows = [{"text": WORDS[i % 13], "label": i % 5} for i in range(40)]
    (work / "stars.json").write_text(json.dumps(rows))
    task = read_task(str(work / "base"), work / "stars.json", regression=True)
    assert task.labels.regression and {row["labels"] for row in task.train} == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert read_task(str(work / "base"), work / "stars.json").labels.names == list("01234")


def test_labels_and_columns_are_found_where_there_is_no_doubt():
    assert find_labels(["10", "2", "2"]).names == ["2", "10"]
    codes = [f"{zero}{n}" for n in range(1, 10) for zero in ("0", "")]  # equal numbers, in an order of their own
    assert find_labels(codes[::-1]).names == codes
    assert find_labels(["3.5", "2"]).regression and not find_labels(["a", "2"]).regression
    rows = [{"idx": "1", "premise": "a", "hypothesis": "b", "label": "0"}]
    assert label_columns("f", rows, []) == ["label"] and label_columns("f", rows, ["idx"]) == ["idx"]
    assert text_columns("f", rows, ["label"], None, None)[0] == ("premise", "hypothesis")
    assert text_columns("f", rows, ["idx"], "premise", None)[0] == ("premise",)
    with pytest.raises(DataError, match="both texts of a pair"):
        text_columns("f", rows, ["label"], "premise", "premise")
    with pytest.raises(DataError, match="--text-column"):
        text_columns("f", [{"a": "x", "b": "y", "c": "z", "label": "0"}], ["label"], None, None)


# -- what must not pass -----------------------------------------------------------------------------------------------


def lines_of(work, name, rows, header="sentence\tlabel") -> Path:
    path = work / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


IGNORED = {
    "plan": [
        ("--scores s --score taylor", "--score changes nothing, because s has the scores"),
        ("--scores s --priming-steps 0", "--priming-steps changes nothing"),
        ("--scores s --calibration-steps 3", "--calibration-steps changes nothing"),
        ("--score random --priming-steps 4", "because --score random reads no data"),
        ("--score random --class-weights balanced", "--class-weights changes nothing"),
        ("--score random --style dark", "--style is about the picture of --plot"),
        ("--score random --text-column a", "--text-column is about --data"),
        ("--score random --no-quotes", "--quotes is about --data"),
        ("--data a.csv --subset b", "--subset is about data sets of the Hub"),
        ("--data a.csv --split test", "--split is about data sets"),
        ("--data a.jsonl --delimiter ;", "--delimiter is about tables"),
        ("--data a.jsonl --quotes", "--quotes is about tables"),
        ("--data a.parquet --encoding utf-8", "--encoding is about text files"),
        ("--overwrite", "--overwrite is about --save-scores and --plot"),
    ],
    "train": [
        ("--scores s --score taylor", "--score changes nothing, because s has the scores"),
        ("--recipe far --scores s", "--scores changes nothing, because the recipe far"),
        ("--overwrite --resume", "leave one of them out"),
        ("--validation b.csv --validation-share 0.2", "--validation-share holds out rows"),
        ("--validation b.csv --label-separator ; --label-column a --label-column b", "need no --label-separator"),
        ("--regression --label-separator ;", "--regression predicts one number"),
        ("--label-separator=", "--label-separator needs the text"),
        ("--stride 3", "--stride changes nothing for the task text"),
        ("--task words --regression", "--regression changes nothing for the task words"),
        ("--task answers --label-column a", "--label-column changes nothing for the task answers"),
    ],
    "sweep": [("--overwrite --resume", "leave one of them out")],
    "trim": [("--overwrite --resume", "leave one of them out"), ("--lr 1e-4", "none without --heal-epochs")],
    "measure": [
        ("--export f --threads 2", "--threads is about a measurement"),
        ("--export f --runtime onnxruntime", "--runtime is about a measurement"),
        ("--against b --out t.json", "--out is about files to write"),
        ("--against b --overwrite", "--overwrite is about files to write"),
        ("--export f --overwrite", "--overwrite is about --out"),
        ("--overwrite", "--overwrite is about --out"),
    ],
}  # fmt: skip


WRITERS = {
    "plan": "plan none --score random --save-scores out/a.st",
    "plan, picture": "plan none --score random --plot out/a.png",
    "train": "train none --data a.csv --out out",
    "trim": "trim none --data a.csv --out out",
    "sweep": "sweep none --data a.csv --budgets 0.3 --out out",
    "predict": "predict none a.csv --out out/a.csv",
    "measure": "measure none --out out/a.json",
    "merge": "merge none out",
    "export": "export none out/a.onnx",
    "export, companion": "export none out/b.onnx",
    "export, int8": "export none out/c.onnx --int8",
}


@pytest.mark.parametrize("case", WRITERS)
def test_what_an_earlier_run_has_written_is_replaced_only_on_request_and_the_answer_comes_first(
    case, tmp_path, monkeypatch
):
    """The first error is about the output, although the model does not exist either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    (tmp_path / "out").mkdir()
    names = {
        "merge": ["config.json"],
        "train": ["adapter_config.json"],
        "trim": ["metrics.json"],
        "sweep": ["sweep.json"],
    }
    for name in names.get(case, ["a.st", "a.png", "a.csv", "a.json", "a.onnx", "b.json", "c.int8.onnx"]):
        (tmp_path / "out" / name).write_text("{}")
    assert "--overwrite" in fails(*WRITERS[case].split())
    message = fails(*WRITERS[case].split(), "--overwrite")
    assert "none" in message and "--overwrite" not in message
    assert all(path.read_text() == "{}" for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", ["train", "trim", "sweep"])
def test_what_is_made_does_not_become_rows(command, work, tmp_path):
    """All files of a folder of rows are read. With JSON files of a model in it, no command could read it again."""
    (tmp_path / "reviews.tsv").write_text((work / "data.tsv").read_text())
    budget = ("--budgets", "0.5,0.7") if command == "sweep" else ("--budget", "0.5")
    for data in ([tmp_path], [work / "data.tsv", "--validation", tmp_path]):
        text = fails(command, work / "base", "--data", *data, *budget, "--out", tmp_path)
        assert "is the folder of the rows" in text and "or a new folder in it" in text
    assert [path.name for path in tmp_path.iterdir()] == ["reviews.tsv"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sweep.json", "has the results of another run (sweep.json)"),  # the sweep's scores would be replaced
        ("checkpoint-500/trainer_state.json", "has the results of another run (checkpoint-500)"),  # removed
        ("checkpoint-7/model.safetensors", "has the results of another run (checkpoint-7)"),
        ("tokenizer.json", "has the results of another run (tokenizer.json)"),  # replaced by that of the base
        ("vocab.txt", "has the results of another run (vocab.txt)"),  # as those of slow tokenizers would be
        ("config.json", "holds a model, or a part of one (config.json)"),
    ],
)
def test_a_training_spoils_no_results_of_something_else(name, words, tmp_path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for command in ("train", "trim"):
        line = (command, "none", "--data", "a.csv", "--budget", "0.3", "--out", tmp_path / "out")
        assert words in fails(*line)
        assert ("holds a model" in fails(*line, "--overwrite")) is (name == "config.json")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")  # an older version has written both
    assert "none" in fails(*line, "--overwrite")
    assert path.read_text() == "{}"


def test_other_files_that_a_command_would_replace(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    train = ("train", "none", "--data", "a.csv", "--budget", "0.3", "--out", out)
    sweep = ("sweep", "none", "--data", "a.csv", "--budgets", "0.3", "--out", out)
    merge = ("merge", "none", out)
    for name, line in (
        ("scores.safetensors", train), ("scores.safetensors", sweep), ("sweep.png", sweep),
        ("metrics.json", merge), ("tokenizer.json", merge), ("tokenizer_config.json", merge),
    ):  # fmt: skip
        (out / name).write_text("{}")
        said = fails(*line)
        assert name in said and "--overwrite" in said
        assert name not in fails(*line, "--overwrite")
        (out / name).unlink()
    (out / "scores.safetensors").write_text("{}")
    assert "is not a whole safetensors file" in fails(*train, "--scores", out / "scores.safetensors")  # stays


def test_folders_that_are_no_checkpoints_of_trainer_stay(tmp_path):
    for name in ("checkpoint-5", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 9}')
    (tmp_path / "unfinished.json").write_text("{}")
    (tmp_path / "moved").mkdir()  # to another disk
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "moved", target_is_directory=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    remove_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "moved", "unfinished.json"]


def test_a_merge_over_another_model_leaves_none_of_its_metrics(adapter, tmp_path):
    call("merge", adapter, tmp_path / "merged")
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / "metrics.json").unlink()
    call("merge", copy, tmp_path / "merged", "--overwrite")
    assert not (tmp_path / "merged" / "metrics.json").exists()


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    assert "a device or a pipe" in fails("predict", "none", "a.csv", "--out", tmp_path / "pipe.csv", "--overwrite")
    with pytest.raises(SensiError, match="a device or a pipe"):
        write_text_atomically(tmp_path / "pipe.csv", "a")
    assert (tmp_path / "pipe.csv").is_fifo()


@pytest.mark.parametrize(
    ("command", "options", "message"), [(c, *case) for c, cases in IGNORED.items() for case in cases]
)
def test_an_option_that_would_change_nothing_is_refused(command, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("text,label\na film,1\nthe film,0\n")
    more = {"train": "--out new", "sweep": "--budgets 0.5 --out new", "trim": "--out new"}.get(command, "")
    data = "--data a.csv" if command in ("train", "sweep", "trim") else ""
    assert message in fails(command, "nowhere", *options.split(), *more.split(), *data.split())
    assert not Path("new").exists() and not Path("t.json").exists()


def test_only_trainings_run_in_several_processes(adapter, tmp_path, monkeypatch):
    """All other commands run in the first process: two that write one file would spoil it."""
    for rank in "10":
        for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        result = run("card", adapter, "--out", tmp_path / rank)
        assert result.exit_code == 0, result.output
        assert (tmp_path / rank / "README.md").exists() is (rank == "0")
        assert f"process {rank} of 2: this command runs in process 0 only" in result.output


def test_train_refuses_what_it_would_ignore_or_spoil(work):
    data = ("--data", work / "data.tsv", "--out", work / "never")
    assert "one limit" in fails(
        "train", work / "base", *data, "--recipe", "sensi_bert", "--budget", "0.9", "--flops", "0.4"
    )
    assert "one limit" in fails("train", work / "base", *data, "--recipe", "sensi_bert", "--trainable", "0.1")
    assert "--score" in fails("train", work / "base", *data, "--recipe", "far", "--score", "magnitude")
    assert "--lr" in fails("train", work / "base", *data, "--budget", "0.5", "--lr", "nan")
    assert "holds a model" in fails("train", work / "base", "--data", work / "data.tsv", "--out", work / "base")
    assert not (work / "never").exists()


def test_holes_among_the_labels_are_found(work):
    rows = [f"good film\t{i % 2}" for i in range(30)]
    for hole in ("nan", "NaN", ""):
        data = lines_of(work, "holes.tsv", [*rows, f"a film\t{hole}"])
        assert "no label" in fails("plan", work / "base", "--data", data, "--budget", "0.5", *FAST)
    data = lines_of(work, "infinite.tsv", [*(f"good film\t{i / 7}" for i in range(30)), "a film\tinf"])
    assert "different labels" in fails("plan", work / "base", "--data", data, "--budget", "0.5", *FAST)
    held = lines_of(work, "held.tsv", ["a film\tnan", "the film\t1.5"])
    amounts = lines_of(work, "amounts.tsv", [f"good film\t{i / 7}" for i in range(30)])
    text = fails("train", work / "base", "--data", amounts, "--validation", held, "--out", work / "never")
    assert "held.tsv: row 1 has no label" in text


@pytest.mark.parametrize("seed", range(4))
def test_the_only_row_of_a_class_is_trained_on(work, seed):
    data = lines_of(work, "rare.tsv", [*(f"good film\t{i % 2}" for i in range(30)), "bad plot\t2"])
    task = read_task(str(work / "base"), data, seed=seed)
    assert len(task.validation) == 3 and 2 in {row["labels"] for row in task.train}


def test_files_of_odd_shapes(work):
    data = lines_of(work, "twice.csv", ["a,b,1"] * 4, "text,text,label")
    assert "two columns 'text'" in fails("plan", work / "base", "--data", data, "--budget", "0.5")
    data = lines_of(work, "long.csv", [f"{'good ' * 40_000},0", "bad film,1"] * 4, "text,label")
    assert len(read_rows(data).rows) == 8
    (work / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    assert "cannot be read" in fails("plan", work / "base", "--data", work / "deep.json", "--budget", "0.5")


def test_one_row_of_validation_does_not_lose_the_training(work):
    amounts = lines_of(work, "few.tsv", [f"good film\t{i / 7}" for i in range(16)])
    held = lines_of(work, "one.tsv", ["a film\t1.5"])
    out = work / "one"
    text = call("train", work / "base", "--data", amounts, "--validation", held, "--out", out, "--budget", "0.5",
                "--epochs", "1", "--batch-size", "8", "--json")  # fmt: skip
    assert json.loads(text)["validation"]["spearman"] is None
    assert json.loads((out / "metrics.json").read_text())["validation"]["pearson"] is None
    assert "undefined" in call("train", work / "base", "--data", amounts, "--validation", held, "--out", out,
                               "--budget", "0.5", "--epochs", "1", "--batch-size", "8", "--overwrite")  # fmt: skip


def test_a_config_beside_an_adapter_imports_nothing(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "evil")
    without_head_settings(tmp_path / "evil")
    marker = tmp_path / "marker"
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for values in (
        {"model_type": "zzz", "auto_map": {"AutoConfig": "evil.Evil"}},
        {"model_type": "bert", "id2label": [1], "num_labels": "x"},
        {"model_type": "bert", "num_labels": 10**9, "problem_type": 5, "pad_token_id": "x"},
        [],
    ):
        (tmp_path / "evil" / "config.json").write_text(json.dumps(values))
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "evil"), "--json"], input="y\n")
        assert result.exit_code == 0 and json.loads(result.stdout)["plan"], result.output
        result = run("merge", tmp_path / "evil", tmp_path / "merged", "--overwrite")
        assert result.exit_code == 0 or "The tokenizer of" in result.output, result.output
        assert not marker.exists()


def test_a_decoder_keeps_its_pad_token_when_it_is_merged(work, tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from peft_sensi.merging.load import load_merged

    vocabulary = len((work / "vocab.txt").read_text().split())
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=None)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    BertTokenizerFast(str(work / "vocab.txt")).save_pretrained(tmp_path / "base")
    options = ("--budget", "0.9", "--epochs", "1", "--batch-size", "8", "--out", tmp_path / "adapter")
    call("train", tmp_path / "base", "--data", work / "data.tsv", *options)
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    assert load_merged(tmp_path / "merged").config.pad_token_id == 0


def test_a_decoder_gets_the_pad_token_that_was_added_to_it(tmp_path):
    """The embeddings of the base do not have this token, so its class could not be built with it."""
    LlamaForSequenceClassification(tiny_config("llama", pad_token_id=None)).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 1)
    base.config.pad_token_id = VOCABULARY
    wrap(base, budget=0.5, task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    assert load_adapter(open_adapter(tmp_path / "adapter")).config.pad_token_id == VOCABULARY


def test_a_merged_decoder_whose_tokenizer_pads_with_another_token(work, tmp_path):
    """Then its predictions would depend on the other rows of a batch."""
    vocabulary = len((work / "vocab.txt").read_text().split())
    config = tiny_config("llama", vocab_size=vocabulary, pad_token_id=5)
    save_merged(LlamaForSequenceClassification(config), tmp_path)
    BertTokenizerFast(str(work / "vocab.txt")).save_pretrained(tmp_path)
    predictor = open_predictor(str(tmp_path))
    raw = [{"row": 1, "text": text} for text in ("good", "good bad good bad good bad", "bad good")]
    rows = texts.encode("", raw, None, predictor.tokenizer, 64)[0]
    found = [predictor.outputs(rows, batch_size) for batch_size in (1, 3)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_many_classes_keep_their_names(work, tmp_path):
    from peft_sensi.merging.load import load_merged

    data = lines_of(work, "many.tsv", [f"{WORDS[i % 13]} film\tclass {i % 12}" for i in range(120)])
    options = ("--budget", "0.9", "--epochs", "0.1", "--batch-size", "8", "--out", tmp_path / "adapter")
    call("train", work / "base", "--data", data, *options)
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    names = sorted({f"class {i}" for i in range(12)})
    assert load_merged(tmp_path / "merged").config.id2label == dict(enumerate(names))


@pytest.mark.parametrize(("count", "budget"), [(3, {"trainable": 0.2}), (12, 0.5)])
def test_names_of_the_bases_labels_survive_merge_and_export(tmp_path, count, budget):
    """In an adapter of the first versions that was saved in Python, nothing names them."""
    names = dict(enumerate(f"name {i}" for i in range(count)))
    tiny_model(id2label=names, label2id={name: i for i, name in names.items()}, num_labels=count).save_pretrained(
        tmp_path / "base"
    )
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    wrap(base, budget=budget).save_pretrained(tmp_path / "adapter")
    without_head_settings(tmp_path / "adapter")
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    # As lists: programs read the names in the order of the file.
    assert list(config["id2label"].items()) == [(str(i), name) for i, name in names.items()]
    assert config["label2id"] == {name: i for i, name in names.items()}
    onnxruntime = pytest.importorskip("onnxruntime")
    call("export", tmp_path / "adapter", tmp_path / "model.onnx", "--int8")
    for file in ("model.onnx", "model.int8.onnx"):
        metadata = onnxruntime.InferenceSession(tmp_path / file).get_modelmeta().custom_metadata_map
        assert list(json.loads(metadata["id2label"]).values()) == list(names.values())


def test_an_adapter_for_other_labels_does_not_get_the_bases_names(tmp_path):
    tiny_model(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, num_labels=2).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    wrap(base, budget=0.5).save_pretrained(tmp_path / "adapter")
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(5)}


def test_trim_an_adapter_and_a_finetuned_model(work, tmp_path):
    train = ("--data", work / "data.tsv", "--validation", work / "data.jsonl", "--batch-size", "16", "--lr", "3e-3")
    call("train", work / "base", *train, "--budget", "1", "--epochs", "20", "--out", tmp_path / "whole")
    trim = ("--data", work / "data.tsv", "--validation", work / "data.jsonl", "--batch-size", "16", "--budget", "0.5")
    found = json.loads(call("trim", tmp_path / "whole", *trim, "--out", tmp_path / "half", "--json"))
    assert found["validation_before"]["accuracy"] > 0.9 and found["plan"]["params_share"] <= 0.5
    assert found["validation_trimmed"] == found["validation"]
    again = json.loads(call("inspect", tmp_path / "half", "--json"))
    assert again["plan"] == found["plan"] and again["budget"] == {"params": 0.5}

    # The merged model has other numbers for its labels than the file would give them.
    call("merge", tmp_path / "whole", tmp_path / "merged")
    shutil.rmtree(tmp_path / "fine", ignore_errors=True)
    model = load_merged(tmp_path / "merged")
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            tensor.copy_(tensor.flip(0))
    model.config.id2label, model.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    model.save_pretrained(tmp_path / "fine")
    BertTokenizerFast.from_pretrained(work / "base").save_pretrained(tmp_path / "fine")
    text = call("trim", tmp_path / "fine", *trim, "--heal-epochs", "2", "--out", tmp_path / "healed")
    assert "before" in text and " trimmed " in text and "after 2 epochs" in text
    metrics = json.loads((tmp_path / "healed" / "metrics.json").read_text())
    assert metrics["validation_before"] == found["validation_before"]
    assert metrics["classes"] == ["good", "bad"]


def test_a_model_that_has_learned_nothing_is_named(work, tmp_path):
    """Its metric alone may look fine: always the most frequent class is right in most rows of many files."""
    rare = lines_of(work, "rare.tsv", [f"good film\t{('yes', 'no')[i % 5 == 0]}" for i in range(40)])
    data = ("--data", rare, "--budget", "0.5", "--validation-share", "0.25")
    said = run("train", work / "base", *data, "--epochs", "1", "--lr", "1e-7", "--out", tmp_path / "a").stderr
    assert "than the baseline (always the most frequent class). Give a higher --lr" in " ".join(said.split())
    said = run("trim", tmp_path / "a", *data[:2], "--budget", "0.25", "--out", tmp_path / "b").stderr
    assert "Fine-tune it before the trim" in said and "--heal-epochs" not in said
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert len(metrics["validation_remarks"]) == 1
    # A smaller squared error is better, and an undefined correlation is none.
    assert not beats_baseline({"accuracy": 0.8, "matthews_correlation": 0.0}, {"accuracy": 0.8})
    assert beats_baseline({"f1": 0.1, "tag_accuracy": 0.7}, {"f1": 0.0, "tag_accuracy": 0.8})
    assert beats_baseline({"pearson": None, "mse": 0.4}, {"pearson": None, "mse": 0.5})
    assert not beats_baseline({"pearson": None, "mse": 0.6}, {"pearson": None, "mse": 0.5})


def test_trim_refuses_other_labels(work, adapter, tmp_path):
    other = lines_of(work, "other.tsv", [f"good film\t{('yes', 'no')[i % 2]}" for i in range(30)])
    out = ("--out", tmp_path / "out")
    assert "the model's labels are bad, good" in fails("trim", adapter, "--data", other, *out)
    assert "3 outputs" in fails("trim", work / "base", "--data", work / "data.tsv", *out)
    assert "numbers as labels" in fails(
        "trim", adapter, "--data", work / "pairs.json", "--label-column", "score", *out
    )


def test_train_thorough(work, tmp_path):
    files = ("--data", work / "data.tsv", "--validation", work / "data.jsonl", "--batch-size", "16")
    text = call("train", work / "base", *files, "--budget", "0.5", "--thorough", "--epochs", "12", "--lr", "3e-3",
                "--out", tmp_path, "--json")  # fmt: skip
    found = json.loads(text)
    assert found["thorough"] and found["plan"]["params_share"] <= 0.5 and found["validation"]["accuracy"] > 0.9
    assert "--thorough" in fails("train", work / "base", *files, "--thorough", "--recipe", "far", "--out", tmp_path)


def test_train_late(work, tmp_path):
    files = ("--data", work / "data.tsv", "--validation", work / "data.jsonl", "--batch-size", "16")
    late = ("train", work / "base", *files, "--late", "--out", tmp_path)
    found = json.loads(call(*late, "--budget", "0.5", "--epochs", "12", "--lr", "3e-3", "--json"))
    assert found["late"] and found["plan"]["params_share"] <= 0.5 and found["validation"]["accuracy"] > 0.9
    for others in (["--thorough"], ["--recipe", "far"], ["--trainable", "0.1"], ["--early-stopping", "1"]):
        assert "--late" in fails(*late, "--overwrite", *others)
    assert "--late would trim nothing" in fails(*late, "--overwrite", "--budget", "100%")


# -- folders that go in and out ---------------------------------------------------------------------------------------


def test_an_old_adapter_is_named_by_the_config_beside_it(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "old")
    without_head_settings(tmp_path / "old")
    tiny_config("bert", num_labels=2, id2label={0: "no", 1: "yes"}).save_pretrained(tmp_path / "old")
    call("merge", tmp_path / "old", tmp_path / "merged")
    assert load_merged(tmp_path / "merged").config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("after", [False, True])
def test_an_adapter_that_was_saved_in_python_keeps_the_names(work, tmp_path, after):
    names = {i: f"name {i}" for i in range(12)}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    base = AutoModelForSequenceClassification.from_pretrained(
        work / "base", ignore_mismatched_sizes=True, **({"num_labels": 12} if after else labels)
    )
    model = wrap(base, budget=0.5)
    if after:
        model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "adapter")
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    config = load_merged(tmp_path / "merged").config
    assert list(config.id2label.items()) == list(names.items()) and config.label2id == labels["label2id"]
    assert config.problem_type == "multi_label_classification"


def test_the_folder_of_an_adapter_opens_where_that_of_lora_does(work, tmp_path):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
    from transformers import AutoTokenizer, pipeline

    AutoModelForSequenceClassification.from_pretrained(
        work / "base", num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path / "base")
    BertTokenizerFast.from_pretrained(work / "base").save_pretrained(tmp_path / "base")
    ours, lora = tmp_path / "ours", tmp_path / "lora"
    (tmp_path / "ours").mkdir()
    tiny_config("bert").save_pretrained(ours)  # of a run of the first versions
    (ours / "adapter_config.json").write_text("{}")
    data = ("--data", work / "data.tsv", "--budget", "0.5", "--epochs", "1")
    call("train", tmp_path / "base", *data, "--out", ours, "--overwrite")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(lora)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(lora)
    batch = AutoTokenizer.from_pretrained(ours)(["good film", "the bad story"], padding=True, return_tensors="pt")
    for folder in (ours, lora):
        with torch.no_grad():
            expected = AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()(**batch).logits
            found = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch).logits
        assert torch.allclose(found, expected, atol=1e-6)
        answer = pipeline("text-classification", model=str(folder))("good film")[0]
        assert answer["score"] == pytest.approx(expected.softmax(-1)[0].max().item(), abs=1e-5)


@pytest.fixture(scope="module")
def merged(work, adapter) -> Path:
    call("merge", adapter, work / "merged-record")
    return work / "merged-record"


def test_a_merged_model_is_a_base_for_every_command(work, merged, tmp_path):
    first = load_merged(merged)
    data = ("--data", work / "data.tsv")
    found = json.loads(call("plan", merged, *data, "--budget", "0.5", "--json", *FAST))
    assert found["plan"]["params_share"] <= 0.5
    more = lines_of(work, "four.tsv", [f"{WORDS[i % 13]} film\tclass {i % 4}" for i in range(60)])
    for name, file in (("same", work / "data.tsv"), ("other", more)):
        options = ("--data", file, "--budget", "0.6", "--epochs", "1", "--batch-size", "16")
        call("train", merged, *options, "--out", tmp_path / name)
        known = json.loads(call("inspect", tmp_path / name, "--json"))
        assert known["base_model"] == str(merged) and 0 < known["plan"]["params_share"] <= 0.6
        call("card", tmp_path / name)
        call("merge", tmp_path / name, tmp_path / f"{name}-merged")
        second = load_merged(tmp_path / f"{name}-merged")
        assert second.num_parameters() < first.num_parameters()
        classes = ["bad", "good"] if name == "same" else [f"class {i}" for i in range(4)]
        assert list(second.config.id2label.values()) == classes
    call("trim", merged, *data, "--budget", "0.5", "--out", tmp_path / "trimmed")
    call("merge", tmp_path / "trimmed", tmp_path / "small", "--base", merged)
    call("trim", tmp_path / "trimmed", *data, "--budget", "0.45", "--out", tmp_path / "again")
    call("export", tmp_path / "again", tmp_path / "model.onnx")
    assert load_merged(tmp_path / "small").num_parameters() < first.num_parameters()


def test_a_merged_encoder_is_a_base_for_a_classifier(work, tmp_path):
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(work / "base")
    peft_sensi.save_merged(wrap(encoder, budget=0.5, task_type="FEATURE_EXTRACTION"), tmp_path / "encoder")
    BertTokenizerFast.from_pretrained(work / "base").save_pretrained(tmp_path / "encoder")
    options = ("--data", work / "data.tsv", "--budget", "0.6", "--epochs", "1", "--batch-size", "16")
    call("train", tmp_path / "encoder", *options, "--out", tmp_path / "adapter")
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    assert type(load_merged(tmp_path / "merged")).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize("how", ["trained tokens", "whole embeddings", "tokenizer only"])
def test_merge_of_an_adapter_with_added_tokens(work, tmp_path, how):
    base = AutoModelForSequenceClassification.from_pretrained(work / "base")
    tokenizer = BertTokenizerFast.from_pretrained(work / "base")
    tokenizer.add_tokens([f"<new{i}>" for i in range(70)])
    base.resize_token_embeddings(len(tokenizer))
    rows = len(tokenizer)
    ids = torch.arange(rows)[None]
    batch = {"input_ids": ids[:, -30:], "attention_mask": torch.ones_like(ids[:, -30:])}
    options = {"budget": 0.5}
    if how == "trained tokens":
        options |= {"also_train": ["tokens"], "calibration": [{**batch, "labels": torch.tensor([0])}]}
    elif how == "tokenizer only":
        options |= {"also_train": []}
    model = wrap(base, **options)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=how == "whole embeddings")
    if how == "tokenizer only":
        tokenizer.save_pretrained(tmp_path / "adapter")
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    merged = load_merged(tmp_path / "merged")
    assert merged.config.vocab_size == rows
    if how != "tokenizer only":
        with torch.no_grad():
            assert torch.allclose(merged(**batch).logits, model.eval()(**batch).logits, atol=1e-5)


def test_an_adapter_whose_plan_has_no_units_has_a_card(adapter, tmp_path):
    from safetensors.torch import load, save_file

    from peft_sensi.tuner.checkpoint import PLAN_KEY, plan_to_tensor

    folder = shutil.copytree(adapter, tmp_path / "empty", ignore=shutil.ignore_patterns("README.md", "plan.png"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["plan"]["groups"] = {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load((folder / "adapter_model.safetensors").read_bytes())
    tensors[f"base_model.model.{PLAN_KEY}"] = plan_to_tensor(config["plan"])
    save_file(tensors, folder / "adapter_model.safetensors")
    call("card", folder)
    assert "its plan has no units." in (folder / "README.md").read_text() and not (folder / "plan.png").exists()
    call("inspect", folder)
    assert json.loads(call("inspect", folder, "--json"))["plan"]["groups"] == []
    assert "plan" in fails("merge", folder, tmp_path / "merged")
