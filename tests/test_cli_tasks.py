"""The command `train` for every kind of task, and that it neither loses work nor does work in vain."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import command
import pandas
import pytest
import torch
from command import fails, run
from interruptions import Signal, assert_same_adapter, interrupted
from processes import run_code
from safetensors.torch import load_file, save_file
from tiny import made_up_table, only_slow, some_slow, tiny_config, wrap
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from peft_sensi import Scores, SensiError, SensiModel, load_merged
from peft_sensi.anatomy.build import build_anatomy
from peft_sensi.anatomy.latency_points import kinds_of, points_of, table_from
from peft_sensi.cli import run as run_module
from peft_sensi.cli import train as train_module
from peft_sensi.cli.run import Run
from peft_sensi.cli.stopping import StopAfterStep
from peft_sensi.reporting.saved import open_adapter
from peft_sensi.reporting.task_record import saved_record
from peft_sensi.tasks.class_weights import balanced_weights
from peft_sensi.tasks.task import Task
from peft_sensi.tuner import decision
from peft_sensi.utils.timing import Timing


WORDS = "the city of is in lives and red green blue stone ann bob york rome who where good bad".split()
SHORT = ["--epochs", "1", "--batch-size", "8"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny encoder with a tokenizer, and a file for each kind of task."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "base")
    AutoModel.from_config(tiny_config("bert")).save_pretrained(folder / "base")
    generator = random.Random(0)
    names, places = ["ann", "bob"], ["york", "rome"]
    sentences, articles, texts = [], [], []
    for i in range(40):
        name, place = generator.choice(names), generator.choice(places)
        sentences.append(f"{name} B-person\nlives O\nin O\n{place} B-place\n" + "red O\n" * (i % 3))
        context = f"the stone is red . {name} lives in {place} and the city is {generator.choice(WORDS[7:10])}"
        answer = {"text": place, "answer_start": context.index(place)}
        qas = [{"id": str(i), "question": f"where lives {name}", "answers": [answer] if i % 5 else []}]
        articles.append({"title": str(i), "paragraphs": [{"context": context, "qas": qas}]})
        word = ("bad", "good")[i % 4 == 0]
        texts.append({"sentence": f"the {place} is {word}", "label": word, "tags": [word, place]})
    (folder / "rows.conll").write_text("\n".join(sentences))
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in texts))
    (folder / "texts.csv").write_text("sentence,label\n" + "".join(f"{r['sentence']},{r['label']}\n" for r in texts))
    return folder


def call(*arguments) -> dict:
    return json.loads(command.call(*arguments, "--json"))


# -- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [[], ["--thorough"], *only_slow(["--early-stopping", "1"])])
def test_mixed_precision_does_not_round_the_metrics(way, work, tmp_path):
    """Rounded predictions have ties, so that a rank correlation was undefined, and `evaluate` found another one."""
    rows = [{"text": f"the {word} is {WORDS[-i]}", "score": i / 7} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--data", tmp_path / "rows.jsonl", "--validation", tmp_path / "rows.jsonl")
    found = call("train", work / "base", *data, "--budget", "0.7", "--bf16", "--out", tmp_path / "out", *SHORT, *way)
    again = call("evaluate", tmp_path / "out", tmp_path / "rows.jsonl")
    assert found["bf16"] and found["validation"] == pytest.approx(again["metrics"], rel=1e-3)


def test_a_base_in_16_bits_is_measured_as_it_was_trained(work, tmp_path):
    """Its merged model has the dtype of the base, whose rounding gave other metrics."""
    base = shutil.copytree(work / "base", tmp_path / "base")
    AutoModel.from_pretrained(work / "base", dtype=torch.bfloat16).save_pretrained(base)
    rows = [{"text": f"the {word} is {WORDS[-i]}", "score": i / 7} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--data", tmp_path / "rows.jsonl", "--validation", tmp_path / "rows.jsonl")
    found = call("train", base, *data, "--budget", "0.7", "--out", tmp_path / "out", *SHORT)
    again = call("evaluate", tmp_path / "out", tmp_path / "rows.jsonl")
    assert found["validation"] == pytest.approx(again["metrics"], rel=1e-3)


def test_words_are_tagged(work, tmp_path):
    found = call("train", work / "base", "--data", work / "rows.conll", "--budget", "0.7", "--epochs", "12", "--lr",
                 "3e-3", "--batch-size", "8", "--out", tmp_path / "out")  # fmt: skip
    assert found["validation"]["f1"] > 0.9 and found["rows"] == {"train": 36, "validation": 4}
    adapter = open_adapter(tmp_path / "out")
    assert str(adapter.config.task_type).endswith("TOKEN_CLS")
    assert saved_record(tmp_path / "out")["labels"] == ["O", "B-person", "B-place"]
    assert adapter.config.head_settings["labels"] == ["O", "B-person", "B-place"]
    trimmed = call("trim", tmp_path / "out", "--data", work / "rows.conll", "--budget", "0.5", "--out", tmp_path / "b")
    assert set(trimmed["validation"]) == set(found["validation"])


def test_answers_are_found(work, tmp_path):
    found = call("train", work / "base", "--data", work / "squad.json", "--budget", "0.7", *SHORT, "--max-length",
                 "24", "--stride", "4", "--out", tmp_path / "out")  # fmt: skip
    assert set(found["validation"]) == {"exact_match", "f1"} and found["rows"] == {"train": 36, "validation": 4}
    record = saved_record(tmp_path / "out")
    assert record["kind"] == "answers" and record["silent"] is True and record["stride"] == 4
    trimmed = call("trim", tmp_path / "out", "--data", work / "squad.json", "--budget", "0.5", "--max-length", "24",
                   "--stride", "4", "--out", tmp_path / "half")  # fmt: skip
    assert set(trimmed["validation"]) == {"exact_match", "f1"}


def test_rows_with_several_labels(work, tmp_path):
    options = ("--label-column", "tags", "--budget", "0.7", *SHORT)
    found = call("train", work / "base", "--data", work / "texts.jsonl", *options, "--class-weights", "balanced",
                 "--out", tmp_path / "out")  # fmt: skip
    assert found["classes"] == ["bad", "good", "rome", "york"] and "f1_micro" in found["validation"]
    assert found["task"]["problem_type"] == "multi_label_classification"
    trimmed = call("trim", tmp_path / "out", "--data", work / "texts.jsonl", "--label-column", "tags", "--budget",
                   "0.5", "--out", tmp_path / "half")  # fmt: skip
    assert trimmed["classes"] == found["classes"] and "f1_micro" in trimmed["validation"]


@pytest.mark.parametrize("file", ["long.csv", *only_slow("long.conll", "long.json")])
def test_texts_longer_than_the_models_positions_are_cut(file, work, tmp_path):
    """This model has 40 positions, and its tokenizer says 64."""
    text = " ".join(WORDS * 3)
    answer = {"text": "york", "answer_start": text.index("york")}
    qas = [{"id": "1", "question": "who", "answers": [answer]}]
    articles = [{"title": str(i), "paragraphs": [{"context": text, "qas": qas}]} for i in range(16)]
    (tmp_path / "long.csv").write_text("sentence,label\n" + f"{text},bad\n{text},good\n" * 8)
    (tmp_path / "long.conll").write_text("\n".join(["".join(f"{word} B-place\n" for word in text.split())] * 16))
    (tmp_path / "long.json").write_text(json.dumps({"data": articles}))
    call("train", work / "base", "--data", tmp_path / file, "--budget", "0.7", *SHORT, "--out", tmp_path / "out")
    assert saved_record(tmp_path / "out")["max_length"] == 40
    found = call("evaluate", tmp_path / "out", tmp_path / file, "--max-length", "60")
    call("merge", tmp_path / "out", tmp_path / "merged")
    assert call("evaluate", tmp_path / "merged", tmp_path / file)["metrics"] == pytest.approx(found["metrics"])


def test_words_have_their_places_also_if_the_tokenizer_pads_on_the_left(work, tmp_path):
    """The tags of all shorter sentences of a batch were those of other words."""
    tokenizer = BertTokenizerFast(str(work / "vocab.txt"), model_max_length=64, padding_side="left")
    tokenizer.save_pretrained(tmp_path / "base")
    AutoModel.from_config(tiny_config("llama", pad_token_id=0)).save_pretrained(tmp_path / "base")
    train = ("train", tmp_path / "base", "--data", work / "rows.conll", "--budget", "0.9", "--lr", "1e-2")
    found = call(*train, "--epochs", "6", "--batch-size", "8", "--no-bf16", "--out", tmp_path / "out")
    single, many = (call("evaluate", tmp_path / "out", work / "rows.conll", "--batch-size", n) for n in (1, 32))
    assert single["metrics"] == pytest.approx(many["metrics"]) and many["metrics"]["f1"] > 0.9
    assert found["validation"]["f1"] > 0.9


def test_one_text_of_a_model_of_pairs(work, tmp_path):
    rows = [{"a": f"the {word} is good", "b": f"{word} and rome", "label": i % 2} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "rows.jsonl"
    train = ("train", work / "base", "--data", data, "--text-column", "a", "--pair-column", "b", *SHORT)
    call(*train, "--budget", "0.7", "--out", tmp_path / "out")
    for column in "ab":
        result = run("evaluate", tmp_path / "out", data, "--text-column", column)
        assert result.exit_code == 0 and f"text in {column}, labels in label" in result.stderr
    assert "text in a + b" in run("evaluate", tmp_path / "out", data).stderr


def test_rows_without_words_are_named(work, tmp_path):
    call("train", work / "base", "--data", work / "rows.conll", "--budget", "0.7", *SHORT, "--out", tmp_path / "out")
    (tmp_path / "new.jsonl").write_text('{"tokens": ["ann"]}\n{"tokens": []}\n{"tokens": ["bob"]}')
    result = run("predict", tmp_path / "out", tmp_path / "new.jsonl", "--out", tmp_path / "tags.jsonl")
    assert "1 row without words, and so without a prediction" in " ".join(result.output.split())
    rows = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 3]
    (tmp_path / "new.jsonl").write_text('{"tokens": ["ann"], "tags": ["B-person"]}\n{"tokens": [], "tags": []}')
    result = run("evaluate", tmp_path / "out", tmp_path / "new.jsonl")
    assert "1 row without words, left out" in " ".join(result.output.split())


def test_a_separator_for_a_model_of_one_label_is_refused(work, tmp_path):
    """It was ignored, and the metrics were those of other labels than the user meant."""
    rows = [{"text": f"the {word} is good", "label": str(i % 2)} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "rows.jsonl"
    call("train", work / "base", "--data", data, "--budget", "0.7", *SHORT, "--out", tmp_path / "out")
    for arguments in (
        ("evaluate", tmp_path / "out", data),
        ("compare", tmp_path / "out", tmp_path / "out", "--data", data),
    ):
        assert "leave out --label-separator" in fails(*arguments, "--label-separator", "|")


def test_models_of_different_label_columns_are_not_compared(work, tmp_path):
    rows = [{"text": f"the {word} is good", "a": str(i % 2), "b": str(i % 3 % 2)} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--data", tmp_path / "rows.jsonl")
    for name in "ab":
        options = ("--label-column", name, "--budget", "0.7", *SHORT, "--out", tmp_path / name)
        call("train", work / "base", *data, *options)
    both = (tmp_path / "a", tmp_path / "b", *data)
    assert "different columns of labels" in fails("compare", *both)
    assert call("compare", *both, "--label-column", "a")["rows"] == len(rows)


def test_several_labels_are_the_same_in_any_order(work, tmp_path):
    columns = [[["--label-column", name] for name in names] for names in ("ab", "ba")]
    rows = [{"text": f"the {word} is good", "a": 1, "b": int(i % 5 > 0)} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i, options in enumerate(columns):
        given = ("--data", tmp_path / "rows.jsonl", *sum(options, []), "--budget", "0.9", "--lr", "3e-3")
        call("train", work / "base", *given, "--epochs", "4", "--batch-size", "4", "--out", tmp_path / str(i))
    given = ("--data", tmp_path / "rows.jsonl", *sum(columns[0], []))
    found = call("compare", tmp_path / "0", tmp_path / "1", *given)
    rights = [model["metrics"]["f1_micro"] for model in found["models"]]
    assert found["difference"]["same"] > 0.9 and min(rights) > 0.8  # most rows have both labels, in both models


def test_files_of_one_name_have_a_hash_each(work, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    lines = (work / "texts.csv").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "x.csv").write_text("".join(lines[:30]))
    (tmp_path / "b" / "x.csv").write_text("".join([lines[0], *lines[30:]]))
    data = ("--data", tmp_path / "a" / "x.csv", "--validation", tmp_path / "b" / "x.csv")
    found = call("train", work / "base", *data, "--budget", "0.7", *SHORT, "--out", tmp_path / "out")
    assert len(set(found["data_sha256"].values())) == 2


def test_a_trim_of_a_model_without_a_trained_head_warns(work, tmp_path):
    AutoModel.from_config(tiny_config("bert", num_labels=2)).save_pretrained(tmp_path / "base")
    BertTokenizerFast(str(work / "vocab.txt"), model_max_length=40).save_pretrained(tmp_path / "base")
    trim = ("trim", tmp_path / "base", "--data", work / "texts.csv", "--budget", "0.7", "--out", tmp_path / "out")
    said = " ".join(run(*trim).output.split())
    assert "The head is random" in said and "have no names: they are taken for bad, good, in this order" in said
    assert "--heal-epochs must be a number" in fails(*trim, "--heal-epochs", "inf", "--overwrite")


@pytest.mark.parametrize("file", ["texts.csv", "rows.conll"])
def test_a_head_without_names_whose_classes_are_in_another_order_is_refused(file, work, tmp_path):
    """Its accuracy was 0, and it was trained on the wrong classes."""
    folder, data = tmp_path / "a", ("--data", work / file, "--validation", work / file)
    call("train", work / "base", *data, "--budget", "1", "--lr", "3e-3", "--epochs", "30", "--batch-size", "8",
         "--out", folder)  # fmt: skip
    call("merge", folder, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    count = len(config["id2label"])
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for name in [name for name in weights if name.startswith("classifier.")]:
        weights[name] = weights[name].roll(1, dims=0).contiguous()
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    (tmp_path / "merged" / "metrics.json").unlink()
    said = fails("trim", tmp_path / "merged", *data, "--budget", "0.7", "--out", tmp_path / "out")
    assert "is probably wrong" in said and "In the order" in said


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_the_base_may_have_been_trained_for_another_problem(problem, work, tmp_path):
    """The loss of its config was used: classes were learned as numbers, with a squared error, and without a word."""
    labels = {"num_labels": 1 if problem == "regression" else 3, "problem_type": problem}
    AutoModelForSequenceClassification.from_config(tiny_config("bert", **labels)).save_pretrained(tmp_path / "base")
    BertTokenizerFast(str(work / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path / "base")
    for file in ("texts.csv", "rows.conll"):
        out = tmp_path / file
        call("train", tmp_path / "base", "--data", work / file, "--budget", "0.7", *SHORT, "--out", out)
        assert open_adapter(out).config.head_settings["problem_type"] == "single_label_classification"
        assert call("evaluate", out, work / file)["rows"] == 40


@pytest.mark.parametrize("pad", [None, 63, *only_slow(-1, 7)])  # the tokenizer does not know the last one
def test_the_padding_of_a_decoder_does_not_change_what_it_predicts(pad, work, tmp_path):
    """A decoder classifies the last token that is not padding for its config; the tokenizer may pad with another."""
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=pad)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    BertTokenizerFast(str(work / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path / "base")
    options = ("--budget", "0.9", "--lr", "0.05", *SHORT, "--out", tmp_path / "out")
    call("train", tmp_path / "base", "--data", work / "texts.csv", *options)
    call("merge", tmp_path / "out", tmp_path / "merged")
    (tmp_path / "new.csv").write_text("sentence\n" + "".join(f"{' '.join(WORDS[:n])}\n" for n in range(1, 17)))
    found = {
        (place, size): [
            json.loads(line)["scores"]["bad"]
            for line in command.call(
                "predict", tmp_path / place, tmp_path / "new.csv", "--batch-size", size, "--json"
            ).splitlines()
        ]
        for place in ("out", "merged")
        for size in (1, 16)
    }
    assert all(scores == pytest.approx(found["out", 1], abs=1e-5) for scores in found.values())


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(work, tmp_path):
    config = GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    BertTokenizerFast(str(work / "vocab.txt")).save_pretrained(tmp_path / "base")
    line = ("train", tmp_path / "base", "--out", tmp_path / "out")
    said = fails(*line, "--data", work / "texts.csv")
    assert "has embeddings of 10 tokens" in said and "resize_token_embeddings" in said
    known = BertTokenizerFast(str(work / "vocab.txt")).convert_ids_to_tokens(range(5, 10))
    rows = "".join(f"{known[i % 5]},{('good', 'bad')[i % 2]}\n" for i in range(8))
    (tmp_path / "known.csv").write_text("sentence,label\n" + rows)
    said = fails(*line, "--data", tmp_path / "known.csv", "--validation", work / "texts.csv", "--max-length", "8")
    assert "has embeddings of 10 tokens" in said


def test_an_adapter_is_no_base(work, saved_adapter, tmp_path):
    """Transformers loaded its base with the adapter, and the training then lost it."""
    _, adapter = saved_adapter()
    for name, *options in (("plan",), ("train", "--out", tmp_path / "out")):
        said = fails(name, adapter, "--data", work / "texts.csv", *options)
        assert "is an adapter, and this command starts from a whole model" in said


def test_a_class_that_cannot_read_the_checkpoint_is_refused(work, tmp_path):
    """Transformers gave random weights to `LlamaForQuestionAnswering`, whose prefix is not that of other Llamas."""
    LlamaForCausalLM(tiny_config("llama")).save_pretrained(tmp_path / "base")
    BertTokenizerFast(str(work / "vocab.txt"), model_max_length=40).save_pretrained(tmp_path / "base")
    said = fails("train", tmp_path / "base", "--data", work / "squad.json", "--out", tmp_path / "out")
    assert "does not have the weights of a LlamaForQuestionAnswering" in said


def test_class_weights_change_the_loss(work, tmp_path):
    options = ("train", work / "base", "--data", work / "texts.csv", "--budget", "1", *SHORT)
    call(*options, "--out", tmp_path / "plain")
    call(*options, "--class-weights", "balanced", "--out", tmp_path / "weighted")
    plain, weighted = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "weighted"))
    assert any(not torch.equal(plain[key], weighted[key]) for key in plain if plain[key].is_floating_point())
    answers = ("--data", work / "squad.json", "--max-length", "24", "--stride", "4", "--out", tmp_path / "no")
    assert "--class-weights" in fails("train", work / "base", *answers, "--class-weights", "balanced")


def test_a_label_that_all_rows_have_keeps_a_weight():
    rows = [{"labels": [1.0, 1.0, 0.0]}, *[{"labels": [1.0, 0.0, 0.0]}] * 3]
    labels = SimpleNamespace(names=["always", "some", "never"], several=True)
    task = SimpleNamespace(labels=labels, kind="text", train=SimpleNamespace(inputs=rows))
    assert balanced_weights(task).tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize("options", [(), ("--class-weights", "balanced")])
def test_the_loss_does_not_grow_with_the_number_of_processes(options, work, tmp_path, monkeypatch):
    show, trainers = run_module.show_progress, []
    monkeypatch.setattr(run_module, "show_progress", lambda trainer: trainers.append(trainer) or show(trainer))
    call("train", work / "base", "--data", work / "texts.csv", "--budget", "1", *SHORT, *options, "--out", tmp_path)
    trainer = trainers[0]
    model, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    items = torch.tensor(len(batch["labels"]))
    alone = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert torch.equal(trainer.compute_loss(model, dict(batch), num_items_in_batch=items), alone)


def test_only_the_batches_that_calibrate_are_made(work, tmp_path, monkeypatch):
    real, read = Task.batches, []

    def batches(task, *arguments):
        for batch in real(task, *arguments):
            read.append(batch)
            yield batch

    monkeypatch.setattr(Task, "batches", batches)
    monkeypatch.setattr(train_module, "CALIBRATION", 2)
    data = ("--data", work / "texts.csv", "--batch-size", "8")
    call("train", work / "base", *data, "--budget", "0.7", "--epochs", "0", "--out", tmp_path / "out")
    assert len(read) == 2
    call("trim", tmp_path / "out", *data, "--budget", "0.5", "--out", tmp_path / "half")
    assert len(read) == 4


def test_plan_scores_with_the_class_weights_of_train(work, tmp_path):
    data = ("--data", work / "texts.csv", "--budget", "0.5", "--batch-size", "8")
    weights = ("--class-weights", "balanced")
    call("train", work / "base", *data, *weights, "--validation", work / "texts.csv", "--epochs", "0", "--out",
         tmp_path / "out")  # fmt: skip
    trained = Scores.load(tmp_path / "out" / "scores.safetensors").values
    for options, same in ((weights, True), ((), False)):
        call("plan", work / "base", *data, *options, "--save-scores", tmp_path / "s.st", "--overwrite")
        planned = Scores.load(tmp_path / "s.st").values
        assert all(torch.allclose(planned[name], value) for name, value in trained.items()) is same
    refused = fails("plan", work / "base", *data, *weights, "--scores", tmp_path / "s.st")
    assert "--class-weights changes nothing" in refused


def test_early_stopping_keeps_the_best_model(work, tmp_path, monkeypatch):
    real, accuracies, heads = Run._compute_metrics, iter([0.5, 0.9, 0.8, 0.9]), []

    def compute_metrics(run, outcome):
        assert 0 <= real(run, outcome)["accuracy"] <= 1
        head = run.model.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
        heads.append(head.detach().clone())
        return {"accuracy": next(accuracies)}

    monkeypatch.setattr(Run, "_compute_metrics", compute_metrics)
    out = tmp_path / "out"
    found = call("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", "--early-stopping", "2",
                 "--epochs", "9", "--batch-size", "8", "--out", out)  # fmt: skip
    assert found["steps"] == 4 * 5  # epochs of 5 steps; two after the best one
    head = load_file(out / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(head, heads[1]) and not torch.equal(head, heads[3])
    assert not list(out.glob("checkpoint-*"))


def test_a_signal_after_the_last_step_of_an_epoch_loses_no_evaluation(work, tmp_path, monkeypatch):
    accuracies, heads, on_step_end = iter([0.5, 0.9, 0.8, 0.95]), [], StopAfterStep.on_step_end

    def compute_metrics(run, outcome):
        heads.append(run.model.get_parameter("base_model.model.classifier.modules_to_save.default.weight").clone())
        return {"accuracy": next(accuracies)}

    def interrupted(stop, args, state, control, **others):
        if state.global_step in (10, 20):  # epochs of 5 steps; the last one has the best model
            stop.request(signal.SIGTERM)
        on_step_end(stop, args, state, control, **others)

    monkeypatch.setattr(Run, "_compute_metrics", compute_metrics)
    monkeypatch.setattr(StopAfterStep, "on_step_end", interrupted)
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", "--early-stopping", "9",
             "--epochs", "4", "--batch-size", "8", "--out", tmp_path / "out")  # fmt: skip
    fails(*train, status=143)
    fails(*train, "--resume", status=143)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-20"] and len(heads) == 4
    call(*train, "--resume")
    head = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert len(heads) == 4 and torch.equal(head, heads[3])


def test_no_results_of_an_earlier_run_stay_beside_a_new_adapter(work, tmp_path, monkeypatch):
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT, "--out", tmp_path / "a")
    call(*train)

    def stopped(*_, **__):
        assert torch.equal(load_file(weights)[key], head), "the adapter is saved"
        raise KeyboardInterrupt

    weights, key = tmp_path / "a" / "adapter_model.safetensors", "base_model.model.classifier.weight"
    head = load_file(weights)[key]
    monkeypatch.setattr(Run, "evaluate", stopped)
    fails(*train, "--overwrite", status=130)
    assert not (tmp_path / "a" / "metrics.json").exists()
    monkeypatch.undo()
    assert call(*train, "--resume")["validation"]


def test_a_data_set_on_disk(work, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (work / "texts.jsonl").read_text().splitlines()]
    set_ = datasets.Dataset.from_list([{"sentence": row["sentence"], "label": row["label"]} for row in rows])
    datasets.DatasetDict({"train": set_, "validation": set_}).save_to_disk(tmp_path / "set")
    found = call("train", work / "base", "--data", tmp_path / "set", "--budget", "1", *SHORT, "--out", tmp_path / "o")
    assert found["rows"] == {"train": 40, "validation": 40}


def test_metrics_record_where_they_come_from(work, tmp_path):
    found = call("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT, "--out", tmp_path)
    assert set(found["validation_interval"]) <= set(found["validation"]) == set(found["validation_baseline"])
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    assert len(found["data_sha256"]["texts.csv"]) == 64 and found["base_revision"] is None
    assert found["validation_data"] == []  # a part of the rows was held out
    assert found["task"]["text_columns"] == ["sentence"] and found["learning_rate"] == 1e-4


def test_a_hold_out_of_one_class_is_said(work, tmp_path):
    (tmp_path / "one.csv").write_text("sentence,label\nthe city is bad,bad\nthe stone is bad,bad\n")
    result = run("train", work / "base", "--data", work / "texts.csv", "--validation", tmp_path / "one.csv",
                 "--budget", "1", *SHORT, "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0
    assert "All 2 validation rows have the class 'bad'" in " ".join(result.output.split())


# -- before anything slow ---------------------------------------------------------------------------------------------


def test_outputs_and_budgets_are_checked_before_the_scoring(work, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was scored")

    monkeypatch.setattr(train_module, "compute_scores", never)
    plan = ("plan", work / "base", "--data", work / "texts.csv")
    assert "--plot" in fails(*plan, "--budget", "0.5", "--plot", tmp_path / "a.bmp")
    assert "is a folder" in fails(*plan, "--budget", "0.5", "--save-scores", tmp_path)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails(*plan, "--budget", "0.5", "--save-scores", tmp_path / "file" / "s.st")
    small = fails(*plan, "--budget", "50")
    assert "too small" in small and "Give a larger --budget." in small and "min_units" not in small
    assert "--trainable" in fails(*plan, "--trainable", "3")
    assert "nowhere.json" in fails(*plan, "--latency", "0.5", "--latency-table", tmp_path / "nowhere.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in fails(*plan, "--budget", "0.5", "--plot", tmp_path / "a.png")


def test_limits_on_times_are_checked_against_their_tables_before_the_ranking(work, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "compute_scores", lambda *a, **k: pytest.fail("ranked in vain"))
    kinds = kinds_of(build_anatomy(AutoModel.from_pretrained(work / "base")))
    times = {name: Timing(9e-3, 0.0) for name in points_of(kinds)}  # without one sublayer: 9 of 10 ms
    about = {"model": "bert", "device": "x", "runtime": "torch", "versions": {}, "threads": 1, "dtype": "float32",
             "batch_size": 1, "sequence_length": 8}  # fmt: skip
    for phase in ("prefill", "decode"):
        table_from(kinds, Timing(1e-2, 0.0), times, {"phase": phase, **about}).save(tmp_path / f"{phase}.json")
    data = ("--data", work / "texts.csv", "--latency", "1ms", "--latency-table")
    for words in (("plan", work / "base"), ("train", work / "base", "--out", tmp_path / "out")):
        small = fails(*words, *data, tmp_path / "prefill.json")
        assert "needs a latency of" in small and "Give a larger --latency." in small and "min_units" not in small
        other = fails(*words, *data, tmp_path / "decode.json")
        assert "--latency needs a table that was measured without --decode" in other
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["--thorough", *only_slow("--late")])
def test_a_limit_on_times_holds_without_a_table_also_after_an_interrupt(way, work, tmp_path, monkeypatch):
    """The machine is measured before the whole model is trained, and again when this training goes on."""
    measured = []

    def measure(model, **options):
        measured.append(type(model).__name__)
        return made_up_table(AutoModel.from_pretrained(work / "base"))

    monkeypatch.setattr("peft_sensi.tuner.latencies.measure_torch", measure)
    train = ("train", work / "base", "--data", work / "texts.csv", way, "--latency", "0.8", *SHORT)
    small = fails(*train[:-5], "0.1", *SHORT, "--out", tmp_path / "none")
    assert "too small" in small and "Give a larger --latency." in small
    whole = call(*train, "--out", tmp_path / "whole")
    assert whole["plan"]["latency_ms"] <= 8
    assert len(measured) == 2
    interrupted(monkeypatch, 2, *train, "--out", tmp_path / "half")
    half = call(*train, "--out", tmp_path / "half", "--resume")
    assert half["plan"]["latency_ms"] == whole["plan"]["latency_ms"] and len(measured) == 4
    for name in ("whole", "half"):
        trim = ("trim", tmp_path / name, "--data", work / "texts.csv", "--latency", "0.7", "--batch-size", "8")
        found = call(*trim, "--out", tmp_path / f"{name} trimmed")
        assert found["plan"]["latency_ms"] <= 7
    assert measured == ["BertForSequenceClassification"] * 6


def test_the_recipe_sensi_bert_takes_a_latency(work, tmp_path):
    made_up_table(AutoModel.from_pretrained(work / "base")).save(tmp_path / "table.json")
    train = ("train", work / "base", "--data", work / "texts.csv", "--recipe", "sensi_bert", *SHORT)
    table = ("--latency-table", tmp_path / "table.json")
    found = call(*train, "--out", tmp_path / "out", "--latency", "0.8", *table)
    assert found["plan"]["latency_ms"] <= 8 and found["recipe"] == "sensi_bert"
    both = fails(*train, "--out", tmp_path / "no", "--latency", "0.8", *table, "--flops", "0.5")
    assert "exactly one limit: --budget, --flops or --latency" in both


def test_a_budget_that_is_too_small_leaves_no_folder(work, tmp_path):
    for late in ([], ["--late"]):
        train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "50", *late)
        assert "too small" in fails(*train, "--out", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_scores_are_saved_even_if_the_plan_fails(work, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("later")

    monkeypatch.setattr(train_module, "plan_for", broken)
    steps = ("--priming-steps", "1", "--calibration-steps", "1", "--batch-size", "8")
    text = fails("plan", work / "base", "--data", work / "texts.csv", "--budget", "0.5", *steps, "--save-scores",
                 tmp_path / "s.st")  # fmt: skip
    assert "later" in text and Scores.load(tmp_path / "s.st").method == "fisher"


def test_a_second_run_does_not_replace_the_first(work, tmp_path):
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT, "--out", tmp_path)
    call(*train)
    assert Scores.load(tmp_path / "scores.safetensors").values
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert "--overwrite" in fails(*train, "--seed", "1")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    call(*train, "--seed", "1", "--overwrite")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before
    assert "no interrupted training" in fails("train", work / "base", "--data", work / "texts.csv", "--out",
                                              work / "new", "--resume")  # fmt: skip


# -- interruptions ----------------------------------------------------------------------------------------------------


INTERRUPTED = {
    "trimmed": (("--budget", "0.7"), 7),
    "low-rank": (("--trainable", "0.1"), 7),
    "schedule": (("--recipe", "learners"), 7),
    "late, before the cut": (("--late", "--budget", "0.5"), 7),
    "late, after the cut": (("--late", "--budget", "0.5"), 11),  # the cut is before step 9
    "thorough, first stage": (("--thorough", "--budget", "0.5"), 7),
    "thorough, second stage": (("--thorough", "--budget", "0.5"), 20),  # a stage has 15 steps
}


@pytest.mark.parametrize("case", some_slow(INTERRUPTED, "low-rank", "late, before the cut", "thorough, first stage"))
def test_a_signal_leaves_a_checkpoint_from_which_the_same_adapter_comes(case, work, tmp_path, monkeypatch):
    options, step = INTERRUPTED[case]
    train = ("train", work / "base", "--data", work / "texts.csv", *options, "--epochs", "3", "--batch-size", "8")
    call(*train, "--out", tmp_path / "whole")
    half = (*train, "--out", tmp_path / "half")
    number = {"trimmed": signal.SIGTERM, "low-rank": signal.SIGHUP}.get(case, signal.SIGINT)
    assert "--resume" in interrupted(monkeypatch, step, *half, number=number)
    assert "--resume" in fails(*half)
    assert "--seed was not given, and is 3 now" in fails(*half, "--resume", "--seed", "3")
    assert "--max-length was not given, and is 9 now" in fails(*half, "--resume", "--max-length", "9")
    seconds = json.loads((tmp_path / "half" / "unfinished.json").read_text())["seconds"]
    assert call(*half, "--resume")["seconds"]["training"] > seconds > 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "half")


def test_a_signal_while_the_adapter_is_saved_loses_nothing(work, tmp_path, monkeypatch):
    """All steps were trained, and the command ended without an adapter and without a checkpoint."""
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT)
    call(*train, "--out", tmp_path / "whole")
    save = Trainer.save_model

    def save_and_signal(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *arguments, **options)

    half = (*train, "--out", tmp_path / "half")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", save_and_signal)
        assert "the same command with --resume goes on" in fails(*half, status=143)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", None)  # nothing is trained again
        call(*half, "--resume")
    assert_same_adapter(tmp_path / "whole", tmp_path / "half")


def test_a_resumed_training_needs_the_same_data(work, tmp_path, monkeypatch):
    """After a class was renamed, the head's classes were in another order: the accuracy was 0, without a word."""
    data = tmp_path / "texts.csv"
    lines = (work / "texts.csv").read_text()
    data.write_text(lines)
    half = ("train", work / "base", "--data", data, "--budget", "0.7", *SHORT, "--out", tmp_path / "half")
    interrupted(monkeypatch, 3, *half)
    data.write_text(lines + lines.splitlines()[1] + "\n")
    assert "texts.csv has changed since the training began" in fails(*half, "--resume")
    state = json.loads((tmp_path / "half" / "unfinished.json").read_text())
    (tmp_path / "half" / "unfinished.json").write_text(json.dumps(state | {"data_sha256": {}}))
    assert "has changed" in fails(*half, "--resume")
    del state["data_sha256"]  # as of a data set without hashes
    (tmp_path / "half" / "unfinished.json").write_text(json.dumps(state | {"classes": ["no", "other"]}))
    assert "same classes, but they were no, other" in fails(*half, "--resume")
    data.write_text(lines)
    del state["classes"]  # as of an older version
    (tmp_path / "half" / "unfinished.json").write_text(json.dumps(state))
    call(*half, "--resume")


def test_an_interrupted_healing_goes_on(work, tmp_path, monkeypatch):
    call("train", work / "base", "--data", work / "texts.csv", "--budget", "1", *SHORT, "--out", tmp_path / "a")
    trim = ("trim", tmp_path / "a", "--data", work / "texts.csv", "--budget", "0.5", "--heal-epochs", "2",
            "--batch-size", "8")  # fmt: skip
    whole = call(*trim, "--out", tmp_path / "whole")
    interrupted(monkeypatch, 4, *trim, "--out", tmp_path / "half")
    half = call(*trim, "--out", tmp_path / "half", "--resume")
    assert half["validation_before"] == whole["validation_before"]
    assert_same_adapter(tmp_path / "whole", tmp_path / "half")


def test_messages_about_labels_that_do_not_fit(work, tmp_path):
    rows = [f"ann is {word}\t{i % 6}" for i, word in enumerate(["good", "bad"] * 24)]
    (tmp_path / "scores.tsv").write_text("\n".join(["text\trelatedness_score", *rows]))
    (tmp_path / "decimals.tsv").write_text("text\trelatedness_score\nann is good\t0.5\nbob is bad\t1.5\n")
    (tmp_path / "unlabeled.tsv").write_text("id\ttext\n1\tann is good\n2\tbob is bad\n")
    train = (
        "train",
        work / "base",
        "--data",
        tmp_path / "scores.tsv",
        "--budget",
        "1",
        *SHORT,
        "--out",
        tmp_path / "a",
    )
    assert "train with --regression" in fails(*train, "--validation", tmp_path / "decimals.tsv")
    call(*train)
    said = fails("evaluate", tmp_path / "a", tmp_path / "unlabeled.tsv")
    assert "no column relatedness_score, from which the training has read the labels" in said and "predict" in said


def test_a_trim_reads_what_the_training_has_read(work, tmp_path):
    """The columns and the length of the training, also in a file with other texts; what is named replaces them."""
    pairs = [f"{text}\tstone\t{label}" for text, label in (("ann is good", "yes"), ("bob is bad", "no")) * 20]
    (tmp_path / "pairs.tsv").write_text("\n".join(["premise\thypothesis\tlabel", *pairs]))
    pandas.DataFrame({"hypothesis": "x", "premise": ["ann", "bob"], "label": ["yes", "no"]}).to_parquet(
        tmp_path / "validation.parquet"
    )
    data = ("--data", tmp_path / "pairs.tsv")
    call("train", work / "base", *data, "--text-column", "premise", "--max-length", "9", "--budget", "1", *SHORT,
         "--out", tmp_path / "a")  # fmt: skip
    trim = ("trim", tmp_path / "a", "--budget", "0.5", "--overwrite", "--out", tmp_path / "half")
    # An option about the format needs to be about one of the files only.
    found = call(*trim, *data, "--delimiter", "tab", "--validation", tmp_path / "validation.parquet")
    assert found["task"]["text_columns"] == ["premise"] and found["task"]["max_length"] == 9
    assert found["rows"]["validation"] == 2
    call("merge", tmp_path / "a", tmp_path / "merged", "--base", work / "base")
    found = call("trim", tmp_path / "merged", *trim[2:], *data)
    assert found["task"]["text_columns"] == ["premise"] and found["task"]["max_length"] == 9
    found = call(*trim, *data, "--text-column", "hypothesis", "--max-length", "8")
    assert found["task"]["text_columns"] == ["hypothesis"] and found["task"]["max_length"] == 8
    (tmp_path / "other.tsv").write_text("\n".join(["text\tmore\tlabel", *pairs]))
    result = run(*trim, "--data", tmp_path / "other.tsv")
    assert "the training has read premise, which the data does not have" in " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_is_stored_in_16_bits_is_trimmed_and_healed_in_float32(kind, work, tmp_path, monkeypatch):
    AutoModel.from_pretrained(work / "base").bfloat16().save_pretrained(tmp_path / "base")
    BertTokenizerFast.from_pretrained(work / "base").save_pretrained(tmp_path / "base")
    call("train", tmp_path / "base", "--data", work / "texts.csv", "--budget", "1", *SHORT, "--out", tmp_path / "a")
    name = tmp_path / "a"
    if kind == "model":
        name = tmp_path / "model"
        save_merged_in_16_bits(tmp_path / "a", name)
    dtypes = []
    inner = train_module.trim_for

    def watched(model, *others, **options):
        dtypes.append({parameter.dtype for parameter in model.parameters()})
        return inner(model, *others, **options)

    monkeypatch.setattr(train_module, "trim_for", watched)
    trim = ("trim", name, "--data", work / "texts.csv", "--budget", "0.5", "--heal-epochs", "2", "--batch-size", "8",
            "--out", tmp_path / "half")  # fmt: skip
    interrupted(monkeypatch, 4, *trim)
    call(*trim, "--resume")
    assert dtypes == [{torch.float32}] * 2


def save_merged_in_16_bits(adapter: Path, folder: Path) -> None:
    """Merges an adapter that keeps everything, and saves the model in 16 bits with its tokenizer."""
    command.call("merge", adapter, folder)
    AutoModelForSequenceClassification.from_pretrained(folder).bfloat16().save_pretrained(folder)


def test_an_adapter_is_trimmed_as_far_as_its_own_settings_allow(work, tmp_path):
    base = tmp_path / "base"
    config = tiny_config("bert", num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    BertTokenizerFast.from_pretrained(work / "base").save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    wrap(model, budget=1.0, min_units=0).save_pretrained(tmp_path / "a")
    trim = ("trim", "--data", work / "texts.csv", "--budget", "0.02", "--batch-size", "8")
    assert call(*trim, tmp_path / "a", "--out", tmp_path / "out")["plan"]["params_share"] <= 0.02
    assert "Give a larger --budget." in fails(*trim, base, "--out", tmp_path / "other")


@pytest.mark.parametrize(("options", "target"), [((), (Run, "evaluate")), (("--thorough",), (SensiModel, "trim"))])
def test_a_finished_training_is_not_lost_by_what_comes_after(options, target, work, tmp_path, monkeypatch):
    """Ctrl-C in the evaluation, and in the trim after the first stage of --thorough."""

    def press(*args, **kwargs):
        raise KeyboardInterrupt

    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.5", *SHORT, *options)
    call(*train, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(*target, press)
        stopped = run(*train, "--out", tmp_path / "half")
        assert stopped.exit_code == 130 and "with --resume goes on" in " ".join(stopped.output.split())
    epochs, trainer = [], Run.trainer
    monkeypatch.setattr(Run, "trainer", lambda self, n=0.0, *more: epochs.append(n) or trainer(self, n, *more))
    call(*train, "--out", tmp_path / "half", "--resume")
    assert sum(epochs) == len(options)  # only the second stage was trained
    assert_same_adapter(tmp_path / "whole", tmp_path / "half")


def test_the_first_stage_is_not_lost_if_the_second_ends_before_its_first_checkpoint(work, tmp_path, monkeypatch):
    """As after a power failure: no signal comes, and no checkpoint is written."""

    class Failure(TrainerCallback):
        def on_step_end(self, args, state, control, **others) -> None:
            raise RuntimeError("the power failed")

    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.5", *SHORT, "--thorough")
    call(*train, "--out", tmp_path / "whole")
    trainer, stages = Run.trainer, []

    def failing(self, epochs=0.0, callbacks=None):
        if epochs:
            stages.append(self.state["stage"])
        return trainer(self, epochs, [*(callbacks or []), *([Failure()] if stages[-1:] == ["train on"] else [])])

    with monkeypatch.context() as patch:
        patch.setattr(Run, "trainer", failing)
        run(*train, "--out", tmp_path / "half")
    assert stages == ["train", "train on"]
    assert json.loads((tmp_path / "half" / "unfinished.json").read_text())["stage"] == "train"
    call(*train, "--out", tmp_path / "half", "--resume")
    assert_same_adapter(tmp_path / "whole", tmp_path / "half")


NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def four_epochs(work) -> tuple[tuple, Path]:
    """A command that trains, without its `--out`, and the folder of an adapter that it made without interruption."""
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", "--early-stopping", "9",
             "--epochs", "4", "--batch-size", "8")  # fmt: skip
    call(*train, "--out", work / "four epochs")
    return train, work / "four epochs"


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("save_model", NO_ROOM),
        (
            "_save_optimizer_and_scheduler",
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2 vs 1"),
        ),
        pytest.param("_save_rng_state", RuntimeError("basic_ios::clear: iostream error"), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_that_could_not_be_written_is_not_used(failing, error, four_epochs, tmp_path, monkeypatch):
    train, whole_run = four_epochs
    half, save = (*train, "--out", tmp_path / "half"), getattr(Trainer, failing)

    def full(trainer, *args, **others):
        if trainer.state.global_step == 10:
            raise error
        save(trainer, *args, **others)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, failing, full)
        text = fails(*half)
    assert "Make room. The same command with --resume goes on from checkpoint-5." in text and "unexpected" not in text
    (tmp_path / "half" / "checkpoint-10").mkdir(exist_ok=True)  # it lacks files
    (tmp_path / "half" / "checkpoint-10" / "trainer_state.json").write_text('{"global_')
    for name in ("scheduler.pt", "rng_state.pth"):  # as after a power failure
        whole = (tmp_path / "half" / "checkpoint-5" / name).read_bytes()
        (tmp_path / "half" / "checkpoint-5" / name).write_bytes(whole[:100])
        assert "checkpoint-5 cannot be resumed: it may be damaged" in fails(*half, "--resume")
        (tmp_path / "half" / "checkpoint-5" / name).write_bytes(whole)
    call(*half, "--resume")
    assert_same_adapter(whole_run, tmp_path / "half")


def test_a_trained_adapter_is_saved_elsewhere_if_the_disk_is_full(work, tmp_path, monkeypatch):
    save = Trainer.save_model

    def only_elsewhere(trainer, folder=None, **others):
        if folder is None:
            raise NO_ROOM
        save(trainer, folder, **others)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Trainer, "save_model", only_elsewhere)
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT)
    text = fails(*train, "--out", tmp_path / "out")
    (folder,) = tmp_path.glob("peft-sensi-*")
    assert f"Make room. The adapter, without metrics.json, is in {folder} instead." in text
    assert call("check", folder)["ok"] and not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("room_elsewhere", [True, False])
def test_a_tokenizer_that_could_not_be_written_costs_no_training(room_elsewhere, work, tmp_path, monkeypatch):
    """The package `tokenizers` raises a bare `Exception`. It is written after the adapter."""
    save = Trainer.save_model

    def without_tokenizer(trainer, folder=None, **others):
        save(trainer, folder, **others)
        if folder is None or not room_elsewhere:
            raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Trainer, "save_model", without_tokenizer)
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT)
    text = fails(*train, "--out", tmp_path / "out")
    assert "No space left on device (os error 28). Make room." in text and "unexpected" not in text
    if room_elsewhere:
        (folder,) = tmp_path.glob("peft-sensi-*")
        assert f"is in {folder} instead." in text and call("check", folder)["ok"]
    else:
        assert f"The adapter itself is whole in {tmp_path / 'out'}" in text and not [*tmp_path.glob("peft-sensi-*")]
        assert open_adapter(tmp_path / "out").config.plan


@pytest.mark.parametrize("room_elsewhere", [True, False])
def test_no_room_for_the_adapter_and_little_elsewhere(room_elsewhere, work, tmp_path, monkeypatch):
    """What is whole elsewhere is kept and named, also without a tokenizer. An empty folder is not left behind."""
    save = Trainer.save_model

    def with_little_room(trainer, folder=None, **others):
        if folder is not None and room_elsewhere:
            save(trainer, folder, **others)
        raise NO_ROOM

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Trainer, "save_model", with_little_room)
    train = ("train", work / "base", "--data", work / "texts.csv", "--budget", "0.7", *SHORT)
    text = fails(*train, "--out", tmp_path / "out")
    folders = [*tmp_path.glob("peft-sensi-*")]
    assert [open_adapter(folder).config.plan is not None for folder in folders] == [True] * room_elsewhere
    assert ("The adapter itself is whole in" in text) == room_elsewhere and all(str(each) in text for each in folders)


def test_a_signal_before_the_training_ends_the_command_in_one_line(work, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    train = ("train", work / "base", "--data", work / "texts.csv", "--out", tmp_path / "out")
    monkeypatch.setattr("peft_sensi.cli.train.get_peft_model", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    assert fails(*train, status=143).endswith("terminated")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_ignored(work, tmp_path, monkeypatch):
    """`nohup` starts a command so, to let it go on without its terminal."""
    train = ("train", work / "base", "--data", work / "texts.csv", "--out", tmp_path / "out", *SHORT)
    hang_up = Signal(2, signal.SIGHUP)
    trainer = Run.trainer
    monkeypatch.setattr(Run, "trainer", lambda self, n=0.0, more=None: trainer(self, n, [*(more or []), hang_up]))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        call(*train)
        assert hang_up.steps_left <= 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_closed_terminal_is_no_error(tmp_path):
    """Otherwise the first line after a SIGHUP would end the command before its checkpoint."""
    code = """
import os, pty, sys
from peft_sensi.cli.terminal import err, leave_lost_terminal
keeper, terminal = pty.openpty()
old = os.dup(1)
os.dup2(terminal, 2)
leave_lost_terminal()
err.print("seen")
assert os.read(keeper, 100).strip() == b"seen"
os.close(keeper)
leave_lost_terminal()
err.print("lost")
print("on stdout, which is no terminal")
"""
    assert "stdout" in run_code(code, tmp_path)


def test_signals_that_a_launcher_passes_on_do_not_end_the_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("peft_sensi.cli.stopping.time.monotonic", lambda: now[0])
    stop = StopAfterStep()
    stop.request(signal.SIGINT)
    for number, seconds in ((signal.SIGINT, 0.5), (signal.SIGTERM, 5)):
        now[0] = seconds
        stop.request(number)
    with pytest.raises(KeyboardInterrupt):
        stop.request(signal.SIGINT)


def test_several_processes_stop_after_the_same_step(monkeypatch):
    """One of two has the signal: the mean is 0.5. All save, wait for each other, and stop."""
    waited: list[int] = []
    two = SimpleNamespace(num_processes=2, device="cpu", wait_for_everyone=lambda: waited.append(1))
    monkeypatch.setattr("peft_sensi.cli.stopping.PartialState", lambda: two)
    step = SimpleNamespace(is_world_process_zero=False, global_step=3, max_steps=9)
    for others, stops in ((0.0, False), (0.5, True)):
        monkeypatch.setattr("peft_sensi.cli.stopping.reduce", lambda flag, mean=others: torch.full_like(flag, mean))
        stop, control = StopAfterStep(), SimpleNamespace(should_save=False)
        stop.on_step_end(SimpleNamespace(eval_strategy="no"), step, control)
        assert control.should_save is stops and not waited
    with pytest.raises(KeyboardInterrupt):
        stop.on_save(None, step, control)
    assert waited == [1]


def test_scores_are_saved_as_soon_as_they_exist(work, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise SensiError("no plan")

    monkeypatch.setattr(decision, "make_plan", broken)
    text = fails("train", work / "base", "--data", work / "texts.csv", "--budget", "0.5", *SHORT, "--out", tmp_path)
    assert "no plan" in text and Scores.load(tmp_path / "scores.safetensors").method == "fisher"


# -- rates and progress -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "rate"), [
    (("--budget", "0.7"), 1e-4), (("--trainable", "0.1"), 2e-3), (("--recipe", "binary_mask"), 3e-3),
    (("--budget", "0.5", "--late"), 5e-5), (("--budget", "0.5", "--thorough"), 5e-5), (("--budget", "1"), 5e-5),
    (("--budget", "0.7", "--lr", "1e-3"), 1e-3),
])  # fmt: skip
def test_the_default_rate_follows_the_update(options, rate, work, tmp_path):
    found = call("train", work / "base", "--data", work / "texts.csv", *options, "--epochs", "0.2", "--batch-size",
                 "8", "--out", tmp_path)  # fmt: skip
    assert found["learning_rate"] == rate


@pytest.mark.parametrize(("options", "rate"), [(("--budget", "0.7"), 5e-5), (("--trainable", "0.1"), 2e-3)])
def test_the_rate_after_a_trim_is_that_of_the_update(options, rate, work, tmp_path):
    data = ("--data", work / "texts.csv", "--batch-size", "8")
    call("train", work / "base", *data, *options, "--epochs", "0.2", "--out", tmp_path / "a")
    line = ("trim", tmp_path / "a", *data, "--budget", "0.5", "--heal-epochs", "0.2", "--out", tmp_path / "b")
    assert call(*line)["learning_rate"] == rate


def test_a_pipe_gets_steps_loss_and_time_left(work, tmp_path, monkeypatch):
    from peft_sensi.utils import progress

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    result = run("train", work / "base", "--data", work / "texts.csv", "--budget", "1", *SHORT, "--out", tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("training:")]
    assert result.exit_code == 0 and any("5/5" in line for line in lines)
    assert any("loss" in line and "<" in line for line in lines) and "\r" not in result.stderr


def test_a_merged_tagger_loads(work, tmp_path):
    call("train", work / "base", "--data", work / "rows.conll", "--budget", "0.5", *SHORT, "--out", tmp_path / "a")
    assert run("merge", tmp_path / "a", tmp_path / "m").exit_code == 0
    model = load_merged(tmp_path / "m")
    assert list(model.config.id2label.values()) == ["O", "B-person", "B-place"]
