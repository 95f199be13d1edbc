"""The commands that use a finished model on data: `predict`, `evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..reporting.tables import facts_table, records_table
from ..utils.errors import SensiError
from ..utils.formatting import human, interval_text, metric_text, size_of
from . import arguments as args
from .arguments import argument, option
from .checks import check_apart, check_files
from .data_options import FORMATS, task_options
from .loading import load_predictor, refuse_base
from .prediction_files import SUFFIXES, unused_name, write_records
from .terminal import print_result, print_understood, print_warning, step
from .trained_options import LENGTHS, TRAINED_OPTIONS, read_as_trained, untrained_columns


if TYPE_CHECKING:
    from ..tasks.predicting import Predictor
    from ..tasks.task import Rows, Task


_INPUTS = {name: TRAINED_OPTIONS[name] for name in ("text_column", "pair_column", *LENGTHS, *FORMATS)}
_LABELED = {name: TRAINED_OPTIONS[name] for name in TRAINED_OPTIONS if name != "task"}
_USABLE = "An adapter, a merged model or an exported .onnx file: a path, or a name on the Hub."
Usable = Annotated[str, argument("MODEL", _USABLE)]
LabeledData = Annotated[
    list[str], argument("DATA...", "Labeled rows: files, folders of files, or data sets of the Hub.")
]


@args.with_options(reading=_INPUTS)
def predict(
    model: Usable,
    data: Annotated[list[str], argument("DATA...", "Rows to predict: files, folders, or data sets of the Hub.")],
    reading: dict[str, Any],
    out_file: Annotated[
        Path, option("--out", "FILE", "The predictions: .csv, .tsv or .jsonl, or - for CSV on stdout.")
    ] = Path("-"),
    scores: Annotated[bool, option("--scores", None, "Also write the score of each class, for texts.")] = False,
    overwrite: args.OverwriteFiles = False,
    base: args.Base = None,
    batch_size: args.BatchSize = 32,
    as_json: args.Json = False,
) -> None:
    """Predict classes, numbers, tags of words, or answers, for each row of a file, in its order.

    The prediction is in new columns. Those of the file stay; beside tags or answers, only what identifies a row. No
    labels are needed. --json with --out - writes JSON Lines.
    """
    from ..utils.files import write_atomically
    from ..utils.progress import progress_bar

    to_stdout = str(out_file) == "-"
    suffix = (".jsonl" if as_json else ".csv") if to_stdout else out_file.suffix.lower()
    if suffix not in SUFFIXES:
        raise SensiError(f"{out_file}: predictions are written as {', '.join(SUFFIXES)}, or to stdout for -.")
    if not to_stdout:
        check_apart(out_file, data, is_file=True)
    check_files({"--out FILE": None if to_stdout else out_file}, overwrite)
    quiet = as_json or to_stdout
    predictor = load_predictor(model, base, show=not quiet)
    if scores and (predictor.kind != "text" or predictor.labels.regression):
        raise SensiError(f"--scores writes the score of each class, and {model} has no classes: leave it out.")
    rows, originals = rows_of(predictor, data, reading, show=not quiet)
    longest = reading["max_answer_length"]
    predicted = progress_bar(
        predictor.predictions(rows, batch_size, longest), "predicting", len(rows.raw), show=not as_json
    )
    separator = predictor.record.get("label_separator") or " "
    columns = list(originals[0]) if originals else []
    records = records_of(predictor, rows, originals, predicted, scores or suffix == ".jsonl")
    if to_stdout:
        write_records(None, suffix, records, separator, columns)
        return
    write_atomically(out_file, lambda path: write_records(Path(path), suffix, records, separator, columns))
    count = len(rows.raw)
    print_result(as_json, {"file": str(out_file), "rows": count}, f"{out_file}: {count:,} rows")


@args.with_options(reading=_LABELED)
def evaluate(
    model: Usable,
    data: LabeledData,
    reading: dict[str, Any],
    base: args.Base = None,
    batch_size: args.BatchSize = 32,
    as_json: args.Json = False,
) -> None:
    """Measure a model on labeled rows: each metric with its 95 % interval, and the metric of a baseline.

    The baseline always gives the same answer, such as the most frequent class.
    """
    from ..tasks.task import baseline_words

    predictor = load_predictor(model, base, show=not as_json)
    task = labeled_rows(predictor, data, reading, show=not as_json)
    with step(f"predicting {len(task.train.raw):,} rows", show=not as_json):
        outputs = predictor.outputs(task.train, batch_size)
    with step("computing metrics and their intervals", show=not as_json):
        quality = task.measure(outputs, task.train, None)
    # Here, all rows are measured, and there is no --validation.
    remarks = [text.replace("validation rows", "rows").replace(", or --validation", "") for text in quality.remarks]
    for remark in remarks:
        print_warning(remark)
    rows = [
        [name, metric_text(value), interval_text(quality.intervals.get(name)), metric_text(quality.baseline.get(name))]
        for name, value in quality.values.items()
    ]
    print_result(
        as_json,
        {
            "model": model, "data_sha256": task.hashes, "rows": len(task.train.raw), "metrics": quality.values,
            "baseline": quality.baseline, "intervals": quality.intervals, "remarks": remarks,
        },
        records_table(["metric", "value", "95 % interval", "baseline"], rows),
        f"baseline: {baseline_words(task.record)}",
    )  # fmt: skip


@args.with_options(reading=_LABELED)
def compare(
    first: Annotated[str, argument("A", _USABLE)],
    second: Annotated[str, argument("B", _USABLE)],
    reading: dict[str, Any],
    data: Annotated[
        list[str], option("--data", "FILE", "Labeled rows, which both predict. May be repeated.", args.DATA)
    ],
    base: args.Base = None,
    batch_size: args.BatchSize = 32,
    as_json: args.Json = False,
) -> None:
    """Compare two models on the same labeled rows: metrics, size, and how sure the difference is."""
    from ..reporting.saved import is_adapter
    from ..tasks.comparing import compare_rows

    measured, outputs = [], []
    sizes: list[dict[str, Any]] = []
    task: Any = None
    for name in (first, second):
        predictor = load_predictor(name, base if is_adapter(name) else None, show=not as_json)
        if name == second and not any(map(is_adapter, (first, second))):
            refuse_base(f"each of {first} and {second}", base)
        own = labeled_rows(predictor, data, reading, show=not as_json and task is None, known=task)
        task = task or own
        same = own.kind == task.kind and own.labels.several == task.labels.several
        if not same or sorted(own.labels.names) != sorted(task.labels.names):
            raise SensiError(f"{first} and {second} do not predict the same labels, so they cannot be compared.")
        if [row.get("label") for row in own.train.raw] != [row.get("label") for row in task.train.raw]:
            raise SensiError(
                f"{first} and {second} were trained on different columns of labels: say with --label-column which one "
                f"of them both are compared on."
            )
        with step(f"predicting with {name}", show=not as_json):
            outputs.append(predictor.outputs(own.train, batch_size))
        measured.append((own, own.measure(outputs[-1], own.train, None)))
        sizes.append({"parameters": predictor.parameters, "bytes": predictor.bytes})
    result = compare_rows([own for own, _ in measured], outputs)
    qualities = [quality for _, quality in measured]
    rows = [[metric, *(metric_text(q.values.get(metric)) for q in qualities)] for metric in qualities[0].values]
    rows += [["parameters", *(human(s["parameters"]) if s["parameters"] else "-" for s in sizes)],
             ["file", *(size_of(s["bytes"]) for s in sizes)]]  # fmt: skip
    figures = [
        {"model": name, "metrics": quality.values, "intervals": quality.intervals, **size}
        for name, quality, size in zip((first, second), qualities, sizes, strict=True)
    ]
    print_result(
        as_json,
        {"models": figures, "rows": len(task.train.raw), "difference": result.to_dict()},
        records_table(["", "A", "B"], rows),
        facts_table({"A": first, "B": second} | result.facts()),
    )


def rows_of(
    predictor: Predictor, data: list[str], reading: Mapping[str, Any], show: bool
) -> tuple[Rows, list[dict[str, Any]]]:
    """Tokenized rows, and the rows of a table as they are in the file (empty for words and answers)."""
    from ..tasks.kinds import rows_for_prediction
    from ..tasks.reading import same_columns

    named = {name: value for name, value in reading.items() if value is not None}
    originals: list[dict[str, Any]] = []
    with step("reading the data", show=show):
        source, options = read_as_trained(predictor.record, predictor.kind, data, named, "prediction")
        if predictor.kind == "text":
            originals = same_columns([row for part in source.train for row in part.rows])
        rows, lines, doubts = rows_for_prediction(predictor.kind, predictor.tokenizer, source, **options)
    print_understood(lines, [*doubts, *untrained_columns(predictor.record, options)])
    return rows, originals


def labeled_rows(
    predictor: Predictor, data: list[str], reading: Mapping[str, Any], show: bool, known: Task | None = None
) -> Task:
    """The labeled rows as a task, all of them in `train`. What was said about the rows of `known` is not repeated.

    Columns are those of the training, if the file has them. Of a folder or a data set with several splits, and if none
    is named, the rows for validation or for a test are used, because the model may have been trained on the others.
    """
    from ..tasks.kinds import read_task

    given = {"task": None, **reading}
    named = {name: value for name, value in task_options(given).items() if value is not None and name != "kind"}
    with step("reading the data", show=show):
        source, options = read_as_trained(predictor.record, predictor.kind, data, named, "evaluation")
        task = read_task(
            predictor.source, source, kind=predictor.kind, config=predictor.config, validation_share=0.0,
            purpose="evaluation", allow_unknown=True,
            head=None if predictor.kind == "answers" else predictor.labels, **options,
        )  # fmt: skip
    task.doubts += untrained_columns(predictor.record, options)
    said = [] if known is None else [*known.lines, *known.doubts]
    print_understood(*([text for text in texts if text not in said] for texts in (task.lines, task.doubts)))
    return task


def records_of(
    predictor: Predictor, rows: Rows, originals: list[dict[str, Any]], predicted: Any, scores: bool
) -> Iterator[dict[str, Any]]:
    """One record for each row: the columns of the file, or what identifies a sentence or question; the prediction."""
    known = [name for name in ("row", "id", "question") if any(name in raw for raw in rows.raw)]
    for number, (raw, found) in enumerate(zip(rows.raw, predicted, strict=True)):
        if predictor.kind == "text":
            values = {"prediction": next(found[key] for key in ("label", "labels", "value") if key in found)}
            if "score" in found:
                values["score"] = found["score"]
            if scores and "scores" in found:
                values["scores"] = found["scores"]
            own = originals[number]
        elif predictor.kind == "words":
            own, values = {"row": raw["row"]}, found
        else:
            own = {name: raw.get(name) for name in known}
            values = found
        # A column of the file is never replaced.
        yield own | {unused_name(name, value, own): value for name, value in values.items()}
