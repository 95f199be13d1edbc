"""Access to files: opens safetensors files, reads JSON, and replaces files atomically.

Every error names the file. An incomplete file is an error; no part of it is used.

PyTorch, safetensors and the Hub library are imported inside functions: a device that only measures latencies (see
`merging.latency_graphs`) reads and writes JSON without them.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import SensiError, SensiLoadError


if TYPE_CHECKING:
    import torch


Spec: TypeAlias = "tuple[tuple[int, ...], torch.dtype]"  # shape and dtype of a tensor

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Creates or replaces a file. The old content stays until the new content is complete and on the disk.

    `write` is called with the name of a temporary file in the same folder and writes the content there. If that fails,
    for example because the disk is full, the old file is unchanged, and a `SensiError` is raised.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # the file would take the place of a device such as /dev/null
        raise SensiError(f"{path} could not be written: it is a folder, a device or a pipe.")
    # Not `mkstemp`: only the owner may read the files that it creates.
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with writing(path):
            write(str(temporary))
            make_readable(temporary)
            flush(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a file system that is read only refuses this also if there is no file
            temporary.unlink()
    flush(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises a `SensiError` that names the file or folder if the block cannot write: the disk is full, for example."""
    try:
        yield
    except Exception as error:
        # By its name, because safetensors may not be installed where this runs.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise SensiError(f"{path} could not be written ({error}). Nothing was changed.") from error


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Creates a folder that does not exist, and removes it if the block fails before anything is in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            for folder in missing:
                folder.rmdir()
        raise


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one around it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_json_atomically(path: str | os.PathLike, value: Any) -> None:
    """Writes `json_text` of a value as `write_atomically` does."""
    write_text_atomically(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN and no infinity: they become null.

    Sets and arrays become lists, numbers of NumPy become numbers, and other objects become texts.
    """

    def plain(other: Any) -> Any:
        if isinstance(other, set):
            return sorted(other)
        return other.tolist() if hasattr(other, "tolist") else str(other)

    text = json.dumps(value, default=plain)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=indent, ensure_ascii=False)


def move_files(files: Sequence[Path], folder: Path) -> None:
    """Moves files into a folder on the same disk, in the given order. Existing files of these names are replaced.

    The last file is the one that refers to the others (a config, for example). It gets its name only after all others
    are on the disk, so an interruption leaves either the old or the new set of files in use.
    """
    for file in files:
        make_readable(file)
        flush(file)
    *others, last = files
    for file in others:
        os.replace(file, folder / file.name)
    flush(folder)
    os.replace(last, folder / last.name)
    flush(folder)


def make_readable(path: Path) -> None:
    """Gives a file the permissions of any new file. safetensors (0.8) lets only its owner read what it writes."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    probe.touch()
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def flush(path: Path) -> None:
    """Waits until the content of a file, or the list of names in a folder, is on the disk."""
    is_folder = path.is_dir()
    # Not every operating system and file system can flush a folder.
    with suppress(OSError) if is_folder else nullcontext():
        # Windows flushes only files that are open for writing.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Opens a safetensors file with `safe_open`. Tensors are read only when the caller asks for them.

    Raises `FileNotFoundError`, or `SensiLoadError` if the file is damaged or an error in the caller's block shows that
    a tensor cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:  # safetensors says that a file which may not be read does not exist
        open(path, "rb").close()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SensiLoadError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SensiError, FileNotFoundError):
        raise
    # The errors that a malformed header can cause in safetensors and in PyTorch's constructors.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise SensiLoadError(
            f"{path} is not a whole safetensors file ({error}). Perhaps a save was interrupted: save it again."
        ) from error


def read_specs(path: str | os.PathLike, file: Any) -> dict[str, Spec]:
    """Shape and dtype of each tensor of an open safetensors file. Reads the header only.

    Raises `SensiLoadError` if a tensor has a dtype that no adapter uses.
    """
    import torch

    specs = {}
    for key in file.keys():
        part = file.get_slice(key)
        if part.get_dtype() not in _DTYPES:
            raise SensiLoadError(f"{path}: {key!r} has the dtype {part.get_dtype()}, expected one of {list(_DTYPES)}.")
        specs[key] = (tuple(part.get_shape()), getattr(torch, _DTYPES[part.get_dtype()]))
    return specs


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises `FileNotFoundError`, or `SensiLoadError` if there is no JSON in the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a part of the path is a file
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise SensiLoadError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SensiLoadError(f"{path} cannot be read: it is not JSON ({error}).") from error


def read_json_object(path: str | os.PathLike, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises the errors of `read_json`.

    If it is `optional`, the result is `{}` instead, with a warning if there is a file which is damaged.
    """
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise SensiLoadError(f"{path} must hold a JSON object, found a {type(values).__name__}.")
    except FileNotFoundError:
        if optional:
            return {}
        raise
    except SensiLoadError as error:
        if not optional:
            raise
        warnings.warn(f"{error} It is not used.", stacklevel=3)
        return {}
    return values


def find_weights(place: str | os.PathLike, subfolder: str | None, hub: Mapping[str, Any]) -> str | None:
    """Path of an adapter's safetensors file. A file on the Hub is downloaded.

    Args:
        place: A folder or the name of a repository on the Hub.
        subfolder: Where the adapter is inside of `place`.
        hub: Options for `hf_hub_download`.

    Returns:
        `None` if there are no weights, or if the repository cannot be reached (PEFT then raises its own error). If
        there is only a pickle, which PEFT would load instead, a `SensiLoadError` is raised.
    """
    from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    folder = os.path.join(place, subfolder or "")
    if os.path.isdir(folder):
        if os.path.exists(path := os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
            return path
        path = os.path.join(folder, WEIGHTS_NAME)
        exists = os.path.exists(path)
    else:
        hub = {key: value for key, value in hub.items() if key not in ("subfolder", "user_agent", "use_auth_token")}
        try:
            return hf_hub_download(str(place), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
        except EntryNotFoundError:
            pass
        except (OSError, ValueError, HfHubHTTPError):
            return None
        pickled = "/".join(filter(None, (subfolder, WEIGHTS_NAME)))
        path = f"{place}/{pickled}"
        known = {key: hub[key] for key in ("cache_dir", "revision") if hub.get(key) is not None}
        exists = isinstance(try_to_load_from_cache(str(place), pickled, **known), str)
        if not exists and not constants.HF_HUB_OFFLINE and not hub.get("local_files_only"):
            with suppress(Exception):  # no connection: the error's class depends on the Hub library's HTTP client
                exists = file_exists(str(place), pickled, revision=hub.get("revision"), token=hub.get("token"))
    if exists:
        raise SensiLoadError(
            f"{path}: only safetensors files are read, because a pickle can run code, and there is no "
            f"{SAFETENSORS_WEIGHTS_NAME}. Ask the adapter's author to save it again."
        )
    return None
