"""Tune a word tagger (such as for named entities) under a budget: any encoder with a fast tokenizer, CoNLL files.

    python examples/token_classification.py --model bert-base-cased --train_file train.conll \\
        --validation_file dev.conll --budget 0.5 --output_dir out

Files: one word with its tag (O, B-person, I-person; also IOB1, IOBES and BILOU) per line, in columns separated by tabs
or spaces, and a blank line between sentences. The first sub-word of a word gets its tag. Entities are counted over the
words of the file, even if a long sentence is read in several windows.
All options of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to
`out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from common import DataError, load_metric
from runner import FileOptions, Task, parse, pretrained, readable_errors, run, split_files, typical_length


OUTSIDE = "O"
IGNORED = -100  # the label of positions without a loss
# With words as input, these byte-level tokenizers must be told that a space comes before each word.
BYTE_LEVEL = ("bloom", "deberta", "gpt2", "longformer", "modernbert", "roberta")


@dataclass
class DataOptions(FileOptions):
    token_column: int = field(default=0, metadata={"help": "Column of the words, counted from 0; -1 is the last one"})
    tag_column: int = field(default=-1, metadata={"help": "Column of the tags, counted in the same way"})
    max_length: int = field(default=128, metadata={"help": "Tokens per window; longer sentences get several windows"})


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], DataOptions, arguments=arguments)
    train_rows, validation_rows = split_files(
        data, lambda path: read_conll(path, data.token_column, data.tag_column), training.seed
    )
    # A tag that occurs only in the validation rows cannot be learned, but must count as missed.
    tags = sorted({tag for rows in (train_rows, validation_rows) for row in rows["tags"] for tag in row} - {OUTSIDE})
    tags = [OUTSIDE, *tags]
    config = pretrained(AutoConfig, options.model)
    extra = {"add_prefix_space": True} if config.model_type in BYTE_LEVEL else {}
    tokenizer = pretrained(AutoTokenizer, options.model, **extra)
    if not tokenizer.is_fast:
        raise DataError(
            f"--model {options.model}: it has no fast tokenizer, which is needed to match sub-words to words"
        )
    train_set, _ = windows(train_rows, tokenizer, tags, data.max_length)
    validation_set, words = windows(validation_rows, tokenizer, tags, data.max_length)
    task = Task(
        task_type="TOKEN_CLS",
        load_base=lambda: pretrained(
            AutoModelForTokenClassification,
            options.model,
            dtype=options.dtype,
            num_labels=len(tags),
            id2label=dict(enumerate(tags)),
            label2id={name: i for i, name in enumerate(tags)},
        ),
        train_set=train_set,
        validation_set=validation_set,
        collator=DataCollatorForTokenClassification(tokenizer),
        metrics=entity_metrics(validation_rows, words, tags),
        unit_of_cost=typical_length(train_set),
        tokenizer=tokenizer,
        reduce_logits=lambda logits, labels: best_class(logits),
        details={"task": data.train_file, "tags": tags},
    )
    run(task, options, training)


def read_conll(path: str | Path, token_column: int, tag_column: int) -> Dataset:
    """Rows with `tokens` and `tags`, one row per sentence.

    An empty line, a line without a word, or a -DOCSTART- line ends a sentence.
    """
    sentences: list[dict[str, list[str]]] = []
    tokens: list[str] = []
    tags: list[str] = []
    # Split only at "\n", because U+0085, U+2028 and similar characters can be tokens.
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        cells = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        if not line.strip() or not cells[0] or cells[0] == "-DOCSTART-":
            if tokens:
                sentences.append({"tokens": tokens, "tags": tags})
            tokens, tags = [], []
            continue
        for column in (token_column, tag_column):
            if not -len(cells) <= column < len(cells):
                raise DataError(
                    f"{path}, line {number}: there is no column {column} among {len(cells)}: {line.strip()!r}"
                )
        token, tag = cells[token_column].strip(), cells[tag_column].strip()
        prefix, dash, kind = tag.partition("-")
        if tag != OUTSIDE and not (prefix in "BIESLU" and len(prefix) == 1 and dash and kind):
            raise DataError(f"{path}, line {number}: {tag!r} is not a tag such as O, B-person or I-person")
        tokens.append(token)
        tags.append(tag)
    if not sentences:
        raise DataError(f"{path} has no sentences")
    text = SequenceFeature(Value("string"))
    return Dataset.from_list(sentences, features=Features({"tokens": text, "tags": text}))


def windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], max_length: int
) -> tuple[Dataset, list[list[tuple[int, int]]]]:
    """Returns the model inputs, one row per window, and the (sentence, word) of each labeled position of each window.

    A word for which the tokenizer produces no token (such as a lone variation selector) has no position.
    """
    index = {tag: i for i, tag in enumerate(tags)}
    limit = min(max_length, tokenizer.model_max_length)
    places: list[list[tuple[int, int]]] = []

    def encode(batch: Mapping[str, list], numbers: list[int]) -> Mapping[str, list]:
        encoded = tokenizer(
            batch["tokens"],
            is_split_into_words=True,
            truncation=True,
            max_length=limit,
            return_overflowing_tokens=True,
        )
        samples = encoded.pop("overflow_to_sample_mapping")
        encoded["labels"] = []
        before: tuple[int, int] | None = None  # a word can continue in the next window
        for window, sample in enumerate(samples):
            labels, found = [], []
            for word in encoded.word_ids(window):
                if word is None or (sample, word) == before:
                    labels.append(IGNORED)
                    continue
                before = (sample, word)
                labels.append(index[batch["tags"][sample][word]])
                found.append((numbers[sample], word))
            encoded["labels"].append(labels)
            places.append(found)
        return dict(encoded)

    # Not cached, because a cached result would have no places.
    encoded = rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    return encoded, places


def best_class(logits: Any) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def entity_metrics(
    rows: Dataset, places: list[list[tuple[int, int]]], tags: Sequence[str]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metric over whole sentences. `places` has the (sentence, word) of each labeled position of each window."""
    metric = load_metric("token_classification")
    expected = [list(row) for row in rows["tags"]]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predicted = [[OUTSIDE] * len(row) for row in expected]
        for classes, labels, found in zip(prediction.predictions, prediction.label_ids, places, strict=True):
            for chosen, (sentence, word) in zip(classes[np.asarray(labels) != IGNORED], found, strict=True):
                predicted[sentence][word] = tags[chosen]
        return metric.compute(predictions=predicted, references=expected)

    return compute


if __name__ == "__main__":
    main()
