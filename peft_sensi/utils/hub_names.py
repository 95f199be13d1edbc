"""Tells names of repositories on the Hub from paths, and says why something was not found."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import first_line


UNFINISHED = "unfinished.json"  # in the folder of a training that was interrupted, see `cli.run`


def is_repo(name: str) -> bool:
    """Whether this can be the name of a repository on the Hub. A file or folder that exists here is not one."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def absolute(name: str) -> str:
    """The name of a model, to be noted in files: of a folder, its absolute path. From another place, a relative one
    would look like a name on the Hub."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def is_out_of_reach(name: str | Path) -> bool:
    """Whether a name leads to the Hub, and the Hub cannot be reached, so that only copies in the cache can be used.

    huggingface_hub tries again for 23 seconds for each file that is not in the cache. This asks once, and the answer
    holds for up to a minute, because several files of a model are loaded one after the other.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not is_repo(str(name)):
        return False
    return _gives_no_answer(constants.ENDPOINT, str(name), int(time.monotonic() // 60))


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, nothing is read from the Hub or sent to it; what is in the cache is found."""
    from huggingface_hub import constants

    # `datasets` has a setting of its own.
    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Inside, a name is read from the Hub, or only from the cache if the Hub is out of reach, which saves the wait."""
    with offline() if is_out_of_reach(name) else contextlib.nullcontext():
        yield


@functools.lru_cache
def _gives_no_answer(endpoint: str, name: str, minute: int) -> bool:
    """Whether the Hub does not answer a request about a repository. The other arguments are for the cache."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:  # an answer, such as that there is no such file
        return False
    except Exception:  # the classes of network errors depend on the Hub library's HTTP client
        return True
    return False


def is_onnx(place: Path) -> bool:
    """Whether this is an exported ONNX model: a file, or a folder without another model."""
    others = ("config.json", "adapter_config.json")
    if place.is_dir() and not any((place / name).exists() for name in others):
        return any(place.glob("*.onnx"))
    return place.suffix == ".onnx" and place.is_file()


def not_found(name: str | Path, error: Exception, what: str = "folder") -> str:
    """Says in plain words that a name leads to nothing, here and on the Hub, and what to do.

    Args:
        name: What the user gave. Paths and names of repositories can look alike.
        error: What a library raised after it had looked on the Hub. Its own text is about its own options.
        what: What could have been here, such as "folder".
    """
    text, path = str(name), Path(name)
    if "://" in text:
        return f"{text} is a web address: give a path, or the name of a repository on the Hub, such as user/name."
    if is_onnx(path):
        return (
            f"{text} is an exported ONNX model, which only `peft-sensi predict`, `evaluate` and `compare` take: give "
            f"the adapter or the model that it was exported from."
        )
    if path.is_file():
        return f"{text} is a file, not the folder of a model."
    is_path = text.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())
    if is_path or not is_repo(text):
        return f"There is no {what} {text}. Check the path."
    return f"There is no {what} {text} here, and it was not found on the Hub: {_reason(text, error)}"


def _reason(name: str, error: Exception) -> str:
    """Why the Hub did not give a repository, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    errors: list[BaseException] = [error]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) is not None and cause not in errors:
        errors.append(cause)
    if any(isinstance(each, GatedRepoError) for each in errors):
        return f"its authors must give you access. Ask at {constants.ENDPOINT}/{name}, and log in (hf auth login)."
    answers = (getattr(each, "response", None) for each in errors if isinstance(each, HfHubHTTPError))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status == 404 or any(isinstance(each, RepositoryNotFoundError) for each in errors):
        return "there is none with this name that you may read. Check the name, or log in (hf auth login)."
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids downloads, and the cache has no copy. Check the name."
    if status is not None:
        return f"it answered with the error {status}. Try again later, or log in (hf auth login)."
    # The library's HTTP client has its own classes of errors.
    if any(isinstance(each, (LocalEntryNotFoundError, ConnectionError, TimeoutError)) for each in errors):
        return "it cannot be reached, and the cache has no copy. Check the name and the connection."
    return first_line(error)
