"""Tune an image classifier under a budget: any ViT, on scikit-learn's digits or on your own image files.

    python examples/image_classification.py --model google/vit-base-patch16-224 --data train.csv --budget 0.5 \\
        --output_dir out

Without a pretrained model, first train a small ViT from scratch on the digits (8 x 8 pixels). Then tune it under a
budget:

    python examples/image_classification.py --method full --num_train_epochs 30 --learning_rate 1e-3 --output_dir small
    python examples/image_classification.py --model small --budget 0.5 --output_dir out

Files: .tsv, .csv, .json or .jsonl with a column of image paths (relative to the file) and a column of labels. PEFT has
no task type for images, so none is set. All options of `transformers.TrainingArguments` work. The adapter, the numbers
of the preprocessor and `metrics.json` are written to `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoModelForImageClassification, TrainingArguments, ViTConfig
from transformers.hf_argparser import HfArg
from transformers.image_processing_base import ImageProcessingMixin

from common import DataError, check_columns, class_metrics, hold_out, read_table, sample, write_json
from runner import FileOptions, MethodOptions, Task, parse, pretrained, readable_errors, run, split_files


PREPROCESSOR = "preprocessor_config.json"
DEFAULTS = {
    "per_device_train_batch_size": 32,
    "train_sampling_strategy": "random",  # all images have the same size
    "remove_unused_columns": False,  # images are converted when a row is read
}


@dataclass
class ImageModelOptions(MethodOptions):
    model: str | None = field(
        default=None, metadata={"help": "A model id on the Hub, or a folder; by default a small random ViT is made"}
    )
    image_size: int = field(default=8, metadata={"help": "Image size of the model that is made, in pixels"})
    patch_size: int = field(default=2, metadata={"help": "Patch size of the model that is made, in pixels"})
    hidden_size: int = field(default=64, metadata={"help": "Hidden size of the model that is made"})
    layers: int = field(default=4, metadata={"help": "Layers of the model that is made"})
    heads: int = field(default=4, metadata={"help": "Heads of the model that is made"})


@dataclass
class DataOptions(FileOptions):
    data: str | None = HfArg(
        default=None, aliases=["--train_file"], help="A file of names of images; without it, scikit-learn's digits"
    )
    validation_share: float = field(default=0.2, metadata={"help": "The share that is held out without --validation"})
    image_column: str = "image"
    label_column: str = "label"


@dataclass
class Pixels:
    """Converts an image to a float32 tensor `[channels, size, size]`, with the values (value in 0..1 - mean) / std."""

    size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Any) -> torch.Tensor:
        image = image.convert({1: "L", 3: "RGB"}[self.channels])
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), resample=2)  # bilinear, as in ViT's own preprocessing
        values = np.asarray(image, dtype=np.float32).reshape(self.size, self.size, self.channels) / 255
        values = (values - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(values.transpose(2, 0, 1).copy())

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`."""
        return {"image_mean": list(self.mean), "image_std": list(self.std), "size": self.size}


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], DataOptions, ImageModelOptions, DEFAULTS, arguments)
    train_rows, validation_rows = read_data(data, training.seed)
    classes = train_rows.features["label"].names
    base = options.model or make_base(options, channels_of(train_rows), training)
    pixels = preprocessing(base)

    def load_base() -> Any:
        # If the head has another number of classes, it is newly initialized.
        return pretrained(
            AutoModelForImageClassification,
            base,
            dtype=options.dtype,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: i for i, name in enumerate(classes)},
            ignore_mismatched_sizes=True,
        )

    task = Task(
        task_type=None,
        load_base=load_base,
        train_set=train_rows.with_transform(encoder(pixels)),
        validation_set=validation_rows.with_transform(encoder(pixels)),
        collator=collate,
        metrics=class_metrics,
        unit_of_cost={"pixel_values": torch.zeros(1, pixels.channels, pixels.size, pixels.size)},
        details={"task": data.data or "digits", "classes": classes, "base": base},
    )
    run(task, options, training)
    if training.process_index == 0:
        write_json(Path(training.output_dir) / PREPROCESSOR, pixels.to_dict())


def read_data(data: DataOptions, seed: int) -> tuple[Dataset, Dataset]:
    """Rows with `image` and `label` (a `ClassLabel`). The classes are those of the training rows."""
    if data.data is not None:
        train, validation = split_files(
            data, lambda path: read_images(path, data.image_column, data.label_column), seed, "label"
        )
        names = sorted(set(train["label"]))
        if unknown := sorted(set(validation["label"]) - set(names)):
            raise DataError(f"label {unknown[0]!r} of the validation rows does not occur in the training rows")
        labels = ClassLabel(names=names)
        return train.cast_column("label", labels), validation.cast_column("label", labels)
    if data.validation is not None:
        raise DataError("--validation needs a --data")
    digits = load_digits()
    # The values 0..16 become 0..240.
    rows = {"image": list((digits.images * 15).astype(np.uint8)), "label": digits.target.tolist()}
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    train, validation = hold_out(
        Dataset.from_dict(rows, features=features), data.validation_share, seed, classes="label"
    )
    return sample(train, data.max_rows, seed), sample(validation, data.max_validation_rows, seed)


def read_images(path: str, image_column: str, label_column: str) -> Dataset:
    table = read_table(path)
    check_columns(table, image_column, label_column)
    files = [Path(path).parent / str(name) for name in table[image_column]]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DataError(f"{path} names an image that does not exist: {missing}")
    rows = Dataset.from_dict(
        {"image": [str(file) for file in files], "label": [str(label) for label in table[label_column]]}
    )
    return rows.cast_column("image", Image())


def channels_of(rows: Dataset) -> int:
    return 1 if rows[0]["image"].mode in ("1", "L") else 3


def make_base(options: ImageModelOptions, channels: int, training: TrainingArguments) -> str:
    """Writes a random ViT to `base` in the output folder, and returns this path."""
    folder = Path(training.output_dir) / "base"
    if options.hidden_size % options.heads or options.image_size % options.patch_size:
        raise DataError("--hidden_size must be a multiple of --heads, and --image_size of --patch_size")
    config = ViTConfig(
        image_size=options.image_size,
        patch_size=options.patch_size,
        num_channels=channels,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden_size,
    )
    with training.main_process_first():
        if training.process_index == 0:
            AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return str(folder)


def preprocessing(base: str) -> Pixels:
    """The numbers in the model's `preprocessor_config.json`. Without this file, those of ViT."""
    config = pretrained(AutoConfig, base)
    size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
    if not isinstance(size, int) or channels not in (1, 3):
        raise DataError(
            f"--model {base} has image size {size} and {channels} channels; only square images of 1 or 3 channels work"
        )
    try:
        given, _ = ImageProcessingMixin.get_image_processor_dict(base)
    except OSError:  # the file does not exist
        given = {}
    mean, std = given.get("image_mean") or [0.5] * channels, given.get("image_std") or [0.5] * channels
    return Pixels(size, channels, mean, std)


def encoder(pixels: Pixels) -> Callable[[Mapping[str, list]], dict[str, list]]:
    def encode(batch: Mapping[str, list]) -> dict[str, list]:
        return {"pixel_values": [pixels(image) for image in batch["image"]], "labels": batch["label"]}

    return encode


def collate(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


if __name__ == "__main__":
    main()
