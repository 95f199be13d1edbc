"""Code that the examples share: reading data, metrics, training defaults, timing and counting.

`python examples/<name>.py` puts this folder on Python's path, so the examples use `from common import ...`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from peft_sensi.tasks import splitting
from peft_sensi.tasks.reading import read_rows
from peft_sensi.utils.errors import DataError, SensiError
from peft_sensi.utils.files import read_json_object, write_json_atomically
from peft_sensi.utils.progress import progress_bar


METRICS = Path(__file__).resolve().parent / "metrics"

# TrainingArguments for a small encoder. Batches of texts of similar length need little padding.
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,  # a number below 1 is a share of all steps
    "train_sampling_strategy": "group_by_length",
    "average_tokens_across_devices": False,  # otherwise Trainer multiplies means by their number
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
}


# --- data ------------------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> Dataset:
    """Reads a table or JSON rows in the same way as the command `peft-sensi`."""
    return Dataset.from_list(read_rows(path).rows)


def check_columns(rows: Dataset, *names: str | None) -> None:
    """Raises `DataError` if a column is missing. Names that are `None` are skipped."""
    for name in names:
        if name is not None and name not in rows.column_names:
            raise DataError(f"there is no column {name!r}; the columns are: {', '.join(rows.column_names)}")


def hold_out(
    rows: Dataset, share: float, seed: int, group: str | None = None, classes: str | None = None
) -> tuple[Dataset, Dataset]:
    """Splits rows into training and validation rows.

    Rows with the same value in the column `group` stay together. With the name of a column as `classes`, both parts
    have the same share of each class.
    """
    if classes is not None:
        train, held = splitting.hold_out(rows[classes], share, seed)
        return rows.select(train), rows.select(held)
    groups = list(rows[group]) if group else list(range(len(rows)))
    distinct = sorted(set(groups))
    np.random.default_rng(seed).shuffle(distinct)
    count = round(share * len(distinct))
    if not 0 < count < len(distinct):
        raise DataError(
            f"--validation_share {share} of {len(distinct)} {f'values of {group}' if group else 'rows'} leaves one "
            f"part without rows: give --validation, or another share"
        )
    held_out = set(distinct[:count])
    sides = [[i for i, value in enumerate(groups) if (value in held_out) is side] for side in (False, True)]
    return rows.select(sides[0]), rows.select(sides[1])


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pair: str | None,
    labels: Sequence[Any],
    max_length: int,
) -> Dataset:
    """Tokenizes texts. The result has model inputs only, so its batches fit `model(**batch)`, also for calibration."""
    limit = min(max_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> Mapping[str, list]:
        return tokenizer(batch[text], batch[pair] if pair else None, truncation=True, max_length=limit)

    encoded = dataset.map(encode, batched=True, remove_columns=dataset.column_names)
    return encoded.add_column("labels", list(labels))


def sample(dataset: Dataset, rows: int | None, seed: int) -> Dataset:
    """At most `rows` randomly chosen rows, in random order. With `None`, all rows in their own order."""
    if rows is None or rows >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(rows))


def batches(dataset: Dataset, collator: Callable, batch_size: int = 32, seed: int | None = None) -> DataLoader:
    """Batches in order, or shuffled with `seed`. The global random state is not used."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shuffle = generator is not None
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator, collate_fn=collator)


# --- metrics and results ---------------------------------------------------------------------------------------------


def load_metric(kind: str) -> evaluate.EvaluationModule:
    """Loads a metric. `kind` is the name of a file in `examples/metrics`."""
    return evaluate.load(str(METRICS / f"{kind}.py"))


def class_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The function `compute_metrics` for a Trainer of a classifier."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted = np.argmax(logits, axis=-1)
    return load_metric("classification").compute(predictions=predicted, references=prediction.label_ids)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, so that a killed run leaves no partial file. Creates the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, content)


def is_done(path: str | Path, settings: Mapping[str, Any], noted: Collection[str] = ()) -> bool:
    """Whether there is a result at `path`. The settings are those of this run, which every result records.

    A difference in one of the settings `noted` is printed only.

    Raises:
        SensiError: The result was made with other settings. Older results lack some; these are not compared.
    """
    path = Path(path)
    if not path.exists():
        return False
    found = read_json_object(path)
    for name in noted:
        if name in found and name in settings and found[name] != settings[name]:
            print(f"note: {path} is kept, which was made with {name} = {found[name]}", file=sys.stderr)
    check_settings(found, {name: value for name, value in settings.items() if name not in noted}, path)
    return True


def check_settings(found: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Raises `SensiError` if a result in the file `path` records another value of one of the settings."""
    wrong = [
        f"`{name}` is {found[name]!r} there, and {value!r} in this run"
        for name, value in settings.items()
        if name in found and found[name] != value
    ]
    if wrong:
        raise SensiError(
            f"{path} has a result with other settings: {'; '.join(wrong)}. Remove this file, or write the results of "
            f"this run elsewhere (`--results` or `--output`)."
        )


def folder_bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# --- models ----------------------------------------------------------------------------------------------------------


def trained_model(trainer: Trainer) -> Any:
    """The trained model without Accelerate's changes.

    With mixed precision, Accelerate replaces the model's `forward` by one under autocast, and does not restore it.
    Logits computed after training would then silently be bfloat16.
    """
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def parameters(model: nn.Module, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Uses eager attention. On a CPU, the FLOPs of PyTorch's fused attention are not counted at all."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def flops(model: PreTrainedModel, inputs: int | Mapping[str, torch.Tensor]) -> int:
    """FLOPs of one forward pass, counted while it runs. A multiply and an add are two FLOPs.

    `inputs` are the inputs of the model, or a number of tokens: one sequence of this length is then used.
    """
    if isinstance(inputs, int):
        ids = torch.ones(1, inputs, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    device = next(model.parameters()).device
    model.eval()
    with eager_attention(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**{name: value.to(device) for name, value in inputs.items()})
    return counter.get_total_flops()


@torch.no_grad()
def all_logits(model: nn.Module, loader: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    model.eval()
    device = next(model.parameters()).device
    found = [
        model(**{name: value.to(device) for name, value in batch.items()}).logits
        for batch in progress_bar(loader, "evaluation")
    ]
    return torch.cat(found).cpu()


# --- timing ----------------------------------------------------------------------------------------------------------


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int = 9, warm_up: int = 2
) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that other load on the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def inference_call(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def call() -> object:
        with torch.inference_mode():
            return model(**inputs)

    return call
