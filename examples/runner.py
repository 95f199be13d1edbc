"""The steps that all example scripts share once the data is read: wrap, train, evaluate, save, reload, report.

Each script provides a `Task`: a base model, training and validation rows, and a metric.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from peft_sensi import Budget, SensiConfig, SensiError
from peft_sensi.anatomy.task_heads import task_head
from peft_sensi.tasks.kinds import read_task
from peft_sensi.tasks.models import load_for
from peft_sensi.tasks.options import DataOptions
from peft_sensi.tasks.words import best_classes
from peft_sensi.utils.precision import bf16_pays
from peft_sensi.utils.progress import show_progress

from common import (
    TRAINING_DEFAULTS,
    DataError,
    batches,
    flops,
    hold_out,
    parameters,
    sample,
    trained_model,
    write_json,
)


POSITIVE = (
    "max_rows max_validation_rows block_size lora_rank vocab_size hidden_size layers heads image_size patch_size"
).split()
CHECKED_ROWS = 128  # the reloaded model is compared on this many validation rows


@dataclass
class MethodOptions:
    model: str = field(metadata={"help": "A model id on the Hub, or a folder"})
    method: Literal["sensi", "full", "lora"] = "sensi"
    budget: float | None = field(
        default=None,
        metadata={"help": "Share of the heads' and neurons' parameters to keep; 0.5 if no limit is given"},
    )
    params: float | None = field(default=None, metadata={"help": "The same as --budget, for use with other limits"})
    flops: float | None = field(default=None, metadata={"help": "Share of the heads' and neurons' FLOPs to keep"})
    trainable: float | None = field(
        default=None, metadata={"help": "Share of the base model's parameters to tune; the rest is frozen"}
    )
    score: str = field(default="fisher", metadata={"help": "fisher, taylor, mask, movement, magnitude or random"})
    lora_rank: int = 8
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the base model; full fine-tuning in 16 bits loses small updates"},
    )


@dataclass
class FileOptions:
    """One file of rows for training, and perhaps one for validation."""

    data: str | None = HfArg(default=None, aliases=["--train_file"], help="The file with the training rows")
    validation: str | None = HfArg(
        default=None, aliases=["--validation_file"], help="Without it, a part of the training rows is held out"
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "The share that is held out if there are no validation rows"}
    )
    max_rows: int | None = HfArg(default=None, aliases=["--max_train_rows"], help="At most so many training rows")
    max_validation_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions(DataOptions):
    """The options of `peft-sensi train` about the data, and the data."""

    data: list[str] | None = HfArg(
        default=None, aliases=["--train_file"], help="Files, folders or data sets with the training rows"
    )
    validation: list[str] | None = HfArg(
        default=None, aliases=["--validation_file"], help="Without it, a part of the training rows is held out"
    )
    max_rows: int | None = HfArg(default=None, aliases=["--max_train_rows"], help="At most so many training rows")


@dataclass
class Task:
    """The parts of an example that differ between scripts.

    `train_set` and `validation_set` have model inputs only: `model(**collator(rows))` returns a loss. `load_base`
    returns the same weights on every call, except those of a fresh head. FLOPs are counted for `unit_of_cost`: a
    number of tokens, or inputs of the model.
    """

    task_type: str | None
    load_base: Callable[[], PreTrainedModel]
    train_set: Dataset
    validation_set: Dataset
    collator: Callable
    metrics: Callable[[EvalPrediction], dict[str, float]]
    unit_of_cost: int | Mapping[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    # Reduces the logits of a batch to small tensors before they are collected: (logits, labels) -> input of `metrics`.
    reduce_logits: Callable[[Any, torch.Tensor], Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)  # further entries of metrics.json


@contextmanager
def readable_errors() -> Iterator[None]:
    """If the user gave a wrong path, file or budget, ends the script with a one-line message and exit status 1."""
    try:
        yield
    except (OSError, UnicodeError, json.JSONDecodeError, DataError, SensiError) as error:
        raise SystemExit(f"error: {error}") from None


def parse(
    description: str,
    data_options: type,
    method_options: type = MethodOptions,
    defaults: Mapping[str, Any] | None = None,
    arguments: list[str] | None = None,
) -> tuple[Any, Any, TrainingArguments]:
    """Parses the three groups of options and refuses contradictions. `arguments` replaces the command line.

    Without `--bf16`, training uses bfloat16 mixed precision where the hardware is faster with it.
    """
    parser = HfArgumentParser((method_options, data_options, TrainingArguments), description=description)
    parser.set_defaults(**{**TRAINING_DEFAULTS, **(defaults or {})})
    given = parser.parse_args(arguments)
    use_cpu = given.use_cpu or not torch.accelerator.is_available()  # TrainingArguments needs it for bf16 on a CPU
    bf16 = not given.fp16 and bf16_pays("cpu" if use_cpu else None)
    parser.set_defaults(use_cpu=use_cpu, bf16=bf16)
    method, data, training = parser.parse_args_into_dataclasses(arguments)
    check_numbers(method, data)
    if isinstance(method, MethodOptions):
        check_used(method)
    if isinstance(method, MethodOptions) and (limits := budget_of(method)) is not None:
        Budget.parse(limits)
    set_seed(training.seed)
    return method, data, training


def check_numbers(*groups: Any) -> None:
    """Raises `DataError` if one of the options in `POSITIVE` is less than 1."""
    given = {name: value for options in groups for name, value in vars(options).items() if name in POSITIVE}
    for name, value in given.items():
        if value is not None and value < 1:
            raise DataError(f"--{name} must be at least 1, got {value}")


def check_used(options: MethodOptions) -> None:
    """Raises `DataError` if an option has another value than its default, but no effect on this method or model."""
    changed = {f.name for f in fields(options) if f.default is not MISSING and getattr(options, f.name) != f.default}
    for name, method in {"score": "sensi", "lora_rank": "lora"}.items():
        if name in changed and options.method != method:
            raise DataError(f"--{name} has no effect with --method {options.method}: leave it out")
    sizes = changed - {f.name for f in fields(MethodOptions)}
    if options.model and sizes:
        names = ", ".join(f"--{name}" for name in sorted(sizes))
        raise DataError(f"only a model that is made here has {names}: leave this out, or --model {options.model}")


def budget_of(options: MethodOptions) -> float | dict[str, float] | None:
    """The budget for `SensiConfig`. `None` means the default budget."""
    limits = {name: getattr(options, name) for name in ("params", "flops", "trainable")}
    limits = {name: share_or_count(value) for name, value in limits.items() if value is not None}
    if options.budget is not None and "params" in limits:
        raise DataError("--budget and --params are the same limit: give only one of them")
    if options.budget is not None:
        limits = {"params": share_or_count(options.budget)} | limits
    if limits and options.method != "sensi":
        raise DataError(f"--method {options.method} has no budget: do not set {', '.join(limits)}")
    return limits or None


def share_or_count(value: float) -> float | int:
    """Whole numbers above 1 become int, because `SensiConfig` takes a float for a share and an int for a count."""
    return int(value) if value > 1 and value.is_integer() else value


def split_files(
    data: FileOptions, read: Callable[[str], Dataset], seed: int, classes: str | None = None
) -> tuple[Dataset, Dataset]:
    """Reads training and validation rows. Of each class in the column `classes`, the same share is held out."""
    if data.data is None:
        raise DataError("give --data")
    train = read(data.data)
    if data.validation is not None:
        validation = read(data.validation)
    else:
        train, validation = hold_out(train, data.validation_share, seed, classes=classes)
    return sample(train, data.max_rows, seed), sample(validation, data.max_validation_rows, seed)


def read_for(kind: str, model: str, dtype: str, data: TaskOptions, seed: int) -> Task:
    """Reads the data of a task as the command `peft-sensi` does, and says what was understood."""
    if not data.data:
        raise DataError("give --data")
    options = {name: value for name, value in vars(data).items() if name not in ("data", "validation")}
    task = read_task(model, data.data, data.validation, kind=kind, seed=seed, **options)
    for line in (*task.lines, *(f"note: {doubt}" for doubt in task.doubts)):
        print(line, file=sys.stderr)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        values = task.metrics(prediction.predictions, task.validation)
        return {name: math.nan if value is None else value for name, value in values.items()}

    rows = {name: Dataset.from_list(part.inputs) for name, part in (("t", task.train), ("v", task.validation))}
    return Task(
        task_type=task.task_type,
        load_base=lambda: load_for(task, model, dtype=dtype),
        train_set=rows["t"],
        validation_set=rows["v"],
        collator=task.collator,
        metrics=metrics,
        unit_of_cost=typical_length(rows["t"]),
        tokenizer=task.tokenizer,
        reduce_logits=(lambda logits, labels: best_classes(logits)) if kind == "words" else None,
        details={
            "task": task.record,
            "data": data.data,
            "classes": task.labels.names,
            "raw_rows": {"train": len(task.train.raw), "validation": len(task.validation.raw)},
        },
    )


def pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`from_pretrained`, with an error that mentions the option `--model`."""
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"--model {name}: {error}") from error


def typical_length(rows: Dataset) -> int:
    """Median number of tokens. FLOPs are counted at this length for every method."""
    return int(statistics.median(len(ids) for ids in rows["input_ids"]))


class StepTimer(TrainerCallback):
    """Wall-clock seconds of each optimizer step, from the start of the first batch to the update of the weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.start)

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class OrderedTrainer(Trainer):
    """Evaluates the rows in their own order, which metrics need that look up texts by row.

    Without this, Trainer's sampling by length would also change the order of evaluation.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        show_progress(self)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        before, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.train_sampling_strategy = before


def run(task: Task, options: MethodOptions, training: TrainingArguments) -> dict[str, Any]:
    """Trains and evaluates. Writes the adapter (or the whole model) and `metrics.json` to the output folder."""
    folder, limits = Path(training.output_dir), budget_of(options)
    start = time.perf_counter()
    base = task.load_base().to(training.device)
    costs = {"parameters": parameters(base), "flops": flops(base, task.unit_of_cost)}
    model = wrapped(base, task, options, training)
    prepared = time.perf_counter() - start

    timer = StepTimer()
    trainer = OrderedTrainer(
        model,
        training,
        train_dataset=task.train_set,
        eval_dataset=task.validation_set,
        data_collator=task.collator,
        processing_class=task.tokenizer,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.reduce_logits,
        callbacks=[timer],
    )
    outcome = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    scores = trainer.evaluate()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return {}

    trained = trained_model(trainer)
    trained_values = parameters(trained, trainable_only=True)
    plan = trained.base_model.plan().figures() if options.method == "sensi" else None
    reloaded, differences = check_reloaded(trained, task, training)
    metrics = {
        "model": options.model,
        "method": options.method,
        "budget": limits if options.method == "sensi" else None,
        "rows": {"train": len(task.train_set), "validation": len(task.validation_set)},
        **task.details,
        "validation": {name.removeprefix("eval_"): value for name, value in scores.items()},
        "train": outcome.metrics,
        "bf16": training.bf16,
        "seconds_before_training": prepared,
        "seconds_per_step": statistics.median(timer.seconds) if timer.seconds else None,
        "base": costs,
        "parameters": parameters(reloaded),
        "flops": flops(reloaded, task.unit_of_cost),
        "trained_values": trained_values,
        "plan": plan,
        "weight_bytes": weight_bytes(folder, "model" if options.method == "full" else "adapter_model"),
        "differences": differences,
        "command": sys.argv,
    }
    write_json(folder / "metrics.json", metrics)
    print(report(metrics, task.unit_of_cost, folder))
    return metrics


def wrapped(base: PreTrainedModel, task: Task, options: MethodOptions, training: TrainingArguments) -> nn.Module:
    """The base model, wrapped for the chosen method."""
    if options.method == "sensi":
        calibration = batches(task.train_set, task.collator, training.per_device_train_batch_size, training.seed)
        config = SensiConfig(
            budget=budget_of(options),
            score=options.score,
            calibration=calibration,
            task_type=task.task_type,
            seed=training.seed,
        )
        model = get_peft_model(base, config)
        print(model.base_model.plan().summary())
        return model
    if options.method == "lora":
        config = LoraConfig(
            task_type=task.task_type,
            r=options.lora_rank,
            lora_alpha=2 * options.lora_rank,
            target_modules="all-linear" if task.task_type is None else None,
            modules_to_save=task_head(base) or None,
        )
        return get_peft_model(base, config)
    return base


@torch.no_grad()
def outputs(model: nn.Module, loader: Iterable[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The logits of all batches. Each batch gives one tensor, or two for question answering."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for batch in loader:
        output = model(**{name: value.to(device) for name, value in batch.items()})
        found += [value.cpu() for name, value in output.items() if name.endswith("logits")]
    return found


def check_reloaded(
    trained: nn.Module, task: Task, training: TrainingArguments
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Loads the saved files and merges the adapter. Returns the plain model, and how much its logits differ from
    those of the trained model, before and after merging."""
    rows = task.validation_set.select(range(min(CHECKED_ROWS, len(task.validation_set))))
    loader = batches(rows, task.collator, training.per_device_eval_batch_size)
    expected = outputs(trained, loader)

    def difference(model: nn.Module) -> float:
        found = outputs(model.to(training.device), loader)
        return max((a.float() - b.float()).abs().max().item() for a, b in zip(found, expected, strict=True))

    # With another seed, a fresh head gets other values than in training. All trained values must come from the files.
    set_seed(training.seed + 1)
    if not isinstance(trained, PeftModel):
        reloaded = type(trained).from_pretrained(training.output_dir, dtype=trained.dtype)
        return reloaded, {"reloaded": difference(reloaded)}
    reloaded = PeftModel.from_pretrained(task.load_base(), training.output_dir)
    differences = {"reloaded": difference(reloaded)}
    merged = reloaded.merge_and_unload()
    return merged, differences | {"merged": difference(merged)}


def weight_bytes(folder: Path, stem: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{stem}*.safetensors"))


def report(metrics: Mapping[str, Any], unit_of_cost: int | Mapping[str, torch.Tensor], folder: Path) -> str:
    """The report, with the same lines for every task and method."""
    base = metrics["base"]
    unit = f"one sequence of {unit_of_cost} tokens" if isinstance(unit_of_cost, int) else "one input"
    speed = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
    scores = {n: v for n, v in metrics["validation"].items() if isinstance(v, int | float) and n not in speed}
    step = metrics["seconds_per_step"]
    differences = metrics["differences"]
    lines = {
        "validation": ", ".join(f"{name} {value:.4f}" for name, value in scores.items()),
        "parameters": f"{metrics['parameters']:,} ({metrics['parameters'] / base['parameters']:.1%} of the base)",
        "FLOPs": f"{metrics['flops']:,} ({metrics['flops'] / base['flops']:.1%}) for {unit}",
        "trained values": f"{metrics['trained_values']:,}",
        "file": f"{metrics['weight_bytes']:,} bytes in {folder}",
        "preparation": f"{metrics['seconds_before_training']:.1f} s",
        "training step": "no step was made" if step is None else f"{step * 1e3:.0f} ms (median)",
        "reloaded": "logits are equal"
        if differences["reloaded"] == 0
        else f"LOGITS DIFFER by up to {differences['reloaded']:.1e}",
    }
    if "merged" in differences:
        lines["merged"] = f"logits differ by at most {differences['merged']:.1e}"
    return "\n".join(f"{name + ':':<16}{value}" for name, value in lines.items())
