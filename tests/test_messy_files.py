"""Files as people have them: what is recognized is right, and what may be wrong is said with the way to settle it."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from datetime import date
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from folders import save_tokenizer
from tiny import tiny_config

from peft_sensi.cli.prediction_commands import records_of
from peft_sensi.cli.prediction_files import write_records
from peft_sensi.cli.terminal import print_result
from peft_sensi.tasks import answers, texts, words
from peft_sensi.tasks.kinds import kind_of, read_task, rows_for_prediction
from peft_sensi.tasks.labels import Labels, find_labels, separator_of
from peft_sensi.tasks.options import Options, stride_of
from peft_sensi.tasks.reading import Format, read_rows
from peft_sensi.tasks.sources import Part, read_part
from peft_sensi.utils.errors import DataError
from peft_sensi.utils.formatting import listed


ROWS = [(f"a film number {i}", "good" if i % 2 else "bad") for i in range(12)]


@pytest.fixture
def base(tmp_path) -> str:
    """A tokenizer with a config of a model, but without the model."""
    tiny_config("bert").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return str(tmp_path / "base")


def doubts(values: list, labels: Labels | None = None) -> str:
    raw = [{"text": f"film {i}", "label": value} for i, value in enumerate(values)]
    return "\n".join(texts.describe(labels or find_labels(values), raw)[1])


def lines(path, opened: dict[int, str]) -> None:
    rows = [f"{opened.get(i, '')}{text},{label}" for i, (text, label) in enumerate(ROWS)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("opened", [{3: '"'}, {3: '"', 8: '"'}], ids=["to the end", "to the next one"])
def test_a_quote_that_is_not_closed_swallows_no_rows(opened, tmp_path):
    lines(tmp_path / "f.csv", opened)
    with pytest.raises(DataError, match=r"double quote in line 5 opens a cell that is not closed.*--no-quotes"):
        read_rows(tmp_path / "f.csv")
    lines(tmp_path / "f.csv", {3: 'a "quoted" word, '})
    with pytest.raises(DataError, match="row 4 .* has 3 cells, and the header has 2 \\(text, label\\)"):
        read_rows(tmp_path / "f.csv")
    lines(tmp_path / "f.csv", {3: 'a "quoted" word '})
    assert len(read_rows(tmp_path / "f.csv").rows) == 12


def test_a_sloppy_quote_in_one_line_does_not_hide_an_open_one(tmp_path):
    lines(tmp_path / "f.csv", {1: '"so" called ', 3: '"'})
    with pytest.raises(DataError, match="double quote in line 5"):
        read_rows(tmp_path / "f.csv")
    lines(tmp_path / "f.csv", {1: '"so" called '})
    assert read_rows(tmp_path / "f.csv").rows[1]["text"].startswith("so called")


def test_rows_over_several_lines_are_noted(tmp_path):
    with (tmp_path / "f.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), ("one\ntwo\n\nfour", "good"), *ROWS])
    table = read_rows(tmp_path / "f.csv")
    assert len(table.rows) == 13 and "1 row with line breaks inside of quotes, up to 4 lines" in table.notes[0]


def test_blanks_before_quotes(tmp_path):
    (tmp_path / "f.csv").write_text("label, text\n" + "\n".join(f'{label}, "{text}, really"' for text, label in ROWS))
    assert read_rows(tmp_path / "f.csv").rows[0] == {"label": "bad", "text": "a film number 0, really"}
    (tmp_path / "f.csv").write_text("text, label\n" + "\n".join(f'"{text}", "{label}"' for text, label in ROWS))
    assert {row["label"] for row in read_rows(tmp_path / "f.csv").rows} == {"good", "bad"}


def test_several_sources_with_other_encodings(tmp_path):
    made = [f"un café {text},{label}".encode("cp1252" if i == 7 else "utf-8") for i, (text, label) in enumerate(ROWS)]
    (tmp_path / "f.csv").write_bytes(b"\n".join([b"text,label", *made]))
    with pytest.raises(DataError, match="UTF-8, but not in line 9.*--encoding"):
        read_rows(tmp_path / "f.csv")
    made = [f"un café {text},{label}".encode("cp1252") for text, label in ROWS]
    (tmp_path / "f.csv").write_bytes(b"\n".join([b"text,label", *made]))
    assert read_rows(tmp_path / "f.csv").rows[0]["text"] == "un café a film number 0"


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_pointer_of_git_lfs(suffix, tmp_path):
    (tmp_path / f"f{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match="git lfs pull"):
        read_part(tmp_path / f"f{suffix}", None, Options())


def test_lists_as_numpy_and_sets_write_them(tmp_path):
    tags = [["O", "B-person", "it's"], ["O"]]
    frame = pandas.DataFrame({"tags": [np.array(row) for row in tags]})
    frame["answers"] = [{"text": np.array(["a b"], dtype=object), "answer_start": np.array([3])}] * 2
    frame["labels"] = [{"sad", "fun"}, {"sad"}]
    frame.to_csv(tmp_path / "f.csv", index=False)
    rows = read_rows(tmp_path / "f.csv").rows
    assert [row["tags"] for row in rows] == tags and rows[0]["labels"] == ["fun", "sad"]
    assert rows[0]["answers.text"] == ["a b"] and rows[0]["answers.answer_start"] == [3]


def test_answers_that_cannot_be_read_are_not_taken_for_none():
    row = {"question": "what?", "context": "a red stone", "answers": "{'text': red}"}
    with pytest.raises(DataError, match="row 1 needs"):
        answers.from_table("f", [row])
    part = Part("f", "table", [{"question": "what?", "context": "a red stone", "answer": "red"}], [], "")
    assert kind_of(part) == "answers" and kind_of(part, has_label=True) == "text"
    assert "no question has an answer" in answers.describe([{"context": "a", "answers": []}])[1][0]


def test_vectors_of_labels_are_not_taken_for_their_numbers():
    raw = [{"row": i, "text": "a", "label": value} for i, value in enumerate(([0, 1, 0], [1, 1, 0]), start=1)]
    with pytest.raises(DataError, match="0 or 1 for each label.*several --label-column"):
        texts.labels_of("f", raw, ["labels"], Options())
    for given, separator in ((("0 1 0", "1 1 0"), None), (("0,1,0", "1,1,0"), ","), ((["0", "0"], ["1", "0"]), None)):
        raw = [{"row": i, "text": "a", "label": value} for i, value in enumerate(given, start=1)]
        with pytest.raises(DataError, match="0 or 1 for each label"):
            texts.labels_of("f", raw, ["labels"], Options(label_separator=separator))
    raw = [{"row": i, "text": "a", "label": value} for i, value in enumerate(("0", "1", "1"), start=1)]
    assert texts.labels_of("f", raw, ["labels"], Options()).names == ["0", "1"]
    raw = [{"row": i, "text": "a", "label": value} for i, value in enumerate(([0, 1], [1]), start=1)]
    assert texts.labels_of("f", raw, ["labels"], Options()).names == ["0", "1"]


def test_vectors_of_labels_are_refused_for_a_trained_head(base, tmp_path):
    rows = [{"text": f"w{i}", "labels": [float(i % 2), float(i % 3 == 0), 1.0]} for i in range(12)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="0 or 1 for each label"):
        read_task(base, tmp_path / "f.jsonl", head=Labels(["a", "b", "c"], several=True))


def test_half_characters_in_json(tmp_path):
    (tmp_path / "f.jsonl").write_text(
        '{"text": "cut \\ud83d", "label": "a"}\n{"text": "\\ud83d\\ude00", "label": "b"}\n'
    )
    assert [row["text"] for row in read_rows(tmp_path / "f.jsonl").rows] == ["cut \ufffd", "\U0001f600"]


def test_labels_with_a_separator_are_doubted():
    several = ["fun|sad", "fun", "sad", "sad|long", "long"]
    assert "'fun|sad' is read as one label; for several labels, give --label-separator '|'" in doubts(several * 2)
    assert "--label-separator" not in doubts(["New York, NY", "Boston, MA", "Ames, IA"] * 2)
    assert separator_of(["n/a", "yes", "no"]) is None and separator_of(["C++", "C", "C#"]) is None
    rows = [{"text": "a film", "label": value} for value in ["a,b", "", "b,a", "a", "b"]]
    with pytest.raises(DataError, match="--skip-unlabeled. If rows can have several labels or none.*','"):
        texts.to_raw("f", rows, ("text",), ("label",), Options())


@pytest.mark.parametrize("pair", [("a", "A"), ("a", "a\u200b"), ("caf\u00e9", "cafe\u0301"), ("a b", "a  b")])
def test_classes_that_look_alike_are_doubted(pair):
    assert "look alike" in doubts([*pair, "other"] * 2)
    assert "look alike" not in doubts(["a", "b"] * 2)


def test_numbers_that_may_be_read_wrong_are_doubted():
    assert "no points between thousands" in doubts(["1.500", "12.250", "3.125"])
    assert "thousands" not in doubts(["0.500", "0.250", "0.125"]) + doubts(["1.5", "12.250", "3.125"])
    for labels in (["12%", "3%", "50%"], ["$1,000.00", "$5.00", "$7.00"]):
        assert "for amounts, write plain numbers" in doubts(labels * 2) and "separator" not in doubts(labels * 2)
    for odd, others in (("NA", ["0.5", "1.5"]), ("-", ["0.5", "1.5"]), ("0,5", ["0", "1,5"])):
        assert f"all labels are classes, because {odd!r} is not a number" in doubts([odd, *others] * 2)
    assert "give --label-separator ','" in doubts(["3", "3,27", "27", "3,10"] * 2)
    assert "not a number" not in doubts(["1", "2", "3", "NA"] * 2) + doubts(["a", "b", "0.5"] * 2)
    assert "plain numbers" not in doubts(["1/5", "2/5", "3/5"] * 2) + doubts(["1", "2", "3"] * 2)
    assert "learned slowly" in doubts([1.5e6, 2e6, 9e6], Labels([]))
    assert "learned slowly" not in doubts([1.5, 2.5, 4.25])


def test_other_columns_and_texts_are_said(base, tmp_path):
    rows = [{"text": text, "category": label, "sentiment": label} for text, label in ROWS]
    (tmp_path / "f.json").write_text(json.dumps(rows))
    assert "could also be in sentiment (--label-column)" in "".join(read_task(base, tmp_path / "f.json").doubts)
    (tmp_path / "f.json").write_text(json.dumps([row | {"text": ""} for row in rows]))
    with pytest.raises(DataError, match="all texts in 'text' are empty"):
        read_task(base, tmp_path / "f.json", text_column="text", label_column="category")
    (tmp_path / "f.json").write_text(
        json.dumps([row | {"category": ("O", "B-x")[i % 2]} for i, row in enumerate(rows)])
    )
    assert "look like tags of words" in "".join(read_task(base, tmp_path / "f.json").doubts)


def test_rows_that_are_in_both_parts_are_doubted_for_every_kind(base, tmp_path):
    (tmp_path / "f.conll").write_text("a B-x\nfilm O\n\n" * 12)
    assert "1 of the validation sentences is also" in "".join(read_task(base, tmp_path / "f.conll").doubts)
    row = {"question": "what?", "context": "a red stone", "answers": {"text": ["red"], "answer_start": [2]}}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    doubts = read_task(base, tmp_path / "f.jsonl", tmp_path / "f.jsonl", stride=8).doubts
    assert "1 of the validation questions is also among the training questions" in doubts


def test_sentences_without_lines_between_them_are_doubted():
    raw = [{"tokens": ["a"], "tags": ["O"]}] * 9 + [{"tokens": ["a"] * 2000, "tags": ["O"] * 1999 + ["B-x"]}]
    assert "empty line after each" in words.describe(words.labels_of(raw), raw)[1][0]


def test_names_are_listed_so_that_they_can_be_told_apart():
    assert listed(["a b", 'c, "d"', "e\tf", ""]) == "a b, 'c, \"d\"', 'e\\tf', ''"
    assert listed(list("abcdefghijklmnop"), 3) == "a, b, c, and 13 more"


@pytest.mark.parametrize(("value", "is_number"), [("2024-05-{:02d}", False), ("{}", True)])
def test_only_numbers_are_told_that_they_can_be_predicted_as_numbers(value, is_number):
    raw = [{"row": i, "text": f"film {i}", "label": value.format(i)} for i in range(1, 13)]
    with pytest.raises(DataError, match="probably not the label") as error:
        texts.labels_of("f.csv", raw, ["day"], Options())
    assert ("--regression" in str(error.value)) == is_number


def test_the_one_value_that_is_no_number_is_named():
    raw = [{"row": i, "text": f"film {i}", "label": f"{i}.5"} for i in range(1, 21)]
    raw.append({"row": 21, "text": "film", "label": "1e400"})
    with pytest.raises(DataError, match=r"with --regression \(1e400 is not a finite number"):
        texts.labels_of("f.csv", raw, ["day"], Options())


def test_data_on_stdout_keeps_letters_that_the_locale_lacks(monkeypatch):
    written = io.BytesIO()
    for write in (lambda: write_records(None, ".csv", [{"text": "schön", "label": "👍"}]),
                  lambda: print_result(True, {"label": "👍"})):  # fmt: skip
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="replace"))
        write()
        sys.stdout.flush()
        sys.stdout.detach()
    assert written.getvalue().decode() == 'text,label\nschön,👍\n{\n  "label": "👍"\n}\n'


def test_lists_in_the_columns_of_a_file_stay_lists_in_predictions(tmp_path):
    record = {"tags": ["New York", "b"], "prediction": ["a", "b"]}
    write_records(tmp_path / "p.csv", ".csv", [record], columns=["tags"])
    assert (tmp_path / "p.csv").read_text() == 'tags,prediction\n"[""New York"", ""b""]",a b\n'
    (tmp_path / "f.csv").write_text("text,tags\na film,\"['a', 'b']\"\n")
    part = read_part(tmp_path / "f.csv", "text", Options(), labeled=False)
    assert part.rows == [{"text": "a film", "tags": "['a', 'b']"}] and not part.notes


def test_no_column_of_a_file_is_replaced_by_a_prediction(tmp_path):
    """Files with the predictions of other models, and a label that has the name of one of their columns."""
    predictor, rows = SimpleNamespace(kind="text"), SimpleNamespace(raw=[{"row": 1}])
    found = {"label": "b", "score": 0.6, "scores": {"a": 0.4, "b": 0.6}}
    own = {"text": "x", "scores_a": "0.9"}
    for _ in range(3):
        before, file = own, tmp_path / "p.csv"
        write_records(file, ".csv", records_of(predictor, rows, [own], [found], True), columns=list(own))
        [own] = csv.DictReader(file.open(newline=""))
        assert own.items() >= before.items() and len(own) == len(before) + 4
    assert own["predicted_predicted_prediction"] == "b" and own["predicted_scores_a"] == "0.4"


def test_cells_of_every_kind_are_written_and_read_again(tmp_path):
    """Objects with other keys, dates in a list, a carriage return, NaN."""
    first = {"text": "a\rb", "meta": {}, "days": [date(2020, 1, 1)], "x": math.nan, "prediction": "a"}
    second = {**first, "text": "c\nd", "meta": {"a": 1}, "days": []}
    write_records(tmp_path / "p.csv", ".csv", [first, second], columns=["text", "meta", "days", "x"])
    rows = list(csv.DictReader((tmp_path / "p.csv").open(newline="")))
    assert [row["text"] for row in rows] == ["a\rb", "c\nd"]
    assert [row["meta"] for row in rows] == ["{}", '{"a": 1}'] and rows[0]["days"] == '["2020-01-01"]'
    write_records(tmp_path / "p.jsonl", ".jsonl", [first])
    assert json.loads((tmp_path / "p.jsonl").read_text(), parse_constant=pytest.fail)["x"] is None


@pytest.mark.parametrize("values", [["0.", "1.", "2."], ["1e3", "2", "1e1"], [1e20, 2.0], ["+1", "-1"]])
def test_whole_numbers_of_every_form_are_classes(values):
    labels = find_labels(values)
    assert sorted(labels.encode(value) for value in values) == list(range(len(values)))
    assert [float(name) for name in labels.names] == sorted(map(float, values))


OTHER_TEXTS = {
    "cp1251": "Очень хороший фильм, посмотрел ещё раз", "koi8-r": "Очень хороший фильм", "gbk": "这部电影非常好看",
    "shift_jis": "とても面白い映画でした。テスト", "euc_kr": "이 영화는 정말 재미있어요", "cp1253": "Πολύ καλή ταινία",
    "big5": "這部電影非常好看,我們昨天晚上去看了,覺得劇情十分精彩,演員的表演也很自然,推薦給大家",
    "cp1256": "فيلم رائع جدا", "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy",
}  # fmt: skip


@pytest.mark.parametrize("encoding", OTHER_TEXTS)
def test_texts_in_an_encoding_that_is_not_recognized_are_not_read_as_latin(encoding, tmp_path):
    rows = [{"text": f"A title in English: {OTHER_TEXTS[encoding]}", "label": label} for _, label in ROWS]
    pandas.DataFrame(rows).to_csv(tmp_path / "f.csv", index=False, encoding=encoding)
    with pytest.raises(DataError, match="not in UTF-8, and looks wrong as .* Name its encoding with --encoding"):
        read_rows(tmp_path / "f.csv")
    assert read_rows(tmp_path / "f.csv", Format(encoding=encoding)).rows == rows
    assert read_rows(tmp_path / "f.csv", Format(encoding="latin-1")).rows


@pytest.mark.parametrize("text", ["un café très créé — «\xa0Égalité\xa0»", "ações da educação", "það er góð æðarfugl"])
def test_latin_texts_are_noted_with_a_word_in_every_form(text, base, tmp_path):
    word = max((word for word in text.split() if word.isalpha()), key=len)
    (tmp_path / "f.csv").write_bytes(f"text,label\n{text},a\n{text},b\n".encode("cp1252"))
    (tmp_path / "f.conll").write_bytes("".join(f"{word} B-x\nfilm O\n\n" for word in text.split()).encode("cp1252"))
    question = {"question": "what?", "answers": [{"text": text[:3], "answer_start": 0}]}
    squad = {"data": [{"paragraphs": [{"context": text, "qas": [question]}]}]}
    (tmp_path / "f.json").write_bytes(json.dumps(squad, ensure_ascii=False).encode("cp1252"))
    for name in ("f.csv", "f.conll", "f.json"):
        notes = "".join(read_part(tmp_path / name, None, Options()).notes)
        assert f"{name} was read as cp1252 (--encoding), such as {word!r}" in notes


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("names", ["numbers", "ids"])
@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
def test_json_as_pandas_writes_it(orient, names, rows, tmp_path):
    frame = pandas.DataFrame(ROWS[:rows], columns=["text", "label"])
    frame["more"] = [{"year": 1990 + i} for i in range(rows)]
    if names == "ids":
        frame.index = [f"row-{i}" for i in range(rows)]
    if rows == 2 and names == "ids" and orient in ("columns", "index"):
        return  # nothing tells rows from columns there
    frame.to_json(tmp_path / "f.json", orient=orient)
    found = [
        {name: row[name] for name in ("text", "label", "more.year")} for row in read_rows(tmp_path / "f.json").rows
    ]
    assert found == [{"text": t, "label": n, "more.year": 1990 + i} for i, (t, n) in enumerate(ROWS[:rows])]


def test_json_that_is_one_row_stays_one(tmp_path):
    row = {"premise": {"text": "a film"}, "claim": {"text": "so bad"}}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    assert read_rows(tmp_path / "f.jsonl").rows == [{"premise.text": "a film", "claim.text": "so bad"}]
    (tmp_path / "f.json").write_text(json.dumps({"train": {"rows": [row]}, "test": {"rows": [row]}}))
    with pytest.raises(DataError, match="several lists of rows"):
        read_rows(tmp_path / "f.json")


@pytest.mark.parametrize("window", [None, 384, 30, 17])
def test_the_default_stride_fits_the_window(base, tmp_path, window):
    """The tiny model has 40 positions."""
    row = {"question": "what?", "context": "a red stone " * 30, "answers": {"text": ["red"], "answer_start": [2]}}
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps(row | {"id": str(i)}) for i in range(4)))
    task = read_task(base, tmp_path / "f.jsonl", validation_share=0.0, max_length=window)
    limit = min(window or 40, 40)
    assert task.record["max_length"] == limit == max(len(row["input_ids"]) for row in task.train)
    assert task.record["stride"] == limit // 3 and stride_of(Options(), 384) == 128 == stride_of(Options(), 512)
    found = rows_for_prediction("answers", task.tokenizer, tmp_path / "f.jsonl", max_length=limit)[0]
    assert found.inputs == [{k: v for k, v in row.items() if "positions" not in k} for row in task.train]


def test_texts_in_a_language_that_the_tokenizer_does_not_know_are_doubted(base, tmp_path):
    for text, unknown in (("a film", False), ("a film 映画", True)):
        frame = pandas.DataFrame([(f"{text} {'good ' * i}", label) for i, (_, label) in enumerate(ROWS)])
        frame.to_json(tmp_path / "f.json", orient="records")
        found = "".join(read_task(base, tmp_path / "f.json", text_column="0", label_column="1").doubts)
        assert ("of the tokens are unknown to the tokenizer: is the model for this language?" in found) is unknown


def test_a_window_without_room_is_named(base, tmp_path):
    row = {"question": "what?", "context": "a red stone", "answers": {"text": ["red"], "answer_start": [2]}}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="--stride 16 must be less than half of the window of 30 tokens"):
        read_task(base, tmp_path / "f.jsonl", validation_share=0.0, max_length=30, stride=16)
    with pytest.raises(DataError, match=r"window of 6 tokens has no room for a question and a text \(--max-length"):
        read_task(base, tmp_path / "f.jsonl", validation_share=0.0, max_length=6)


@pytest.mark.parametrize("column", ["first", "second"])
def test_a_pair_of_which_one_text_is_missing_counts_as_empty(base, column, tmp_path):
    frame = pandas.DataFrame([(text, f"{text}, said they", label) for text, label in ROWS])
    frame.columns = ["first", "second", "label"]
    frame.loc[3, column] = None
    frame.to_csv(tmp_path / "f.csv", index=False)
    assert ", 1 empty" in "".join(read_task(base, tmp_path / "f.csv").lines)


@pytest.mark.parametrize("columns", [["text"], ["text", "more"]])
def test_rows_with_empty_texts_get_a_prediction_each(columns, tmp_path):
    """The file with predictions has the rows that pandas reads, in the same order."""
    frame = pandas.DataFrame({"text": ["a film", "", "bad"], "more": ["x", "", "y"]})[columns]
    frame.to_csv(tmp_path / "f.csv", index=False)
    (tmp_path / "f.csv").write_text((tmp_path / "f.csv").read_text() + "\n\n")
    part = read_part(tmp_path / "f.csv", "text", Options(), labeled=False)
    assert [row["text"] for row in part.rows] == ["a film", "", "bad"] and not part.notes
    assert len(part.rows) == len(pandas.read_csv(tmp_path / "f.csv"))
    assert [row["text"] for row in read_part(tmp_path / "f.csv", "text", Options()).rows] == ["a film", "bad"]


def test_a_text_that_is_the_name_of_the_only_column_is_a_row(tmp_path):
    """The rows of the predictions were fewer than those of the file."""
    (tmp_path / "f.csv").write_text("text\na film\ntext\nbad\n")
    part = read_part(tmp_path / "f.csv", "text", Options(), labeled=False)
    assert [row["text"] for row in part.rows] == ["a film", "text", "bad"] and not part.notes
