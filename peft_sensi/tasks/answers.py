"""Questions about texts go in; windows for a model that finds answers, its metrics and the texts of answers come out.

Files are in the format of SQuAD 1.1 or 2.0 (data > paragraphs > context, qas > question, answers > text,
answer_start), or tables with the columns question, context and answers, or answer and answer_start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..utils.errors import DataError
from ..utils.formatting import counted, listed
from . import metrics
from .labels import name_of
from .metrics import Quality
from .options import MAX_ANSWER_LENGTH
from .task import Rows


# In tables: the columns of the texts of the answers, and of the characters at which they start.
COLUMNS = (("answers.text", "answers.answer_start"), ("answer.text", "answer.answer_start"),
           ("answer_text", "answer_start"), ("answer", "answer_start"))  # fmt: skip


def is_squad(value: Any) -> bool:
    """Whether a JSON value has the form of a SQuAD file."""
    articles = value.get("data") if isinstance(value, dict) else None
    return (
        isinstance(articles, list)
        and bool(articles)
        and all(isinstance(article, dict) and "paragraphs" in article for article in articles)
    )


def from_squad(name: Any, value: Any, labeled: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per question, and a note about answers that are not at their `answer_start`, which are left out.

    Without `labeled`, answers are not read, so that every question gets a row.
    """
    rows: list[dict[str, Any]] = []
    misplaced = 0
    try:
        for number, article in enumerate(value["data"]):
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for entry in paragraph["qas"]:
                    # If an impossible question has answers, they are only plausible, not correct.
                    given = [] if _is_impossible(entry) else entry.get("answers")
                    is_known = labeled and given is not None
                    pairs = [(a["text"], a["answer_start"]) for a in given] if is_known else None
                    title = f"{number} {article.get('title', '')}"
                    misplaced += _add(rows, title, context, entry["question"], pairs, entry.get("id"))
    except (KeyError, TypeError, AttributeError) as error:
        lack = f"lacks {error}" if isinstance(error, KeyError) else "has another kind of value at one of these places"
        raise DataError(
            f"{name} is not in SQuAD format (data > paragraphs > context, qas > question, answers > text, "
            f"answer_start): what comes after {len(rows):,} questions {lack}."
        ) from None
    return _checked(name, rows, misplaced), _note(name, misplaced)


def from_table(
    name: Any, table: Sequence[dict[str, Any]], labeled: bool = True
) -> tuple[list[dict[str, Any]], list[str]]:
    """As `from_squad`, from rows with question, context and answers (or two of `COLUMNS`, lists or single values)."""
    rows: list[dict[str, Any]] = []
    misplaced = 0
    names = list(table[0])
    if missing := [column for column in ("question", "context") if column not in names]:
        raise DataError(
            f"{name} has no column {missing[0]!r}; it has {listed(names)}. Questions need a file in SQuAD format, "
            f"or the columns question, context and answers."
        )
    for number, row in enumerate(table, start=1):
        try:
            pairs = _pairs_of(row) if labeled else None
            misplaced += _add(rows, row["context"], row["context"], row["question"], pairs, row.get("id"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(
                f"{name}: row {number} needs the texts `question` and `context`, and its answer in `answer` and "
                f"`answer_start` (the character of the context at which it starts, from 0), or several in `answers` "
                f"with the lists `text` and `answer_start`."
            ) from None
    return _checked(name, rows, misplaced), _note(name, misplaced)


def _pairs_of(row: dict[str, Any]) -> list[tuple[str, int]] | None:
    """Text and place of each answer of a table's row. `None` if it has no such columns. Raises if they do not fit."""
    if _is_impossible(row):
        return []
    if isinstance(row.get("answers"), list):
        return [(a["text"], int(a["answer_start"])) for a in row["answers"]]
    columns = next((both for both in COLUMNS if row.get(both[0]) is not None), None)
    if columns is None:
        if isinstance(row.get("answers"), str) and row["answers"].strip():
            raise ValueError("a text, and no list of answers")
        return None if row.get("answers") is None else []
    texts: Any = row[columns[0]]
    starts: Any = row.get(columns[1])
    if isinstance(texts, str):
        texts, starts = ([texts], starts if isinstance(starts, list) else [starts]) if texts.strip() else ([], [])
    return [(text, int(float(start))) for text, start in zip(texts, starts or [], strict=True)]


def _is_impossible(row: dict[str, Any]) -> bool:
    """Whether SQuAD's mark, which is a text in tables, says that the text has no answer."""
    return name_of(row.get("is_impossible")).lower() in ("1", "true")


def _add(rows: list[dict[str, Any]], article: str, context: str, question: str, pairs: Any, id: Any) -> int:
    """Adds a question, unless all of its answers are misplaced. Returns the number of misplaced answers."""
    if not (isinstance(context, str) and isinstance(question, str)):
        raise TypeError("not a text")
    right = [(t, at) for t, at in pairs or [] if t.strip() and at >= 0 and context[at : at + len(t)] == t]
    if not pairs or right:
        row = {"row": len(rows) + 1, "article": article, "context": context, "question": question.strip()}
        known = {} if pairs is None else {"answers": [text for text, _ in right], "starts": [at for _, at in right]}
        rows.append(row | known | ({} if id is None else {"id": id}))
    return len(pairs or []) - len(right)


def _note(name: Any, misplaced: int) -> list[str]:
    where = "that is not at its" if misplaced == 1 else "that are not at their"
    return [f"{name}: skipped {counted(misplaced, 'answer')} {where} `answer_start`"] if misplaced else []


def _checked(name: Any, rows: list[dict[str, Any]], misplaced: int) -> list[dict[str, Any]]:
    if not rows and misplaced:
        raise DataError(
            f"{name}: no answer is in its context at its `answer_start`, the number of characters before it."
        )
    if not rows:
        raise DataError(f"{name} has no questions.")
    return rows


def encode(raw: Sequence[dict[str, Any]], tokenizer: Any, max_length: int, stride: int) -> tuple[Rows, int, int]:
    """Windows over the contexts, each with its question and the token positions of the first answer.

    If a window does not contain the whole answer, its positions are those of its first token, such as [CLS]. A
    question may take half of a window; a longer question is cut. Also returns the longest input in tokens and the
    number of contexts with several windows.
    """
    longest_question = max_length // 2 - tokenizer.num_special_tokens_to_add(pair=True)
    if longest_question < 1:
        raise DataError(f"A window of {max_length} tokens has no room for a question and a text (--max-length).")
    if not 0 <= stride < max_length - max_length // 2:
        raise DataError(
            f"--stride {stride} must be less than half of the window of {max_length} tokens. Give a smaller one."
        )
    found = Rows([], list(raw))
    if not raw:
        return found, 0, 0
    encoded = tokenizer(
        [shortened(row["question"], tokenizer, longest_question) for row in raw],
        [row["context"] for row in raw],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    samples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    for window, sample in enumerate(samples):
        in_text = np.array([part == 1 for part in encoded.sequence_ids(window)])
        places = np.where(in_text[:, None], np.array(offsets[window]), -1)
        row = {key: values[window] for key, values in encoded.items()}
        if (answers := raw[sample].get("answers")) is not None:
            first, last = answer_tokens(places, answers[0], raw[sample]["starts"][0]) if answers else (0, 0)
            row |= {"start_positions": first, "end_positions": last}
        found.inputs.append(row)
        found.places.append((sample, places))
    windows = np.bincount(samples, minlength=len(raw))
    return found, max(len(row["input_ids"]) for row in found.inputs), int((windows > 1).sum())


def shortened(question: str, tokenizer: Any, tokens: int) -> str:
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]


def answer_tokens(places: np.ndarray, answer: str, start: int) -> tuple[int, int]:
    """First and last token of an answer; (0, 0) if the window does not contain the whole answer."""
    start += len(answer) - len(answer.lstrip())
    end = start + len(answer.strip())
    # Some tokenizers include the space before a word in its token. Therefore all tokens that overlap the answer count.
    touched = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start) & (places[:, 0] >= 0))
    if not len(touched):
        return 0, 0
    first, last = int(touched[0]), int(touched[-1])
    return (first, last) if places[first, 0] <= start and places[last, 1] >= end else (0, 0)


def describe(raw: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    silent = sum(not row.get("answers") for row in raw)
    texts = len({row["context"] for row in raw})
    doubts = ["no question has an answer, so there is nothing to find"] if silent == len(raw) else []
    return [f"{len(raw):,} questions about {texts:,} texts, {silent:,} of them without an answer"], doubts


def may_be_silent(raw: Sequence[dict[str, Any]]) -> bool:
    """Whether some questions have no answer, so that the model learns to give none."""
    return any(not row["answers"] for row in raw)


def measure(outputs: Any, rows: Rows, max_answer_length: int, silent: bool) -> Quality:
    """The quality of the two logits `[windows, tokens]`. The baseline is to give no answer to any question."""
    references = [row["answers"] for row in rows.raw]
    texts = [found["answer"] for found in decode(outputs, rows, max_answer_length, silent)]
    scores = metrics.answer_scores(texts, references)
    nothing = metrics.answers(metrics.answer_scores([""] * len(references), references))
    values, intervals = metrics.measured(
        lambda i: metrics.answers(scores[i]), len(scores), {"exact_match": len(scores)}
    )
    return Quality(values, nothing, intervals)


def decode(
    outputs: Any, rows: Rows, max_answer_length: int = MAX_ANSWER_LENGTH, silent: bool = False
) -> list[dict[str, Any]]:
    """For each question, `answer` (cut from the text; empty for none), `score`, and `start` and `end` in characters.

    An answer is the span with the highest sum of its two logits over all windows; `score` is that sum. With `silent`,
    the answer is empty if in every window "no answer" has a higher sum than the best span of the text.
    """
    starts, ends = outputs[:2]
    best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(rows.raw)
    silence = [np.inf] * len(rows.raw)
    for (row, places), start_logits, end_logits in zip(rows.places, starts, ends, strict=True):
        silence[row] = min(silence[row], float(start_logits[0] + end_logits[0]))
        score, first, last = best_span(places, start_logits, end_logits, max_answer_length)
        if score > best[row][0]:
            best[row] = score, int(places[first, 0]), int(places[last, 1])
    found = []
    for raw, (score, start, end), none in zip(rows.raw, best, silence, strict=True):
        if not np.isfinite(score) or (silent and none > score):
            found.append({"answer": "", "score": none, "start": None, "end": None})
        else:
            text = raw["context"][start:end]  # some tokens contain the blank before a word
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            found.append({"answer": raw["context"][start:end], "score": score, "start": start, "end": end})
    return found


def best_span(places: np.ndarray, starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, int, int]:
    """Score, first token and last token of the best span. The score is minus infinity if the window has no text."""
    text = np.flatnonzero(places[:, 0] >= 0)
    if not len(text):
        return -np.inf, 0, 0
    length = text[None, :] - text[:, None]
    scores = np.where((length >= 0) & (length < longest), starts[text][:, None] + ends[text][None, :], -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, last]), int(text[first]), int(text[last])
