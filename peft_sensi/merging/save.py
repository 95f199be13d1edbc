"""Merged models on disk: a trimmed model is saved whole, with what rebuilds the widths of its layers.

A folder is one of two things. Where the config's own fields can express the widths, it is a plain checkpoint, which
stock `from_pretrained` loads. Otherwise `config.json` holds a record of all widths (see `widths`) and the name of the
weights file, which is one that stock loaders do not look for: without this package (or the generated modeling file)
they find no weights and raise, whatever `ignore_mismatched_sizes` says.

`config.json` is what makes a save valid: it is renamed into place last and names its own weights file, so a folder
holds either the old model or the new one, whenever the process is killed.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.widths import RECORD_KEY, compare, expressed, on_meta, stock_class
from ..layers.layer import SensiLayer
from ..tuner.model import SensiModel
from ..utils.errors import SensiError
from ..utils.files import flush, read_json_object
from .load import CONFIG, OTHER_WEIGHTS, OWN_WEIGHTS, WEIGHTS, load_merged
from .modeling_file import auto_map, modeling_file


__all__ = ["load_merged", "merged_copy", "save_merged"]


_TEMPORARY = ".sensi-"
_MARK = {"saved_by": "peft_sensi"}  # in the config of a plain checkpoint, which nothing else tells from a base


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """A merged copy of a `PeftModel`, or the model itself where it already is merged. The argument stays as it was.

    Raises `SensiError` for adapters of other methods and for models that are not Transformers' own.
    """
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, SensiModel):
            raise SensiError(
                f"The model's adapter is a {type(model.base_model).__name__}, not one of this package: call "
                f"`merge_and_unload()` and the model's own `save_pretrained`."
            )
        model = copy.deepcopy(model).merge_and_unload()
    elif any(isinstance(module, SensiLayer) for module in model.modules()):
        raise SensiError("The model has adapters in place: load them with `PeftModel.from_pretrained` and pass that.")
    stock_class(model)
    assert isinstance(model, PreTrainedModel)
    return model


def save_merged(model: nn.Module, folder: str | os.PathLike[str], modeling: bool = True) -> bool:
    """Saves a merged model: weights as safetensors, its config, and what rebuilds the widths of its layers.

    Args:
        model: A `PeftModel` with an adapter of this package (stays as it is; a copy is merged), or what
            `merge_and_unload` returned.
        folder: Made if need be. Its old content stays valid until the new one is complete; files that have nothing to
            do with it (a tokenizer, a card) stay.
        modeling: Whether a small modeling file is written with which `trust_remote_code=True` loads the folder where
            this package is not installed. Plain checkpoints need none.

    Returns:
        Whether the folder is a plain checkpoint, which stock `from_pretrained` loads.

    Raises:
        SensiError: The model cannot be rebuilt from a file, or the folder holds something that would be mixed up with
            it.
    """
    folder = Path(folder)
    _check_folder(folder)
    model = merged_copy(model)
    config = copy.deepcopy(model.config)
    if hasattr(config, RECORD_KEY):
        delattr(config, RECORD_KEY)
    widths = compare(model, on_meta(type(model), config))
    edits = expressed(model, widths)
    for key, value in (edits or {}).items():
        setattr(config, key, value)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return edits is not None  # one process writes
    folder.mkdir(parents=True, exist_ok=True)
    plain = edits is not None
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as name:
        temporary = Path(name)
        # Stock code writes dtypes, tied weights and generation settings as the installed Transformers reads them.
        type(model).save_pretrained(model, temporary, max_shard_size=2**62, save_original_format=plain)
        values = _json_of(config, temporary)
        weights = f"{'' if plain else 'sensi_'}model-{secrets.token_hex(8)}.safetensors"
        os.replace(temporary / WEIGHTS, temporary / weights)
        if plain:
            values |= _MARK | {"transformers_weights": weights}
        else:
            values[RECORD_KEY] = widths.to_record(type(model).__name__) | {"weights": weights}
            if modeling:
                file_name, text = modeling_file(type(model))
                (temporary / file_name).write_text(text, encoding="utf-8")
                values["auto_map"] = auto_map(type(model), file_name)
        (temporary / CONFIG).write_text(_dumps(values), encoding="utf-8")
        _move_in(temporary, folder)
        if plain:
            _standard_name(folder, weights, values)
    _remove_old(folder, keep=WEIGHTS if plain else weights)
    return plain


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SensiError(f"{folder} is a file; give a folder.")
    if (folder / WEIGHTS).exists() and not _is_ours(folder / CONFIG):
        raise SensiError(
            f"{folder} holds a model that `save_merged` did not write, perhaps the adapter's base, and that would be "
            f"lost: give another folder."
        )
    for name in ("adapter_config.json", *OTHER_WEIGHTS):
        if (folder / name).exists():
            raise SensiError(
                f"{folder} already holds {name!r}, which loaders would take for this model: give another folder."
            )


def _is_ours(config: Path) -> bool:
    values = read_json_object(config, optional=True)
    return RECORD_KEY in values or _MARK.items() <= values.items()


def _json_of(config: Any, temporary: Path) -> dict[str, Any]:
    """The config as stock code writes it, with what saving has set on the model's own."""
    saved = json.loads((temporary / CONFIG).read_text(encoding="utf-8"))
    config.save_pretrained(temporary)
    values = json.loads((temporary / CONFIG).read_text(encoding="utf-8"))
    values |= {key: saved[key] for key in ("architectures", "dtype") if key in saved}
    values.pop("auto_map", None)
    return values


def _dumps(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _move_in(temporary: Path, folder: Path) -> None:
    """Moves all files into the folder, the config last, each of them on the disk before it has its name."""
    names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == CONFIG)
    for name in names:
        flush(temporary / name)
    for name in names:
        if name == CONFIG:
            flush(folder)
        os.replace(temporary / name, folder / name)
    flush(folder)


def _standard_name(folder: Path, weights: str, values: dict[str, Any]) -> None:
    """Gives the weights of a plain checkpoint the name that all tools expect; valid at every step."""
    spare = folder / f"{weights}.tmp"
    try:
        os.link(folder / weights, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(folder / weights, spare)
        flush(spare)
    os.replace(spare, folder / WEIGHTS)
    flush(folder)
    spare = folder / f"{CONFIG}.tmp"
    spare.write_text(_dumps({k: v for k, v in values.items() if k != "transformers_weights"}), encoding="utf-8")
    flush(spare)
    os.replace(spare, folder / CONFIG)
    flush(folder)


def _remove_old(folder: Path, keep: str) -> None:
    """Weights that no config names any more (a stock loader would take some for this model's), and cut-off saves."""
    for path in folder.iterdir():
        if path.name.startswith(_TEMPORARY) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        if path.name != keep and (path.name == WEIGHTS or OWN_WEIGHTS.fullmatch(path.name.removesuffix(".tmp"))):
            path.unlink(missing_ok=True)
