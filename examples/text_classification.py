"""Tune a text classifier or regressor under a budget: any encoder, a GLUE task from the Hub or your own files.

    python examples/text_classification.py --model bert-base-uncased --task sst2 --budget 0.5 --output_dir out
    python examples/text_classification.py --model bert-base-uncased \\
        --train_file train.tsv --validation_file dev.tsv --text_column sentence1 --pair_column sentence2 \\
        --flops 0.4 --trainable 0.05 --output_dir out

Files: .tsv (read without quoting), .csv, .json or .jsonl. Labels: names or integers for classes, decimal numbers for
regression.
All options of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to
`out`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from peft_sensi.cli.textdata import Labels, find_labels

from common import DataError, check_columns, metric_function, read_table, sample, tokenize
from runner import FileOptions, Task, parse, pretrained, readable_errors, run, split_files, typical_length


# The text columns of the GLUE tasks. The labels, and whether they are classes, are read from the data.
GLUE: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class DataOptions(FileOptions):
    task: str | None = field(default=None, metadata={"help": f"A GLUE task, read from the Hub: {', '.join(GLUE)}"})
    text_column: str = field(default="sentence", metadata={"help": "The column of the (first) text"})
    pair_column: str | None = field(
        default=None, metadata={"help": "The column of the second text, for tasks on two texts"}
    )
    label_column: str = "label"
    regression: bool | None = field(
        default=None, metadata={"help": "Whether labels are numbers, not classes; by default found from the labels"}
    )
    max_length: int = field(default=128, metadata={"help": "Inputs with more tokens are cut"})


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], DataOptions, arguments=arguments)
    run(text_task(options.model, options.dtype, data, training.seed), options, training)


def text_task(model: str, dtype: str, data: DataOptions, seed: int) -> Task:
    """Reads the rows and tokenizes them for the model's tokenizer."""
    train_rows, validation_rows, text, pair, label = read_data(data, seed)
    labels = labels_of(train_rows, label, data.regression)
    tokenizer = pretrained(AutoTokenizer, model)
    train_set, validation_set = (
        tokenize(rows, tokenizer, text, pair, encode_all(labels, rows, label), data.max_length)
        for rows in (train_rows, validation_rows)
    )
    return Task(
        task_type="SEQ_CLS",
        load_base=lambda: load_base(model, labels, dtype),
        train_set=train_set,
        validation_set=validation_set,
        collator=DataCollatorWithPadding(tokenizer),
        metrics=metric_function("regression" if labels.regression else "classification"),
        unit_of_cost=typical_length(train_set),
        tokenizer=tokenizer,
        details={"task": data.task or data.train_file, "classes": labels.names},
    )


def read_data(data: DataOptions, seed: int) -> tuple[Dataset, Dataset, str, str | None, str]:
    """Training rows, validation rows, and the names of the text, pair and label columns."""
    if (data.task is None) == (data.train_file is None):
        raise DataError("give either --task or --train_file, not both")
    if data.task is not None:
        if data.task not in GLUE:
            raise DataError(f"--task {data.task} is not one of {', '.join(GLUE)}")
        splits = load_dataset("nyu-mll/glue", data.task)
        train = sample(splits["train"], data.max_train_rows, seed)
        validation = splits["validation_matched" if data.task == "mnli" else "validation"]
        validation = sample(validation, data.max_validation_rows, seed)
        (text, pair), label = GLUE[data.task], "label"
    else:
        train, validation = split_files(data, read_table, seed)
        text, pair, label = data.text_column, data.pair_column, data.label_column
    for rows in (train, validation):
        check_columns(rows, text, pair, label)
    return train, validation, text, pair, label


def labels_of(rows: Dataset, column: str, regression: bool | None) -> Labels:
    """The labels, with the names of the classes if there are classes. Some datasets store these names."""
    names = getattr(rows.features[column], "names", None)
    return Labels(list(names), int) if names else find_labels(rows[column][:], regression)


def encode_all(labels: Labels, rows: Dataset, column: str) -> list[int | float]:
    encoded = []
    for value in rows[column]:
        try:
            encoded.append(labels.encode(value))
        except (KeyError, ValueError, TypeError):
            raise DataError(f"label {value!r} of the validation rows does not occur in the training rows") from None
    return encoded


def load_base(name: str, labels: Labels, dtype: str) -> Any:
    heads: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not labels.regression:
        heads = {
            "num_labels": len(labels.names),
            "id2label": dict(enumerate(labels.names)),
            "label2id": {name: i for i, name in enumerate(labels.names)},
        }
    return pretrained(AutoModelForSequenceClassification, name, dtype=dtype, **heads)


if __name__ == "__main__":
    main()
