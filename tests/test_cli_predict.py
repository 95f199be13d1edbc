"""`predict`, `evaluate` and `compare` on adapters, merged models and ONNX files, for every kind of task."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call, fails, run
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from folders import NAMES, save_adapter

from peft_sensi.cli.prediction_files import write_records
from peft_sensi.tasks import sources, texts
from peft_sensi.tasks.comparing import mcnemar
from peft_sensi.tasks.kinds import read_task
from peft_sensi.tasks.labels import Labels
from peft_sensi.tasks.metrics import exact
from peft_sensi.tasks.predicting import Predictor, chunks, open_predictor
from peft_sensi.tasks.task import Rows
from peft_sensi.utils.errors import DataError


TEXTS = ["the film is good", "a bad plot", "", "the story is very very very very poor", "fine"] * 3
TAGS = ["O", "B-x", "I-x"]


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    record = {"kind": "text", "max_length": 9, "text_columns": ["text"], "label_columns": ["label"],
              "labels": ["bad", "good", "so"], "problem_type": "single_label_classification"}  # fmt: skip
    save_adapter(folder, names=["bad", "good", "so"], metrics={"task": record})
    (folder / "merged" / "metrics.json").write_text(json.dumps({"task": record}))
    rows = [{"id": f"r{i}", "text": text, "score": i} for i, text in enumerate(TEXTS)]
    with (folder / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "score"])
        writer.writeheader()
        writer.writerows(rows)
    labeled = [{"text": text, "label": ("good", "bad", "so")[i % 3]} for i, text in enumerate(TEXTS)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, labeled)))
    return folder


def expected(work: Path) -> list[str]:
    """What the merged model says of one text at a time, without padding and without this package's tokenized rows."""
    predictor = open_predictor(str(work / "merged"))
    found = []
    for text in TEXTS:
        ids = predictor.tokenizer([text], truncation=True, max_length=9, return_tensors="pt")
        with torch.no_grad():
            (logits,) = predictor.run(ids)
        found.append(predictor.labels.names[int(logits[0].argmax())])
    return found


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_rows_and_their_order_stay(work, tmp_path, suffix):
    out = tmp_path / f"deep/pred{suffix}"
    call("predict", work / "adapter", work / "new.csv", "--out", out, "--batch-size", "4")
    found = [json.loads(line) for line in out.read_text().splitlines()] if suffix == ".jsonl" else rows_in(out)
    assert [row["id"] for row in found] == [f"r{i}" for i in range(len(TEXTS))]
    assert [row["text"] for row in found] == TEXTS
    assert [row["prediction"] for row in found] == expected(work)
    # The file has a column of this name already.
    assert [str(row["score"]) for row in found] == [str(i) for i in range(len(TEXTS))]
    assert all(1 / 3 <= float(row["predicted_score"]) <= 1 for row in found)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(("command", "file"), [("predict", "new.csv"), ("evaluate", "test.jsonl")])
def test_a_file_is_read_once(work, monkeypatch, command, file):
    calls, read = [], sources.read_part
    monkeypatch.setattr(sources, "read_part", lambda *a, **k: calls.append(1) or read(*a, **k))
    call(command, work / "merged", work / file)
    assert calls == [1]


def test_adapter_merged_and_onnx_say_the_same(work, tmp_path):
    pytest.importorskip("onnxruntime")
    found = json.loads(call("export", work / "adapter", tmp_path / "onnx" / "model.onnx", "--int8", "--json"))
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.int8.onnx", "model.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert found["longest"] == 40
    beside = json.loads((tmp_path / "onnx" / "model.json").read_text())
    assert beside["labels"] == ["bad", "good", "so"] and beside["max_length"] == 9 and beside["kind"] == "text"
    predicted = {}
    for model in (work / "adapter", work / "merged", tmp_path / "onnx", tmp_path / "onnx" / "model.onnx"):
        call("predict", model, work / "new.csv", "--out", tmp_path / "p.csv", "--scores", "--overwrite")
        rows = rows_in(tmp_path / "p.csv")
        assert [row["prediction"] for row in rows] == expected(work)
        predicted[model] = [[float(row[f"scores_{name}"]) for name in ("bad", "good", "so")] for row in rows]
    first, *others = predicted.values()
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-4)
    # Without a mask, a model takes no token for padding.
    values = json.loads((tmp_path / "onnx" / "tokenizer_config.json").read_text())
    (tmp_path / "onnx" / "tokenizer_config.json").write_text(json.dumps(values | {"model_input_names": ["input_ids"]}))
    call("predict", tmp_path / "onnx", work / "new.csv", "--batch-size", "1", "--scores", "--out", tmp_path / "p3.csv")
    unmasked = [
        [float(row[f"scores_{name}"]) for name in ("bad", "good", "so")] for row in rows_in(tmp_path / "p3.csv")
    ]
    np.testing.assert_allclose(unmasked, first, atol=1e-4)
    call("predict", tmp_path / "onnx" / "model.int8.onnx", work / "new.csv", "--out", tmp_path / "p2.csv")
    companion = tmp_path / "onnx" / "model.json"
    companion.write_text(json.dumps(json.loads(companion.read_text()) | {"max_length": -1}))
    assert "Export the model again" in fails("predict", tmp_path / "onnx", work / "new.csv")
    companion.unlink()
    assert "Export it again" in fails("predict", tmp_path / "onnx", work / "new.csv")


def test_a_text_that_is_too_long_for_an_onnx_file_is_named_as_the_reason(work, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    call("export", work / "merged", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["max_length"] == "40"
    ids = np.full((1, 41), 7)
    with pytest.raises(Exception, match="a text may have at most 40 tokens"):
        session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids})
    # Another tokenizer in the folder is not replaced.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "another tokenizer" in fails("export", work / "merged", tmp_path / "other.onnx")
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


def test_files_with_other_columns(work, tmp_path):
    (tmp_path / "a.csv").write_text("text\na bad plot\n")
    (tmp_path / "b.csv").write_text("text,place\nthe film is very very very very good,Rome\n")
    (tmp_path / "c.csv").write_text("comment\na bad plot\n")
    out = tmp_path / "p.csv"
    result = run("predict", work / "adapter", tmp_path / "a.csv", tmp_path / "b.csv", "--out", out)
    assert "1 cut at 9 (--max-length)" in result.output and "note:" not in result.output
    assert [row["place"] for row in rows_in(out)] == ["", "Rome"], "a column of the second file is lost"
    message = fails("predict", work / "adapter", tmp_path / "a.csv", tmp_path / "c.csv", "--out", tmp_path / "q.csv")
    assert "c.csv has no column 'text', as the first file has; it has comment" in message
    result = run("predict", work / "adapter", tmp_path / "c.csv", "--out", tmp_path / "q.csv")
    assert "text in comment" in result.output and "the training has read text" in result.output
    result = run(
        "predict", work / "adapter", tmp_path / "c.csv", "--text-column", "comment", "--out", tmp_path / "r.csv"
    )
    assert "the training has read" not in result.output
    message = fails("predict", work / "adapter", tmp_path / "no.csv", "--out", tmp_path / "s.csv")
    assert message.endswith("no.csv. Check the path.") and "Errno" not in message


def test_evaluate_says_what_it_has_read(work):
    result = run("evaluate", work / "adapter", work / "test.jsonl")
    assert "text in text, labels in label" in result.output and "3 classes: bad (5), good (5), so (5)" in result.output


def test_several_labels_in_a_table_can_be_read_back(tmp_path):
    records = [{"labels": ["very good", "so"]}, {"labels": ["a|b"]}, {"labels": []}]
    write_records(tmp_path / "a.csv", ".csv", records, "|")
    assert [row["labels"] for row in rows_in(tmp_path / "a.csv")] == ["very good|so", '["a|b"]', ""]
    write_records(tmp_path / "b.csv", ".csv", records)
    assert [row["labels"] for row in rows_in(tmp_path / "b.csv")] == ['["very good", "so"]', "a|b", ""]


def test_predictions_on_stdout_can_be_piped(work):
    result = run("predict", work / "merged", work / "new.csv")
    lines = list(csv.DictReader(result.stdout.splitlines()))
    assert [row["prediction"] for row in lines] == expected(work)
    lines = run("predict", work / "merged", work / "new.csv", "--json").stdout.splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == expected(work)


def test_a_failed_prediction_leaves_the_old_file(work, tmp_path, monkeypatch):
    out = tmp_path / "pred.csv"
    out.write_text("old")
    from peft_sensi.tasks import predicting

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(predicting.Predictor, "outputs", broken)
    assert "no space left" in fails("predict", work / "merged", work / "new.csv", "--out", out, "--overwrite")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    assert "predictions are written as" in fails("predict", work / "merged", work / "new.csv", "--out", "p.txt")


def test_evaluate_advises_no_option_that_it_lacks(work, tmp_path):
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": text, "label": "so"}) + "\n" for text in TEXTS))
    remarks = json.loads(call("evaluate", work / "merged", tmp_path / "one.jsonl", "--json"))["remarks"]
    assert len(remarks) == 1 and remarks[0].endswith("give more rows.") and "validation" not in remarks[0]


def test_evaluate_agrees_with_the_predictions(work):
    found = json.loads(call("evaluate", work / "merged", work / "test.jsonl", "--json"))
    truth = [("good", "bad", "so")[i % 3] for i in range(len(TEXTS))]
    right = np.mean([a == b for a, b in zip(expected(work), truth, strict=True)])
    assert found["metrics"]["accuracy"] == pytest.approx(right) and found["rows"] == len(TEXTS)
    low, high = found["intervals"]["accuracy"]
    assert low <= right <= high and found["baseline"]["accuracy"] == pytest.approx(1 / 3)
    text = call("evaluate", work / "adapter", work / "test.jsonl")
    assert "accuracy" in text and "95 %" in text and max(map(len, text.splitlines())) <= 80
    other = work / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": text, "label": i % 2 and "yes" or "no"})
                               for i, text in enumerate(TEXTS)))  # fmt: skip
    assert "the model's labels are bad, good, so" in fails("evaluate", work / "merged", other)


def test_classes_that_the_model_does_not_know_count_as_wrong(work, tmp_path):
    whole = json.loads(call("evaluate", work / "merged", work / "test.jsonl", "--json"))
    rows = [json.loads(line) for line in (work / "test.jsonl").read_text().splitlines()]
    new = [{"text": row["text"], "label": "new"} for row in rows]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, [*rows, *new])))
    result = run("evaluate", work / "merged", tmp_path / "new.jsonl", "--json")
    assert "note: the model knows bad, good, so, and not new: such labels count as wrong" in result.stderr
    assert "4 classes: bad (5), good (5), so (5), new (15)" in result.stderr
    found = json.loads(result.stdout)
    assert found["metrics"]["accuracy"] == pytest.approx(whole["metrics"]["accuracy"] / 2)
    assert found["metrics"]["f1_macro"] < whole["metrics"]["f1_macro"] and found["baseline"]["accuracy"] == 0.5
    data = ("--data", tmp_path / "new.jsonl", "--json")
    both = json.loads(call("compare", work / "adapter", work / "merged", *data))
    assert both["models"][0]["metrics"] == found["metrics"] and both["difference"]["mean"] == 0.0
    with pytest.raises(DataError, match="the model's labels are bad, good, so"):  # for a training
        read_task(str(work / "merged"), [tmp_path / "new.jsonl"], head=Labels(["bad", "good", "so"]))


def test_several_labels_of_which_the_model_does_not_know_some():
    labels = Labels(["a", "b"], several=True, separator="|", unknown=("c",))
    _, doubts = texts.describe(Labels(["a", "b"], unknown=("a|b", "b|a")), [{"text": "x", "label": "a|b"}])
    assert any("give --label-separator '|'" in doubt for doubt in doubts)
    rows = Rows([{"labels": labels.encode(text)} for text in ("a", "a|c", "")], [{}] * 3)
    quality = texts.measure(labels, np.array([[1.0, -1.0], [1.0, -1.0], [-1.0, -1.0]]), rows, None)
    assert quality.values == pytest.approx({"accuracy": 2 / 3, "f1_micro": 4 / 5, "f1_macro": 1 / 2})


def test_evaluate_takes_the_split_that_was_not_trained_on(work, tmp_path):
    lines = (work / "test.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[:4]))
    assert json.loads(call("evaluate", work / "merged", tmp_path, "--json"))["rows"] == 4


def test_evaluate_takes_a_test_with_labels_before_the_training_rows(work, tmp_path):
    lines = (work / "test.jsonl").read_text().splitlines()
    new = json.dumps({"text": "a film", "label": "unknown"})  # of a class that the training does not have
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text("\n".join([*lines[:2], new]))
    assert json.loads(call("evaluate", work / "merged", tmp_path, "--json"))["rows"] == 3
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a film", "labels": "good"}))  # not named as in training
    assert json.loads(call("evaluate", work / "merged", tmp_path, "--json"))["rows"] == 1
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))  # as on Kaggle
    said = " ".join(run("evaluate", work / "merged", tmp_path).stderr.split())
    assert "measured are the rows of train.jsonl; a model that was trained on them does better" in said
    rows = [json.loads(line) for line in lines]
    names = sorted({row["label"] for row in rows})
    features = Features(text=Value("string"), label=ClassLabel(names=names))
    hidden = [{**row, "label": -1} for row in rows[:3]]  # as in GLUE
    for test, count in ((rows[:3], 3), (hidden, len(rows))):
        splits = {"train": rows, "test": test}
        saved = {name: Dataset.from_list(part, features=features) for name, part in splits.items()}
        DatasetDict(saved).save_to_disk(tmp_path / f"set{count}")
        report = json.loads(call("evaluate", work / "merged", tmp_path / f"set{count}", "--json"))
        assert report["rows"] == count
    plain = {"train": [{**row, "label": names.index(row["label"])} for row in rows], "test": hidden}  # no names
    DatasetDict({name: Dataset.from_list(part) for name, part in plain.items()}).save_to_disk(tmp_path / "plain")
    assert json.loads(call("evaluate", work / "merged", tmp_path / "plain", "--json"))["rows"] == len(rows)


def test_predict_reads_all_files_of_a_folder(work, tmp_path):
    (tmp_path / "data").mkdir()
    for name, text in (("train.csv", "a film"), ("test.csv", "a plot"), ("other.csv", "good")):
        (tmp_path / "data" / name).write_text(f"text\n{text}\n")
    call("predict", work / "merged", tmp_path / "data", "--out", tmp_path / "p.csv")
    assert [row["text"] for row in rows_in(tmp_path / "p.csv")] == ["good", "a plot", "a film"]


def test_compare_a_model_with_itself_and_with_another(work, tmp_path):
    data = ("--data", work / "test.jsonl", "--json")
    same = json.loads(call("compare", work / "adapter", work / "merged", *data))
    assert same["difference"]["same"] == 1.0 and same["difference"]["mean"] == 0.0 and same["difference"]["p"] == 1.0
    assert same["models"][0]["metrics"] == same["models"][1]["metrics"]
    text = call("compare", work / "adapter", work / "merged", *data[:2])
    assert "parameters" in text and "McNemar" in text
    save_adapter(tmp_path, names=["x", "y", "z"])
    assert "labels are x, y, z" in fails("compare", work / "merged", tmp_path / "merged", *data[:2])


def test_predicted_numbers_are_not_compared_for_equality(tmp_path):
    save_adapter(tmp_path, problem="regression")
    (tmp_path / "rows.csv").write_text("text,label\na film,0.5\nthe plot,1.5\nso good,2.5\n")
    arguments = ("compare", tmp_path / "adapter", tmp_path / "merged", "--data", tmp_path / "rows.csv")
    assert json.loads(call(*arguments, "--json"))["difference"]["same"] is None
    text = call(*arguments)
    assert "negative squared error" in text and "same prediction" not in text


@pytest.mark.parametrize("order", [("one", "several"), ("several", "one")])
def test_models_with_one_and_with_several_labels_are_not_compared(order, tmp_path):
    for name, problem in (("one", None), ("several", "multi_label_classification")):
        save_adapter(tmp_path / name, names=NAMES, problem=problem)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"a film,{name}\n" for name in NAMES))
    text = fails("compare", *(tmp_path / name / "merged" for name in order), "--data", tmp_path / "rows.csv")
    assert "do not predict the same labels" in text, text


def test_the_rows_are_not_replaced_by_their_predictions(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("text\ngood film\n")
    assert "would be replaced" in fails("predict", work / "adapter", tmp_path / "new.csv", "--out", "new.csv")
    assert (tmp_path / "new.csv").read_text() == "text\ngood film\n"


def test_predictions_do_not_become_rows(work, tmp_path, monkeypatch):
    """All files of a folder of rows are read, so the next command would predict for the predictions, too."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "new.csv").write_text("text\ngood film\n")
    monkeypatch.chdir(tmp_path)
    for out in ("rows/predictions.csv", "rows/new.csv", "../" + tmp_path.name + "/rows/a.jsonl"):
        text = fails("predict", work / "adapter", tmp_path / "rows", "--out", out, "--overwrite")
        assert "is in the folder of the rows" in text and "give a path outside of" in text
    run("predict", work / "adapter", "rows", "--out", "rows/made/predictions.csv")
    assert (tmp_path / "rows" / "new.csv").read_text() == "text\ngood film\n"


def test_mcnemar():
    """A textbook example: 5 against 15 discordant pairs."""
    assert mcnemar(5, 15) == pytest.approx(0.0414, abs=1e-4) and mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0


def test_words(tmp_path):
    save_adapter(tmp_path, "TOKEN_CLS", TAGS)
    sentences = [["the", "film", "is"], ["good"] * 60, ["a", "plot"]]
    lines = "\n\n".join("\n".join(f"{word} {TAGS[i % 3]}" for i, word in enumerate(words)) for words in sentences)
    (tmp_path / "rows.conll").write_text(lines)
    call("predict", tmp_path / "merged", tmp_path / "rows.conll", "--out", tmp_path / "p.jsonl", "--batch-size", "2")
    found = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in found] == sentences
    assert [len(row["tags"]) for row in found] == [3, 60, 2] and {tag for row in found for tag in row["tags"]} <= {
        *TAGS
    }
    # Predictions need no tags, and read none.
    bare = "\n\n".join("\n".join(f"{word} NN" for word in words) for words in sentences)
    (tmp_path / "bare.conll").write_text(bare)
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"tokens": s, "tags": []}) for s in sentences))
    for name in ("bare.conll", "bare.jsonl"):
        call("predict", tmp_path / "merged", tmp_path / name, "--out", tmp_path / f"{name}.jsonl", "--batch-size", "2")
        assert (tmp_path / f"{name}.jsonl").read_text() == (tmp_path / "p.jsonl").read_text()
    assert "bare.conll, line 1: 'NN' is not a tag" in fails("evaluate", tmp_path / "merged", tmp_path / "bare.conll")
    metrics = json.loads(call("evaluate", tmp_path / "adapter", tmp_path / "rows.conll", "--json"))["metrics"]
    right = sum(tag == TAGS[i % 3] for row in found for i, tag in enumerate(row["tags"]))
    assert metrics["tag_accuracy"] == pytest.approx(right / 65)
    # The file has a tag that the training had not: it cannot be found.
    more = (tmp_path / "rows.conll").read_text() + "\n\nfine\tB-rare\n"
    (tmp_path / "more.conll").write_text(more)
    result = run("evaluate", tmp_path / "adapter", tmp_path / "more.conll", "--json")
    assert "does not know some tags, which count as missed: B-rare" in " ".join(result.stderr.split())
    assert json.loads(result.stdout)["metrics"]["recall"] < 1
    (tmp_path / "others.conll").write_text("fine\tB-rare\n")
    assert "has the label 'B-rare'" in fails("evaluate", tmp_path / "adapter", tmp_path / "others.conll")


def test_answers(tmp_path):
    save_adapter(tmp_path, "QUESTION_ANS")
    context = "the story is very good . " * 12
    rows = [{"question": "the film is ?", "context": text, "answers": {"text": ["good"], "answer_start": [at]}}
            for text, at in ((context, 18), ("a good plot", 2))]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--max-length", "30", "--stride", "5")
    call("predict", tmp_path / "merged", tmp_path / "rows.jsonl", "--out", tmp_path / "p.csv", *options)
    found = rows_in(tmp_path / "p.csv")
    assert [row["question"] for row in found] == ["the film is ?"] * 2
    for row, source in zip(found, rows, strict=True):
        assert row["answer"] and row["answer"] == source["context"][int(row["start"]) : int(row["end"])].strip()
    # What the training has noted is the default.
    record = {"kind": "answers", "max_length": 30, "stride": 5, "max_answer_length": 30, "silent": False}
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps({"task": record}))
    call("predict", tmp_path / "adapter", tmp_path / "rows.jsonl", "--out", tmp_path / "q.csv")
    assert [row["answer"] for row in rows_in(tmp_path / "q.csv")] == [row["answer"] for row in found]
    metrics = json.loads(call("evaluate", tmp_path / "adapter", tmp_path / "rows.jsonl", "--json"))["metrics"]
    assert metrics["exact_match"] == pytest.approx(np.mean([exact(row["answer"], "good") for row in found]))
    # The stride of the training is too long for windows that are named here.
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps({"task": record | {"stride": 14}}))
    call("predict", tmp_path / "adapter", tmp_path / "rows.jsonl", "--max-length", "24", "--out", tmp_path / "r.csv")


@pytest.mark.parametrize("silent", [False, True])
def test_answers_are_measured_as_they_are_predicted(silent, tmp_path, monkeypatch):
    """Whether a question may get no answer is a matter of the training, not of the rows that are measured."""
    save_adapter(tmp_path, "QUESTION_ANS")
    at_good = np.where(np.arange(30) == 11, 1.0, 0.0) + np.where(np.arange(30) == 0, 2.0, 0.0)  # most for no answer
    monkeypatch.setattr(Predictor, "outputs", lambda self, rows, size: (np.tile(at_good, (len(rows), 1)),) * 2)
    answers = [{"text": ["good"], "answer_start": [18]}, {"text": [], "answer_start": []}]
    for name, given in (("known", answers[:1]), ("open", answers)):
        rows = [{"question": f"the film {i} is ?", "context": "the story is very good . " * 2, "answers": answer}
                for i in range(8) for answer in given]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        record = {"kind": "answers", "max_length": 30, "stride": 5, "silent": silent}
        (tmp_path / "adapter" / "metrics.json").write_text(json.dumps({"task": record}))
        predicted = json.loads("[" + ",".join(call("predict", tmp_path / "adapter", tmp_path / f"{name}.jsonl",
                                                   "--json").splitlines()) + "]")  # fmt: skip
        right = [exact(found["answer"], "".join(row["answers"]["text"]))
                 for found, row in zip(predicted, rows, strict=True)]  # fmt: skip
        measured = json.loads(call("evaluate", tmp_path / "adapter", tmp_path / f"{name}.jsonl", "--json"))
        assert measured["metrics"]["exact_match"] == pytest.approx(np.mean(right))


def test_numbers(tmp_path):
    save_adapter(tmp_path, problem="regression")
    rows = [{"text": text, "label": i / 7} for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call("predict", tmp_path / "merged", tmp_path / "rows.jsonl", "--out", tmp_path / "p.csv")
    found = [float(row["prediction"]) for row in rows_in(tmp_path / "p.csv")]
    metrics = json.loads(call("evaluate", tmp_path / "adapter", tmp_path / "rows.jsonl", "--json"))["metrics"]
    truth = [row["label"] for row in rows]
    assert metrics["mse"] == pytest.approx(np.mean((np.array(found) - truth) ** 2), rel=1e-4)


def test_a_single_label_that_a_row_has_or_has_not(tmp_path):
    """A head with one output was taken for one that predicts numbers."""
    save_adapter(tmp_path, names=["spam"], problem="multi_label_classification")
    rows = [{"text": text, "label": ["spam"] * (i % 2)} for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pytest.importorskip("onnxruntime")
    call("export", tmp_path / "adapter", tmp_path / "onnx" / "model.onnx")
    for name in ("adapter", "merged", "onnx"):
        lines = call("predict", tmp_path / name, tmp_path / "rows.jsonl", "--json").splitlines()
        found = [json.loads(line)["prediction"] for line in lines]
        metrics = json.loads(call("evaluate", tmp_path / name, tmp_path / "rows.jsonl", "--json"))["metrics"]
        assert metrics["accuracy"] == np.mean(
            [labels == row["label"] for labels, row in zip(found, rows, strict=True)]
        )
    trimmed = call("trim", tmp_path / "adapter", "--data", tmp_path / "rows.jsonl", "--budget", "0.3", "--out",
                   tmp_path / "half", "--json")  # fmt: skip
    assert json.loads(trimmed)["classes"] == ["spam"]


def test_windows_of_a_row_stay_together():
    owners = [0, 0, 1, 2, 2, 2, 3]
    rows = Rows([{"input_ids": [i]} for i in range(7)], [{"row": i} for i in range(4)],
                [(owner, np.zeros(1)) for owner in owners])  # fmt: skip
    parts = list(chunks(rows, 2))
    assert [[place for place, _ in part.places] for part in parts] == [[0, 0], [0, 1, 1, 1], [0]]
    assert [raw for part in parts for raw in part.raw] == rows.raw
    assert [row for part in parts for row in part.inputs] == rows.inputs
