"""Cards: what they say, and that the code in them runs and prints what a reader expects."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from folders import NAMES, save_adapter
from hub_cache import add_model, use
from huggingface_hub import EvalResult, ModelCard
from tiny import tiny_model, wrap
from typer.testing import CliRunner

from peft_sensi import SensiError, save_merged
from peft_sensi.cli.commands import app
from peft_sensi.reporting.card import write_card
from peft_sensi.reporting.card_files import keep_words
from peft_sensi.reporting.results import model_index
from peft_sensi.reporting.saved_merged import SavedMerged, open_saved
from peft_sensi.utils.files import write_atomically


METRICS = {
    "model": "me/base",
    "validation": {"accuracy": 0.875, "f1_macro": 0.5},
    "rows": {"train": 54, "validation": 6},
    "learning_rate": 1e-4,
    "epochs": 3,
    "seed": 7,
    "recipe": None,
    "data_sha256": {"train.tsv": "ab12", "/somewhere/test.tsv": "cd34"},
    "seconds": {"training": 61.2},
    "versions": {"peft_sensi": "0.1.0", "torch": "2.9.0"},
    "task": {"kind": "text", "max_length": 32, "text_columns": ["text"]},
}


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    save_adapter(folder, names=NAMES, metrics=METRICS)
    (folder / "merged" / "metrics.json").write_text(json.dumps(METRICS))
    return folder


def execute(card: Path, place: Path, capsys, monkeypatch) -> str:
    """Runs the Python of a card where a reader would, and returns what it prints."""
    code = card.read_text().split("```python\n")[1].split("```")[0]
    assert str(place) not in code
    monkeypatch.chdir(place)
    exec(compile(code.replace("path/to/base", "base"), str(card), "exec"), {})
    return capsys.readouterr().out


def test_a_card_needs_no_arguments_and_says_what_was_done(folder):
    run("card", folder / "adapter")
    card = ModelCard.load(folder / "adapter" / "README.md")
    text = card.text
    assert text.strip().startswith("# adapter\n") and "| accuracy | 0.875 |" in text
    for line in ("| data | `train.tsv`, `test.tsv` |", "| epochs | 3 |", "| learning rate | 0.0001 |", "| seed | 7 |",
                 "| training time | 61 s |", "| versions | peft_sensi 0.1.0, torch 2.9.0 |"):  # fmt: skip
        assert line in text, line
    assert "recipe" not in text and "None" not in text and "/somewhere" not in text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert card.data.model_name == "adapter" and results["accuracy"].metric_value == 0.875
    assert results["accuracy"].dataset_name == "test.tsv" and results["accuracy"].task_type == "text-classification"


def test_results_and_base_of_an_earlier_adapter_leave_the_card_and_those_of_the_user_stay(folder, tmp_path):
    place = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    card, mine = place / "README.md", EvalResult("text-classification", "me/t", "my test", "accuracy", 0.777)
    run("card", place, "--base", "someone/base")
    written = ModelCard.load(card)
    assert {r.metric_type for r in written.data.eval_results} == {"accuracy", "f1_macro"}
    assert written.data.base_model == "someone/base"
    written.data.eval_results.append(mine)
    written.save(card)
    run("card", place, "--base", "someone/base")
    again = ModelCard.load(card).data.eval_results
    assert len(again) == 3 and mine.metric_value in {r.metric_value for r in again}
    (place / "metrics.json").unlink()
    run("card", place)
    last = ModelCard.load(card)
    assert [(r.dataset_name, r.metric_value) for r in last.data.eval_results] == [("my test", 0.777)]
    assert last.data.get("base_model") is None and "someone/base" not in last.content


def test_an_upload_without_a_card_leaves_no_results_of_another_adapter_on_the_hub(folder, tmp_path):
    former = shutil.copytree(folder / "adapter", tmp_path / "adapter") / "README.md"
    run("card", former.parent)
    card = ModelCard.load(former)
    card.data.eval_results.append(EvalResult("text-classification", "me/t", "my test", "accuracy", 0.777))
    card.save(former)
    keep_words(tmp_path / "README.md", former, "me/adapter", [])
    assert [result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results] == [0.777]


@pytest.mark.parametrize(
    ("found", "name"),
    [(["dev.tsv"], "dev.tsv"), ([], "train.tsv, test.tsv (held-out rows)"), (["me/set (test)"], "me/set (test)")],
)
def test_a_card_says_which_rows_were_measured(found, name):
    results = model_index({**METRICS, "validation_data": found}, "text-classification")
    assert {result.dataset_name for result in results} == {name}


def test_the_title_is_the_name_of_the_repository(folder, tmp_path, monkeypatch):
    run("card", folder / "adapter", "--repo", "me/reviews", "--out", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "\n# reviews\n" in text and 'PeftModel.from_pretrained(base, "me/reviews")' in text
    shutil.copytree(folder / "adapter", tmp_path / "adapter")  # with the card that saving has written
    run("card", tmp_path / "adapter", "--repo", "me/reviews")
    assert "\n# reviews\n" in (tmp_path / "adapter" / "README.md").read_text()
    monkeypatch.chdir(folder / "adapter")
    run("card", ".", "--out", tmp_path / "here")
    assert "\n# adapter\n" in (tmp_path / "here" / "README.md").read_text()


def test_a_card_has_no_empty_tables(tmp_path):
    save_adapter(tmp_path)
    write_card(open_saved(tmp_path / "adapter"))
    lines = (tmp_path / "adapter" / "README.md").read_text().splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert tables and all(lines[i + 1].startswith("| ") for i in tables)
    assert "## Training" not in lines and "## Results" not in lines and "\n\n\n" not in "\n".join(lines)


def test_a_picture_for_which_there_is_no_room_is_not_passed_over_in_silence(tmp_path, monkeypatch):
    save_adapter(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.warns(UserWarning, match=r"no picture: .*plan\.png could not be written \(.*No space left"):
        write_card(open_saved(tmp_path / "adapter"))
    assert "plan.png" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_file_system_that_is_read_only_is_named_and_not_a_temporary_file(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(SensiError, match=r"a\.json could not be written"):
        write_atomically(tmp_path / "a.json", refuse)


@pytest.mark.parametrize("which", ["adapter", "merged"])
def test_whoever_loads_as_the_card_says_sees_the_names_of_classes(folder, which, capsys, monkeypatch):
    run("card", folder / which)
    printed = execute(folder / which / "README.md", folder, capsys, monkeypatch)
    assert printed.strip().splitlines()[-1] in NAMES


@pytest.mark.parametrize(
    ("task", "names", "problem", "kind"),
    [
        ("SEQ_CLS", None, "regression", float),
        ("SEQ_CLS", ["a", "b"], "multi_label_classification", list),
        ("TOKEN_CLS", ["O", "B-x", "I-x"], None, list),
        ("QUESTION_ANS", None, None, str),
    ],
)
def test_the_code_of_other_tasks_runs(tmp_path, task, names, problem, kind, capsys, monkeypatch):
    save_adapter(tmp_path, task, names, problem)
    for which in ("adapter", "merged"):
        write_card(open_saved(tmp_path / which))
        printed = execute(tmp_path / which / "README.md", tmp_path, capsys, monkeypatch).strip()
        value = printed if kind is str else kind(eval(printed))
        assert isinstance(value, kind)
        if task == "TOKEN_CLS":
            assert {name for _, name in value} <= set(names)


def test_the_card_of_a_merged_model(folder):
    run("card", folder / "merged", "--license", "mit")
    card = ModelCard.load(folder / "merged" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model == "me/base"
    assert "base_model:finetune:me/base" in card.data.tags and "| accuracy | 0.875 |" in card.text
    assert "load_merged" in card.text and "PeftModel" not in card.text and os.fspath(folder) not in card.text
    assert "BertForSequenceClassification, made from `me/base` with `peft_sensi`: the attention heads" in card.text
    assert "pruning" in card.data.tags


def test_the_card_of_a_merged_model_that_was_not_trimmed_does_not_say_so(tmp_path):
    save_merged(wrap(tiny_model(), budget=None, update="low_rank", rank=2), tmp_path / "merged")
    run("card", tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "an adapter was merged into its weights" in card.text and "smaller" not in card.text
    assert "pruning" not in card.data.tags


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MarianMTModel"])
def test_the_task_of_a_merged_encoder_decoder_is_known(name):
    assert SavedMerged("x", Path(), {"architectures": [name]}, "", {}, 0).task == "SEQ_2_SEQ_LM"


def test_a_card_of_an_adapter_on_the_hub_is_not_written_into_the_cache(folder, tmp_path, monkeypatch):
    add_model(tmp_path / "cache", "me/reviews", folder / "adapter")
    use(tmp_path / "cache", monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["card", "me/reviews"])
    assert result.exit_code == 1 and "give a folder for the card with --out" in result.stderr
    run("card", "me/reviews", "--out", tmp_path / "here")
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before
    assert "\n# reviews\n" in (tmp_path / "here" / "README.md").read_text()


def test_a_picture_of_the_users_is_not_replaced(folder, tmp_path):
    (tmp_path / "plan.png").write_bytes(b"mine")
    (tmp_path / "README.md").write_text("# My project\n")
    command = ["card", str(folder / "adapter"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "plan.png belongs to no card of this command" in result.stderr
    assert (tmp_path / "plan.png").read_bytes() == b"mine" and "sensi" not in (tmp_path / "README.md").read_text()
    (tmp_path / "plan.png").unlink()
    run(*command)
    run(*command)  # a card of its own is written again, with its picture
    assert (tmp_path / "plan.png").read_bytes() != b"mine"


def test_a_base_in_a_folder_of_another_system_is_named_without_its_path(folder, tmp_path):
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "D:\\clients\\acme\\small-bert"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    run("card", copy)
    text = (copy / "README.md").read_text()
    assert "path/to/small-bert" in text and "acme" not in text


def test_a_copy_of_the_base_is_read_and_the_base_of_the_hub_is_named(folder, tmp_path):
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    local, config["base_model_name_or_path"] = config["base_model_name_or_path"], "someone/small-bert"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    run("card", copy, "--base", local)
    text = (copy / "README.md").read_text()
    assert text.count("someone/small-bert") >= 3 and str(local) not in text and "path/to" not in text
    assert "prunable FLOPs kept" in text, "the costs come from the copy"
