"""Small adapters and merged models in folders, with a tokenizer and named classes, as the command leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import tiny_model, train, wrap
from transformers import BertTokenizerFast

from peft_sensi import save_merged


WORDS = ["good", "fine", "great", "bad", "poor", "awful", "a", "film", "story", "plot", "the", "is", "very", "?"]
NAMES = ["bad", "good", 'it\'s "so"']


def save_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=40).save_pretrained(folder)


def save_adapter(
    folder: Path,
    task: str = "SEQ_CLS",
    names: list[str] | None = None,
    problem: str | None = None,
    metrics: Any = None,
) -> Path:
    """Saves `folder/base`, which has no names of classes, and `folder/adapter`, which has them. Returns the latter."""
    count = len(names) if names else 1 if problem == "regression" else 3
    labels = {} if task == "QUESTION_ANS" else {"num_labels": count}
    tiny_model("bert", task, **labels).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    base = tiny_model("bert", task, **labels)
    base.name_or_path = str(folder / "base")
    if names:
        base.config.id2label = dict(enumerate(names))
        base.config.label2id = {name: i for i, name in enumerate(names)}
    base.config.problem_type = problem
    model = wrap(base, budget=0.5, task_type=task)
    if task == "SEQ_CLS" and problem is None and count == 3:
        train(model)
    model.save_pretrained(folder / "adapter")
    save_tokenizer(folder / "adapter")
    if metrics:
        (folder / "adapter" / "metrics.json").write_text(json.dumps(metrics))
    save_merged(model, folder / "merged")
    save_tokenizer(folder / "merged")
    return folder / "adapter"
