"""Reads data and decodes outputs with the module of the task's kind: `texts`, `words` or `answers`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..utils.errors import DataError
from ..utils.task_types import Kind
from . import answers, texts, word_files, words
from .building import (
    check_columns,
    only_tables,
    questions_in,
    sentences_in,
    size_line,
    task_of_answers,
    task_of_texts,
    task_of_words,
)
from .columns import WRITTEN, text_columns, usual_label_columns
from .encodings import TEXT_SUFFIXES, suffix_of
from .labels import Labels
from .models import load_tokenizer
from .options import MAX_ANSWER_LENGTH, MAX_LENGTH, Options, stride_of
from .sources import Part, Purpose, Source, read_source
from .task import Rows, Task, token_doubts


Data = str | Path | Iterable[str | Path] | Source


def read_task(
    model: str,
    data: Data,
    validation: Data | None = None,
    *,
    kind: Kind | None = None,
    head: Labels | None = None,
    config: Any = None,
    purpose: Purpose = "training",
    **options: Any,
) -> Task:
    """Reads the data of a training or an evaluation for a model's tokenizer.

    Args:
        model: The name of a model on the Hub, or the folder of a model or an adapter.
        data: Files, folders or data sets, or what `read_source` has read of them. Their rows are for training, except
            those of a split for validation.
        validation: The same for validation. `None`: the data's own split, or else `validation_share` of its rows.
        kind: What is predicted. `None` is recognized from the file.
        head: The labels of a trained head (`labels_of_head`): the labels of the file then get the same numbers.
        config: The config of the base model, if `model` is the folder of an adapter.
        purpose: What the data are for, see `read_source`.
        **options: See `Options`. For an evaluation, set `validation_share=0` and use `task.train`.

    Raises:
        DataError: The data cannot be used. The message names the file, the row, and the option that settles it.
    """
    wanted = Options(**options)
    source = _source_of(data, kind, wanted, purpose, beside=validation)
    if validation is not None:
        beside = data.given if isinstance(data, Source) else data
        other = _source_of(validation, kind, replace(wanted, split=None), beside=beside)
        source = Source(source.train, other.validation or other.train, source.notes + other.notes)
    kind = kind or kind_of(source.train[0], bool(wanted.label_columns()))
    check_options(kind, wanted)
    tokenizer = load_tokenizer(kind, model, config)
    limit = min(wanted.max_length or MAX_LENGTH[kind], tokenizer.model_max_length)
    read = {"text": task_of_texts, "words": task_of_words, "answers": task_of_answers}[kind]
    task = read(source, wanted, head, tokenizer, limit)
    task.doubts[:0] = [*notes_of(source), *token_doubts(task.train, tokenizer)]
    task.hashes = {part.name: part.sha256 for part in (*source.train, *source.validation)}
    task.validation_data = [part.name for part in source.validation]
    return task


def notes_of(source: Source) -> list[str]:
    """What was said about the source and its parts while they were read. Call it after all rows are made."""
    return [*source.notes, *(note for part in (*source.train, *source.validation) for note in part.notes)]


def rows_for_prediction(
    kind: str, tokenizer: Any, data: Data, *, max_length: int | None = None, **options: Any
) -> tuple[Rows, list[str], list[str]]:
    """Tokenized rows for a prediction, what was recognized, and what may be wrong. Labels are not needed, nor read.

    Args:
        kind: `"text"`, `"words"` or `"answers"`.
        tokenizer: From `load_tokenizer`.
        data: As in `read_task`. All files of a folder are read, in the order of their names.
        max_length: Longest input in tokens.
        **options: See `Options`: `text_column`, `pair_column`, `stride` and those about the format.
    """
    wanted = Options(**options)
    check_options(kind, wanted)
    limit = min(max_length or MAX_LENGTH[kind], tokenizer.model_max_length)
    source = _source_of(data, kind, wanted, "prediction")
    parts = source.train
    if kind == "text":
        only_tables(parts, kind)
        columns, doubts = text_columns(parts[0].name, parts[0].rows, [], wanted.text_column, wanted.pair_column)
        for part in parts:
            check_columns(part, columns)
        raw = [row for part in parts for row in texts.to_raw(part.name, part.rows, columns, [], wanted)[0]]
        rows, longest, cut = texts.encode(parts[0].name, raw, None, tokenizer, limit)
        line = f"text in {' + '.join(columns)}, {size_line(raw, longest, cut, limit)}"
        return rows, [line], [*notes_of(source), *doubts]
    if kind == "words":
        raw = [row for part in parts for row in sentences_in(part, wanted, needs_tags=False)]
        lines = [f"{len(raw):,} sentences, {sum(len(row['tokens']) for row in raw):,} words"]
        return words.encode(raw, None, tokenizer, limit)[0], lines, notes_of(source)
    raw = [row for part in parts for row in questions_in(part, labeled=False)]
    return answers.encode(raw, tokenizer, limit, stride_of(wanted, limit))[0], [], notes_of(source)


def decode(
    kind: str,
    outputs: Any,
    rows: Rows,
    labels: Labels,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    silent: bool = False,
) -> list[dict[str, Any]]:
    """Readable predictions, one dict per raw row, from a model's logits (see `Task.metrics`).

    For texts, `label`, `score` and `scores`; or `labels` and `scores`; or `value`. For words, `tags`, `scores` and
    `entities`. For answers, `answer`, `score`, `start` and `end`. No PyTorch is needed.
    """
    if kind == "answers":
        return answers.decode(outputs, rows, max_answer_length, silent)
    return (texts.decode if kind == "text" else words.decode)(labels, outputs, rows)


def kind_of(part: Part, has_label: bool = False) -> Kind:
    """The kind of task that the rows are for. `has_label` says that the user has named a column of labels.

    Raises `DataError` if there is one column only: it can be texts without labels, or words with tags.
    """
    if part.form in ("words", "answers"):
        return part.form  # type: ignore[return-value]
    names, first = set(part.rows[0]), part.rows[0]
    if {"question", "context"} <= names:
        has_label = has_label or bool(usual_label_columns(part.rows))
        known = [text for text, start in answers.COLUMNS if text in names and (start in names or not has_label)]
        if known or "answers" in names:
            return "answers"
    has_lists = any(isinstance(first.get(column), list) for column in word_files.WORD_COLUMNS)
    if has_lists or word_files.has_word_rows(part.rows):
        return "words"
    if len(names) == 1:
        hint = " If the file has no header, write one. For other delimiters, see --delimiter."
        hint = hint * (suffix_of(Path(part.name)) in TEXT_SUFFIXES) + " For words with tags, give --task words. "
        column = f"{next(iter(names))!r:.60}"
        raise DataError(f"{part.name} has one column, {column}, and labels need another one.{hint}{WRITTEN}")
    return "text"


def check_options(kind: Kind | str, options: Options) -> None:
    """Raises `DataError` for an option that changes nothing for this kind of task."""
    for name in _UNUSED[kind]:
        if getattr(options, name) not in (getattr(_DEFAULTS, name), [], ()):
            raise DataError(f"--{name.replace('_', '-')} changes nothing for the task {kind}: leave it out.")
    if options.label_separator == "":
        raise DataError("--label-separator needs the text that is between two labels, such as a comma.")
    several = len(options.label_columns()) > 1
    if several and (kind == "words" or options.label_separator):
        raise DataError("Several --label-column are columns of 0 and 1 for texts, and need no --label-separator.")
    if options.regression and (several or options.label_separator):
        raise DataError(
            "--regression predicts one number: leave out --label-separator, or all but one --label-column."
        )


_DEFAULTS = Options()
_UNUSED = {
    "text": ("stride", "max_answer_length"),
    "words": ("pair_column", "label_separator", "regression", "skip_unlabeled", "stride", "max_answer_length"),
    "answers": ("text_column", "pair_column", "label_column", "label_separator", "regression", "skip_unlabeled"),
}


def _source_of(
    data: Data, kind: str | None, options: Options, purpose: Purpose = "training", beside: Any = None
) -> Source:
    return data if isinstance(data, Source) else read_source(data, kind, options, purpose, beside)
