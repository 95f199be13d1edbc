"""What a card knows about a model goes in; the Python code that loads it and predicts with it comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..utils.heads import is_regressor


@dataclass(frozen=True)
class Head:
    """What the task head predicts.

    Attributes:
        task: PEFT's task type; `None` if it is unknown.
        count: The number of outputs; `None` if it is unknown.
        names: Names of the classes, in the order of their numbers; empty if nobody named them.
        problem: The config's `problem_type`.
        record: What the command knows about the inputs: `text_columns`, `max_length`.
    """

    task: str | None = None
    count: int | None = None
    names: Sequence[str] = ()
    problem: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        return is_regressor(self.problem, self.count)


def adapter_snippet(
    head: Head, model_class: str, base: str, repo: str, tokenizer: str, merged_words: str, other_head: bool
) -> str:
    """Loads an adapter on its base, merges it, and predicts.

    `tokenizer` is the place of the tokenizer, and `other_head` says whether the base has a head for other labels.
    """
    arguments = [f'"{base}"']
    names = [f"labels = {json.dumps(list(head.names), ensure_ascii=False)}"] if head.names else []
    if names:
        arguments += ["id2label=dict(enumerate(labels))", "label2id={name: i for i, name in enumerate(labels)}"]
    elif head.task in ("SEQ_CLS", "TOKEN_CLS"):
        arguments.append(f"num_labels={head.count or '...'}")
    if other_head:
        arguments.append("ignore_mismatched_sizes=True")
    line = f"base = {model_class}.from_pretrained({', '.join(arguments)})"
    if len(line) > 100:
        line = f"base = {model_class}.from_pretrained(" + "".join(f"\n    {part}," for part in arguments) + "\n)"
    predicted = _prediction(head, "small", tokenizer)
    return "\n".join(
        [
            *(["import torch", ""] if "torch." in "".join(predicted) else []),
            "import peft_sensi  # registers the method with PEFT; without it, loading fails with KeyError: 'SENSI'",
            "from peft import PeftModel",
            f"from transformers import {_imports(model_class, predicted)}",
            "",
            *names,
            line,
            f'model = PeftModel.from_pretrained(base, "{repo}").eval()',
            f"small = model.merge_and_unload()  # {merged_words}",
            *predicted,
        ]
    )


def merged_snippet(head: Head, model_class: str, repo: str, plain: bool) -> str:
    """Loads a merged model and predicts. A plain checkpoint needs Transformers only."""
    predicted = _prediction(head, "model", repo)
    torch = ["import torch"] if "torch." in "".join(predicted) else []
    if plain:
        imports = [f"from transformers import {_imports(model_class, predicted)}"]
        load = f'model = {model_class}.from_pretrained("{repo}").eval()'
    else:
        hub = ["from huggingface_hub import snapshot_download"] if "/" in repo else []
        tokenizer = ["from transformers import AutoTokenizer"] if predicted else []
        imports = [*hub, "from peft_sensi import load_merged", *tokenizer]
        load = f'model = load_merged(snapshot_download("{repo}"))' if hub else f'model = load_merged("{repo}")'
    return "\n".join([*torch, *imports, "", load, *predicted])


def _imports(model_class: str, predicted: Sequence[str]) -> str:
    return ", ".join(sorted([model_class, *(["AutoTokenizer"] if predicted else [])]))


def _prediction(head: Head, model: str, tokenizer: str) -> list[str]:
    """The lines from a text to a printed prediction; empty for tasks that are not about text."""
    limit = f", max_length={head.record['max_length']}" if "max_length" in head.record else ""
    options = f', truncation=True{limit}, return_tensors="pt"'
    pair = len(head.record.get("text_columns", [])) == 2
    inputs = '"Write the first text here.", "Write the second text here."' if pair else '"Write your text here."'
    outputs = [f"outputs = {model}(**batch)"]
    if head.task == "SEQ_CLS":
        logits = "outputs.logits[0]"
        if head.is_regression:
            shown = [f"print({logits}.item())"]
        elif head.problem == "multi_label_classification":
            shown = [f"print([{model}.config.id2label[i] for i, value in enumerate({logits}) if value > 0])"]
        else:
            shown = [f"print({model}.config.id2label[{logits}.argmax().item()])"]
    elif head.task == "TOKEN_CLS":
        pairs = f"[(token, {model}.config.id2label[n]) for token, n in zip(batch.tokens(), numbers)]"
        shown = ["numbers = outputs.logits[0].argmax(-1).tolist()", f"print({pairs})"]
    elif head.task == "QUESTION_ANS":
        inputs = '"Write your question here?", "Write here the text that has the answer."'
        shown = ["start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
                 'print(tokenizer.decode(batch["input_ids"][0, start : end + 1]))']  # fmt: skip
    elif head.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        outputs = [f"outputs = {model}.generate(**batch, max_new_tokens=20)"]
        shown = ["print(tokenizer.decode(outputs[0], skip_special_tokens=True))"]
    elif head.task == "FEATURE_EXTRACTION":
        shown = ["print(outputs.last_hidden_state.shape)  # [texts, tokens, width]"]
    else:
        return []
    return [
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")',
        f"batch = tokenizer({inputs}{options})",
        "with torch.no_grad():",
        *(f"    {line}" for line in outputs),
        *shown,
    ]
