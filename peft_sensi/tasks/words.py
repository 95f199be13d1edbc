"""Sentences of words with tags go in; windows of tokens for a model that tags words, its metrics and tags come out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from ..utils.errors import DataError
from ..utils.formatting import counted
from . import metrics
from .columns import check_known
from .encodings import read_text
from .labels import OUTSIDE, Labels, is_tag, listed, order_of_head
from .metrics import Quality
from .task import Rows, check_room
from .texts import logits_in


IGNORED = -100  # the label of positions without a loss
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

    A note about the encoding is added to `notes`.

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
        raise DataError(f"{name}: name the column that holds the {option}; there are {listed(names)}. {FORMS}")
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
            f"{name}: name the column that holds the tags with --label-column; there are {listed(list(rows[0]))}."
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


def labels_of(*parts: Sequence[dict[str, Any]]) -> Labels:
    """The tags of all rows. A tag that only validation rows have cannot be learned, but must count as missed."""
    return Labels([OUTSIDE, *sorted({tag for rows in parts for row in rows for tag in row["tags"]} - {OUTSIDE})])


def labels_for(head: Labels, labels: Labels, data: Any) -> Labels:
    """The labels of a trained head for the tags of a file.

    A small file for training lacks rare tags, which a file for an evaluation has. Raises `DataError` if the head knows
    no entities of the file.
    """
    knows_some = any(tag in head.names for tag in labels.names if tag != OUTSIDE)
    return order_of_head(labels, head.names, data, allow_unknown=knows_some)


def encode(
    raw: Sequence[dict[str, Any]], labels: Labels | None, tokenizer: Any, max_length: int
) -> tuple[Rows, int, int]:
    """Windows over the sentences, the longest sentence in tokens, and the number of sentences with several windows.

    The first sub-word of a word gets its tag, if that is among the labels. A word for which the tokenizer produces no
    token (such as a lone variation selector) has no position.
    """
    index = None if labels is None else {tag: i for i, tag in enumerate(labels.names)}
    found = Rows([], list(raw))
    if not raw:
        return found, 0, 0
    check_room(tokenizer, max_length)
    before_words = " " if lacks_spaces(tokenizer) else ""
    encoded = tokenizer(
        [[before_words + token for token in row["tokens"]] for row in raw],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
    )
    samples = encoded.pop("overflow_to_sample_mapping")
    before: tuple[int, int] | None = None  # a word can continue in the next window
    for window, sentence in enumerate(samples):
        places = []
        for position, word in enumerate(encoded.word_ids(window)):
            if word is not None and (sentence, word) != before:
                before = (sentence, word)
                places.append((position, word))
        row = {key: values[window] for key, values in encoded.items()}
        tags = raw[sentence].get("tags")
        if index is not None and tags is not None:
            row["labels"] = [IGNORED] * len(row["input_ids"])
            for position, word in places:
                row["labels"][position] = index.get(tags[word], IGNORED)
        found.inputs.append(row)
        found.places.append((sentence, np.array(places, dtype=np.int64).reshape(-1, 2)))
    lengths: Counter[int] = Counter()
    for sentence, row in zip(samples, found.inputs, strict=True):
        lengths[sentence] += len(row["input_ids"])
    return found, max(lengths.values()), sum(count > 1 for count in Counter(samples).values())


def lacks_spaces(tokenizer: Any) -> bool:
    """Whether separate words get other tokens than the same words in a text, where a space is part of the next token.

    This is so for byte-level tokenizers of decoders and of ModernBERT, for which `add_prefix_space` changes nothing.
    """
    text, alone, spaced = (
        tokenizer(value, is_split_into_words=isinstance(value, list), add_special_tokens=False)["input_ids"]
        for value in ("a a", ["a", "a"], [" a"])
    )
    return text != alone and text[-len(spaced) :] == spaced


def describe(labels: Labels, raw: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """A line about the entities of each type, and doubts about the tags."""
    kinds = Counter(kind for row in raw for kind, _, _ in metrics.entities(row["tags"]))
    words, tagged = sum(len(row["tokens"]) for row in raw), sum(tag != OUTSIDE for row in raw for tag in row["tags"])
    shown = ", ".join(f"{kind} {count:,}" for kind, count in sorted(kinds.items())) or "none"
    doubts = [] if tagged else ["no word has a tag other than O, so there is nothing to find (--label-column)"]
    if (longest := max(len(row["tokens"]) for row in raw)) > 1000:
        doubts.append(f"a sentence has {longest:,} words: is there an empty line after each sentence?")
    types = {tag.partition("-")[2] for tag in labels.names}
    other = [tag for tag in labels.unknown if tag.partition("-")[2] in types]
    if missed := [tag for tag in labels.unknown if tag not in other]:
        doubts.append(f"the model does not know some tags, which count as missed: {listed(missed)}")
    if other:
        doubts.append(
            f"the model marks entities in another way than with {listed(other)}: they are right if their words are, "
            f"but tag_accuracy compares the tags"
        )
    return [f"{words:,} words, {tagged:,} in entities: {shown}"], doubts


def measure(labels: Labels, outputs: Any, rows: Rows, train: Rows | None) -> Quality:
    """The quality of logits `[windows, tokens, classes]`, or of class numbers `[windows, tokens]`."""
    expected = [row["tags"] for row in rows.raw]
    counts = metrics.word_counts(tags_of(labels, outputs, rows), expected)
    baseline = metrics.words(metrics.word_counts([[OUTSIDE] * len(tags) for tags in expected], expected))
    values, intervals = metrics.measured(lambda i: metrics.words(counts[i]), len(counts))
    remarks = [] if counts[:, 2].any() else ["The validation rows have no entities, so precision and F1 say nothing."]
    return Quality(values, baseline, intervals, remarks)


def tags_of(labels: Labels, outputs: Any, rows: Rows) -> list[list[str]]:
    """The tags of all words of each sentence. Entities are read over words, also if windows divide a sentence."""
    tags = [[OUTSIDE] * len(row["tokens"]) for row in rows.raw]
    for (sentence, places), values in zip(rows.places, logits_in(outputs), strict=True):
        numbers = best_classes(values) if np.ndim(values) == 2 else values
        for position, word in places:
            tags[sentence][word] = labels.names[int(numbers[position])]
    return tags


def best_classes(logits: Any) -> Any:
    """The numbers of the most likely classes, from an array or tensor `[..., classes]` (or a tuple that starts so)."""
    return logits_in(logits).argmax(-1)


def decode(labels: Labels, outputs: Any, rows: Rows) -> list[dict[str, Any]]:
    """For each sentence, `tokens`, `tags`, `scores` and `entities` (type, text, first and last word)."""
    logits = np.asarray(logits_in(outputs), dtype=float)
    tags = tags_of(labels, logits, rows)
    scores: list[list[float | None]] = [[None] * len(row["tokens"]) for row in rows.raw]
    for (sentence, places), values in zip(rows.places, logits, strict=True):
        for position, word in places:
            scores[sentence][word] = float(softmax(values[position]).max())
    return [
        {
            "tokens": row["tokens"],
            "tags": found,
            "scores": certain,
            "entities": [
                {"type": kind, "text": " ".join(row["tokens"][first:end]), "first": first, "last": end - 1}
                for kind, first, end in metrics.entities(found)
            ],
        }
        for row, found, certain in zip(rows.raw, tags, scores, strict=True)
    ]
