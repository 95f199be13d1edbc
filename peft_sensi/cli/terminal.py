"""What the commands print: results on stdout, progress, warnings and errors on stderr, each error in one line."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

from ..utils.errors import SensiError, how_to_install, number_of_system_error
from ..utils.files import json_text
from .resuming import can_resume


out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


# A cluster, a container or `kill` ends a process with SIGTERM. SIGHUP comes when a terminal is closed or a connection
# ends; Windows has none.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(KeyboardInterrupt):
    """A signal of `ENDING`, whose number is the argument. It unwinds the command as Ctrl-C does."""


@contextlib.contextmanager
def handling(numbers: Sequence[int], handler: Callable[..., None]) -> Iterator[None]:
    """Inside the block, these signals call the handler, except those that are ignored: `nohup` ignores SIGHUP.

    Does nothing outside of the main thread, which has signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def stop_at_once(number: int, *_: Any) -> None:
    """The handler of signals that end a command."""
    leave_lost_terminal()
    raise Ended(number) if number in ENDING else KeyboardInterrupt


def leave_lost_terminal() -> None:
    """If the terminal is closed, output goes nowhere from now on: each line would be an error, and end the command."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream)


def is_for_this_process(trains: bool) -> bool:
    """Whether this process runs the command. If a launcher has started several, all run a command that `trains`.

    Other commands run in the first process, as if it were alone: several would write the same file at the same time.
    """
    processes, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    is_first = rank in ("", "0")
    if not processes.isdecimal() or int(processes) < 2:
        return True
    if trains:
        err.quiet = not is_first
        return True
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
    err.print(Text(f"process {rank or 0} of {processes}: this command runs in process 0 only", "dim"))
    return is_first


def one_line_errors(command: Callable[..., None], loads: bool, trains: bool) -> Callable[..., None]:
    """Turns an exception of a command into one line on stderr and exit status 1.

    The traceback is printed before that line with `debug=True` (see `arguments.with_debug`). `loads` says whether the
    command needs PyTorch and PEFT, which are then imported first, and `trains` whether several processes can run it
    together.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        if not is_for_this_process(trains):
            return
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # instead of an error for a character that the terminal lacks
        try:
            with handling(ENDING, stop_at_once):
                if loads:
                    load_libraries()
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as stop:
            number = stop.args[0] if isinstance(stop, Ended) else signal.SIGINT
            word = "interrupted" if number == signal.SIGINT else "terminated"
            way = " instead of --overwrite" * bool(kwargs.get("overwrite"))
            hint = f": the same command with --resume{way} goes on" if can_resume(kwargs.get("out_folder")) else ""
            say(word + hint, style="")
            raise typer.Exit(128 + number) from None
        except BrokenPipeError:  # the program that reads our output has ended, as `head` does
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            err.quiet = False
            known = isinstance(error, (SensiError, OSError, ImportError))
            expected = known or number_of_system_error(error) is not None
            reason = str(error)
            if isinstance(error, FileNotFoundError) and error.filename is not None:
                reason = f"There is no file {error.filename}. Check the path."
            elif isinstance(error, OSError) and error.filename is not None and error.strerror:
                reason = f"{error.filename}: {error.strerror}."  # without Python's number of the error
            text = " ".join(reason.split()) or "no reason was given"
            if isinstance(error, ModuleNotFoundError):
                text += f": {how_to_install('cli')}"
            text = for_command(text)
            line = text if expected else f"{type(error).__name__}: {text} (unexpected; --debug shows the traceback)"
            say(line, "error: ", "bold red")
            raise typer.Exit(1) from None

    return wrapper


def for_command(text: str) -> str:
    """A message of the library with the command's option instead of Python's argument."""
    return text.replace("`base`", "--base")


def load_libraries() -> None:
    """Imports PyTorch and PEFT, which takes seconds, and registers the method. A terminal shows a spinner."""
    import peft_sensi

    with err.status("starting") if err.is_terminal else contextlib.nullcontext():
        peft_sensi.register()
        quiet_libraries()


def quiet_libraries() -> None:
    """Hides messages of other libraries that a user of the command cannot act on. Prints each warning in one line."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # `step` reports the loading of weights
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        print_warning(for_command(" ".join(str(message).split())))

    warnings.showwarning = show


@contextlib.contextmanager
def step(what: str, show: bool = True) -> Iterator[None]:
    """Shows a spinner while the block runs (on a terminal only), and then a line with the seconds that it took."""
    start = time.perf_counter()
    status = err.status(what) if show and err.is_terminal else contextlib.nullcontext()
    with status:
        yield
    if show:
        err.print(Text(f"{what}: {time.perf_counter() - start:.1f} s", "dim"))


def say(text: str, kind: str = "", style: str = "dim") -> None:
    """Prints a text on stderr, after its kind. A terminal gets lines that end between words; a pipe gets one line."""
    line = kind + text
    if err.is_terminal:
        line = "\n".join(textwrap.wrap(line, err.width, break_long_words=False, break_on_hyphens=False))
    shown = Text(line)
    shown.stylize(style, 0, len(kind) or None)
    err.print(shown, soft_wrap=True)


def print_warning(text: str) -> None:
    say(text, "warning: ", "yellow")


def print_understood(lines: Sequence[str], doubts: Sequence[str]) -> None:
    """Says on stderr what was understood about data, and what may be wrong about it."""
    for line in lines:
        say(line)
    for doubt in doubts:
        say(doubt, "note: ", "yellow")


def print_result(as_json: bool, value: Mapping[str, Any] | list[Any], *parts: Any) -> None:
    """Prints one JSON value on stdout, or else lines and tables."""
    if as_json:
        stdout_for_programs().write(json_text(value, indent=2) + "\n")
        return
    for part in parts:
        is_line = isinstance(part, str)  # lines are not wrapped, so that paths can be copied
        out.print(Text(part) if is_line else part, soft_wrap=is_line)


def stdout_for_programs() -> TextIO:
    """Stdout for data. In a file or a pipe it is UTF-8, because the locale of the system may lack letters."""
    if not sys.stdout.isatty() and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    return sys.stdout


def ascii_only() -> bool:
    """Whether the encoding of stdout lacks the block characters of the bars."""
    try:
        "█▒·".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return True
    return False
