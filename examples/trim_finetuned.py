"""Make a fine-tuned text classifier smaller, and say what is kept without training and after some training.

    python examples/trim_finetuned.py --model my-finetuned-model \\
        --data train.tsv --validation dev.tsv --budgets 0.5 0.25 --heal_epochs 1 --output_dir out

The model must have a trained head for the labels of the files. For each budget, the script wraps it with
`SensiConfig(budget=1.0)`, which keeps everything, and calls `trim(...)`, which scores, plans and refits. It evaluates
the trimmed model, trains it on for `--heal_epochs` ("healing"), evaluates again, and saves the adapter to
`out/<budget>`. The adapter belongs to the fine-tuned model: `PeftModel.from_pretrained(fine_tuned_model, "out/0.5")`.
Files and the other options are those of `text_classification.py`. All figures are written to `out/metrics.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, TrainingArguments

from peft_sensi import Budget, SensiConfig

from common import DataError, batches, write_json
from runner import OrderedTrainer, Task, TaskOptions, parse, pretrained, read_for, readable_errors, share_or_count


NOT_GIVEN = 0.0  # the default of --num_train_epochs here, which shows whether the option is given


@dataclass
class TrimOptions:
    model: str = field(metadata={"help": "The fine-tuned model: a model id on the Hub, or a folder"})
    budgets: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "Shares of the heads' and neurons' parameters to keep"}
    )
    heal_epochs: float = field(default=1.0, metadata={"help": "Epochs of training after the trim; 0 for none"})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"


def check_options(options: TrimOptions, training: TrainingArguments) -> None:
    """Raises `DataError` for options of `TrainingArguments` that would have no effect here."""
    if training.num_train_epochs != NOT_GIVEN:
        raise DataError("--num_train_epochs has no effect here: give the epochs after the trim as --heal_epochs")
    if training.resume_from_checkpoint:
        raise DataError("--resume_from_checkpoint has no effect here: the model is trimmed and healed anew")


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    defaults = {"num_train_epochs": NOT_GIVEN}
    options, data, training = parse(__doc__.splitlines()[0], TaskOptions, TrimOptions, defaults, arguments)
    check_options(options, training)
    budgets = [share_or_count(budget) for budget in options.budgets]
    for budget in budgets:
        Budget.parse(budget)
    task = read_for("text", options.model, options.dtype, data, training.seed)
    classes = task.details["classes"]
    outputs = pretrained(AutoConfig, options.model).num_labels
    if outputs != (len(classes) or 1):
        raise DataError(
            f"the head of {options.model} has {outputs} outputs, but the training rows have "
            f"{f'{len(classes)} classes' if classes else 'numbers as labels'}: fine-tune it first, for example with "
            f"text_classification.py --method full"
        )
    training.num_train_epochs = options.heal_epochs
    folder = Path(training.output_dir)
    whole = evaluate(task.load_base(), task, training)
    print(f"fine-tuned model: {line(whole)}")
    rows = [trimmed(task, budget, options, training, folder) for budget in budgets]
    write_json(folder / "metrics.json", {"model": options.model, "whole": whole, "budgets": rows})


def trimmed(
    task: Task, budget: float | int, options: TrimOptions, training: TrainingArguments, folder: Path
) -> dict[str, Any]:
    """Trims the fine-tuned model to one budget, evaluates it before and after healing, and saves the adapter."""
    calibration = batches(task.train_set, task.collator, training.per_device_train_batch_size, training.seed)
    config = SensiConfig(budget=1.0, calibration=calibration, task_type=task.task_type, seed=training.seed)
    model: Any = get_peft_model(task.load_base().to(training.device), config)
    model.base_model.trim(budget, calibration)
    row = {"budget": budget, "plan": model.base_model.plan().figures(), "trimmed": evaluate(model, task, training)}
    print(f"{budget} of the parameters, no training: {line(row['trimmed'])}")
    if options.heal_epochs:
        trainer(model, task, training).train()
        row["healed"] = evaluate(model, task, training)
        print(f"{budget} of the parameters, {options.heal_epochs:g} epochs of healing: {line(row['healed'])}")
    model.save_pretrained(folder / str(budget))
    return row


def trainer(model: nn.Module, task: Task, training: TrainingArguments) -> OrderedTrainer:
    return OrderedTrainer(
        model,
        training,
        train_dataset=task.train_set,
        eval_dataset=task.validation_set,
        data_collator=task.collator,
        processing_class=task.tokenizer,
        compute_metrics=task.metrics,
    )


def evaluate(model: nn.Module, task: Task, training: TrainingArguments) -> dict[str, float]:
    scores = trainer(model, task, training).evaluate()
    ignored = ("runtime", "second", "preparation")
    return {n.removeprefix("eval_"): v for n, v in scores.items() if not any(word in n for word in ignored)}


def line(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float))


if __name__ == "__main__":
    main()
