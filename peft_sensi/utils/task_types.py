"""PEFT's task types: the class that loads such a model, what the Hub calls the task, and the kind of its data."""

from __future__ import annotations

from typing import Literal, NamedTuple


Kind = Literal["text", "words", "answers"]


class TaskType(NamedTuple):
    """Of a task type.

    Attributes:
        auto_class: The class of Transformers that loads its models.
        pipeline: The Hub's name of the task, if there is one.
        kind: The kind of data that the command trains it on, if it can.
    """

    auto_class: str
    pipeline: str | None
    kind: Kind | None = None


TASK_TYPES = {
    "SEQ_CLS": TaskType("AutoModelForSequenceClassification", "text-classification", "text"),
    "TOKEN_CLS": TaskType("AutoModelForTokenClassification", "token-classification", "words"),
    "QUESTION_ANS": TaskType("AutoModelForQuestionAnswering", "question-answering", "answers"),
    "CAUSAL_LM": TaskType("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": TaskType("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": TaskType("AutoModel", "feature-extraction"),
}
# The task type of each kind of data.
TYPE_OF_KIND: dict[str, str] = {entry.kind: name for name, entry in TASK_TYPES.items() if entry.kind}
# How the names of model classes end. `AutoModel` itself loads classes such as `BertModel`.
_ENDINGS = {
    **{entry.auto_class.removeprefix("AutoModel"): name for name, entry in TASK_TYPES.items()},
    "LMHeadModel": "CAUSAL_LM",
    "Model": "FEATURE_EXTRACTION",
}
del _ENDINGS[""]


def describe_type(name: str | None) -> TaskType:
    """The entry of a task type. For others it is empty: no class, no name, and no kind."""
    return TASK_TYPES.get(name or "", TaskType("", None))


def type_of_class(name: str) -> str | None:
    """The task type of a model class by its name (`BertForTokenClassification`); `None` if the name does not say."""
    return next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), None)


def kind_of_model(task_type: str | None, architectures: list[str] | None = None) -> Kind | None:
    """The kind of data of an adapter's task type, or else of a model's class; `None` if unknown."""
    types = [task_type, *map(type_of_class, architectures or [])]
    return next((kind for name in types if (kind := describe_type(name).kind)), None)
