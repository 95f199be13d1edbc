"""Tune a text classifier (or a regressor) with a budget: any encoder, a GLUE task from the Hub or files of your own.

    python examples/text_classification.py --model bert-base-uncased --task sst2 --budget 0.5 --output_dir out
    python examples/text_classification.py --model bert-base-uncased \\
        --train_file train.tsv --validation_file dev.tsv --text_column sentence1 --pair_column sentence2 \\
        --flops 0.4 --trainable 0.05 --output_dir out

Files: .tsv (read without quoting), .csv, .json or .jsonl. Labels: names or integers (classes), or decimal numbers
(regression).
All options of `transformers.TrainingArguments` work. `out` gets the adapter, the tokenizer and `metrics.json`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_sensi import SensiConfig

from common import (
    TRAINING_DEFAULTS,
    batches,
    metric_function,
    parameters,
    plan_figures,
    read_table,
    sample,
    tokenize,
    write_json,
)


# The columns of the GLUE tasks; the labels and their kind come with the data.
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
class DataOptions:
    task: str | None = field(default=None, metadata={"help": f"A GLUE task, read from the Hub: {', '.join(GLUE)}"})
    train_file: str | None = field(default=None, metadata={"help": "Instead of a task: .tsv, .csv, .json or .jsonl"})
    validation_file: str | None = field(
        default=None, metadata={"help": "Without it a part of the training file is held out"}
    )
    validation_share: float = field(default=0.1, metadata={"help": "How much of it, when there is no validation file"})
    text_column: str = field(default="sentence", metadata={"help": "The (first) text in the files"})
    pair_column: str | None = field(default=None, metadata={"help": "The second text, for tasks on two texts"})
    label_column: str = "label"
    regression: bool | None = field(
        default=None, metadata={"help": "Whether labels are amounts; found from the labels if not set"}
    )
    max_length: int = field(default=128, metadata={"help": "Longer inputs are cut, in tokens"})
    max_train_rows: int | None = None
    max_validation_rows: int | None = None


@dataclass
class MethodOptions:
    model: str = field(metadata={"help": "A model id on the Hub, or a folder"})
    method: Literal["sensi", "full", "lora"] = "sensi"
    budget: float | None = field(
        default=None, metadata={"help": "Share of the heads' and neurons' parameters to keep; 0.5 if no limit is set"}
    )
    params: float | None = field(default=None, metadata={"help": "The same as --budget, together with other limits"})
    flops: float | None = field(default=None, metadata={"help": "Share of the heads' and neurons' FLOPs to keep"})
    trainable: float | None = field(
        default=None, metadata={"help": "Share of the base model's parameters to tune; the rest is frozen"}
    )
    score: str = field(default="fisher", metadata={"help": "fisher, taylor, mask, movement, magnitude or random"})
    lora_rank: int = 8


@dataclass
class Labels:
    """What the label column holds, read from the training rows and applied to both splits."""

    names: list[str]  # of the classes; empty for regression
    encode: Callable[[Any], int | float]

    @property
    def regression(self) -> bool:
        return not self.names


def main() -> None:
    parser = HfArgumentParser((MethodOptions, DataOptions, TrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(**TRAINING_DEFAULTS)
    options, data, training = parser.parse_args_into_dataclasses()
    limits = budget_of(options)
    set_seed(training.seed)

    train_rows, validation_rows, text, pair, label = read_data(data, training.seed)
    labels = find_labels(train_rows, label, data.regression)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train_set, validation_set = (
        tokenize(rows, tokenizer, text, pair, encode_all(labels, rows, label), data.max_length)
        for rows in (train_rows, validation_rows)
    )
    collator = DataCollatorWithPadding(tokenizer)

    start = time.perf_counter()
    model = load_base(options.model, labels)
    if options.method == "sensi":
        calibration = batches(train_set, collator, training.per_device_train_batch_size, seed=training.seed)
        config = SensiConfig(
            budget=limits, score=options.score, calibration=calibration, task_type="SEQ_CLS", seed=training.seed
        )
        model = get_peft_model(model, config)
        print(model.base_model.plan().summary())
    elif options.method == "lora":
        model = get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", r=options.lora_rank, lora_alpha=2 * options.lora_rank)
        )
    prepared = time.perf_counter() - start

    trainer = Trainer(
        model,
        training,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=metric_function("regression" if labels.regression else "classification"),
    )
    outcome = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    scores = trainer.evaluate()
    trainer.save_model()

    if trainer.is_world_process_zero():
        folder = Path(training.output_dir)
        metrics = {
            "model": options.model,
            "method": options.method,
            "budget": limits if options.method == "sensi" else None,
            "task": data.task or data.train_file,
            "rows": {"train": len(train_set), "validation": len(validation_set)},
            "classes": labels.names,
            "validation": {name.removeprefix("eval_"): value for name, value in scores.items()},
            "train": outcome.metrics,
            "seconds_before_training": prepared,
            "trained_values": parameters(trainer.model, trainable_only=True),
            "plan": plan_figures(trainer.model) if options.method == "sensi" else None,
            "weight_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "command": sys.argv,
        }
        write_json(folder / "metrics.json", metrics)
        shown = {name: round(value, 4) for name, value in metrics["validation"].items() if isinstance(value, float)}
        print(f"{shown}\nsaved in {folder}")


def budget_of(options: MethodOptions) -> float | dict[str, float] | None:
    """The budget for SensiConfig; None lets it choose its default."""
    limits = {name: getattr(options, name) for name in ("params", "flops", "trainable")}
    limits = {name: share_or_count(value) for name, value in limits.items() if value is not None}
    if options.budget is not None and "params" in limits:
        raise SystemExit("--budget and --params are the same limit: give one of them")
    if options.budget is not None:
        limits = {"params": share_or_count(options.budget)} | limits
    if limits and options.method != "sensi":
        raise SystemExit(f"--method {options.method} has no budget: leave out {', '.join(limits)}")
    return limits or None


def share_or_count(value: float) -> float | int:
    """A budget tells shares from counts by their type, which an option on the command line doesn't have."""
    return int(value) if value > 1 and value.is_integer() else value


def read_data(data: DataOptions, seed: int) -> tuple[Dataset, Dataset, str, str | None, str]:
    """Training rows, validation rows, and the names of the text, pair and label columns."""
    if (data.task is None) == (data.train_file is None):
        raise SystemExit("give either --task or --train_file")
    if data.task is not None:
        if data.task not in GLUE:
            raise SystemExit(f"--task {data.task}: not one of {', '.join(GLUE)}")
        splits = load_dataset("nyu-mll/glue", data.task)
        train, validation = splits["train"], splits["validation_matched" if data.task == "mnli" else "validation"]
        (text, pair), label = GLUE[data.task], "label"
    else:
        train = read_table(data.train_file)
        if data.validation_file is not None:
            validation = read_table(data.validation_file)
        else:
            split = train.train_test_split(test_size=data.validation_share, seed=seed)
            train, validation = split["train"], split["test"]
        text, pair, label = data.text_column, data.pair_column, data.label_column
    for name in filter(None, (text, pair, label)):
        for rows in (train, validation):
            if name not in rows.column_names:
                raise SystemExit(f"no column {name!r}; there are: {', '.join(rows.column_names)}")
    return (
        sample(train, data.max_train_rows, seed),
        sample(validation, data.max_validation_rows, seed),
        text,
        pair,
        label,
    )


def find_labels(rows: Dataset, column: str, regression: bool | None) -> Labels:
    """Names of the classes, or that there are none. Files give strings: "1" is a class, "3.8" is an amount."""
    values = rows[column][:]
    names = getattr(rows.features[column], "names", None)
    if names:  # a dataset that knows its classes
        return Labels(list(names), int)
    if regression is None:
        regression = not all(is_integer(value) for value in values) and all(is_number(value) for value in values)
    if regression:
        return Labels([], float)
    # 2 comes before 10 where every label is a number.
    distinct = sorted(
        {str(value) for value in values}, key=int if all(is_integer(value) for value in values) else None
    )
    index = {name: i for i, name in enumerate(distinct)}
    return Labels(distinct, lambda value: index[str(value)])


def encode_all(labels: Labels, rows: Dataset, column: str) -> list[int | float]:
    encoded = []
    for value in rows[column]:
        try:
            encoded.append(labels.encode(value))
        except (KeyError, ValueError, TypeError):
            raise SystemExit(f"label {value!r} of the validation rows does not occur in the training rows") from None
    return encoded


def is_integer(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lstrip("+-").isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def load_base(name: str, labels: Labels) -> Any:
    if labels.regression:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, problem_type="regression")
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(labels.names),
        id2label=dict(enumerate(labels.names)),
        label2id={name: i for i, name in enumerate(labels.names)},
    )


if __name__ == "__main__":
    main()
