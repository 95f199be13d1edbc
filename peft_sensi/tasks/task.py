"""What all kinds of tasks share: tokenized rows, and the task itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..utils.errors import DataError
from ..utils.task_types import TYPE_OF_KIND, Kind
from .labels import Labels
from .metrics import Quality
from .options import Options


@dataclass
class Rows(Sequence):
    """Tokenized rows, and what they were made from.

    Attributes:
        inputs: Inputs of the model for each row or window, as lists of numbers; with labels if the file has them.
        raw: The rows of the file: `{"row", "text", "pair"?, "label"?}`, `{"row", "tokens", "tags"?}`, or
            `{"row", "question", "context", "answers"?, "starts"?, "article"?}`. `row` counts from 1.
        places: For each of the inputs, the number of its raw row and an int array. Words: `[labeled, 2]` of positions
            of tokens and numbers of words. Answers: `[tokens, 2]` of starts and ends in the context, -1 outside of it.
    """

    inputs: list[dict[str, Any]]
    raw: list[dict[str, Any]]
    places: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Any) -> Any:
        return self.inputs[index]


@dataclass
class Task:
    """Files as a task for a model's tokenizer.

    Attributes:
        kind: `"text"`, `"words"` or `"answers"`.
        tokenizer: The model's tokenizer, with a padding token.
        labels: The labels. Those of answers have no names.
        train, validation: Tokenized rows. Those of `validation` are not trained on.
        measure: Computes the metrics from the outputs and the rows.
        lines: What was recognized, for the user.
        doubts: What may be wrong, for the user, each with the option that settles it.
        record: What a later prediction must know besides the adapter, as a JSON value.
        hashes: SHA-256 of each data file, by its name.
        validation_data: The names of the files for validation; none if the rows were held out of those for training.
    """

    kind: Kind
    tokenizer: Any
    labels: Labels
    train: Rows
    validation: Rows
    measure: Callable[[Any, Rows, Rows | None], Quality]
    lines: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    validation_data: list[str] = field(default_factory=list)

    @property
    def task_type(self) -> str:
        """PEFT's task type."""
        return TYPE_OF_KIND[self.kind]

    @property
    def collator(self) -> Any:
        return collator_of(self.kind, self.tokenizer)

    @property
    def main_metric(self) -> str:
        """The metric by which trainings are compared."""
        if self.kind != "text":
            return "f1"
        return "spearman" if self.labels.regression else "f1_micro" if self.labels.several else "accuracy"

    def batches(self, batch_size: int, seed: int) -> Any:
        """Batches of the training rows in an order that depends on `seed`. Processes share them out if they can."""
        from torch.utils.data import DataLoader

        from ..utils import distributed

        order = list(self.train.inputs)
        random.Random(seed).shuffle(order)
        places = [range(i, min(i + batch_size, len(order))) for i in range(0, len(order), batch_size)]
        processes = distributed.start()
        own = places[distributed.rank() :: processes] if len(places) >= processes else places
        return DataLoader(order, batch_sampler=own, collate_fn=self.collator)  # type: ignore[arg-type]

    def metrics(self, outputs: Any, rows: Rows) -> dict[str, float | None]:
        """The metrics of a model's outputs for `rows`, as Trainer's `predict` returns them.

        `outputs` are logits: `[rows, classes]` for texts, `[windows, tokens, classes]` for words, and a pair of
        `[windows, tokens]` (start, end) for answers. `None` stands for a metric that is undefined.
        """
        return self.quality(outputs, rows).values

    def quality(self, outputs: Any, rows: Rows) -> Quality:
        """The metrics, the metrics of a baseline (`baseline_words`), and 95 % intervals."""
        return self.measure(outputs, rows, self.train)


def baseline_words(record: Mapping[str, Any]) -> str:
    """What the baseline of `Quality` always answers, in words. `record` is `Task.record`."""
    kind, problem = record.get("kind"), record.get("problem_type")
    if kind != "text":
        return "no entity at all" if kind == "words" else "no answer to any question"
    if problem == "regression":
        return "always the mean of the labels"
    several = problem == "multi_label_classification"
    return "the labels of more than half of the rows" if several else "always the most frequent class"


def collator_of(kind: str, tokenizer: Any) -> Any:
    """Pads rows to a batch of tensors."""
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

    return (DataCollatorForTokenClassification if kind == "words" else DataCollatorWithPadding)(tokenizer)


def check_room(tokenizer: Any, max_length: int, pair: bool = False) -> None:
    """Raises `DataError` if an input of so many tokens has no room for texts beside the tokenizer's own tokens."""
    needed = tokenizer.num_special_tokens_to_add(pair=pair) + 1 + pair
    if max_length < needed:
        raise DataError(f"{max_length} tokens are too few for a text: give a --max-length of at least {needed}.")


def token_doubts(rows: Rows, tokenizer: Any) -> list[str]:
    """Doubts about the tokens: two texts without a border, and many words that are the same unknown token."""
    found = []
    added = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (True, False)]
    if added[0] == added[1] and not {"pair", "context"}.isdisjoint(rows.raw[0]):
        found.append("the tokenizer puts nothing between the two texts: let the first one end in a mark, as a colon")
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:  # GPT-2 uses one token for both, and knows all words
        return found
    special = {*tokenizer.all_special_ids} - {unknown}
    ids = [i for row in rows.inputs for i in row["input_ids"] if i not in special]
    share = ids.count(unknown) / max(1, len(ids))
    text = f"{share:.0%} of the tokens are unknown to the tokenizer: is the model for this language?"
    return [*found, text] if share > 0.1 else found


def record_of(kind: str, labels: Labels, options: Options, max_length: int, **more: Any) -> dict[str, Any]:
    """What a later prediction must know: kind, columns, labels and lengths."""
    kept = ("stride", "max_answer_length") if kind == "answers" else ()
    values: Mapping[str, Any] = {name: asdict(options)[name] for name in kept}
    known = {"labels": labels.names, "problem_type": labels.problem_type, "label_separator": labels.separator}
    return {"kind": kind, "max_length": max_length, **({} if kind == "answers" else known), **values, **more}
