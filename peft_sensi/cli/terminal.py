"""How the commands talk: results on stdout, everything else on stderr, errors in one line."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ..utils.errors import SensiError


out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def readable(command: Callable[..., None]) -> Callable[..., None]:
    """What goes wrong ends the command with one line and exit status 1; with `debug=True` Python's traceback too."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has seen enough
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            expected = isinstance(error, (SensiError, OSError, ImportError))
            text = " ".join(str(error).split()) or "no reason was given"
            line = text if expected else f"{type(error).__name__}: {text} (unexpected; --debug shows where)"
            err.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapper


def quiet_libraries() -> None:
    """Only warnings that users can do something about, a line each."""
    from transformers.utils import logging

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights, which has our own spinner
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        err.print(Text.assemble(("warning: ", "yellow"), " ".join(str(message).split())), soft_wrap=True)

    warnings.showwarning = show


@contextlib.contextmanager
def step(what: str, show: bool = True) -> Iterator[None]:
    """A spinner on a terminal, and afterwards a line with the seconds; for what has no progress bar of its own."""
    start = time.perf_counter()
    status = err.status(what) if show and err.is_terminal else contextlib.nullcontext()
    with status:
        yield
    if show:
        err.print(Text(f"{what}: {time.perf_counter() - start:.1f} s", "dim"))


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """One JSON value on stdout, without color or wrapping. NaN and infinity become null, which JSON has."""
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False, default=str) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ascii_only() -> bool:
    """Whether this output cannot show block characters."""
    try:
        "█▒·".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return True
    return False
