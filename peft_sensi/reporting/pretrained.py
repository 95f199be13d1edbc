"""The name of a model goes in, a folder or a repository of the Hub; its files, its tokenizer or the model come out.

Nothing runs code of the repository, and each error says in one line what was not found or cannot be loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoTokenizer
from transformers.utils import cached_file

from ..anatomy.widths import RECORD_KEY
from ..merging.load import load_merged_as
from ..utils.checks import is_number, shown
from ..utils.errors import SensiError, first_line
from ..utils.files import read_json_object
from ..utils.hub_names import is_out_of_reach, not_found


TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MARKS = (TOKENIZER_CONFIG, "tokenizer.json")  # a folder with one of them has a tokenizer
# The files that the tokenizers of Transformers save (`vocab_files_names`), and those that all of them have in common.
TOKENIZER_FILES = (
    *TOKENIZER_MARKS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "prophetnet.tokenizer", "byte_maps.json", "emoji.json",
    "entity_vocab.json", "normalizer.json", "vocab-src.json", "vocab-tgt.json", "word_pronunciation.json",
    "word_shape.json",
)  # fmt: skip


def file_in(name: str, file: str) -> Path | None:
    """A file of a folder, or of a repository of the Hub; `None` if it is not there."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).exists() else None
    with contextlib.suppress(Exception):  # no connection, no such repository: loading the model says that
        local = is_out_of_reach(name)
        found = cached_file(name, file, local_files_only=local, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)
    return None


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained`, without remote code and with errors of one line. Raises `SensiError`.

    A merged model with widths of its own is loaded as by `load_merged`, with a new head if the labels differ.
    """
    _refuse_file(name)
    try:
        if hasattr(auto_class, "_model_mapping") and (folder := _merged_folder(name)) is not None:
            if (config := options.get("config")) is not None:
                options = {key: getattr(config, key) for key in ("num_labels", "id2label", "label2id", "problem_type")}
            changes = {key: value for key, value in options.items() if key != "ignore_mismatched_sizes"}
            return load_merged_as(folder, auto_class, changes)
        if is_out_of_reach(name):
            options["local_files_only"] = True
        if not hasattr(auto_class, "_model_mapping"):
            return auto_class.from_pretrained(name, trust_remote_code=False, **options)
        model, report = auto_class.from_pretrained(name, trust_remote_code=False, output_loading_info=True, **options)
        _check_loaded(model, name, report["missing_keys"])
        return model
    except SensiError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        if not Path(name).is_dir() and isinstance(error, (OSError, HFValidationError)):
            raise SensiError(not_found(name, error)) from error
        if "Unrecognized configuration class" in str(error):  # no class for this task in the family
            check_takes_texts(name)
        raise SensiError(f"{name} cannot be loaded as a model: {first_line(error)}") from error


def _check_loaded(model: Any, name: str, missing: Collection[str]) -> None:
    """Raises `SensiError` if most weights of a model are missing in its checkpoint `name`, so that they are random.

    This happens where Transformers' class for a task uses another prefix than the rest of the family, such as
    `LlamaForQuestionAnswering`. A task head alone may be missing.
    """
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    if 2 * sum(sizes.get(key, 0) for key in missing) > sum(sizes.values()):
        raise SensiError(
            f"{name} does not have the weights of a {type(model).__name__}, which would be random: choose a model of "
            f"another family for this task."
        )


def _refuse_file(name: str) -> None:
    """Raises `SensiError` if there is a file of this name. From some files, Transformers makes a useless tokenizer."""
    if Path(name).is_file():
        raise SensiError(not_found(name, FileNotFoundError()))


def check_takes_texts(name: str) -> None:
    """Raises `SensiError` if the config has no vocabulary: the model is one of images or sounds."""
    config = load_pretrained(transformers.AutoConfig, name)
    if not hasattr(config.get_text_config(), "vocab_size"):
        raise SensiError(
            f"{name} ({config.model_type}) takes no texts, and this command needs a model that does. For other "
            f"models, use SensiConfig in Python."
        )


def pretrained_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a folder or of a repository. Raises `SensiError` if it has none, or a damaged one."""
    _refuse_file(name)
    try:
        if is_out_of_reach(name):
            options["local_files_only"] = True
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # a damaged file can raise anything, also errors of the tokenizers library
        folder = Path(name)
        if not folder.is_dir() and isinstance(error, (OSError, HFValidationError)):
            raise SensiError(not_found(name, error)) from error
        if not folder.is_dir() or any((folder / file).exists() for file in TOKENIZER_FILES):
            raise SensiError(f"The tokenizer of {name} cannot be loaded: {first_line(error)}") from error
        found = None
    if found is not None and not (is_number(found.model_max_length) and found.model_max_length >= 1):
        raise SensiError(f"The tokenizer of {name} has the longest input {shown(found.model_max_length)}.")
    # Without its files, Transformers 5 makes one that knows special tokens only: all words would be the same to it.
    if found is None or len(found) <= len(found.all_special_tokens):
        if file_in(name, "config.json") is not None:
            check_takes_texts(name)
        raise SensiError(f"{name} has no tokenizer: save the one that belongs to the model into the same folder.")
    return found


def _merged_folder(name: str) -> Path | None:
    """The folder of a merged model that stock loaders cannot load; `None` for other models."""
    file = file_in(name, "config.json")
    if file is None or read_json_object(file).get(RECORD_KEY) is None:
        return None
    if Path(name).is_dir():
        return file.parent
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
