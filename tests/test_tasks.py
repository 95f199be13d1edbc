"""Data as it really comes: files of every form, columns and labels, splits, metrics, and decoded predictions."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import re
import zipfile
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from folders import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast, RobertaConfig, T5Config

from peft_sensi.reporting.task_record import saved_record
from peft_sensi.tasks import answers, metrics, sources, texts, word_files, words
from peft_sensi.tasks.class_order import check_order
from peft_sensi.tasks.columns import label_columns, text_columns
from peft_sensi.tasks.encodings import encoding_of
from peft_sensi.tasks.kinds import kind_of, read_task, rows_for_prediction
from peft_sensi.tasks.labels import Labels, find_labels, find_several, labels_of_config, order_of_head
from peft_sensi.tasks.models import load_tokenizer, longest_input
from peft_sensi.tasks.options import Options
from peft_sensi.tasks.reading import Format, read_rows
from peft_sensi.tasks.sources import read_source
from peft_sensi.tasks.splitting import by_group, hold_out, sample
from peft_sensi.tasks.task import Rows, token_doubts
from peft_sensi.utils import distributed
from peft_sensi.utils.errors import DataError
from peft_sensi.utils.task_types import TASK_TYPES, describe_type, kind_of_model, type_of_class


ROWS = [
    {"text": "a fine film", "label": "good"},
    {"text": "prée, naïve", "label": "bad"},
    {"text": "it is so; really", "label": "good"},
]


@pytest.fixture
def base(tmp_path) -> Path:
    """A tokenizer with a config of a model, but without the model."""
    tiny_config("bert").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def table(delimiter: str = ",", header: bool = True, quoting: int = csv.QUOTE_MINIMAL) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


# -- files ------------------------------------------------------------------------------------------------------------


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.csv", content)
    return file.getvalue()


FILES = {
    "plain.csv": table().encode(),
    "tabs.tsv": table("\t").encode(),
    "semicolons.csv": table(";").encode(),
    "bars.csv": table("|").encode(),
    "tabs-named.csv": table("\t").encode(),
    "commas-named.tsv": table(",").encode(),
    "mark.csv": table().encode("utf-8-sig"),
    "utf16.csv": table().encode("utf-16"),
    "utf16-without-mark.csv": table().encode("utf-16-le"),
    "latin.csv": table().encode("latin-1"),
    "windows.csv": table().replace("\n", "\r\n").encode(),
    "quoted.tsv": table("\t", quoting=csv.QUOTE_ALL).encode(),
    "packed.csv.gz": gzip.compress(table().encode()),
    "packed.csv.bz2": bz2.compress(table().encode()),
    "packed.csv.zip": zipped(table().encode()),
    "packed-inside.csv": gzip.compress(table().encode()),
    "blank-lines.csv": table().replace("\n", "\n\n").encode(),
    "list.json": json.dumps(ROWS).encode(),
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "lines-named.json": "\n".join(map(json.dumps, ROWS)).encode(),
    "list-named.jsonl": json.dumps(ROWS, indent=1).encode(),
    "nested.json": json.dumps({"version": 1, "data": {"rows": ROWS}}).encode(),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "pandas.json": json.dumps({key: {str(i): r[key] for i, r in enumerate(ROWS)} for key in ROWS[0]}).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_form(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert read_rows(tmp_path / name).rows == ROWS


def test_a_column_that_the_first_row_lacks_is_found(tmp_path):
    rows = [{"text": "a fine film"}, {"text": "so bad", "label": "bad", "more": {"year": 3}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_rows(tmp_path / "a.jsonl").rows
    assert found[0] == {"text": "a fine film", "label": None, "more.year": None}
    assert label_columns("a", found, []) == ["label"]
    with pytest.raises(DataError, match=r"row 1 has no label in 'label'.*--skip-unlabeled"):
        texts.to_raw("a", found, ["text"], ["label"], Options())


def test_parquet_and_arrow(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_feather(tmp_path / "rows.arrow")
    assert read_rows(tmp_path / "rows.parquet").rows == read_rows(tmp_path / "rows.arrow").rows == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_columns_of_any_type(name, tmp_path):
    """Texts as bytes are texts; dates, decimals, categories, booleans and lists are labels, other things are not."""
    pyarrow = pytest.importorskip("pyarrow")
    write = {"rows.parquet": pytest.importorskip("pyarrow.parquet").write_table,
             "rows.arrow": pytest.importorskip("pyarrow.feather").write_feather}[name]  # fmt: skip

    def read(column: Any, given: Any = None) -> Labels:
        texts_ = pyarrow.array([b"a fine film", b"so bad", b"a film"], pyarrow.binary())
        table = pyarrow.table({"text": texts_, "label": column})
        path = tmp_path / name
        write(table, str(path))
        rows = read_rows(path).rows
        assert text_columns(path, rows, ["label"], None, None)[0] == ("text",)
        options = Options(regression=given, skip_unlabeled=True)
        return texts.labels_of(path, texts.to_raw(path, rows, ["text"], ["label"], options)[0], ["label"], options)

    day, array = datetime.date(2024, 1, 31), pyarrow.array
    for column, names in (
        (array([b"yes", b"no", b"yes"]), ["no", "yes"]),
        (array([True, False, None]), ["False", "True"]),
        (array([day, day.replace(day=1), day]), ["2024-01-01", "2024-01-31"]),
        (array(["b", "a", None]).dictionary_encode(), ["a", "b"]),
        (array([2.0, None, 10.0]), ["2", "10"]),
        (array([Decimal("1.00"), Decimal("2.00"), Decimal("1.00")]), ["1", "2"]),
        (array([Decimal("1.50"), Decimal("2.00"), Decimal("1.00")]), []),
        (array([["a"], ["a", None, "b"], []]), ["a", "b"]),
    ):
        assert read(column).names == names
    for column, message in (
        (array([b"\xff\xd8", b"\xff", b"\x00"]), r"row 1 has no label in 'label', but b'"),
        (array([[["a"]], [["b"]], [["a"]]]), r"row 1 has no label in 'label', but \[\['a'"),
        (array([[1.5, 2.5], [0.5], [3.5, 4.5]]), "5 different labels in 3 rows"),
        (array([None, None, None]), "no row has a label"),
    ):
        with pytest.raises(DataError, match=message):
            read(column)
    with pytest.raises(DataError, match="--regression predicts one number"):
        read(array([["a"], ["b"], ["a"]]), given=True)


def test_hidden_classes_in_lists_are_not_the_last_class(tmp_path):
    datasets = pytest.importorskip("datasets")
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"]))
    rows = {"tokens": [["a", "b"]], "tags": [[1, -1]], "raw": [b"text"]}
    features = {"tokens": datasets.Sequence(datasets.Value("string")), "tags": tags, "raw": datasets.Value("binary")}
    found = sources.rows_of(datasets.Dataset.from_dict(rows, datasets.Features(features)))
    assert found == [{"tokens": ["a", "b"], "tags": ["B-x", None], "raw": "text"}]


def test_held_out_rows_are_at_most_so_many(base, tmp_path):
    file = labeled(tmp_path / "a.csv", ["yes", "no"] * 50)
    task = read_task(str(base), file, max_validation_rows=4)
    assert len(task.validation) == 4 and len(task.train) == 96


def test_a_data_set_for_validation_is_its_validation_split(base, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} film {i}" for i in range(6)], "label": ["a", "b"] * 3})
        for name in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    task = read_task(str(base), labeled(tmp_path / "a.csv", ["a", "b"] * 5), tmp_path / "set")
    assert {row["text"].split()[0] for row in task.validation.raw} == {"validation"}


def test_what_was_recognized_is_noted(tmp_path):
    def notes(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return " ".join(read_rows(tmp_path / name).notes)

    assert notes("a.csv", FILES["plain.csv"]) == ""
    assert "cp1252 (--encoding)" in notes("b.csv", FILES["latin.csv"])
    assert "semicolons (--delimiter)" in notes("c.csv", FILES["semicolons.csv"])
    assert "part of the text (--quotes" in notes("d.tsv", b'text\tlabel\nsay "hi\t1\n')
    twice = notes("e.tsv", b"text\tlabel\na b\t1\ntext\tlabel\nc d\t0\n \t \n")
    assert "1 repeated header" in twice and "1 empty row" in twice
    assert "1 repeated header" in notes("f.csv", "\ufefftext,label\na b,1\n\ufefftext,label\nc d,0\n".encode())


def test_quotes_in_files_with_tabs(tmp_path):
    def rows(text: str, **form) -> list[str]:
        (tmp_path / "a.tsv").write_text(text)
        return [row["text"] for row in read_rows(tmp_path / "a.tsv", Format(**form)).rows]

    glue = 'text\tlabel\n"odd" film\t1\n"whole"\t0\nan open " one\t1\n'
    assert rows(glue) == ['"odd" film', '"whole"', 'an open " one']
    pandas = 'text\tlabel\n"say ""hi"""\t1\nplain\t0\n"two\nlines"\t1\n'
    assert rows(pandas) == ['say "hi"', "plain", "two\nlines"]
    assert rows('text\tlabel\n"whole"\t0\n"x"\t1\n', quotes=True) == ["whole", "x"]


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"", "spreadsheet"),
        ("a.ODS", b"", "spreadsheet"),
        ("a.csv", zipped("[Content_Types].xml", "xl/workbook.xml"), "spreadsheet"),
        ("a.jsonl", zipped("mimetype", "content.xml", "meta.xml"), "spreadsheet"),
        ("a.csv", b"\xd0\xcf\x11\xe0" + bytes(600), "spreadsheet"),
        ("a.csv", b"\xef\xbb\xbf\n<!DOCTYPE html>\n<title>Sign in, please</title>", "web page"),
        ("a.json", b"<HTML lang=en>404", "web page"),
        ("a.tsv", b"PAR1" + bytes(99), "end in .parquet"),
        ("a.csv", b"%PDF-1.7\n", "PDF"),
        ("a.csv", b'{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n', "end in .json"),
    ],
)
def test_a_file_that_is_something_else_gets_an_error_that_says_what(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_a_line_of_excel_names_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\r\ntext;label\r\na, b;x\r\nc;y\r\nd\r\n", newline="")
    with pytest.raises(DataError, match="ends in line 5"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("sep=;\ntext;label\na, b;x\n")
    assert read_rows(tmp_path / "a.csv").rows == [{"text": "a, b", "label": "x"}]
    (tmp_path / "b.csv").write_text("sep=1,[x]\na,b\n")
    assert read_rows(tmp_path / "b.csv").rows == [{"sep=1": "a", "[x]": "b"}]


def test_empty_columns_of_a_spreadsheet_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,,\na film,1,,\na plot,0\n,,,\n")
    assert read_rows(tmp_path / "a.csv").rows == [{"text": "a film", "label": "1"}, {"text": "a plot", "label": "0"}]
    (tmp_path / "a.csv").write_text(",text,,label\n0,a film,,1\n1,a plot,,0\n")
    assert read_rows(tmp_path / "a.csv").rows == [
        {"": "0", "text": "a film", "label": "1"}, {"": "1", "text": "a plot", "label": "0"}
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text("text,label,,\na film,1,y,x\n")
    with pytest.raises(DataError, match="two columns without a name"):
        read_rows(tmp_path / "a.csv")


def labeled(path: Path, labels: list[str]) -> Path:
    path.write_text("text;label\n" + "".join(f"film {i};{label}\n" for i, label in enumerate(labels)))
    return path


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["1,5", "2,5", "3,5"], {}, "write decimals with a point"),
        (["1,999", "2,999", "1,003,999"], {}, "nothing between thousands"),
        (["1,5", "2.5", "3.5"], {"regression": True}, "the label '1,5' of row 1 is not a number"),
        (["1", "2", "n/a"], {"regression": True}, "the label 'n/a' of row 3 is not a number"),
    ],
)
def test_numbers_in_other_notations(base, tmp_path, labels, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_task(str(base), labeled(tmp_path / "a.csv", labels), validation_share=0.0, **options)


def test_labels_that_a_trained_head_cannot_have_are_named(base, tmp_path):
    numbers = labeled(tmp_path / "a.csv", ["1.5", "2.5", "NA"])
    with pytest.raises(DataError, match="the label 'NA' of row 3 is not a number, as the model predicts"):
        read_task(str(base), numbers, validation_share=0.0, head=Labels([]))
    (tmp_path / "a.jsonl").write_text('{"text": "a film", "label": "a"}\n{"text": "a plot", "label": ["a", "b"]}\n')
    for head in (Labels(["a", "b"]), Labels([])):
        with pytest.raises(DataError, match="labels are lists, such as .'a', 'b'., and the model predicts one label"):
            read_task(str(base), tmp_path / "a.jsonl", validation_share=0.0, head=head)


@pytest.mark.parametrize("names", ["text", "source,target", "prompt,completion"])
def test_models_that_write_texts_are_trained_elsewhere(base, tmp_path, names):
    rows = [",".join([f"the film {i}"] * len(names.split(","))) for i in range(4)]
    (tmp_path / "a.csv").write_text("\n".join([names, *rows]))
    with pytest.raises(DataError, match="Models that write texts are trained in Python, with SensiConfig"):
        read_task(str(base), tmp_path / "a.csv")


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer as decoders have it: spaces are a part of the token after them, and nothing is added to a text."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(**options)
    inner.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    texts = [" ann lives in rome", " bob lives in york"] * 20
    inner.train_from_iterator(texts, BpeTrainer(special_tokens=["<s>"], initial_alphabet=alphabet, vocab_size=300))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>", pad_token="<s>")


@pytest.mark.parametrize("options", [{"add_prefix_space": False}, {"add_prefix_space": True}])
def test_words_have_the_tokens_that_they_have_in_a_text(options):
    """Without their spaces, words were other tokens in the training than in the texts that the model reads later."""
    tokenizer = byte_level(**options)
    raw = [{"row": 1, "tokens": ["ann", "lives", "in", "rome"], "tags": ["B-person", "O", "O", "B-place"]}]
    rows, _, _ = words.encode(raw, words.labels_of(raw), tokenizer, 30)
    assert rows[0]["input_ids"] == tokenizer(" ann lives in rome")["input_ids"]
    assert rows[0]["labels"] == [1, 0, 0, 2] and rows.places[0][1].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_words_of_other_tokenizers_stay_as_they_are(base):
    assert not words.lacks_spaces(load_tokenizer("words", str(base)))


@pytest.mark.parametrize(
    ("config", "tokenizers_own", "longest"),
    [
        (BertConfig(max_position_embeddings=40), 64, 40),
        (BertConfig(max_position_embeddings=40), 10**30, 40),
        (BertConfig(max_position_embeddings=40), 24, 24),
        (RobertaConfig(max_position_embeddings=42), 10**30, 40),  # the first two rows are for padding
        (LlamaConfig(max_position_embeddings=40), 10**30, 40),
        (LlamaConfig(max_position_embeddings=40), 64, 64),  # no table of positions
        (T5Config(), 10**30, 10**30),
    ],
)
def test_the_longest_input_is_what_model_and_tokenizer_take(config, tokenizers_own, longest):
    """A tokenizer may have the number of another model: the first longer text ended in PyTorch's error."""
    assert longest_input(SimpleNamespace(model_max_length=tokenizers_own), config) == longest


def test_a_length_without_room_for_a_text_is_refused(base):
    tokenizer = load_tokenizer("text", str(base))
    raw = [{"row": 1, "text": "ann", "pair": "bob", "tokens": ["ann"]}]
    with pytest.raises(DataError, match="--max-length of at least 5"):
        texts.encode("f", raw, None, tokenizer, 4)
    with pytest.raises(DataError, match="--max-length of at least 3"):
        words.encode(raw, None, tokenizer, 2)


def test_an_empty_text_has_a_token():
    """Decoders add none. Alone in a batch, such a text was an error; beside others, its prediction was of padding."""
    rows, _, _ = texts.encode("f", [{"row": 1, "text": ""}, {"row": 2, "text": "ann"}], None, byte_level(), 30)
    assert (rows[0]["input_ids"], rows[0]["attention_mask"]) == ([0], [1]) and rows[1]["input_ids"] != [0]


def test_two_texts_without_a_border_are_doubted(base):
    raw = [{"row": 1, "text": "ann lives", "pair": "in rome"}]
    assert "puts nothing between the two texts" in token_doubts(Rows([{"input_ids": [1]}], raw), byte_level())[0]
    assert not token_doubts(Rows([{"input_ids": [1]}], [{"row": 1, "text": "ann lives"}]), byte_level())
    assert not token_doubts(Rows([{"input_ids": [5]}], raw), load_tokenizer("text", str(base)))


def test_entities_in_another_scheme_are_not_said_to_be_missed(base, tmp_path):
    """A model that marks entities as in IOB1 finds those of a file in IOB2."""
    (tmp_path / "a.conll").write_text("ann B-person\nin O\nrome I-place\n")
    head = Labels(["O", "I-person", "I-place"])
    task = read_task(str(base), tmp_path / "a.conll", validation_share=0.0, head=head)
    assert "another way than with B-person" in "".join(task.doubts) and "missed" not in "".join(task.doubts)
    numbers = np.zeros((1, len(task.train[0]["input_ids"])), dtype=int)
    for (_, places), tag in zip(task.train.places, [("I-person", "O", "I-place")], strict=True):
        numbers[0, places[:, 0]] = [head.names.index(name) for name in tag]
    found = words.measure(task.labels, numbers, task.train, None).values
    assert found["f1"] == 1.0 and found["tag_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.txt", "this is a text\nand another\n", "words"),
        ("a.csv", "text,label\na film,1\n", "words"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": [0]}\n', "words"),
    ],
)
def test_files_of_words_have_a_form(base, tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_task(str(base), tmp_path / name, kind=kind)
    assert "(CoNLL)" in str(caught.value) and ".conll, .iob" in str(caught.value) and "ner_tags" in str(caught.value)
    if name.endswith("txt"):  # a prediction would read the first word of each line only
        with pytest.raises(DataError, match="line 2 has 2 columns"):
            rows_for_prediction(kind, load_tokenizer(kind, str(base)), tmp_path / name)
        with pytest.raises(DataError, match="give --task words"):
            read_task(str(base), tmp_path / name)


WRONG = {
    "cells.csv": (b"text,label\na,b,c\n", "row 1 (it ends in line 2) has 3 cells"),
    "twice.csv": (b"text,text\na,b\n", "two columns 'text'"),
    "empty.csv": (b"text,label\n", "no rows"),
    "nothing.csv": (b"", "no rows"),
    "nothing.jsonl": (b" \n", "no rows"),
    "number.json": (b"5", "no list of rows"),
    "numbers.json": (b"[1, 2]", "row 1 is not an object"),
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "line 2"),
    "two.json": (b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of rows (train, test)"),
    "cut.csv.gz": (gzip.compress(b"text,label\na,b\n" * 99)[:40], "cannot be unpacked"),
    "no.parquet": (b"PAR1", "cannot be read as .parquet"),
    "letter.doc": (b"x", "data files end in"),
    "binary.csv": (bytes(range(256)) * 9, "is not a text file"),
    "deep.json": (b"[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert message in str(caught.value) and name in str(caught.value)


cells = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text.strip() == text)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=2, max_size=6), delimiter=st.sampled_from(",;\t|"))
def test_what_python_writes_is_read_back(rows, delimiter, tmp_path_factory):
    rows = [row for row in rows if row != ("text", "label")] or [("a", "b")]
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("text", "label"), *rows])
    found = read_rows(path, Format(encoding="utf-8", delimiter=delimiter, quotes=True)).rows
    assert [(row["text"], row["label"]) for row in found] == rows


@given(st.text(max_size=200))
def test_utf8_is_recognized(text):
    if "\x00" not in text and not text.startswith("\ufeff"):
        assert encoding_of(text.encode("utf-8")) == "utf-8"


MAGIC = [
    b"", b"\x1f\x8b\x08\x00",
    b"BZh9", b"\xfd7zXZ\x00", b"PK\x03\x04", b"\xff\xfe", b"\xff\xfe\x00\x00", b"PAR1", b"ARROW1",
    b"text,label\n", b'{"a": ', b"[", gzip.compress(b"text,label\na,b\n")[:20],
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from(MAGIC),
    rest=st.binary(max_size=60),
    suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".csv.gz"]),
)
def test_any_bytes_are_rows_or_a_data_error(start, rest, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(start + rest)
    try:
        rows = read_rows(path).rows
    except (DataError, OSError):
        return
    assert rows and all(isinstance(row, dict) for row in rows)


# -- sources ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_files(tmp_path):
    for name in ("train-1.csv", "train-2.csv", "dev.csv", "test.csv"):
        (tmp_path / name).write_text(table())
    (tmp_path / "notes.md").write_text("no data")
    found = read_source(tmp_path, None, Options())
    assert [len(part.rows) for part in found.train] == [3, 3] and len(found.validation) == 1
    assert "not read: test.csv" in " ".join(found.notes) and all(part.sha256 for part in found.train)


def test_a_test_of_words_without_tags_is_not_measured(tmp_path):
    (tmp_path / "train.conll").write_text("ann B-x\nin O\n")
    (tmp_path / "test.conll").write_text("rome\n")
    found = read_source(tmp_path, "words", Options(), "evaluation")
    assert [Path(part.name).name for part in found.train] == ["train.conll"]


def test_a_name_that_fits_training_and_validation(tmp_path):
    (tmp_path / "train_dev.csv").write_text(table())
    found = read_source(tmp_path, None, Options())
    assert [Path(part.name).name for part in found.train] == ["train_dev.csv"] and not found.validation
    (tmp_path / "train.csv").write_text(table())
    found = read_source(tmp_path, None, Options())
    parts = (found.train, found.validation)
    assert [[Path(part.name).name for part in each] for each in parts] == [["train.csv"], ["train_dev.csv"]]


def test_several_files_are_all_read(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(table())
    assert (
        sum(len(part.rows) for part in read_source([tmp_path / "a.csv", tmp_path / "b.csv"], None, Options()).train)
        == 6
    )


def test_a_saved_data_set_with_names_of_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_list([{"text": "a film", "label": 1}, {"text": "b", "label": -1}], features=features)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "set")
    found = read_source(tmp_path / "set", None, Options())
    assert [row["label"] for row in found.train[0].rows] == ["good", None] and len(found.validation[0].rows) == 2
    with pytest.raises(DataError, match="--split"):
        read_source(tmp_path / "set", None, Options(split="dev"))


def test_what_is_nowhere_is_named():
    with pytest.raises(
        DataError, match="There is no file or folder nobody/nothing here, and it was not found on the Hub"
    ):
        read_source("nobody/nothing", None, Options())


# -- columns and labels -----------------------------------------------------------------------------------------------


def columns_of(*names: str, **more) -> tuple[str, ...]:
    words = {"text": "a fine film", "id": "r-17", "label": "1", "source": "web", "amount": "7", "url": "http://a.b/c"}
    rows = [{name: more.get(name, words.get(name, "two words")) for name in names} for _ in range(30)]
    return text_columns("f", rows, ["label"], None, None)[0]


def test_only_texts_are_taken_for_texts():
    assert columns_of("id", "text", "label") == ("text",)
    assert columns_of("doc_id", "text", "label", doc_id="a b c") == ("text",)
    assert columns_of("source", "text", "amount", "url", "label") == ("text",)
    assert columns_of("premise", "hypothesis", "label") == ("premise", "hypothesis")
    assert columns_of("word", "label", word="film") == ("word",)
    assert columns_of("a", "b", "text", "label") == ("text",)
    assert columns_of("author", "text", "when", "label", author="Ann Lee", when="2020-01-01 10:00",
                      text="a film about a city in ruins") == ("text",)  # fmt: skip
    long = "where does the man in the film live"
    assert columns_of("question", "sentence", "label", question=long, sentence=long) == ("question", "sentence")
    with pytest.raises(DataError, match="--text-column"):
        columns_of("a", "b", "c", "label")
    assert label_columns("f", [{"meta.label": "x", "text": "y"}], []) == ["meta.label"]
    with pytest.raises(DataError, match="--label-column"):
        label_columns("f", [{"a": "x"}], [])
    assert label_columns("f", [{"Label": "x"}], []) == ["Label"]


def test_labels_are_classes_or_numbers():
    assert find_labels(["1.0", "2.0", "10.0"]).names == ["1", "2", "10"]
    assert find_labels([1.0, 2.0]).names == ["1", "2"]
    assert find_labels([float(i) for i in range(100)]).regression
    assert find_labels(["3.5", "2"]).regression and not find_labels(["a", "2"]).regression
    assert find_labels([" good", "good ", "bad"]).names == ["bad", "good"]
    assert find_labels([True, False]).names == ["False", "True"]
    assert find_labels(["1", "2"], regression=True).regression


def test_several_labels_of_a_row():
    labels = Labels(["a", "b", "c"], several=True, separator=";")
    assert labels.encode("a; c") == [1.0, 0.0, 1.0] and labels.encode("") == [0.0, 0.0, 0.0]
    assert labels.encode(["b"]) == [0.0, 1.0, 0.0]
    with pytest.raises(KeyError):
        labels.encode("a;d")
    rows = [{"text": "x", "toxic": "1", "rude": "0"}, {"text": "y", "toxic": "0", "rude": "0"}]
    raw, _ = texts.to_raw("f", rows, ["text"], ["toxic", "rude"], Options())
    assert [row["label"] for row in raw] == [["toxic"], []]
    assert texts.labels_of("f", raw, ["toxic", "rude"], Options()).names == ["toxic", "rude"]
    with pytest.raises(DataError, match="row 2 has 'x'"):
        texts.to_raw("f", [rows[0], {"text": "y", "toxic": "x", "rude": "0"}], ["text"], ["toxic", "rude"], Options())


def test_missing_labels_are_named_or_left_out():
    rows = [{"text": "a", "label": "1"}, {"text": "b", "label": " "}, {"text": "c", "label": None}]
    with pytest.raises(DataError, match=r"row 2 \(and 1 more\) has no label.*--skip-unlabeled"):
        texts.to_raw("f", rows, ["text"], ["label"], Options())
    raw, notes = texts.to_raw("f", rows, ["text"], ["label"], Options(skip_unlabeled=True))
    assert [row["row"] for row in raw] == [1] and "left out 2 rows" in notes[0]


def test_labels_get_the_order_of_a_head():
    assert order_of_head(Labels(["a", "b"]), ["b", "a", "c"], "f").names == ["b", "a", "c"]
    assert order_of_head(Labels(["x", "y"]), ["LABEL_0", "LABEL_1"], "f").names == ["x", "y"]
    assert order_of_head(Labels(["0", "2"]), ["LABEL_0", "LABEL_1", "LABEL_2"], "f").names == ["0", "1", "2"]
    usual = [f"LABEL_{i}" for i in range(12)]
    assert order_of_head(Labels(sorted(usual)), usual, "f").names == usual
    assert order_of_head(Labels(["LABEL_10", "LABEL_2"]), usual, "f").names == usual
    assert order_of_head(Labels([], several=True), ["a", "b"], "f").names == ["a", "b"]  # no row has a label
    for labels, head in ((["1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]), (["d"], ["a"]), ([], ["a"]), (["a"], [])):
        with pytest.raises(DataError):
            order_of_head(Labels(labels), head, "f")


def test_a_file_may_have_the_numbers_of_a_heads_classes():
    """As the public data sets have, of which many models with named classes are trained. They count from 0."""
    found = order_of_head(Labels(["0", "2"]), ["bad", "so", "good"], "f")
    assert found.names == ["bad", "so", "good"] and found.numbered
    assert [found.encode(value) for value in ("0", 1, 2.0)] == [0, 1, 2]
    several = order_of_head(Labels(["0", "1"], several=True), ["a", "b"], "f")
    assert several.encode([1]) == [0.0, 1.0]
    assert not order_of_head(Labels(["0", "1"]), ["1", "0"], "f").numbered  # these are names
    for numbers in (["1", "2"], ["0", "3"], ["0", "so"]):
        with pytest.raises(DataError, match="bad, so, good. Write these names, or numbers that start at 0"):
            order_of_head(Labels(numbers), ["bad", "so", "good"], "f")


@pytest.mark.parametrize("head", [["1.0", "2.0"], [" 1 ", "2"], ["1", "1.0"]], ids=str)
def test_the_names_of_a_head_may_be_spelled_otherwise_than_in_a_file(head):
    """A file's names have no blanks around them, and no fraction of zeros. Two classes never become one."""
    names = list(dict.fromkeys(name.strip().removesuffix(".0") for name in head))
    found = order_of_head(Labels(names), head, "f")
    assert found.names == head and not found.unknown
    assert [found.encode(name) for name in names] == list(range(len(names)))


def test_a_label_column_is_given_once():
    with pytest.raises(DataError, match="give each column once"):
        label_columns("f.csv", [{"a": "1", "b": "0"}], ["a", "a"])


def test_a_head_of_one_class_is_a_regressor_only_for_texts():
    config = SimpleNamespace(problem_type=None, num_labels=1, id2label={0: "B-x"})
    assert labels_of_config("words", config).names == ["B-x"]
    assert labels_of_config("text", config).regression and labels_of_config("answers", config).regression


def test_doubts_about_labels_are_said():
    def doubts(*values, twice: bool = False) -> str:
        raw = [{"text": f"film {i // 2 if twice else i}", "label": value} for i, value in enumerate(values)]
        return " ".join(texts.describe(find_labels(values), raw)[1])

    assert "--regression" in doubts("1", "2", "3", "1", "2", "3")
    assert "blanks around 1 label" in doubts("a ", "b", "a", "b")
    assert "look alike" in doubts("Good", "good", "Good", "good")
    assert "one row only" in doubts("a", "a", "b")
    assert "1 text has different labels" in doubts("a", "b", "a", "a", "b", "b", twice=True)
    assert doubts("a", "b", "a", "b") == ""
    several, raw = find_several(["a,b", "", "b"], ","), [{"text": text, "label": text} for text in ("a,b", "", "b")]
    assert texts.describe(several, raw)[0] == ["2 labels, a row can have several: a (1), b (2); 1 row without a label"]


# -- splitting --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=12, max_size=120), st.floats(0.1, 0.5), st.integers(0, 3))
def test_every_class_is_held_out_in_its_share(classes, share, seed):
    train, held = hold_out(classes, share, seed)
    assert sorted([*train, *held]) == list(range(len(classes))) and held
    assert (train, held) == hold_out(classes, share, seed)
    for name in set(classes):
        count, out = classes.count(name), sum(classes[i] == name for i in held)
        assert out <= count - 1 and abs(out - share * count) < 2


def test_too_few_rows_to_hold_out():
    for rows in ([0], [0, 1, 2]):
        with pytest.raises(DataError, match="--validation"):
            hold_out(rows, 0.3, 0)


def test_groups_stay_together():
    groups = [i // 3 for i in range(30)]
    train, held = by_group(groups, 0.2, 1)
    assert len(held) == 6 and not {groups[i] for i in train} & {groups[i] for i in held}
    assert sample(5, None, 0) == list(range(5)) and len(sample(5, 3, 0)) == 3


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_classes_equal_those_of_sklearn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for classes in (2, 5):
        for _ in range(20):
            predicted, expected = generator.integers(classes, size=(2, 13))
            found = metrics.classes(predicted, expected)
            assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(expected, predicted))
            f1 = sklearn.f1_score(expected, predicted, average="macro", zero_division=0)
            assert found["f1_macro"] == pytest.approx(f1)
            assert found["matthews_correlation"] == pytest.approx(sklearn.matthews_corrcoef(expected, predicted))
            a, b = predicted[:12].reshape(-1, 4) > 0, expected[:12].reshape(-1, 4) > 0
            several = metrics.several_classes(a, b)
            assert several["f1_micro"] == pytest.approx(sklearn.f1_score(b, a, average="micro", zero_division=0))
            assert several["accuracy"] == pytest.approx(sklearn.accuracy_score(b, a))


def test_the_counted_metrics_of_resamples_equal_those_of_the_library():
    """Also for classes that are missing on one side or on both, and for rows that are all equal."""
    generator = np.random.default_rng(0)
    for _ in range(60):
        classes, rows = generator.integers(1, 7), generator.integers(1, 30)
        predicted, expected = generator.integers(classes, size=(2, rows)) * generator.integers(1, 3)
        assert metrics.counted_classes(predicted, expected) == pytest.approx(metrics.classes(predicted, expected))
        a, b = (generator.random((2, rows, classes)) < generator.choice([0, 0.1, 0.5])).astype(bool)
        assert metrics.counted_several_classes(a, b) == pytest.approx(metrics.several_classes(a, b))

    def measure(i: np.ndarray) -> metrics.Values:
        return metrics.classes(predicted[i], expected[i])

    predicted, expected = generator.integers(3, size=(2, 20))
    slow, fast = (
        metrics.measured(measure, 20, fast=form)[1]
        for form in (None, lambda i: metrics.counted_classes(predicted[i], expected[i]))
    )
    assert slow.keys() == fast.keys() == {"accuracy", "f1_macro", "matthews_correlation"}
    for name, interval in slow.items():
        assert fast[name] == pytest.approx(interval, abs=1e-12)


def test_metrics_of_classes_that_are_never_predicted_or_never_right():
    found = metrics.classes(np.array([0, 0, 1, 3, 1]), np.array([0, 1, 1, 2, 1]))
    # F1 of the classes: 2/3, 4/5, 0 (never predicted), 0 (never right).
    assert found["accuracy"] == pytest.approx(3 / 5) and found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 4)


def test_metrics_of_numbers():
    found = metrics.numbers(np.array([1.0, 2.0, 4.0]), np.array([10.0, 20.0, 40.0]))
    assert found["pearson"] == pytest.approx(1) and found["spearman"] == pytest.approx(1)
    assert metrics.numbers(np.ones(3), np.arange(3.0))["pearson"] is None


def text_rows(labels: list[int]) -> Rows:
    return Rows([{"labels": label} for label in labels], [{"text": "x"} for _ in labels])


def test_one_class_is_never_a_perfect_result_without_saying_so():
    labels, logits = Labels(["bad", "good"]), np.tile([0.0, 1.0], (6, 1))
    quality = texts.measure(labels, logits, text_rows([1] * 6), text_rows([1] * 40 + [0] * 10))
    assert quality.values["accuracy"] == quality.baseline["accuracy"] == 1.0
    assert "All 6 validation rows have the class 'good'" in quality.remarks[0]
    low, high = quality.intervals["accuracy"]
    assert low == pytest.approx(0.6097, abs=1e-3) and high == pytest.approx(1)  # Wilson's interval of 6 of 6
    assert texts.measure(labels, logits, text_rows([1, 0] * 3), None).remarks == []


def test_intervals_contain_the_value_and_shrink():
    labels, generator = Labels(["a", "b"]), np.random.default_rng(0)
    widths = []
    for rows in (40, 4000):
        logits, classes = generator.normal(size=(rows, 2)), generator.integers(2, size=rows)
        quality = texts.measure(labels, logits, text_rows(list(classes)), None)
        for name, (low, high) in quality.intervals.items():
            assert low <= quality.values[name] <= high
        widths.append({name: high - low for name, (low, high) in quality.intervals.items()})
    assert all(widths[1][name] < widths[0][name] / 5 for name in ("accuracy", "f1_macro", "matthews_correlation"))


# -- predictions ------------------------------------------------------------------------------------------------------


def test_decoded_texts():
    rows = Rows([{}, {}], [{}, {}])
    first, second = texts.decode(Labels(["a", "b"]), np.array([[0.0, 2.0], [3.0, 0.0]]), rows)
    assert first["label"] == "b" and first["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert second["label"] == "a" and sum(second["scores"].values()) == pytest.approx(1)
    several = texts.decode(Labels(["a", "b"], several=True), np.array([[1.0, 2.0], [-1.0, -2.0]]), rows)
    assert [row["labels"] for row in several] == [["a", "b"], []]
    assert texts.decode(Labels([]), np.array([[1.5], [2.0]]), rows)[0] == {"value": 1.5}


def test_decoded_words():
    rows = Rows([{}], [{"row": 1, "tokens": ["Ann", "in", "New", "York"]}],
                [(0, np.array([[1, 0], [3, 1], [4, 2], [5, 3]]))])  # fmt: skip
    labels, logits = Labels(["O", "B-x", "I-x"]), np.full((1, 7, 3), -9.0)
    for position, tag in ((1, 1), (3, 0), (4, 1), (5, 2)):
        logits[0, position, tag] = 9.0
    (found,) = words.decode(labels, logits, rows)
    assert found["tags"] == ["B-x", "O", "B-x", "I-x"] and min(found["scores"]) > 0.99
    assert [entity["text"] for entity in found["entities"]] == ["Ann", "New York"]


def test_decoded_answers():
    raw = [{"row": 1, "context": "the red stone", "question": "?"}]
    places = np.array([[-1, -1], [0, 3], [4, 7], [8, 13]])
    starts, ends = np.array([[0.0, 0, 5, 0]]), np.array([[0.0, 0, 0, 5]])
    (found,) = answers.decode((starts, ends), Rows([{}], raw, [(0, places)]))
    assert found == {"answer": "red stone", "score": 10.0, "start": 4, "end": 13}
    places[2:, 0] -= 1  # as of tokens that contain the blank before the word
    (with_blanks,) = answers.decode((starts, ends), Rows([{}], raw, [(0, places)]))
    assert with_blanks == found
    (none,) = answers.decode((starts + [[20, 0, 0, 0]], ends), Rows([{}], raw, [(0, places)]), silent=True)
    assert none["answer"] == "" and none["start"] is None


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_record_from_anywhere_is_checked(tmp_path):
    def saved(task) -> dict:
        (tmp_path / "metrics.json").write_text(json.dumps({"task": task}))
        return saved_record(tmp_path)

    good = {"kind": "text", "max_length": 64, "labels": ["a", "b"], "label_separator": None,
            "problem_type": "multi_label_classification"}  # fmt: skip
    assert saved(good) == good
    assert saved({"kind": "text", "max_length": "64", "labels": [1], "stride": True, "other": 1}) == {"kind": "text"}
    assert saved({"kind": "text", "max_length": -1, "stride": 10**400, "max_answer_length": 0}) == {"kind": "text"}
    assert saved({"kind": "evil"}) == saved({"kind": {}}) == saved([]) == saved(None) == {}
    (tmp_path / "metrics.json").unlink()
    assert saved_record(tmp_path) == {}


def test_labels_that_a_public_test_set_hides(base, tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\none film\t-1\nsome plot\t-1\n")
    (tmp_path / "b.tsv").write_text("text\tlabel\none film\t0\nsome plot\t1\n")
    with pytest.raises(DataError, match="All labels of .*a.tsv are -1.*peft-sensi predict"):
        read_task(str(base), tmp_path / "a.tsv", head=Labels(["no", "yes"]))
    with pytest.raises(DataError, match="All labels of .*a.tsv are -1"):
        read_task(str(base), tmp_path / "b.tsv", tmp_path / "a.tsv")


@pytest.mark.parametrize("hidden", ["-1", "-1.0", "", "  "])
def test_a_test_set_without_labels_is_not_measured(hidden, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\none film,0\nsome plot,1\n")
    (tmp_path / "test.csv").write_text(f"text,label\none film,{hidden}\nsome plot,{hidden}\n")
    found = read_source(tmp_path, None, Options(), "evaluation")
    assert [Path(part.name).name for part in found.train] == ["train.csv"]


def test_a_guessed_order_of_classes_that_is_plainly_wrong_is_refused():
    guessed = Labels(["neg", "neutral", "pos"], guessed=True)
    expected = np.arange(30) % 3
    check_order(guessed, expected, expected)
    check_order(guessed, np.zeros(30, dtype=int), expected)  # a constant answer
    check_order(guessed, np.roll(expected, 1)[:3], expected[:3])  # three rows prove nothing
    check_order(Labels(guessed.names), (expected + 1) % 3, expected)  # the names are those of the head
    with pytest.raises(DataError, match="0% of the labels are right. In the order pos, neg, neutral it would be 100%"):
        check_order(guessed, (expected + 1) % 3, expected)
    generator = np.random.default_rng(0)
    for _ in range(200):  # heads that know nothing
        check_order(guessed, generator.integers(3, size=40), generator.integers(3, size=40))
    several = Labels(["a", "b"], several=True, guessed=True)
    rows = generator.random((40, 2)) < [0.2, 0.6]
    check_order(several, rows, rows)
    with pytest.raises(DataError, match="In the order b, a it would be 100%"):
        check_order(several, rows[:, ::-1], rows)


def test_task_types_and_kinds_of_data():
    assert kind_of_model("TOKEN_CLS") == "words" and kind_of_model(None, ["BertForQuestionAnswering"]) == "answers"
    assert kind_of_model("CAUSAL_LM") is None and kind_of_model("CAUSAL_LM", ["BertForTokenClassification"]) == "words"
    assert type_of_class("GPT2LMHeadModel") == "CAUSAL_LM" and type_of_class("BertModel") == "FEATURE_EXTRACTION"
    assert type_of_class("WhisperForAudioClassification") is None
    for entry in TASK_TYPES.values():
        assert hasattr(transformers, entry.auto_class)
    assert describe_type("SEQ_CLS").pipeline == "text-classification" and not any(describe_type("none"))


# -- data sets of the Hub ---------------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-x"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = datasets.Dataset.from_list([{"tokens": ["a", "b"], "ner_tags": [0, 1]}], features=features)

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.DatasetDict({"train": rows, "validation_matched": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_source("someone/things", None, Options(subset="small"))
    assert asked == [(("someone/things", "small"), {"split": None})]
    assert kind_of(found.train[0]) == "words" and len(found.validation) == 1
    assert word_files.to_raw("f", found.train[0].rows, None, None)[0]["tags"] == ["O", "B-x"]
    assert "split train for training, validation_matched for validation" in found.notes[0]
    assert read_source("someone/things", None, Options(split="test")).train[0].name == "someone/things (test)"


def test_questions_of_a_table():
    rows = [
        {"question": "what?", "context": "a red stone", "answers.text": ["red"], "answers.answer_start": [2]},
        {"question": "who?", "context": "a red stone", "answers.text": [], "answers.answer_start": []},
        {"question": "why?", "context": "a red stone", "answers.text": ["blue"], "answers.answer_start": [2]},
    ]
    raw, notes = answers.from_table("f", rows)
    assert [row["answers"] for row in raw] == [["red"], []] and "skipped 1 answer that is" in notes[0]
    from_the_end = {**rows[0], "answers.answer_start": [-9]}
    assert "skipped 1 answer" in answers.from_table("f", [*rows[:2], from_the_end])[1][0]
    open_ones, _ = answers.from_table("f", [{"question": "what?", "context": "a red stone"}])
    assert "answers" not in open_ones[0]  # for a prediction
    unknown = [{"question": "what?", "context": "a red stone", "answers": None}]
    assert "answers" not in answers.from_table("f", unknown)[0][0]  # not known is not the same as no answer
    with pytest.raises(DataError, match="row 1 needs the texts `question` and `context`"):
        answers.from_table("f", [{"question": "what?", "context": "x", "answers": [{"text": "x"}]}])
    with pytest.raises(DataError, match="no column 'question'"):
        answers.from_table("f", [{"context": "x"}])


@pytest.mark.parametrize(
    "columns",
    [
        {"answer": "red", "answer_start": 2},
        {"answer_text": "red", "answer_start": "2"},
        {"answers.text": "red", "answers.answer_start": 2.0},
        {"answers.text": ["red"], "answers.answer_start": ["2"]},
        {"answers": [{"text": "red", "answer_start": "2"}]},
    ],
)
def test_one_answer_in_each_form(columns):
    raw, notes = answers.from_table("f", [{"question": "what?", "context": "a red stone", **columns}])
    assert (raw[0]["answers"], raw[0]["starts"], notes) == (["red"], [2], [])
    empty = {name: "" for name in columns if name != "answers"} or {"answers": []}
    assert answers.from_table("f", [{"question": "?", "context": "x", **empty}])[0][0]["answers"] == []


@pytest.mark.parametrize("mark", [True, "True", "true", 1, "1"])
def test_answers_of_impossible_questions_are_only_plausible(mark):
    row = {"question": "what?", "context": "a red stone", "answer_text": "red", "answer_start": "2"}
    for changes in ({}, {"answer_text": None, "answer_start": None}):
        raw, notes = answers.from_table("f", [row | changes | {"is_impossible": mark}])
        assert (raw[0]["answers"], notes) == ([], [])
    for other in (False, "False", "0", "", None):
        assert answers.from_table("f", [row | {"is_impossible": other}])[0][0]["answers"] == ["red"]


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "red", "context": "a red stone", "question": "what?"},
        {"answers": ["red"], "context": "a red stone", "question": "what?"},
        {"answers.text": ["a", "b"], "answers.answer_start": [0], "context": "a red stone", "question": "what?"},
        {"answers": [], "context": None, "question": "what?"},
    ],
)
def test_answers_without_a_place_are_an_error_only_where_they_are_needed(row):
    with pytest.raises(DataError, match=r"row 1 needs the texts .* `answer_start` \(the character of the context"):
        answers.from_table("f", [row])
    if row["context"]:
        assert answers.from_table("f", [row], labeled=False)[0][0]["question"] == "what?"


def test_a_training_needs_answers(base, tmp_path):
    value = {"data": [{"paragraphs": [{"context": "a red stone", "qas": [{"id": "1", "question": "what?"}]}]}]}
    (tmp_path / "q.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"question 1 has no answer. Give each question `answers`, as in SQuAD"):
        read_task(str(base), tmp_path / "q.json", kind="answers")


def test_misplaced_answers_leave_a_question_out_of_a_training_but_not_of_a_prediction(base, tmp_path):
    question = {"question": "what?", "answers": [{"text": "red", "answer_start": 3}]}
    value = {"data": [{"paragraphs": [{"context": "a red stone", "qas": [question]}]}]}
    (tmp_path / "q.json").write_text(json.dumps(value))
    options: dict[str, Any] = {"stride": 8, "max_length": 32}
    with pytest.raises(DataError, match="no answer is in its context at its `answer_start`"):
        read_task(str(base), tmp_path / "q.json", kind="answers", **options)
    rows, _, notes = rows_for_prediction(
        "answers", load_tokenizer("answers", str(base)), tmp_path / "q.json", **options
    )
    assert len(rows.raw) == 1 and notes == []
    for wrong, words_of_error in (
        ({"data": [{"paragraphs": [{"context": None, "qas": [question]}]}]}, "has another kind of value"),
        ({"data": [{"paragraphs": [{"qas": [question]}]}]}, "lacks 'context'"),
    ):
        with pytest.raises(DataError, match=f"not in SQuAD format .*: what comes after 0 questions {words_of_error}"):
            answers.from_squad("f", wrong)


def test_lists_in_cells_are_read_as_lists(tmp_path):
    """pandas writes them so."""
    lists = [["a", "it's"], [], ["O"]]
    for write in (str, json.dumps):
        with (tmp_path / "f.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "tags"], *([i, write(value)] for i, value in enumerate(lists))])
        found = read_rows(tmp_path / "f.csv", Format())
        assert [row["tags"] for row in found.rows] == lists and "tags are read as lists" in found.notes[-1]
    (tmp_path / "f.csv").write_text("question,answers\nx,\"{'text': ['a'], 'answer_start': [0]}\"\n")
    assert read_rows(tmp_path / "f.csv", Format()).rows[0]["answers.text"] == ["a"]
    for cells in (["[deleted]"], ["['a']", "b"], ["['a' 'b' ... 'c']"], ["[" * 10_000 + "]"]):
        (tmp_path / "f.csv").write_text("text\n" + "\n".join(cells))
        found = read_rows(tmp_path / "f.csv", Format())
        assert [row["text"] for row in found.rows] == cells and found.notes == []


@pytest.mark.parametrize(("processes", "shares"), [(1, [5]), (2, [3, 2]), (9, [5] * 9)])
def test_processes_share_out_the_batches(processes, shares, base, tmp_path, monkeypatch):
    """Or else a refit would be checked on batches that another process has fitted."""
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(18)))
    task = read_task(str(base), tmp_path / "a.csv", validation_share=0.0)
    monkeypatch.setattr(distributed, "start", lambda: processes)
    found = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append([batch["input_ids"].tolist() for batch in task.batches(4, seed=0)])
    assert list(map(len, found)) == shares
    if processes == 2:
        monkeypatch.setattr(distributed, "start", lambda: 1)
        monkeypatch.setattr(distributed, "rank", lambda: 0)
        whole = [batch["input_ids"].tolist() for batch in task.batches(4, seed=0)]
        assert (found[0], found[1]) == (whole[::2], whole[1::2])


@pytest.mark.parametrize("token", ["10\u00a0000", "\u00a0", "\u2028", "\u0085", "a\u3000b"])
def test_only_spaces_and_tabs_separate_the_columns_of_words(token, tmp_path):
    for space in (" ", "  ", "\t"):
        (tmp_path / "f.conll").write_text(f"red{space}O\n{token}{space}B-x\n", encoding="utf-8")
        (found,) = word_files.read_conll(tmp_path / "f.conll")
        assert [each.strip() for each in found["tokens"]] == ["red", token.strip()] and found["tags"] == ["O", "B-x"]


def test_the_column_of_words_decides_where_a_sentence_ends(tmp_path):
    """In some files, the first column has the name of a sentence, in its first row only."""
    text = "Sentence: 1\tred\tO\n\tcar\tB-x\n\nSentence: 2\tit\tO\nSentence: 3\t\tO\n\tis\tO\n"
    (tmp_path / "f.conll").write_text(text)
    found = word_files.read_conll(tmp_path / "f.conll", token_column=1)
    assert [row["tokens"] for row in found] == [["red", "car"], ["it"], ["is"]]


def test_headers_and_comments_in_files_of_words(tmp_path):
    text = "# newdoc\n# sent_id = 1\nred\tB-x\n# O\n\n# text = a = b\n# id 3\tO\n"
    for header in ("", "token\ttag\n", "Word\tNER\n"):
        (tmp_path / "f.conll").write_text(header + text)
        found = word_files.read_conll(tmp_path / "f.conll")
        assert [row["tokens"] for row in found] == [["red", "#"], ["# id 3"]]  # only what is written as a comment
    with pytest.raises(DataError, match="row 1 has no list of words in 'tokens', but 'a b'. Files of words"):
        word_files.to_raw("f", [{"tokens": "a b", "ner_tags": "O O"}], None, None)


def test_the_name_of_the_only_column_is_no_word(tmp_path):
    """This is what is left of a file with a header when its tags are cut off."""
    notes: list[str] = []
    (tmp_path / "f.txt").write_text("word\nred\ncar\n\nblue\n")
    found = word_files.read_conll(tmp_path / "f.txt", tag_column=None, notes=notes)
    assert [row["tokens"] for row in found] == [["red", "car"], ["blue"]] and "'word', is the name" in notes[0]
    (tmp_path / "f.txt").write_text("word\n\nblue\nword\n")  # a sentence of one word
    found = word_files.read_conll(tmp_path / "f.txt", tag_column=None)
    assert [row["tokens"] for row in found] == [["word"], ["blue", "word"]]


WORD_ROWS = [
    ("Sentence: 1", "Anna", "NNP", "B-per"),
    ("", "is", "VBZ", "O"),
    ("", "in", "IN", "O"),
    ("", "New", "NNP", "B-geo"),
    ("", "York", "NNP", "I-geo"),
    ("Sentence: 2", "Rain", "NN", "O"),
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_table_with_one_word_in_each_row_is_read_as_sentences(suffix, repeated, tmp_path, base):
    """As in the table of named entities on Kaggle: the number of the sentence in its first row, or in every row."""
    delimiter = "," if suffix == ".csv" else "\t"
    lines, last = [delimiter.join(["Sentence #", "Word", "POS", "Tag"])], ""
    for sentence, *others in WORD_ROWS:
        last = sentence or last
        lines.append(delimiter.join([last if repeated else sentence, *others]))
    path = tmp_path / f"ner{suffix}"
    path.write_text("\n".join(lines))
    expected = [["Anna", "is", "in", "New", "York"], ["Rain"]]
    for kind in (None, "words"):
        task = read_task(str(base), path, kind=kind, validation_share=0.0)
        assert task.kind == "words" and [row["tokens"] for row in task.train.raw] == expected
        assert [row["tags"] for row in task.train.raw] == [["B-per", "O", "O", "B-geo", "I-geo"], ["O"]]
    rows, _, _ = rows_for_prediction("words", task.tokenizer, path)
    assert [row["tokens"] for row in rows.raw] == expected and "tags" not in rows.raw[0]


def test_a_sentence_with_one_of_its_words_and_a_class_is_no_table_of_words(tmp_path):
    (tmp_path / "a.csv").write_text("sentence,word,label\nthe bank of the river,bank,1\nmoney in the bank,bank,0\n")
    assert kind_of(read_source(tmp_path / "a.csv", None, Options()).train[0]) == "text"


def test_words_in_rows_need_a_column_for_the_sentence_and_one_for_the_tag(tmp_path, base):
    for header, reason in (
        ("tokens,tags", r"no list of words in 'tokens', but 'Anna'.*with the columns sentence, word and tag"),
        ("word,sentence", "holds the tags with --label-column"),
    ):
        (tmp_path / "a.csv").write_text(f"{header}\nAnna,B-per\nsleeps,O\n")
        with pytest.raises(DataError, match=reason):
            read_task(str(base), tmp_path / "a.csv", kind="words")


def test_blank_lines_between_rows_are_named(tmp_path):
    """Predictions have one row for each row of the file, so a reader who counts lines must know which are left out."""
    (tmp_path / "a.csv").write_text("text\nso fine\n\nso bad\n  \nso so\n\n")
    table = read_rows(tmp_path / "a.csv")
    assert [row["text"] for row in table.rows] == ["so fine", "so bad", "so so"]
    assert table.notes == ["a.csv: left out 2 empty rows (lines 3, 5)"]


def test_one_column_is_no_task_and_the_advice_is_for_who_can_follow_it(tmp_path, base):
    """`evaluate` has no --task: its model knows what it predicts."""
    (tmp_path / "a.csv").write_text("text\nso fine\nso bad\n")
    with pytest.raises(DataError, match=r"one column, 'text'.*--task words"):
        read_task(str(base), tmp_path / "a.csv")
    with pytest.raises(DataError, match="--label-column") as caught:
        read_task(str(base), tmp_path / "a.csv", kind="text")
    assert "--task" not in str(caught.value)


def test_a_whole_number_without_a_float_is_no_label(base, tmp_path):
    rows = [{"text": f"film {i}", "label": i / 7} for i in range(6)]
    for name, more in (("train", []), ("dev", [{"text": "a plot", "label": 10**400}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [*rows, *more])))
    with pytest.raises(DataError, match="of row 7 is not a number"):
        read_task(str(base), tmp_path / "train.jsonl", tmp_path / "dev.jsonl", regression=True)
