"""Our own files are complete or absent: written under a temporary name, flushed to the disk, and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .errors import SensiError, SensiLoadError


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls `write` with a temporary name beside `path`, then renames. The old file stays until the new one is whole.

    Raises `SensiError` when the disk is full or nothing can be written there; the old file is then as it was.
    """
    path = Path(path)
    # Not `mkstemp`, whose files only the owner may read.
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        write(str(temporary))
        _flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SensiError(f"{path} could not be written, and is as it was before: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the rename itself; not every system can flush a folder
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


Spec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def find_weights(place: str | os.PathLike, subfolder: str | None, hub: Mapping[str, Any]) -> str | None:
    """Path of the safetensors file in a folder or a repository of the Hub; `None` where there are no weights at all.

    PEFT would fall back to `adapter_model.bin`, a pickle. Raises `SensiLoadError` for that.
    """
    folder = os.path.join(place, subfolder or "")
    if os.path.isdir(folder):
        if os.path.exists(path := os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
            return path
        if os.path.exists(path := os.path.join(folder, WEIGHTS_NAME)):
            raise _only_safetensors(path)
        return None
    hub = {key: value for key, value in hub.items() if key not in ("subfolder", "user_agent", "use_auth_token")}
    try:
        return hf_hub_download(str(place), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    except EntryNotFoundError:
        pass
    except (OSError, ValueError, HfHubHTTPError):
        return None  # no such repository, no connection: PEFT says that
    pickled = "/".join(filter(None, (subfolder, WEIGHTS_NAME)))
    known = {key: hub[key] for key in ("cache_dir", "revision") if hub.get(key) is not None}
    found = isinstance(try_to_load_from_cache(str(place), pickled, **known), str)
    if not found and not constants.HF_HUB_OFFLINE and not hub.get("local_files_only"):
        with suppress(Exception):  # no connection, in the words of whatever HTTP client the Hub's library has
            found = file_exists(str(place), pickled, revision=hub.get("revision"), token=hub.get("token"))
    if found:
        raise _only_safetensors(f"{place}/{pickled}")
    return None


def _only_safetensors(path: str) -> SensiLoadError:
    return SensiLoadError(
        f"{path}: only safetensors files are read, and there is no {SAFETENSORS_WEIGHTS_NAME}; a pickle could run "
        f"code. Ask its author to save the adapter again."
    )


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """`safe_open`, whose errors become `SensiLoadError`s that name the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SensiError:
        raise
    # What a header can provoke in the reader and in PyTorch's constructors.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise SensiLoadError(
            f"{path}: expected a whole safetensors file, found: {error} (a save may have been interrupted)."
        ) from error


def read_specs(path: str, file: Any) -> dict[str, Spec]:
    """Shape and dtype of each tensor, from the header alone."""
    specs = {}
    for key in file.keys():
        part = file.get_slice(key)
        if part.get_dtype() not in _DTYPES:
            raise SensiLoadError(f"{path}: {key!r} has the dtype {part.get_dtype()}, expected one of {list(_DTYPES)}.")
        specs[key] = (tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    return specs


def flush(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds; empty where there is none, for files that need not be there."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
