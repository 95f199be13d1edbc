"""Loads the tokenizer and the model of a task: names and folders go in, both come out in agreement with each other."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..utils.errors import DataError
from ..utils.task_types import TASK_TYPES, TYPE_OF_KIND
from .task import Task


# With words as input, these byte-level tokenizers must be told that a space comes before each word.
BYTE_LEVEL = ("bloom", "deberta", "gpt2", "longformer", "modernbert", "roberta")


def load_tokenizer(kind: str, model: str, config: Any = None) -> Any:
    """The tokenizer of a model or adapter, as the kind of task needs it. `config` is the base's, if it is known.

    Its `model_max_length` is at most the longest input that the model takes.

    Raises:
        DataError: The kind needs a fast tokenizer, and the model has none; or the tokenizer has no padding token.
        SensiError: The model has no tokenizer, or a damaged one.
    """
    from transformers import AutoConfig

    from ..reporting.pretrained import load_pretrained, pretrained_tokenizer

    config = config or load_pretrained(AutoConfig, model)
    options: dict[str, Any] = {}
    if kind == "answers":
        # PEFT 0.21's model for question answering drops `token_type_ids`, but the merged model would use them.
        # Therefore the tokenizer does not produce them. This is saved with it.
        options = {"model_input_names": ["input_ids", "attention_mask"]}
    elif kind == "words":
        options = {"add_prefix_space": True} if config.model_type in BYTE_LEVEL else {}
    if kind != "text":  # the places of words and answers count from the left
        options["padding_side"] = "right"
    tokenizer = pretrained_tokenizer(model, **options)
    if kind != "text" and not tokenizer.is_fast:
        raise DataError(f"{model} has no fast tokenizer, which is needed to find words and answers in a text.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise DataError(
            f"The tokenizer of {model} has no padding token: save it again with one. Is tokenizer_config.json missing?"
        )
    tokenizer.model_max_length = longest_input(tokenizer, config)
    return tokenizer


def longest_input(tokenizer: Any, config: Any) -> int:
    """The longest input in tokens that a tokenizer and a model with this config take.

    A model with a table of positions takes no more tokens than that has rows. Not every tokenizer knows this number,
    and some have a larger one, of the model that they were made for.
    """
    from transformers import AutoModel, PretrainedConfig

    from ..anatomy.inputs import positions_of
    from ..anatomy.widths import on_meta

    longest = tokenizer.model_max_length
    if not isinstance(config, PretrainedConfig):  # of an ONNX file, beside which the number is written down
        return longest
    try:
        table = positions_of(on_meta(partial(AutoModel.from_config, trust_remote_code=False), config))
    except Exception:  # a model with code of its own, or without a class for texts alone
        table = None
    if table is not None:
        return min(longest, table[1])
    if longest > 10**6:  # a placeholder: this tokenizer does not know the number
        return getattr(config.get_text_config(), "max_position_embeddings", None) or longest
    return longest


def load_for(task: Task | str, model: str, dtype: str = "float32") -> Any:
    """The base model with a fresh head for the task's labels.

    Args:
        task: The task, or only its kind. The checkpoint then keeps its own head.
        model: The name of a model on the Hub, or a folder.
        dtype: The dtype of the weights, or `"auto"` for that of the checkpoint.
    """
    import transformers

    from ..reporting.pretrained import load_pretrained

    kind, labels, tokenizer = (task, None, None) if isinstance(task, str) else (task.kind, task.labels, task.tokenizer)
    heads: dict[str, Any] = {}
    if kind == "answers":
        heads = {"num_labels": 2}
    elif labels is not None and labels.regression:
        heads = {"num_labels": 1}
    elif labels is not None:
        names = dict(enumerate(labels.names))
        heads = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    if labels is not None and kind != "answers":
        heads["problem_type"] = labels.problem_type  # that of the checkpoint may be another one
    # The checkpoint may have a head for other labels, which is replaced.
    auto = getattr(transformers, TASK_TYPES[TYPE_OF_KIND[kind]].auto_class)
    if dtype == "float32":  # also for a merged model, which is loaded in its own dtype
        base = load_pretrained(auto, model, ignore_mismatched_sizes=True, **heads).float()
    else:
        base = load_pretrained(auto, model, ignore_mismatched_sizes=True, dtype=dtype, **heads)
    if tokenizer is not None:
        agree_on_padding(base, tokenizer)
        _check_vocabulary(model, base, task)
    return base


def _check_vocabulary(name: str, model: Any, task: Any) -> None:
    """Raises `DataError` if the rows have tokens, or are padded with one, that the model has no embedding of."""
    from ..anatomy.modules import embedding_of

    table = getattr(embedding_of(model, "input"), "weight", None)
    rows = (*task.train.inputs, *task.validation.inputs)
    largest = max(task.tokenizer.pad_token_id, *(max(row["input_ids"], default=0) for row in rows))
    if table is not None and largest >= table.shape[0]:
        raise DataError(
            f"{name} has embeddings of {table.shape[0]:,} tokens, and its tokenizer gives the token "
            f"{task.tokenizer.convert_ids_to_tokens(largest)!r} the number {largest:,}: save the model again after "
            f"model.resize_token_embeddings(len(tokenizer))."
        )


def agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Decoders look for the last token that is not padding, so the tokenizer must pad with the token of the config.

    If the tokenizer has no such token, the config gets that of the tokenizer.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None or not 0 <= config.pad_token_id < len(tokenizer):
        config.pad_token_id = tokenizer.pad_token_id
    elif config.pad_token_id != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
