"""Runs the example scripts with made-up rows and tiny models. No other files are needed."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from peft import PeftModel
from processes import environment, run_script
from tiny import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from peft_sensi.cli.commands import app
from peft_sensi.tasks import answers, word_files, words
from peft_sensi.tasks import metrics as metrics_of
from peft_sensi.tasks.kinds import read_task
from peft_sensi.tasks.labels import Labels


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "the city of is in lives and red green blue stone who where what".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# In float32, so that the figures are the same on every machine.
QUICK = ("--use_cpu --bf16 false --disable_tqdm True --per_device_train_batch_size 8 --learning_rate 1e-3").split()


@pytest.fixture(scope="module", autouse=True)
def scripts_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def run(script: str, *arguments: object) -> dict:
    """Runs a script in this process, and returns the content of its metrics.json."""
    given = [str(argument) for argument in arguments]
    epochs = [] if "--heal_epochs" in given else ["--num_train_epochs", "1"]
    importlib.import_module(script).main([*given, *QUICK, *epochs])
    folder = Path(given[given.index("--output_dir") + 1])
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The folder of a tiny BERT. Its tokenizer knows a few words, and splits all others into letters."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", "?", "1", "##1"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(folder)
    tiny_model("bert", "FEATURE_EXTRACTION", vocab_size=len(vocabulary), max_position_embeddings=64).save_pretrained(
        folder
    )
    return folder


def check(metrics: dict, trims: bool) -> None:
    """Checks the entries that every report has, and that the saved files give the trained model again."""
    assert metrics["differences"]["reloaded"] == 0
    assert metrics["differences"]["merged"] < 1e-4
    base = metrics["base"]
    if trims:
        assert metrics["plan"]["params_share"] <= 0.5
        assert metrics["parameters"] < base["parameters"] and metrics["flops"] < base["flops"]
    else:
        assert metrics["parameters"] == base["parameters"] and metrics["flops"] == base["flops"]
    assert 0 < metrics["trained_values"] < base["parameters"]
    assert metrics["weight_bytes"] > 4 * metrics["trained_values"]
    assert metrics["seconds_per_step"] > 0
    assert math.isfinite(metrics["validation"]["loss"])


# --- texts -----------------------------------------------------------------------------------------------------------


def write_sentences(path: Path, count: int = 40) -> Path:
    lines = ["sentence\tlabel"]
    lines += [
        f'the {"stone" if i % 2 else "city"} {LETTERS[i % 26]} "\t{"odd" if i % 2 else "even"}' for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("pays", [True, False])
def test_precision_follows_the_hardware_unless_it_is_given(pays, tmp_path, monkeypatch):
    runner = importlib.import_module("runner")
    monkeypatch.setattr(runner, "bf16_pays", lambda device: pays)
    for given, expected in (("", pays), ("--bf16 true", True), ("--bf16 false", False), ("--fp16 true", False)):
        arguments = ["--model", "any", "--output_dir", str(tmp_path), "--use_cpu", *given.split()]
        *_, training = runner.parse("", runner.TaskOptions, arguments=arguments)
        assert training.bf16 is expected


def test_examples_have_the_options_of_the_command_about_the_data():
    data = importlib.import_module("runner").TaskOptions
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    assert {field.name for field in fields(data)} <= {each.name for each in command.params}
    # The names that the scripts of Transformers use.
    aliases = ["--train_file", "a.tsv", "--validation_file", "b.tsv", "--max_train_rows", "9"]
    arguments = ["--model", "any", "--output_dir", "out", "--use_cpu", *aliases]
    _, found, _ = importlib.import_module("runner").parse("", data, arguments=arguments)
    assert (found.data, found.validation, found.max_rows) == (["a.tsv"], ["b.tsv"], 9)


def test_text_classification(encoder, tmp_path):
    file = write_sentences(tmp_path / "rows.tsv")
    metrics = run("text_classification", "--model", encoder, "--train_file", file, "--budget", 0.5,
                  "--output_dir", tmp_path / "out")  # fmt: skip
    check(metrics, trims=True)
    assert metrics["classes"] == ["even", "odd"]
    assert metrics["rows"] == {"train": 36, "validation": 4}


def test_numbers_are_a_regression(encoder, tmp_path):
    rows = [{"sentence": "red " * (1 + i % 4), "score": 0.5 * (i % 4)} for i in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    metrics = run("text_classification", "--model", encoder, "--train_file", file, "--trainable", 0.1,
                  "--label_column", "score", "--output_dir", tmp_path / "out")  # fmt: skip
    check(metrics, trims=False)
    assert metrics["classes"] == [] and metrics["validation"]["mse"] >= 0


def test_a_finetuned_model_is_trimmed(encoder, tmp_path):
    file, whole = write_sentences(tmp_path / "rows.tsv"), tmp_path / "whole"
    run("text_classification", "--model", encoder, "--train_file", file, "--method", "full", "--output_dir", whole)
    given = ["--model", whole, "--train_file", file, "--heal_epochs", 1, "--output_dir", tmp_path / "out"]
    metrics = run("trim_finetuned", *given, "--budgets", 0.5, 0.25)
    assert [row["budget"] for row in metrics["budgets"]] == [0.5, 0.25]
    for row in metrics["budgets"]:
        assert row["plan"]["params_share"] <= row["budget"]
        assert math.isfinite(row["trimmed"]["loss"]) and row["healed"]["loss"] != row["trimmed"]["loss"]
        base = AutoModelForSequenceClassification.from_pretrained(whole)
        plan = PeftModel.from_pretrained(base, tmp_path / "out" / str(row["budget"])).base_model.plan()
        assert plan.params_share == row["plan"]["params_share"]
    with pytest.raises(SystemExit, match="3 outputs, but the training rows have 2 classes"):
        three = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
        three.save_pretrained(tmp_path / "three")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "three")
        run("trim_finetuned", *given, "--model", tmp_path / "three")
    for option in (["--num_train_epochs", 7], ["--resume_from_checkpoint", "nowhere"]):
        with pytest.raises(SystemExit, match=f"{option[0]} has no effect here"):
            run("trim_finetuned", *given, *option)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_have_the_same_report(method, encoder, tmp_path):
    file = write_sentences(tmp_path / "rows.tsv")
    metrics = run("text_classification", "--model", encoder, "--train_file", file, "--method", method,
                  "--output_dir", tmp_path / "out")  # fmt: skip
    assert metrics["differences"]["reloaded"] == 0
    assert metrics["parameters"] == metrics["base"]["parameters"]
    assert (metrics["trained_values"] == metrics["parameters"]) is (method == "full")


# --- tags ------------------------------------------------------------------------------------------------------------


def write_tags(path: Path, count: int = 48) -> Path:
    """The word after `in` is B-place, a second one is I-place. The word before `lives` is B-person."""
    sentences = []
    for i in range(count):
        place = [f"{LETTERS[i % 26]}b\tB-place", f"{LETTERS[i % 7]}c\tI-place"][: 1 + i % 2]
        rest = ["red\tO"] * (i % 5)
        sentences.append("\n".join([f"{LETTERS[i % 11]}d\tB-person", "lives\tO", "in\tO", *place, *rest]))
    path.write_text("\n\n".join(sentences) + "\n")
    return path


def test_token_classification(encoder, tmp_path):
    file = write_tags(tmp_path / "rows.conll")
    metrics = run("token_classification", "--model", encoder, "--train_file", file, "--budget", 0.5,
                  "--output_dir", tmp_path / "out")  # fmt: skip
    check(metrics, trims=True)
    assert metrics["classes"] == ["O", "B-person", "B-place", "I-place"]


def test_tags_are_learned(encoder, tmp_path):
    """With wrongly aligned labels, or rows evaluated in another order, this F1 could not be reached."""
    file = write_tags(tmp_path / "rows.conll", 96)
    metrics = run("token_classification", "--model", encoder, "--train_file", file, "--validation_file", file,
                  "--method", "full", "--max_length", 16, "--output_dir", tmp_path / "out",
                  "--max_steps", 120)  # fmt: skip
    assert metrics["validation"]["f1"] > 0.95
    assert metrics["rows"]["validation"] == 96


@pytest.mark.parametrize("max_length", [6, 7, 11, 64])
def test_every_word_is_labeled_once_over_all_windows(max_length, encoder, tmp_path):
    path = tmp_path / "rows.conll"
    # The third word of the first sentence is a control character, for which the tokenizer produces no token.
    path.write_text("red O\nabcdefgh B-x\n\x07 I-x\nblue I-x\n\nstone O\n\n-DOCSTART- -X- O\n\nzz S-y\nabc I-x\n")
    raw = word_files.read_conll(path, 0, -1)
    assert [len(row["tokens"]) for row in raw] == [4, 1, 2]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    labels = Labels(["O", "B-x", "I-x", "S-y"])
    rows, longest, cut = words.encode(raw, labels, tokenizer, max_length)
    flat = [(sentence, int(word)) for sentence, places in rows.places for _, word in places]
    assert flat == [(0, 0), (0, 1), (0, 3), (1, 0), (2, 0), (2, 1)]
    assert (cut > 0) is (max_length < 12) and longest >= 12
    for window, (sentence, places) in zip(rows.inputs, rows.places, strict=True):
        assert len(window["labels"]) == len(window["input_ids"]) <= max_length
        assert [i for i, label in enumerate(window["labels"]) if label != -100] == places[:, 0].tolist()
        for position, word in places:
            first = tokenizer.convert_ids_to_tokens(window["input_ids"][position])
            assert raw[sentence]["tokens"][word].startswith(first)  # the first sub-word
            assert labels.names[window["labels"][position]] == raw[sentence]["tags"][word]
    # With all labels predicted correctly, everything is found except words without a token.
    width = max(len(row["labels"]) for row in rows.inputs)
    right = np.array([[*row["labels"], *[-100] * (width - len(row["labels"]))] for row in rows.inputs])
    scores = words.measure(labels, right, rows, None).values
    assert scores["recall"] == 2 / 3  # without its middle word, the entity (x, 1, 4) is found as two parts
    assert scores["tag_accuracy"] == 6 / 7


def test_entities():
    entities = metrics_of.entities
    assert entities("B-x I-x O B-x B-x I-y".split()) == [("x", 0, 2), ("x", 3, 4), ("x", 4, 5), ("y", 5, 6)]
    assert entities("I-x I-x O I-x B-x".split()) == [("x", 0, 2), ("x", 3, 4), ("x", 4, 5)]  # IOB1
    assert entities("S-x B-x E-x E-x B-y I-y E-y".split()) == [("x", 0, 1), ("x", 1, 3), ("x", 3, 4), ("y", 4, 7)]
    assert entities("U-x B-x L-x U-x".split()) == [("x", 0, 1), ("x", 1, 3), ("x", 3, 4)]  # BILOU
    assert entities(["B-a-b", "I-a-b"]) == [("a-b", 0, 2)]
    assert entities([]) == entities(["O"]) == []


def test_entity_scores():
    found = [["B-x", "I-x", "O"], ["B-x", "O"], ["O"]]
    right = [["B-x", "O", "O"], ["B-x", "O"], ["B-y"]]
    scores = metrics_of.words(metrics_of.word_counts(found, right))
    assert scores == {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "tag_accuracy": 4 / 6}


# --- answers ---------------------------------------------------------------------------------------------------------


def write_questions(path: Path, count: int = 24) -> Path:
    articles = []
    for i in range(count):
        name, place = f"{LETTERS[i]}ob", f"{LETTERS[-1 - i]}ork"
        context = f"  The red stone is in the city.  {name} lives in {place}{' and is red' * (6 * (i % 3))}. The end"
        qas = [
            {"id": f"{i}a", "question": f"Where lives {name}?",
             "answers": [{"text": place, "answer_start": context.index(place)}]},
            {"id": f"{i}b", "question": "What is red? " * (1 + 9 * (i % 2)),
             "answers": [{"text": " stone", "answer_start": context.index(" stone")}]},
        ]  # fmt: skip
        if i % 4 == 0:
            qas.append({"id": f"{i}c", "question": "Who is blue?", "answers": [], "is_impossible": True})
        articles.append({"title": name, "paragraphs": [{"context": context, "qas": qas}]})
    path.write_text(json.dumps({"version": "made up", "data": articles}))
    return path


def test_question_answering(encoder, tmp_path):
    file = write_questions(tmp_path / "rows.json")
    metrics = run("question_answering", "--model", encoder, "--train_file", file, "--budget", 0.5, "--max_length", 32,
                  "--stride", 8, "--output_dir", tmp_path / "out", "--max_steps", 12)  # fmt: skip
    check(metrics, trims=True)
    assert metrics["raw_rows"]["train"] + metrics["raw_rows"]["validation"] == 54
    # PEFT drops token types, so the saved tokenizer must not produce them.
    assert "token_type_ids" in AutoTokenizer.from_pretrained(encoder)("red", "blue")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(saved("red", "blue")) == {"input_ids", "attention_mask"}


def read_squad(path: Path) -> list[dict]:
    return answers.from_squad(path, json.loads(path.read_text()))[0]


@pytest.mark.parametrize(("max_length", "stride"), [(24, 3), (32, 8), (33, 15), (64, 0)])
def test_labels_of_windows_are_the_answers(max_length, stride, encoder, tmp_path):
    raw = read_squad(write_questions(tmp_path / "rows.json"))
    rows, longest, cut = answers.encode(raw, AutoTokenizer.from_pretrained(encoder), max_length, stride)
    assert longest == max(len(row["input_ids"]) for row in rows.inputs) <= max_length
    assert (len(rows) > len(raw) and cut > 0) or max_length == 64
    answered = set()
    starts = np.full((len(rows), max_length), -5.0)
    ends = starts.copy()
    for window, (number, places) in enumerate(rows.places):
        first, last = rows[window]["start_positions"], rows[window]["end_positions"]
        starts[window, first] = ends[window, last] = 5.0
        if last:
            context, answer = raw[number]["context"], raw[number]["answers"][0]
            assert context[places[first, 0] : places[last, 1]] == answer.strip()
            answered.add(number)
    with_answers = {i for i, row in enumerate(raw) if row["answers"]}
    assert answered == with_answers
    # Logits that point at the labels give every answer, in the words of the original text.
    quality = answers.measure((starts, ends), rows, 30, silent=True)
    assert quality.values == {"exact_match": 1.0, "f1": 1.0}
    assert quality.baseline["f1"] == pytest.approx(1 - len(with_answers) / len(raw))
    found = [row["answer"] for row in answers.decode((starts, ends), rows, 30, silent=True)]
    assert [text for i, text in enumerate(found) if i not in with_answers] == [""] * (len(raw) - len(with_answers))
    assert all(row["answer"] for row in answers.decode((starts, ends), rows, 30))


def test_best_span_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for _ in range(50):
        starts, ends = generator.normal(size=(2, 12))
        places = np.where(generator.random(12)[:, None] < 0.8, np.arange(12)[:, None] * [3, 3] + [0, 2], -1)
        longest = int(generator.integers(1, 6))
        spans = [(starts[i] + ends[j], i, j) for i in range(12) for j in range(i, min(12, i + longest))
                 if places[i, 0] >= 0 and places[j, 0] >= 0]  # fmt: skip
        score, first, last = answers.best_span(places, starts, ends, longest)
        assert (score, first, last) == max(spans, default=(-np.inf, 0, 0))


def test_answer_scores():
    assert metrics_of.exact("The  City!", "city") == 1.0
    assert metrics_of.f1("red city", "the red stone") == 0.5
    assert metrics_of.f1("", "") == 1.0 and metrics_of.f1("red", "") == 0.0
    scores = metrics_of.answer_scores(["red", "", "blue"], [["green", "red city"], [], ["red"]])
    found = metrics_of.answers(scores)
    assert found["exact_match"] == pytest.approx(1 / 3) and found["f1"] == pytest.approx((2 / 3 + 1) / 3)


def test_misplaced_answers_are_left_out_and_counted(tmp_path):
    path = write_questions(tmp_path / "rows.json", 4)
    content = json.loads(path.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    rows, notes = answers.from_squad(path, content)
    assert len(rows) == 8  # of 9
    assert "skipped 1 answer that is not" in notes[0]


# --- language models -------------------------------------------------------------------------------------------------


def write_text(path: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    path.write_text("\n\n".join(" ".join(generator.choice(WORDS, 30)) + "." for _ in range(30)))
    return path


SMALL = ["--hidden_size", 32, "--layers", 2, "--vocab_size", 280, "--block_size", 40]


def test_causal_lm(tmp_path):
    file = write_text(tmp_path / "text.txt")
    whole = run("causal_lm", "--method", "full", "--train_file", file, *SMALL, "--output_dir", tmp_path / "small")
    assert whole["differences"]["reloaded"] == 0
    # The reported numbers must equal those of all rows, computed one at a time and without padding.
    script = importlib.import_module("causal_lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    _, rows = importlib.import_module("common").hold_out(script.read_texts(str(file), "text"), 0.1, seed=42)
    blocks = script.blocks(rows, tokenizer, 40)
    assert len({len(ids) for ids in blocks["input_ids"]}) > 1  # so the evaluated batch had padding
    losses, right, count = 0.0, 0, 0
    for ids in blocks["input_ids"]:
        ids = torch.tensor([ids])
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        losses += output.loss.item() * (ids.shape[1] - 1)
        right += (output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum().item()
        count += ids.shape[1] - 1
    assert whole["validation"]["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-4)
    assert whole["validation"]["next_token_accuracy"] == pytest.approx(right / count)
    text = "red städte 城 \n\n end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # bytes can encode every text

    metrics = run("causal_lm", "--model", tmp_path / "small", "--train_file", write_text(tmp_path / "b.txt", 1),
                  "--budget", 0.5, "--block_size", 40, "--output_dir", tmp_path / "out")  # fmt: skip
    check(metrics, trims=True)


# --- images ----------------------------------------------------------------------------------------------------------


def test_image_classification(tmp_path):
    few, size = ["--max_train_rows", 64, "--max_validation_rows", 30], ["--layers", 2, "--hidden_size", 32]
    whole = run("image_classification", "--method", "full", *few, *size, "--output_dir", tmp_path / "small")
    assert whole["differences"]["reloaded"] == 0
    metrics = run("image_classification", "--model", tmp_path / "small", *few, "--budget", 0.5,
                  "--output_dir", tmp_path / "out")  # fmt: skip
    check(metrics, trims=True)


def test_image_files(tmp_path):
    from PIL import Image

    lines = ["image,label"]
    for i in range(20):
        shade = np.full((9, 12, 3), 255 * (i % 2), dtype=np.uint8)
        shade[:, :, 2] = i
        Image.fromarray(shade).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'light' if i % 2 else 'dark'}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    metrics = run("image_classification", "--train_file", tmp_path / "rows.csv", "--method", "full", "--layers", 1,
                  "--max_steps", 12, "--output_dir", tmp_path / "out")  # fmt: skip
    assert metrics["classes"] == ["dark", "light"]
    assert metrics["validation"]["accuracy"] == 1.0
    assert metrics["differences"]["reloaded"] == 0
    (tmp_path / "7.png").unlink()
    with pytest.raises(SystemExit, match=r"7\.png"):
        run("image_classification", "--train_file", tmp_path / "rows.csv", "--output_dir", tmp_path / "out")


# --- wrong input -----------------------------------------------------------------------------------------------------


NEEDS_MODEL = ("text_classification", "token_classification", "question_answering")


@pytest.mark.parametrize("script", [*NEEDS_MODEL, "causal_lm", "image_classification"])
def test_a_missing_file_is_one_line(script, encoder, tmp_path):
    model = ["--model", encoder] if script in NEEDS_MODEL else []
    with pytest.raises(SystemExit, match=r"nowhere\.tsv") as caught:
        run(script, *model, "--train_file", tmp_path / "nowhere.tsv", "--output_dir", tmp_path)
    assert isinstance(caught.value.code, str)  # Python prints it, and exits with status 1


ROWS = ["--train_file", "rows.tsv"]
WRONG = {
    "no file": ("text_classification", [], "--data"),
    "label column": ("text_classification", [*ROWS, "--label_column", "lable"], "no column 'lable'"),
    "contradiction": ("text_classification", [*ROWS, "--budget", 0.5, "--params", 0.5], "--params"),
    "budget for full": ("text_classification", [*ROWS, "--method", "full", "--flops", 0.5], "flops"),
    "impossible budget": ("text_classification", ["--train_file", "nowhere.tsv", "--budget", 1.5], "1.5"),
    "tag column": ("token_classification", ["--train_file", "rows.conll", "--label_column", 4],
                   "line 1: there is no column 4"),
    "not tags": ("token_classification", ["--train_file", "rows.conll", "--label_column", 0], "'ad' is not a tag"),
    "not SQuAD": ("question_answering", ROWS, "SQuAD format"),
    "other JSON": ("question_answering", ["--train_file", "other.json"], "not in SQuAD format"),
    "stride": ("question_answering", ["--train_file", "rows.json", "--stride", 40], "--stride 40"),
    "empty text": ("causal_lm", ["--train_file", "empty.txt"], "no text"),
    "text column": ("causal_lm", ROWS, "no column 'text'"),
    "vocabulary": ("causal_lm", ["--train_file", "text.txt", "--vocab_size", 100], "257"),
    "image column": ("image_classification", ROWS, "no column 'image'"),
    "no model there": ("causal_lm", ["--train_file", "text.txt", "--model", "nowhere"], "--model nowhere"),
    "score for full": ("text_classification", [*ROWS, "--method", "full", "--score", "taylor"],
                       "--score has no effect"),
    "rank for sensi": ("text_classification", [*ROWS, "--lora_rank", 3], "--lora_rank has no effect"),
    "size for a given model": ("causal_lm", ["--model", "any", "--layers", 3, "--heads", 8], "--heads, --layers"),
    "no tokens": ("causal_lm", ["--train_file", "text.txt", "--block_size", 0], "--block_size must be at least 1"),
    "no rows": ("causal_lm", ["--train_file", "text.txt", "--max_rows", 0], "--max_rows must be at least 1"),
    "no layers": ("causal_lm", ["--train_file", "text.txt", "--layers", 0], "--layers must be at least 1"),
    "no heads": ("image_classification", ["--heads", 0], "--heads must be at least 1"),
    "no images": ("image_classification", ["--max_train_rows", 0], "--max_rows must be at least 1"),
    "no pixels": ("image_classification", ["--image_size", 0], "--image_size must be at least 1"),
    "no patch": ("image_classification", ["--patch_size", 0], "--patch_size must be at least 1"),
    "one row": ("causal_lm", ["--train_file", "one.txt"], "--validation"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sentences(Path("rows.tsv"))
    write_tags(Path("rows.conll"))
    write_questions(Path("rows.json"))
    write_text(Path("text.txt"))
    Path("other.json").write_text('{"data": [{"paragraphs": [{"qas": []}]}]}')
    Path("empty.txt").write_text(" \n\n \n")
    Path("one.txt").write_text("red stone")
    script, arguments, message = WRONG[case]
    model = ["--model", encoder] if script in NEEDS_MODEL else []
    with pytest.raises(SystemExit) as caught:
        run(script, *model, *arguments, "--output_dir", "out")
    assert message in str(caught.value.code)


def test_the_exit_status_is_not_zero_and_there_is_no_traceback(tmp_path):
    command = [str(EXAMPLES / "causal_lm.py"), "--train_file", "nowhere.txt", "--output_dir", str(tmp_path)]
    code, output = run_script(command, tmp_path, environment())
    assert code == 1
    assert "nowhere.txt" in output and "Traceback" not in output


def test_articles_are_held_out_whole(encoder, tmp_path):
    file = write_questions(tmp_path / "rows.json")
    task = read_task(str(encoder), file, validation_share=0.25, max_length=32, stride=8)
    train, validation = ({row["article"] for row in part.raw} for part in (task.train, task.validation))
    assert not train & validation and len(validation) == 6
    assert len(task.train.raw) + len(task.validation.raw) == len(read_squad(file))
