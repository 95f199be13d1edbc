"""Tune a question answering model under a budget: any encoder with a fast tokenizer, files in SQuAD format.

    python examples/question_answering.py --model bert-base-uncased --train_file train.json \\
        --validation_file dev.json --budget 0.5 --output_dir out

Files: JSON in the format of SQuAD 1.1 or 2.0 (data > paragraphs > context, qas > question, answers > text,
answer_start). A long text is read in windows that overlap by `--stride` tokens. The answer is the best span of all
windows, cut from the original text. Questions without answers are learned if the training file has some. Without a
validation file, whole articles are held out.
All options of `transformers.TrainingArguments` work. The adapter, the tokenizer and `metrics.json` are written to
`out`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from common import DataError, load_metric
from runner import FileOptions, Task, parse, pretrained, readable_errors, run, split_files, typical_length


FEATURES = Features(
    {
        "article": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": SequenceFeature(Value("string")),
        "starts": SequenceFeature(Value("int64")),
    }
)


@dataclass
class DataOptions(FileOptions):
    max_length: int = field(
        default=384, metadata={"help": "Tokens per window, with the question and a part of the text"}
    )
    stride: int = field(default=128, metadata={"help": "Number of tokens that neighboring windows share"})
    max_answer_length: int = field(default=30, metadata={"help": "Longest answer, in tokens"})


@dataclass
class Windows:
    """Windows over the texts.

    `inputs` has one row of model inputs per window. `rows[window]` is the index of its question. `spans[window]` is an
    int array `[tokens, 2]` with the start and end of each token in the text, in characters; -1 for tokens outside it.
    """

    inputs: Dataset
    rows: list[int]
    spans: list[np.ndarray]


@readable_errors()
def main(arguments: list[str] | None = None) -> None:
    options, data, training = parse(__doc__.splitlines()[0], DataOptions, arguments=arguments)
    train_rows, validation_rows = split_files(data, read_squad, training.seed, group="article")
    # Positions count from the left. PEFT 0.21's model for question answering drops `token_type_ids`, but the merged
    # model would use them. Therefore the tokenizer does not produce them. Both settings are saved with the tokenizer.
    options_of_text: dict[str, Any] = {"padding_side": "right", "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = pretrained(AutoTokenizer, options.model, **options_of_text)
    if not tokenizer.is_fast:
        raise DataError(
            f"--model {options.model}: it has no fast tokenizer, which is needed to find answers in a text"
        )
    train_windows = windows(train_rows, tokenizer, data.max_length, data.stride)
    validation_windows = windows(validation_rows, tokenizer, data.max_length, data.stride)
    may_be_silent = any(not answers for answers in train_rows["answers"])
    task = Task(
        task_type="QUESTION_ANS",
        load_base=lambda: pretrained(AutoModelForQuestionAnswering, options.model, dtype=options.dtype, num_labels=2),
        train_set=train_windows.inputs,
        validation_set=validation_windows.inputs,
        collator=DataCollatorWithPadding(tokenizer),
        metrics=answer_metrics(validation_rows, validation_windows, data.max_answer_length, may_be_silent),
        unit_of_cost=typical_length(train_windows.inputs),
        tokenizer=tokenizer,
        details={
            "task": data.train_file,
            "questions": {"train": len(train_rows), "validation": len(validation_rows)},
        },
    )
    run(task, options, training)


def read_squad(path: str | Path) -> Dataset:
    """One row per question. Answers that are not at the stated position are skipped, and counted on stderr."""
    content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    rows, misplaced = [], 0
    try:
        for number, article in enumerate(content["data"]):
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for entry in paragraph["qas"]:
                    # If an impossible question has answers, they are only plausible, not correct.
                    given = [] if entry.get("is_impossible", False) else entry["answers"]
                    answers = [(answer["text"], answer["answer_start"]) for answer in given]
                    right = [(t, at) for t, at in answers if t.strip() and context[at : at + len(t)] == t]
                    misplaced += len(answers) - len(right)
                    if answers and not right:
                        continue
                    rows.append(
                        {
                            "article": f"{number} {article.get('title', '')}",
                            "context": context,
                            "question": entry["question"].strip(),
                            "answers": [text for text, _ in right],
                            "starts": [start for _, start in right],
                        }
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not in SQuAD format (data > paragraphs > context, qas > question, answers > text, "
            f"answer_start): {type(error).__name__} {error}"
        ) from error
    if misplaced:
        print(f"{path}: skipped {misplaced} answers that are not at their `answer_start`", file=sys.stderr)
    if not rows:
        raise DataError(f"{path} has no questions")
    return Dataset.from_list(rows, features=FEATURES)


def windows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> Windows:
    """Windows over the texts, each with its question and the token positions of the first answer.

    If a window does not contain the whole answer, its positions are those of its first token, such as [CLS]. A
    question may take half of a window; a longer question is cut.
    """
    limit = min(max_length, tokenizer.model_max_length)
    longest_question = limit // 2 - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < limit - limit // 2 or longest_question < 1:
        raise DataError(f"--stride {stride} must be less than half of the window of {limit} tokens")
    owners: list[int] = []
    spans: list[np.ndarray] = []

    def encode(batch: Mapping[str, list], numbers: list[int]) -> Mapping[str, list]:
        encoded = tokenizer(
            [shortened(question, tokenizer, longest_question) for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=limit,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        samples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        positions = []
        for window, sample in enumerate(samples):
            in_text = np.array([part == 1 for part in encoded.sequence_ids(window)])
            places = np.where(in_text[:, None], np.array(offsets[window]), -1)
            owners.append(numbers[sample])
            spans.append(places)
            answers, starts = batch["answers"][sample], batch["starts"][sample]
            positions.append(answer_tokens(places, answers[0], starts[0]) if answers else (0, 0))
        encoded["start_positions"] = [start for start, _ in positions]
        encoded["end_positions"] = [end for _, end in positions]
        return dict(encoded)

    # Not cached, because a cached result would have no spans.
    encoded = rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    return Windows(encoded, owners, spans)


def shortened(question: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]


def answer_tokens(places: np.ndarray, answer: str, start: int) -> tuple[int, int]:
    """First and last token of an answer; (0, 0) if the window does not contain the whole answer."""
    start += len(answer) - len(answer.lstrip())
    end = start + len(answer.strip())
    # Some tokenizers include the space before a word in its token. Therefore all tokens that overlap the answer count.
    touched = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start) & (places[:, 0] >= 0))
    if not len(touched):
        return 0, 0
    first, last = int(touched[0]), int(touched[-1])
    return (first, last) if places[first, 0] <= start and places[last, 1] >= end else (0, 0)


def answer_metrics(
    rows: Dataset, found: Windows, max_answer_length: int, may_be_silent: bool
) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = load_metric("question_answering")
    contexts, references = list(rows["context"]), [list(answers) for answers in rows["answers"]]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        starts, ends = prediction.predictions[:2]
        texts = answer_texts(contexts, found, starts, ends, max_answer_length, may_be_silent)
        return metric.compute(predictions=texts, references=references)

    return compute


def answer_texts(
    contexts: list[str],
    found: Windows,
    starts: np.ndarray,
    ends: np.ndarray,
    max_answer_length: int,
    may_be_silent: bool = False,
) -> list[str]:
    """The span of each text with the highest sum of its two logits (`starts`, `ends`: `[windows, tokens]`).

    With `may_be_silent`, the answer is empty if in every window the logits of "no answer" have a higher sum than the
    best span of the text.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(contexts)
    silence = [np.inf] * len(contexts)
    for row, places, start_logits, end_logits in zip(found.rows, found.spans, starts, ends, strict=True):
        silence[row] = min(silence[row], float(start_logits[0] + end_logits[0]))
        score, first, last = best_span(places, start_logits, end_logits, max_answer_length)
        if score > best[row][0]:
            best[row] = score, contexts[row][places[first, 0] : places[last, 1]].strip()
    return ["" if may_be_silent and none > score else text for (score, text), none in zip(best, silence, strict=True)]


def best_span(places: np.ndarray, starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, int, int]:
    """Score, first token and last token of the best span. The score is minus infinity if the window has no text."""
    text = np.flatnonzero(places[:, 0] >= 0)
    if not len(text):
        return -np.inf, 0, 0
    length = text[None, :] - text[:, None]
    scores = np.where((length >= 0) & (length < longest), starts[text][:, None] + ends[text][None, :], -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, last]), int(text[first]), int(text[last])


if __name__ == "__main__":
    main()
