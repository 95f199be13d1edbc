"""Sentences of words with tags go in; windows of tokens for a model that tags words, its metrics and tags come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from ..utils.formatting import listed
from . import metrics
from .class_order import check_order
from .labels import OUTSIDE, Labels, order_of_head
from .metrics import Quality
from .task import Rows, check_room
from .texts import logits_in


IGNORED = -100  # the label of positions without a loss


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
    found = tags_of(labels, outputs, rows)
    if labels.guessed:
        number = {name: i for i, name in enumerate(labels.names)}
        check_order(labels, *(np.array([number[tag] for tags in part for tag in tags]) for part in (found, expected)))
    counts = metrics.word_counts(found, expected)
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
