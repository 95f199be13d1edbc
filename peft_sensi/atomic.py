"""Our own files are complete or absent: written under a temporary name, flushed to the disk, and renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import SensiError


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
