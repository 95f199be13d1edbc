"""Trim an embedding model of sentence-transformers under a budget, on pairs of texts that belong together.

    python examples/embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 --data pairs.tsv --budget 0.5 \\
        --output_dir out

The file (.tsv, .csv, .json or .jsonl) has two columns of texts, such as a question and its answer. Training pulls the
texts of a pair together, and away from the other pairs of the batch. `recall` is the share of the held-out pairs whose
second text is the nearest one to the first, among all second texts. All options of
`SentenceTransformerTrainingArguments` work. Needs sentence-transformers 6 or newer.

`out/adapter` has the adapter as sentence-transformers saves it, and `out/merged` the smaller model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from transformers import HfArgumentParser, set_seed

from peft_sensi import SensiConfig, save_merged

from common import TRAINING_DEFAULTS, DataError, check_columns, folder_bytes, parameters, read_table, write_json
from runner import FileOptions, check_numbers, readable_errors, share_or_count, split_files


SCALE = 20.0  # of the cosines in the loss, as in `MultipleNegativesRankingLoss`


@dataclass(kw_only=True)
class Options(FileOptions):
    model: str = field(metadata={"help": "A model of sentence-transformers, or any encoder, or a folder"})
    budget: float = field(default=0.5, metadata={"help": "Share or number of the heads' and neurons' parameters kept"})
    first_column: str = "first"
    second_column: str = "second"
    calibration_pairs: int = field(default=256, metadata={"help": "Pairs that the units are scored with"})


def calibration_batches(
    model: SentenceTransformer, pairs: Dataset, size: int = 16
) -> list[Mapping[str, torch.Tensor]]:
    """Tokenized batches in which the rows 2i and 2i + 1 are the texts of a pair."""
    batches = []
    for start in range(0, len(pairs), size):
        texts = [text for pair in pairs.select(range(start, min(start + size, len(pairs)))) for text in pair.values()]
        length = model.max_seq_length
        batches.append(
            dict(model.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))
        )
    return batches


def pair_loss(model: SentenceTransformer) -> Any:
    """The loss for the scores: a function of the transformer inside the model and a batch of `calibration_batches`."""
    pooling = list(model)[1:]  # type: ignore[call-overload]

    def loss(transformer: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        features: Any = {**batch, "token_embeddings": transformer(**batch).last_hidden_state}
        for module in pooling:
            features = module(features)
        vectors = nn.functional.normalize(features["sentence_embedding"], dim=-1)
        cosines = vectors[::2] @ vectors[1::2].T
        return nn.functional.cross_entropy(SCALE * cosines, torch.arange(len(cosines), device=cosines.device))

    return loss


def recall(model: SentenceTransformer, pairs: Dataset, columns: Sequence[str]) -> float:
    """The share of pairs whose second text is the nearest one to the first. Several pairs may have the same one."""
    first, second = (model.encode(list(pairs[c]), normalize_embeddings=True, show_progress_bar=False) for c in columns)
    answers = np.array(pairs[columns[1]])
    return float((answers[(first @ second.T).argmax(1)] == answers).mean())


def merge(name: str, adapter: Path, folder: Path) -> SentenceTransformer:
    """Merges a saved adapter into a fresh copy of its model, and saves the smaller model."""
    model = SentenceTransformer(name, device="cpu")
    adapted = PeftModel.from_pretrained(model[0].model, str(adapter))
    trims = adapted.plan().trims
    model[0].model = adapted.merge_and_unload()
    model.save_pretrained(str(folder))  # also the tokenizer, the pooling and the prompts
    if trims:
        save_merged(model[0].model, folder)  # replaces the weights by a form that keeps the widths of the layers
    return model


def main(arguments: list[str] | None = None) -> None:
    with readable_errors():
        parser = HfArgumentParser((Options, SentenceTransformerTrainingArguments), description=__doc__.splitlines()[0])
        # One length of padding for each batch of pairs, so rows are not sorted by length.
        parser.set_defaults(**{**TRAINING_DEFAULTS, "train_sampling_strategy": "random"})
        options, training = parser.parse_args_into_dataclasses(arguments)
        check_numbers(options)
        if training.resume_from_checkpoint:
            raise DataError("--resume_from_checkpoint has no effect here: this script always trains from the start")
        set_seed(training.seed)
        columns = [options.first_column, options.second_column]

        def read(path: str) -> Dataset:
            rows = read_table(path)
            check_columns(rows, *columns)
            return rows.select_columns(columns)

        train, held_out = split_files(options, read, training.seed)
        out = Path(training.output_dir)
        model = SentenceTransformer(options.model, device=str(training.device))
        metrics = {"recall before": recall(model, held_out, columns), "parameters before": parameters(model)}
        calibration = train.shuffle(seed=training.seed).select(range(min(len(train), options.calibration_pairs)))
        config = SensiConfig(
            budget=share_or_count(options.budget),
            calibration=calibration_batches(model, calibration),
            loss_fn=pair_loss(model),
            task_type="FEATURE_EXTRACTION",
            seed=training.seed,
        )
        model.add_adapter(config)
        loss = MultipleNegativesRankingLoss(model, scale=SCALE)
        SentenceTransformerTrainer(model, training, train_dataset=train, loss=loss).train()
        model.save_pretrained(str(out / "adapter"))
        metrics["recall"] = recall(model, held_out, columns)
        small = merge(options.model, out / "adapter", out / "merged")
        # Our modeling file builds the layers with their own widths, so the folder's code must be allowed to run.
        again = SentenceTransformer(str(out / "merged"), device="cpu", trust_remote_code=True)
        texts = list(held_out[columns[0]])
        difference = abs(small.encode(texts) - again.encode(texts)).max()
        metrics |= {
            "recall, merged": recall(again, held_out, columns),
            "parameters, merged": parameters(again),
            "difference after loading": float(difference),
            "adapter bytes": folder_bytes(out / "adapter"),
        }
        write_json(out / "metrics.json", metrics)
    for name, value in metrics.items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
