"""Tune a language model under a budget: any decoder, or a small Llama-shaped model made here; the data is a text file.

    python examples/causal_lm.py --model meta-llama/Llama-3.2-1B --data train.txt --validation dev.txt \\
        --budget 0.5 --output_dir out

Without a pretrained model, first train a small model from scratch (its byte-level tokenizer is trained on the text).
Then tune it under a budget on another text:

    python examples/causal_lm.py --method full --data general.txt --num_train_epochs 5 --output_dir small
    python examples/causal_lm.py --model small --data special.txt --budget 0.5 --output_dir out

Files: .txt (documents separated by blank lines), or a format of text_classification.py with a text column. All options
of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to `out`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from common import DataError, check_columns, load_metric, read_table
from runner import FileOptions, MethodOptions, Task, parse, pretrained, readable_errors, run, split_files


IGNORED = -100  # the label of positions without a loss
END = "<end>"  # the end of a document, in the tokenizer that is trained here
DEFAULTS = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}


@dataclass
class LanguageModelOptions(MethodOptions):
    model: str | None = field(
        default=None, metadata={"help": "A model id on the Hub, or a folder; by default a small random Llama is made"}
    )
    vocab_size: int = field(default=1024, metadata={"help": "Vocabulary size of the model that is made; at least 257"})
    hidden_size: int = field(default=128, metadata={"help": "Hidden size of the model that is made"})
    layers: int = field(default=4, metadata={"help": "Layers of the model that is made"})
    heads: int = field(default=4, metadata={"help": "Heads of the model that is made; two share a key/value head"})


@dataclass
class DataOptions(FileOptions):
    text_column: str = field(default="text", metadata={"help": "The column of the texts, in files with columns"})
    block_size: int = field(default=128, metadata={"help": "Tokens per row; documents are joined, then cut"})


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], DataOptions, LanguageModelOptions, DEFAULTS, arguments)
    train_rows, validation_rows = split_files(data, lambda path: read_texts(path, data.text_column), training.seed)
    base = options.model or make_base(train_rows["text"], options, data.block_size, training)
    tokenizer = pretrained(AutoTokenizer, base)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise DataError(f"--model {base}: its tokenizer has neither a padding token nor an end-of-text token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask and the labels exclude padding
    train_set, validation_set = (
        blocks(rows, tokenizer, min(data.block_size, tokenizer.model_max_length))
        for rows in (train_rows, validation_rows)
    )
    task = Task(
        task_type="CAUSAL_LM",
        load_base=lambda: pretrained(AutoModelForCausalLM, base, dtype=options.dtype),
        train_set=train_set,
        validation_set=validation_set,
        # Pads the labels too, like the tags of words.
        collator=DataCollatorForTokenClassification(tokenizer),
        metrics=language_metrics,
        unit_of_cost=min(data.block_size, tokenizer.model_max_length),
        tokenizer=tokenizer,
        reduce_logits=token_statistics,
        details={"task": data.data, "base": base},
    )
    run(task, options, training)


def read_texts(path: str, column: str) -> Dataset:
    """Rows with a column `text`, one row per document."""
    if Path(path).suffix.lower() in (".tsv", ".csv", ".json", ".jsonl"):
        rows = read_table(path)
        check_columns(rows, column)
        texts = [str(text) for text in rows[column]]
    else:
        paragraphs = Path(path).read_text(encoding="utf-8-sig").split("\n\n")
        texts = [text.strip("\n") for text in paragraphs]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path} has no text")
    return Dataset.from_dict({"text": texts})


def make_base(texts: list[str], options: LanguageModelOptions, block_size: int, training: TrainingArguments) -> str:
    """Writes a tokenizer and a random Llama-shaped model to `base` in the output folder, and returns this path."""
    folder = Path(training.output_dir) / "base"
    with training.main_process_first():
        if training.process_index == 0:
            tokenizer = train_tokenizer(texts, options.vocab_size)
            tokenizer.save_pretrained(folder)
            if options.heads < 2 or options.heads % 2 or options.hidden_size % (2 * options.heads):
                raise DataError("--heads must be even, and --hidden_size a multiple of twice --heads")
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=options.hidden_size,
                intermediate_size=3 * options.hidden_size,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                num_key_value_heads=options.heads // 2,
                max_position_embeddings=max(2048, block_size),
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer. It starts from the 256 bytes, so it can encode every text."""
    if vocab_size < 257:
        raise DataError(f"--vocab_size {vocab_size} is too small: the 256 bytes and the end of a document need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def blocks(rows: Dataset, tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
    """Joins all documents, with an end token after each, and cuts the result into rows of at most `size` tokens."""

    def encode(batch: Mapping[str, list]) -> Mapping[str, list]:
        return {"input_ids": tokenizer(batch["text"], verbose=False)["input_ids"]}

    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
    ended = ([*ids, *(end if ids[-1:] != end else [])] for ids in encoded["input_ids"])
    line = list(itertools.chain.from_iterable(ended))
    cut = [line[start : start + size] for start in range(0, len(line), size)]
    cut = [ids for ids in cut if len(ids) > 1]  # a row of one token has nothing to predict
    if not cut:
        raise DataError("the text has fewer than two tokens")
    return Dataset.from_dict({"input_ids": cut, "attention_mask": [[1] * len(ids) for ids in cut], "labels": cut})


def token_statistics(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely next token and the log-likelihood of the correct one, `[batch, tokens - 1]` each.

    All logits of a validation set would not fit into memory.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    right = labels[:, 1:]
    likelihood = -F.cross_entropy(logits.transpose(1, 2), right, ignore_index=IGNORED, reduction="none")
    return logits.argmax(-1), likelihood


def language_metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted, likelihood = prediction.predictions
    right = np.asarray(prediction.label_ids)[:, 1:]
    counted = right != IGNORED
    return load_metric("language_modeling").compute(
        predictions=predicted[counted], references=right[counted], log_likelihoods=likelihood[counted]
    )


if __name__ == "__main__":
    main()
