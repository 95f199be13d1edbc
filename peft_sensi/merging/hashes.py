"""Hashes that detect an edited or mixed-up merged folder.

The generated modeling file contains the text of the functions, so they use the standard library only, and no
annotations of other modules.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


HASH_KEY = "peft_sensi_hash"  # in config.json


def read_header(path: Any) -> dict:
    """The header of a safetensors file: dtype, shape and place of each tensor, without the file's metadata."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:  # the limit of the format
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
            size = file.seek(0, 2)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max([0, *(entry["data_offsets"][1] for entry in entries.values())])
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Save the model again.") from None
    return entries


def hashes_of(config: dict, weights: Any) -> dict:
    """SHA-256, in hexadecimal, of a config (the object in `config.json`) and of the header of a weights file."""
    parts = {"config": {key: value for key, value in config.items() if key != "peft_sensi_hash"}}
    if weights is not None:
        parts["tensors"] = read_header(weights)
    texts = {name: json.dumps(part, sort_keys=True) for name, part in parts.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def check_hashes(folder: Any, config: dict, weights: Any) -> None:
    """Raises `ValueError` if the config or the weights file are not the ones that the config's hash was made of.

    Without `weights`, only the config is checked. A config without a hash is accepted: older folders have none.
    """
    expected = config.get("peft_sensi_hash")
    if expected is None:
        return
    for name, value in hashes_of(config, weights).items():
        if not isinstance(expected, dict) or expected.get(name) != value:
            what = "config.json was" if name == "config" else "the tensors of the weights file were"
            raise ValueError(
                f"{folder}: {what} changed after the model was saved. Restore the file, or save the model again. If "
                f"the change is wanted, delete `peft_sensi_hash` in config.json."
            )
