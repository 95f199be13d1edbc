"""The command `peft-sensi`. Arguments and files go in; tables or JSON, adapters, models and cards come out.

Results go to stdout, everything else to stderr. Exit status: 0 for success, 1 for a problem with a file, a model or a
budget (one line says which), 2 for wrong arguments, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

Help and the list of recipes need no PyTorch: modules import it inside the functions that need it. Where PyTorch or
PEFT is not installed, `peft-sensi measure FOLDER` works too (see `device`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..utils.errors import TRAINING_STACK, how_to_install


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process. `arguments` defaults to the process's own, `sys.argv[1:]`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    missing = [name for name in ("typer", "rich", *TRAINING_STACK) if not is_installed(name)]
    if missing and arguments[:1] == ["measure"]:
        from .device import main as measure_on_device

        measure_on_device(arguments[1:], missing[0])
    if missing and missing[0] not in TRAINING_STACK:
        sys.exit(f"error: the command needs {missing[0]}: {how_to_install('cli')}")
    from .commands import app

    app(args=arguments, prog_name="peft-sensi")


def is_installed(name: str) -> bool:
    """Whether a package can be found. It is not imported."""
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False
