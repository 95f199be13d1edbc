"""The parts of a source go in; a task comes out, with its rows, labels and metrics: one function for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..utils.errors import DataError
from ..utils.formatting import listed
from . import answers, texts, word_files, words
from .columns import label_columns, other_label_columns, text_columns
from .labels import Labels, find_labels, find_several, is_tag, name_of, order_of_head, parts_of
from .metrics import Quality
from .options import VALIDATION_SHARE, Options, stride_of
from .sources import Part, Source
from .splitting import by_group, hold_out, sample
from .task import Rows, Task, record_of


def only_tables(parts: Sequence[Part], kind: str) -> None:
    """Raises `DataError` for a file that has another form than a table."""
    for part in parts:
        if part.form != "table":
            raise DataError(f"{part.name} has rows for the task {part.form}, not for the task {kind}.")


def check_columns(part: Part, columns: Sequence[str]) -> None:
    """Raises `DataError` if a file lacks a column that was found in the first file."""
    if missing := [name for name in columns if name not in part.rows[0]]:
        there = listed(list(part.rows[0]))
        raise DataError(f"{part.name} has no column {missing[0]!r}, as the first file has; it has {there}.")


# -- texts ------------------------------------------------------------------------------------------------------------


def task_of_texts(source: Source, options: Options, head: Labels | None, tokenizer: Any, limit: int) -> Task:
    only_tables([*source.train, *source.validation], "text")
    first = source.train[0]
    label = label_columns(first.name, first.rows, options.label_columns())
    columns, doubts = text_columns(first.name, first.rows, label, options.text_column, options.pair_column)
    notes: list[str] = []

    def raw_of(parts: Sequence[Part], at_most: int | None) -> list[dict[str, Any]]:
        found = []
        for part in parts:
            check_columns(part, [*columns, *label])
            rows, left_out = texts.to_raw(part.name, part.rows, columns, label, options)
            texts.check_not_hidden(part.name, rows)
            found += rows
            notes.extend(f"{part.name}: {note}" for note in left_out)
        return [found[i] for i in sample(len(found), at_most, options.seed)]

    train, held = raw_of(source.train, options.max_rows), raw_of(source.validation, options.max_validation_rows)
    if not any(row["text"].strip() for row in train):
        raise DataError(f"{first.name}: all texts in {columns[0]!r} are empty (--text-column).")
    labels = _labels_for(first.name, train, label, options, head)
    lines, more = texts.describe(labels, train)
    if others := other_label_columns(first.rows, options.label_columns(), label[0]):
        more.append(f"the labels could also be in {listed(others)} (--label-column)")
    if labels.guessed and not all(map(str.isdecimal, labels.names)):
        more.append(
            f"the classes of the model have no names: they are taken for {listed(labels.names)}, in this order"
        )
    if labels.numbered:
        more.append(f"the labels are taken for the numbers of the model's classes {listed(labels.names)}, from 0 on")
    if words.OUTSIDE in labels.names and all(map(is_tag, labels.names)):
        more.append("the labels look like tags of words: --task words reads words and sentences")
    if share := _held_share(len(train), source, options):
        strata = [None if labels.regression else str((parts_of(row["label"], labels.separator) or [""])[0])
                  for row in train]  # fmt: skip
        kept, out = hold_out(strata, share, options.seed)
        train, held = [train[i] for i in kept], [train[i] for i in out]
    (rows, longest, cut), (held_rows, _, cut_too) = (
        texts.encode(name, part, labels, tokenizer, limit)
        for name, part in ((first.name, train), (source.validation[0].name if source.validation else first.name, held))
    )
    more += _repeated(train, held, "texts", "text", "pair")
    size = size_line([*train, *held], longest, cut + cut_too, limit)
    described = [f"{_count(rows, held_rows, 'rows')}; text in {' + '.join(columns)}, labels in {', '.join(label)}"]
    record = record_of("text", labels, options, limit, text_columns=list(columns), label_columns=label)
    return Task(
        "text", tokenizer, labels, rows, held_rows, partial(texts.measure, labels), [*described, *lines, size],
        [*notes, *doubts, *more], record,
    )  # fmt: skip


def _repeated(train: Sequence[dict], held: Sequence[dict], what: str, *keys: str) -> list[str]:
    """A doubt, if validation rows are among the training rows."""
    known = {str([row.get(key) for key in keys]) for row in train}
    again = sum(str([row.get(key) for key in keys]) in known for row in held)
    which = f"{again:,} of the validation {what} {'is' if again == 1 else 'are'} also among the training {what}"
    return [which] if again else []


def size_line(raw: Sequence[dict[str, Any]], longest: int, cut: int, limit: int) -> str:
    empty = sum(not (row["text"].strip() and row.get("pair", "-").strip()) for row in raw)  # or a half of a pair
    return f"longest text {longest:,} tokens, {cut:,} cut at {limit} (--max-length), {empty:,} empty"


def _labels_for(
    name: str, raw: list[dict[str, Any]], columns: list[str], options: Options, head: Labels | None
) -> Labels:
    if head is None:
        return texts.labels_of(name, raw, columns, options)
    values = [row["label"] for row in raw]
    if head.several:
        texts.check_no_vectors(name, raw, columns)
        return order_of_head(find_several(values, options.label_separator), head.names, name, options.allow_unknown)
    if options.label_separator is not None:
        raise DataError("The model predicts one label for each row: leave out --label-separator.")
    if lists := [value for value in values if isinstance(value, list | tuple)]:
        raise DataError(f"{name}: the labels are lists, such as {lists[0]!r:.60}, and the model predicts one label.")
    if head.regression or options.regression:
        texts.check_numbers(name, raw, "as the model predicts")
    found = find_labels(values, head.regression or options.regression)
    if found.regression and {name_of(value) for value in values} <= set(head.names):
        found = Labels(list(head.names))
    return order_of_head(found, head.names, name, options.allow_unknown)


def _held_share(rows: int, source: Source, options: Options) -> float:
    """The share of the rows that is held out for validation: none if there are rows for that."""
    if source.validation:
        return 0.0
    share = VALIDATION_SHARE if options.validation_share is None else options.validation_share
    return min(share, (options.max_validation_rows or rows) / rows)


def _count(rows: Rows, held: Rows, what: str) -> str:
    return f"{len(rows.raw):,} {what}" + (f" and {len(held.raw):,} for validation" if len(held) else "")


# -- words and answers ------------------------------------------------------------------------------------------------


def sentences_in(part: Part, options: Options, needs_tags: bool = True) -> list[dict[str, Any]]:
    """The raw rows of sentences (see `Rows`). Without `needs_tags`, they may have no tags."""
    if part.form == "words":
        return part.rows
    only_tables([part], "words")
    label = options.label_columns()
    column = label[0] if label else None
    return word_files.to_raw(part.name, part.rows, options.text_column, column, needs_tags, part.notes)


def task_of_words(source: Source, options: Options, head: Labels | None, tokenizer: Any, limit: int) -> Task:
    train, held = (
        [row for part in parts for row in sentences_in(part, options)] for parts in (source.train, source.validation)
    )
    train, held = _chosen(train, held, options)
    labels = words.labels_of(train, held)
    if head is not None:
        labels = words.labels_for(head, labels, source.train[0].name)
    lines, doubts = words.describe(labels, train)
    if share := _held_share(len(train), source, options):
        strata = [any(tag != words.OUTSIDE for tag in row["tags"]) for row in train]
        kept, out = hold_out(strata, share, options.seed, "sentences")
        train, held = [train[i] for i in kept], [train[i] for i in out]
    doubts += _repeated(train, held, "sentences", "tokens")
    rows, longest, cut = words.encode(train, labels, tokenizer, limit)
    held_rows, _, cut_too = words.encode(held, labels, tokenizer, limit)
    size = f"longest sentence {longest:,} tokens, {cut + cut_too:,} in several windows of {limit} (--max-length)"
    record = record_of("words", labels, options, limit)
    measure = partial(words.measure, labels)
    described = [_count(rows, held_rows, "sentences"), *lines, size]
    return Task("words", tokenizer, labels, rows, held_rows, measure, described, doubts, record)


def questions_in(part: Part, labeled: bool = True) -> list[dict[str, Any]]:
    """The raw rows of questions (see `Rows`). If they are `labeled`, a question without answers is a `DataError`."""
    rows = part.rows
    if part.form != "answers":
        only_tables([part], "answers")
        rows, notes = answers.from_table(part.name, part.rows, labeled)
        part.notes += notes
    if labeled and (open_ones := [row["row"] for row in rows if "answers" not in row]):
        raise DataError(
            f"{part.name}: question {open_ones[0]} has no answer. Give each question `answers`, as in SQuAD (an empty "
            f"list if the text has no answer), or a table the columns `answer` and `answer_start`."
        )
    return rows


def task_of_answers(source: Source, options: Options, head: Labels | None, tokenizer: Any, limit: int) -> Task:
    train, held = (
        [row for part in parts for row in questions_in(part)] for parts in (source.train, source.validation)
    )
    train, held = _chosen(train, held, options)
    lines, doubts = answers.describe(train)
    if share := _held_share(len(train), source, options):
        kept, out = by_group([row["article"] for row in train], share, options.seed)
        train, held = [train[i] for i in kept], [train[i] for i in out]
        held = [held[i] for i in sample(len(held), options.max_validation_rows, options.seed)]  # groups differ in size
    doubts += _repeated(train, held, "questions", "question", "context")
    silent = answers.may_be_silent(train) if options.silent is None else options.silent
    stride = stride_of(options, limit)
    rows, longest, cut = answers.encode(train, tokenizer, limit, stride)
    held_rows, _, cut_too = answers.encode(held, tokenizer, limit, stride)
    size = f"longest input {longest:,} tokens, {cut + cut_too:,} in several windows of {limit} (--max-length)"
    record = record_of("answers", Labels([]), replace(options, stride=stride), limit, silent=silent)
    described = [_count(rows, held_rows, "questions"), *lines, size]

    def measure(outputs: Any, measured: Rows, _: Rows | None) -> Quality:
        return answers.measure(outputs, measured, options.max_answer_length, silent)

    return Task("answers", tokenizer, Labels([]), rows, held_rows, measure, described, doubts, record)


def _chosen(train: list, held: list, options: Options) -> tuple[list, list]:
    """The rows that `max_rows` and `max_validation_rows` leave."""
    parts = (train, options.max_rows), (held, options.max_validation_rows)
    kept = [[rows[i] for i in sample(len(rows), at_most, options.seed)] for rows, at_most in parts]
    return kept[0], kept[1]
