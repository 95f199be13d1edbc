"""One door for all kinds of tasks: reads data for training, evaluation and prediction, and decodes outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import answers, texts, words
from .columns import WRITTEN, label_columns, other_label_columns, text_columns, usual_label_columns
from .decoding import TEXT_SUFFIXES, suffix_of
from .labels import DataError, Labels, find_labels, find_several, is_tag, listed, name_of, order_of_head, parts_of
from .metrics import Quality
from .sources import Part, Source, read_source
from .splitting import by_group, hold_out, sample
from .task import KINDS, Kind, Options, Rows, Task, limit_of, load_tokenizer, record_of, stride_of, token_doubts


Data = str | Path | Iterable[str | Path] | Source


def read_task(
    model: str,
    data: Data,
    validation: Data | None = None,
    *,
    kind: Kind | None = None,
    head: Labels | None = None,
    config: Any = None,
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
        **options: See `Options`. For an evaluation of all rows, set `validation_share=0` and use `task.train`.

    Raises:
        DataError: The data cannot be used. The message names the file, the row, and the option that settles it.
    """
    wanted = Options(**options)
    source = _source_of(data, kind, wanted, beside=validation)
    if validation is not None:
        other = _source_of(validation, kind, replace(wanted, split=None), beside=data)
        source = Source(source.train, other.validation or other.train, source.notes + other.notes)
    kind = kind or kind_of(source.train[0], bool(wanted.label_columns()))
    check_options(kind, wanted)
    tokenizer = load_tokenizer(kind, model, config)
    limit = limit_of(tokenizer, wanted.max_length or KINDS[kind][2], _config_of(model, config, tokenizer))
    read = {"text": _read_texts, "words": _read_words, "answers": _read_answers}[kind]
    task = read(source, wanted, head, tokenizer, limit)
    notes = [*source.notes, *(note for part in (*source.train, *source.validation) for note in part.notes)]
    task.doubts[:0] = [*notes, *token_doubts(task.train, tokenizer)]
    task.hashes = {part.name: part.sha256 for part in (*source.train, *source.validation)}
    return task


def rows_for_prediction(
    kind: str, tokenizer: Any, data: Data, *, max_length: int | None = None, **options: Any
) -> tuple[Rows, list[str], list[str]]:
    """Tokenized rows for a prediction, what was recognized, and what may be wrong. Labels are not needed, nor read.

    Args:
        kind: `"text"`, `"words"` or `"answers"`.
        tokenizer: From `load_tokenizer`.
        data: As in `read_task`. All of its rows are read, in their order.
        max_length: Longest input in tokens.
        **options: See `Options`: `text_column`, `pair_column`, `stride` and those about the format.
    """
    wanted = Options(**options)
    check_options(kind, wanted)
    limit = limit_of(tokenizer, max_length or KINDS[kind][2])
    source = _source_of(data, kind, wanted, labeled=False)
    parts = source.train
    notes = [*source.notes, *(note for part in parts for note in part.notes)]
    if kind == "text":
        _only_tables(parts, kind)
        columns, doubts = text_columns(parts[0].name, parts[0].rows, [], wanted.text_column, wanted.pair_column)
        for part in parts:
            _check_columns(part, columns)
        raw = [row for part in parts for row in texts.to_raw(part.name, part.rows, columns, [], wanted)[0]]
        rows, longest, cut = texts.encode(parts[0].name, raw, None, tokenizer, limit)
        return rows, [f"text in {' + '.join(columns)}, {_size(raw, longest, cut, limit)}"], [*notes, *doubts]
    if kind == "words":
        raw = [row for part in parts for row in _sentences(part, wanted, needs_tags=False)]
        lines = [f"{len(raw):,} sentences, {sum(len(row['tokens']) for row in raw):,} words"]
        return words.encode(raw, None, tokenizer, limit)[0], lines, notes
    raw = [row for part in parts for row in _questions(part, labeled=False)]
    return answers.encode(raw, tokenizer, limit, stride_of(wanted, limit))[0], [], notes


def decode(
    kind: str, outputs: Any, rows: Rows, labels: Labels, max_answer_length: int = 30, silent: bool = False
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
    if any(isinstance(first.get(column), list) for column in words.WORD_COLUMNS) or words.has_word_rows(part.rows):
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
        if (value := getattr(options, name)) and value != getattr(_DEFAULTS, name):
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


def _source_of(data: Data, kind: str | None, options: Options, labeled: bool = True, beside: Any = None) -> Source:
    return data if isinstance(data, Source) else read_source(data, kind, options, labeled, beside)


def _config_of(model: str, config: Any, tokenizer: Any) -> Any:
    """The config of the base model, if the tokenizer does not know the model's longest input."""
    if config is not None or tokenizer.model_max_length <= 10**6:
        return config
    from transformers import AutoConfig

    from ..reporting.saved import load_pretrained

    return load_pretrained(AutoConfig, model)


def _only_tables(parts: Sequence[Part], kind: str) -> None:
    for part in parts:
        if part.form != "table":
            raise DataError(f"{part.name} has rows for the task {part.form}, not for the task {kind}.")


def _check_columns(part: Part, columns: Sequence[str]) -> None:
    """All files have the columns that were found in the first one."""
    if missing := [name for name in columns if name not in part.rows[0]]:
        there = listed(list(part.rows[0]))
        raise DataError(f"{part.name} has no column {missing[0]!r}, as the first file has; it has {there}.")


# -- texts ------------------------------------------------------------------------------------------------------------


def _read_texts(source: Source, options: Options, head: Labels | None, tokenizer: Any, limit: int) -> Task:
    _only_tables([*source.train, *source.validation], "text")
    first = source.train[0]
    label = label_columns(first.name, first.rows, options.label_columns())
    columns, doubts = text_columns(first.name, first.rows, label, options.text_column, options.pair_column)
    notes: list[str] = []

    def raw_of(parts: Sequence[Part], at_most: int | None) -> list[dict[str, Any]]:
        found = []
        for part in parts:
            _check_columns(part, [*columns, *label])
            rows, left_out = texts.to_raw(part.name, part.rows, columns, label, options)
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
    if words.OUTSIDE in labels.names and all(map(is_tag, labels.names)):
        more.append("the labels look like tags of words: --task words reads words and sentences")
    if not source.validation and options.validation_share:
        strata = [None if labels.regression else str((parts_of(row["label"], labels.separator) or [""])[0])
                  for row in train]  # fmt: skip
        kept, out = hold_out(strata, _held_share(len(train), options), options.seed)
        train, held = [train[i] for i in kept], [train[i] for i in out]
    (rows, longest, cut), (held_rows, _, cut_too) = (
        texts.encode(name, part, labels, tokenizer, limit)
        for name, part in ((first.name, train), (source.validation[0].name if source.validation else first.name, held))
    )
    more += _repeated(train, held, "texts", "text", "pair")
    size = _size([*train, *held], longest, cut + cut_too, limit)
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


def _size(raw: Sequence[dict[str, Any]], longest: int, cut: int, limit: int) -> str:
    empty = sum(not row["text"].strip() for row in raw)
    return f"longest text {longest:,} tokens, {cut:,} cut at {limit} (--max-length), {empty:,} empty"


def _labels_for(
    name: str, raw: list[dict[str, Any]], columns: list[str], options: Options, head: Labels | None
) -> Labels:
    if head is None:
        return texts.labels_of(name, raw, columns, options)
    values = [row["label"] for row in raw]
    if head.several:
        return order_of_head(find_several(values, options.label_separator), head.names, name, options.allow_unknown)
    if lists := [value for value in values if isinstance(value, list | tuple)]:
        raise DataError(f"{name}: the labels are lists, such as {lists[0]!r:.60}, and the model predicts one label.")
    if head.regression or options.regression:
        texts.check_numbers(name, raw, "as the model predicts")
    found = find_labels(values, head.regression or options.regression)
    if found.regression and {name_of(value) for value in values} <= set(head.names):
        found = Labels(list(head.names))
    return order_of_head(found, head.names, name, options.allow_unknown)


def _held_share(rows: int, options: Options) -> float:
    """The share of the rows that is held out for validation."""
    return min(options.validation_share, (options.max_validation_rows or rows) / rows)


def _count(rows: Rows, held: Rows, what: str) -> str:
    return f"{len(rows.raw):,} {what}" + (f" and {len(held.raw):,} for validation" if len(held) else "")


# -- words and answers ------------------------------------------------------------------------------------------------


def _sentences(part: Part, options: Options, needs_tags: bool = True) -> list[dict[str, Any]]:
    if part.form == "words":
        return part.rows
    _only_tables([part], "words")
    label = options.label_columns()
    return words.to_raw(part.name, part.rows, options.text_column, label[0] if label else None, needs_tags)


def _read_words(source: Source, options: Options, head: Labels | None, tokenizer: Any, limit: int) -> Task:
    train, held = (
        [row for part in parts for row in _sentences(part, options)] for parts in (source.train, source.validation)
    )
    train, held = _chosen(train, held, options)
    labels = words.labels_of(train, held)
    if head is not None:
        labels = words.labels_for(head, labels, source.train[0].name)
    lines, doubts = words.describe(labels, train)
    if not source.validation and options.validation_share:
        strata = [any(tag != words.OUTSIDE for tag in row["tags"]) for row in train]
        kept, out = hold_out(strata, _held_share(len(train), options), options.seed, "sentences")
        train, held = [train[i] for i in kept], [train[i] for i in out]
    doubts += _repeated(train, held, "sentences", "tokens")
    rows, longest, cut = words.encode(train, labels, tokenizer, limit)
    held_rows, _, cut_too = words.encode(held, labels, tokenizer, limit)
    size = f"longest sentence {longest:,} tokens, {cut + cut_too:,} in several windows of {limit} (--max-length)"
    record = record_of("words", labels, options, limit)
    measure = partial(words.measure, labels)
    described = [_count(rows, held_rows, "sentences"), *lines, size]
    return Task("words", tokenizer, labels, rows, held_rows, measure, described, doubts, record)


def _questions(part: Part, labeled: bool = True) -> list[dict[str, Any]]:
    rows = part.rows
    if part.form != "answers":
        _only_tables([part], "answers")
        rows, notes = answers.from_table(part.name, part.rows, labeled)
        part.notes += notes
    if labeled and (open_ones := [row["row"] for row in rows if "answers" not in row]):
        raise DataError(
            f"{part.name}: question {open_ones[0]} has no answer. Give each question `answers`, as in SQuAD (an empty "
            f"list if the text has no answer), or a table the columns `answer` and `answer_start`."
        )
    return rows


def _read_answers(source: Source, options: Options, head: Labels | None, tokenizer: Any, limit: int) -> Task:
    train, held = ([row for part in parts for row in _questions(part)] for parts in (source.train, source.validation))
    train, held = _chosen(train, held, options)
    lines, doubts = answers.describe(train)
    if not source.validation and options.validation_share:
        kept, out = by_group([row["article"] for row in train], _held_share(len(train), options), options.seed)
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
