"""Files and tables of words go in; sentences with their tags come out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import DataError
from ..utils.formatting import counted, listed
from .columns import check_known
from .encodings import read_text
from .labels import is_tag


CONLL_SUFFIXES = (".conll", ".iob", ".bio", ".txt", ".tsv", ".tab")
FORMS = (
    "Files of words (CoNLL) have a word and its tag in each line and an empty line after each sentence "
    f"({', '.join(CONLL_SUFFIXES)}); tables have a list of words and a list of tags in each row, in the columns "
    "tokens and ner_tags (.jsonl, .parquet), or a word in each row, with the columns sentence, word and tag (.csv)."
)
WORD_COLUMNS, TAG_COLUMNS = ("tokens", "words"), ("ner_tags", "tags", "labels", "ner")
WORD_NAMES, TAG_NAMES = (*WORD_COLUMNS, "token", "word"), (*TAG_COLUMNS, "tag", "label", "ner_tag")
SENTENCE_NAMES = ("sentence #", "sentence", "sentence_id", "sentence_number", "sent_id")
_COMMENT = re.compile(r"#\s.*=|# new(doc|par)\s*$")


def read_conll(
    path: str | Path,
    token_column: int = 0,
    tag_column: int | None = -1,
    encoding: str | None = None,
    notes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows with `tokens` and `tags`, one row per sentence; without `tags` if `tag_column` is `None`.

    Notes about the encoding, and about a header without tags, are added to `notes`.

    An empty line, a line without a word, or a -DOCSTART- line ends a sentence. Not read are a header in the first line
    and, before a sentence, comments such as `# id = 3` and `# newdoc`.

    Raises `DataError` for a line without such a column or with something else than a tag in it. Without tags, the
    lines must have equally many columns: lines of a text would lose all words but the first.
    """
    sentences: list[dict[str, Any]] = []
    tokens: list[str] = []
    tags: list[str] = []
    width = 0
    # Split only at line ends, tabs and spaces, because U+0085, U+00A0 and similar characters can be tokens.
    lines = read_text(Path(path), notes, encoding).split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        cells = line.rstrip("\r").split("\t") if "\t" in line else re.split(" +", line.strip(" \r"))
        has_column = -len(cells) <= token_column < len(cells)  # else an error below
        word = cells[token_column if has_column else 0].strip(" ")
        if not line.strip() or not word or word == "-DOCSTART-":
            if tokens:
                tagged = {} if tag_column is None else {"tags": tags}
                sentences.append({"row": len(sentences) + 1, "tokens": tokens, **tagged})
            tokens, tags = [], []
            continue
        if not tokens and (_COMMENT.match(line) or (not sentences and is_header(cells))):
            continue
        if tag_column is None and not tokens and not sentences and is_lone_header(cells, lines[number:]):
            notes = [] if notes is None else notes
            notes.append(f"{path}: the first line, {word!r}, is the name of the column, and not a word")
            continue
        if tag_column is None and width not in (0, len(cells)):
            raise DataError(f"{path}, line {number} has {len(cells)} columns, and the lines before {width}. {FORMS}")
        width = len(cells)
        for column, option in ((token_column, "--text-column"), (tag_column, "--label-column")):
            if column is not None and not -len(cells) <= column < len(cells):
                raise DataError(
                    f"{path}, line {number}: there is no column {column} among {len(cells)} ({option}): "
                    f"{line.strip()!r:.60}"
                )
        tokens.append(word.strip())
        if tag_column is not None:
            tag = cells[tag_column].strip()
            check_tag(tag, f"{path}, line {number}")
            tags.append(tag)
    if not sentences:
        raise DataError(f"{path} has no sentences. {FORMS}")
    return sentences


def is_header(cells: Sequence[str]) -> bool:
    """Whether the cells of a line are names of columns: one for words, and one for tags."""
    return _usual(cells, WORD_NAMES) is not None and _usual(cells, TAG_NAMES) is not None


def is_lone_header(cells: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a line of a file without tags is the name of its only column, and not a sentence of one word."""
    return len(cells) == 1 and _usual(cells, WORD_NAMES) is not None and bool(others and others[0].strip())


def has_word_rows(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a table has one word in each row, with columns for its sentence and its tag."""
    tag = _usual(list(rows[0]), TAG_NAMES)
    return tag is not None and is_word_header(list(rows[0])) and all(is_tag(row[tag]) for row in rows[:100])


def is_word_header(names: Sequence[str]) -> bool:
    """Whether a table with these columns has one word in each row, and says to which sentence it belongs."""
    return _usual(names, WORD_NAMES) is not None and _usual(names, SENTENCE_NAMES) is not None


def _usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first of the names that is a usual one."""
    return next((name for name in names if name.strip().lower() in usual), None)


def check_tag(tag: Any, place: str) -> None:
    if not is_tag(tag):
        hint = "" if isinstance(tag, str) else " Tags need their names, not their numbers."
        raise DataError(
            f"{place}: {tag!r} is not a tag of an entity: O, or a type after B-, I-, E-, S-, L- or U-, such as "
            f"B-person (--label-column).{hint} {FORMS}"
        )


def column_numbers(text: str | None, label: str | None) -> tuple[int, int]:
    """The columns of a file without a header, from --text-column and --label-column."""
    for option, value in (("--text-column", text), ("--label-column", label)):
        if value is not None and not re.fullmatch(r"-?\d+", value):
            raise DataError(f"{option} {value}: a file of words has no header, so give a column's number, such as 0.")
    return int(text or 0), int(label or -1)


def to_raw(
    name: Any,
    rows: Sequence[dict[str, Any]],
    text: str | None,
    label: str | None,
    needs_tags: bool = True,
    notes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Sentences from a table with a list of words and, if tags are needed, a list of tags in each row.

    A table with one word in each row has a column for the sentence (see `in_sentences`). Rows without words are left
    out, and a note about them is added to `notes`.
    """
    names = list(rows[0])
    check_known(name, names, [text] if text else [], "--text-column")
    check_known(name, names, [label] if label else [], "--label-column")
    word = text or _usual(names, WORD_NAMES)
    sentence = _usual([column for column in names if column not in (word, label)], SENTENCE_NAMES)
    if word is not None and sentence is not None and isinstance(rows[0].get(word), str):
        return in_sentences(name, rows, sentence, word, label or _usual(names, TAG_NAMES), needs_tags)
    text = text or next((column for column in WORD_COLUMNS if column in names), None)
    if needs_tags:
        label = label or next((column for column in TAG_COLUMNS if column in names), None)
    if text is None or (label is None and needs_tags):
        option = "words with --text-column" if text is None else "tags with --label-column"
        raise DataError(f"{name}: name the column that holds the {option}; the columns are {listed(names)}. {FORMS}")
    found = []
    for number, row in enumerate(rows, start=1):
        tokens = row.get(text)
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise DataError(f"{name}: row {number} has no list of words in {text!r}, but {tokens!r:.60}. {FORMS}")
        tagged = {}
        if label is not None:
            tags = row.get(label)
            if not isinstance(tags, list) or len(tags) != len(tokens):
                raise DataError(
                    f"{name}: row {number} has {counted(len(tokens), 'word')}, but {label!r} is not a list of as many "
                    f"tags: give one tag for each word."
                )
            for tag in tags:
                check_tag(tag, f"{name}, row {number}")
            tagged = {"tags": tags}
        if tokens:
            found.append({"row": number, "tokens": tokens, **tagged})
    if not found:
        raise DataError(f"{name} has no sentences. {FORMS}")
    if notes is not None and (without := len(rows) - len(found)):
        what = "left out" if needs_tags else "and so without a prediction"
        notes.append(f"{name}: {counted(without, 'row')} without words, {what}")
    return found


def in_sentences(
    name: Any, rows: Sequence[dict[str, Any]], sentence: str, word: str, tag: str | None, needs_tags: bool = True
) -> list[dict[str, Any]]:
    """Sentences from a table with one word in each row.

    A sentence begins where the column of the sentence has another value. Some tables have the value only in the first
    row of each sentence.
    """
    if tag is None and needs_tags:
        raise DataError(
            f"{name}: name the column that holds the tags with --label-column; the columns are "
            f"{listed(list(rows[0]))}."
        )
    found: list[dict[str, Any]] = []
    current: Any = None
    for number, row in enumerate(rows, start=1):
        value = "" if row[sentence] is None else str(row[sentence]).strip()
        if not found or value not in ("", current):
            found.append({"row": len(found) + 1, "tokens": []} | ({"tags": []} if needs_tags else {}))
            current = value
        if not isinstance(row[word], str):
            raise DataError(f"{name}: row {number} has no word in {word!r}, but {row[word]!r:.60}.")
        found[-1]["tokens"].append(row[word].strip())
        if needs_tags:
            label = row[str(tag)]
            label = label.strip() if isinstance(label, str) else label
            check_tag(label, f"{name}, row {number}")
            found[-1]["tags"].append(label)
    return found
