"""A merged model goes in; a folder comes out, with the weights, the config and what rebuilds the widths of the layers.

The config has two hashes, of itself and of the header of the weights file (see `hashes`).

The folder has one of two forms. If the fields of the config can express the widths, it is a plain checkpoint, which
any `from_pretrained` loads. If not, `config.json` contains a record of all widths (see `widths`) and the name of the
weights file. Stock loaders do not look for a file of that name: without this package (or the generated modeling file)
they find no weights and raise, even with `ignore_mismatched_sizes`.

Every save writes its weights under a new name. `config.json` names the weights and is replaced last, in one step. So
the folder contains the old model or the new one, no matter when the process is killed.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.modules import unwrapped
from ..anatomy.widths import RECORD_KEY, SAVED_BY, config_fields, find_widths, is_merged, on_meta, stock_class
from ..layers.layer import SensiLayer
from ..tuner.model import SensiModel
from ..utils.errors import SensiError
from ..utils.files import move_files, new_folder, open_safetensors, read_json_object, writing
from .foreign import MODEL_CONFIG, MODEL_WEIGHTS, OTHER_WEIGHTS, OWN_WEIGHTS, with_floats
from .hashes import HASH_KEY, hashes_of
from .modeling_file import write_modeling_file


_TEMPORARY = ".sensi-"


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """A merged copy of a `PeftModel`. A model that is merged already is returned itself.

    Its class is one of Transformers: a model that was loaded with our modeling file is returned as a shallow copy.

    Raises `SensiError` if the adapter is of another method, or the model class is not one of Transformers.
    """
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, SensiModel):
            raise SensiError(
                f"The model's adapter is a {type(model.base_model).__name__}, not one of this package: call "
                f"`merge_and_unload()` and the model's own `save_pretrained`."
            )
        model = copy.deepcopy(model).merge_and_unload()
    elif any(isinstance(module, SensiLayer) for module in model.modules()):
        raise SensiError(
            "The model contains adapter layers, but is not a `PeftModel`: pass the `PeftModel` around it, or load the "
            "adapter with `PeftModel.from_pretrained`."
        )
    cls = stock_class(model)
    assert isinstance(model, PreTrainedModel) and cls.config_class is not None
    if type(model) is not cls:
        model, config = copy.copy(model), copy.deepcopy(model.config)  # the user's own object keeps its class
        model.__class__, config.__class__ = cls, cls.config_class
        vars(config).pop("auto_map", None)
        model.config = config
    return model


def save_merged(model: nn.Module, folder: str | os.PathLike[str], modeling: bool = True) -> bool:
    """Saves a merged model: its weights as safetensors, its config, and a record of its layers' widths.

    Args:
        model: What `merge_and_unload` returned, or a `PeftModel` with an adapter of this package. The latter does not
            change: a copy is merged.
        folder: Is created if it does not exist. A model that `save_merged` wrote there before stays valid until the
            new one is complete. Unrelated files (a tokenizer, a card) stay.
        modeling: Whether to write a small modeling file. With it, `trust_remote_code=True` loads the folder where this
            package is not installed. Plain checkpoints do not need it.

    Returns:
        Whether the folder is a plain checkpoint, which any `from_pretrained` loads.

    Raises:
        SensiError: The model cannot be rebuilt from files, or loaders would mix it up with something in the folder, or
            the folder cannot be written.
    """
    folder = Path(folder)
    _check_place(folder)
    model = merged_copy(model)
    _check_weights(folder, model)
    config = copy.deepcopy(model.config)
    for key in (RECORD_KEY, HASH_KEY):
        vars(config).pop(key, None)
    empty = on_meta(type(model), config)
    widths = find_widths(model, empty)
    edits = config_fields(model, widths)
    plain = edits is not None
    config.update(edits or {})
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return plain  # only the first process writes
    with writing(folder), new_folder(folder), tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as name:
        temporary = Path(name)
        # Transformers writes dtypes, tied weights and generation settings in the form that it reads.
        type(model).save_pretrained(
            model, temporary, state_dict=_state_to_save(model, empty), max_shard_size=2**62, save_original_format=plain
        )
        saved = read_json_object(temporary / MODEL_CONFIG)  # `save_pretrained` sets fields in the model's own config
        config.save_pretrained(temporary)
        values = _complete(read_json_object(temporary / MODEL_CONFIG), config)
        values |= {key: saved[key] for key in ("architectures", "dtype") if key in saved}
        values.pop("auto_map", None)
        weights = f"{'' if plain else 'sensi_'}model-{secrets.token_hex(8)}.safetensors"
        os.replace(temporary / MODEL_WEIGHTS, temporary / weights)
        if plain:
            values |= SAVED_BY | {"transformers_weights": weights}
        else:
            values[RECORD_KEY] = widths.to_record(type(model).__name__) | {"weights": weights}
            if modeling:
                values["auto_map"] = write_modeling_file(empty, temporary)
        _write_config(temporary, values, temporary / weights)
        files = sorted(temporary.iterdir(), key=lambda path: path.name == MODEL_CONFIG)
        move_files(files, folder)
        if plain:
            # Tools expect the usual name. The folder is valid without it, and it must not replace the weights that the
            # old config names. So this copy comes last.
            shutil.copyfile(folder / weights, temporary / MODEL_WEIGHTS)
            # Its presence tells that no other program has saved the folder again (see `load._read`).
            values["transformers_weights"] = MODEL_WEIGHTS
            _write_config(temporary, values, temporary / MODEL_WEIGHTS)
            move_files([temporary / MODEL_WEIGHTS, temporary / MODEL_CONFIG], folder)
            weights = MODEL_WEIGHTS
    # Weights that no config names any more are removed: a stock loader could mistake them for the new model's.
    for path in folder.iterdir():
        if path.name.startswith(_TEMPORARY) and path.is_dir():  # of an interrupted save
            shutil.rmtree(path, ignore_errors=True)
        if path.name != weights and (path.name == MODEL_WEIGHTS or OWN_WEIGHTS.fullmatch(path.name)):
            path.unlink(missing_ok=True)
    return plain


def _complete(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """The values of a config's file, with those that it lacks although the reader would not choose the same.

    Transformers leaves out what equals the default of all configs, also where a family has another default: two labels
    of a BART, whose default is three.
    """
    read_again = type(config).from_dict(with_floats(values))
    wanted, found = (json.loads(each.to_json_string(use_diff=False)) for each in (config, read_again))
    return values | {key: value for key, value in wanted.items() if key not in values and value != found.get(key)}


def _state_to_save(model: PreTrainedModel, empty: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict, with a copy of each tensor that is shared here but not in a new model of this config.

    Transformers writes a shared tensor once. It would be missing in the file for a model that does not share it: for
    example, `resize_token_embeddings` gives two biases of BERT the same tensor, also if nothing is tied.
    """
    state, first = dict[str, torch.Tensor](), dict[int, str]()
    own = empty.state_dict(keep_vars=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        other = first.setdefault(id(tensor), name)
        tied = own.get(name) is own.get(other)
        state[name] = tensor.detach() if tied else tensor.detach().clone()
    return state


def _check_weights(folder: Path, model: PreTrainedModel) -> None:
    """Raises `SensiError` if another program has saved weights here that would be lost, whatever the config says.

    When Transformers saves a merged model that was trained on, it keeps our fields of the config, but not the names of
    our weights files. The same values may be there: sentence-transformers writes them first.
    """
    values = read_json_object(folder / MODEL_CONFIG, optional=True)
    record = values.get(RECORD_KEY)
    named = record.get("weights") if isinstance(record, dict) else None
    if named or "transformers_weights" in values or not (folder / MODEL_WEIGHTS).exists():
        return
    state = model.state_dict()
    with open_safetensors(folder / MODEL_WEIGHTS) as file:
        if all(name in state and _equal(file.get_tensor(name), state[name]) for name in file.keys()):
            return
    raise SensiError(
        f"{folder / MODEL_WEIGHTS} holds other values, which peft_sensi did not write: perhaps a merged model that "
        f"was trained on, or the adapter's base. They would be lost: give another folder, or delete the file first."
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.detach().cpu())


def check_folder(folder: Path) -> None:
    """Raises `SensiError` if a merged model cannot be saved in this folder, because of what is in it.

    `save_merged` also allows weights that are equal to those of the model, which is not known here.
    """
    _check_place(folder)
    values = read_json_object(folder / MODEL_CONFIG, optional=True)
    if (folder / MODEL_WEIGHTS).exists() and not is_merged(values):
        raise SensiError(
            f"{folder} holds a model that peft_sensi did not write, perhaps the adapter's base, and it would be "
            f"lost: give another folder."
        )


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SensiError(f"{folder} is a file: give the path of a folder.")
    for name in (CONFIG_NAME, *OTHER_WEIGHTS):
        if (folder / name).exists():
            raise SensiError(
                f"{folder} holds {name!r}, and loaders would read that instead of the merged model: give another "
                f"folder."
            )


def _write_config(folder: Path, values: dict[str, Any], weights: Path) -> None:
    values = {**values, HASH_KEY: hashes_of(values, weights)}
    # Not `sort_keys`: it would put label 10 before label 2, because the keys of JSON are strings.
    (folder / MODEL_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
