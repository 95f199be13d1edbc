"""The command `peft-sensi`. Arguments and files go in; tables or JSON, adapters, models and cards come out.

Results go to stdout, everything else to stderr. Exit status: 0 for success, 1 for a problem with a file, a model or a
budget (one line says which), 2 for wrong arguments, 130 for an interruption with Ctrl-C.

Without PyTorch or PEFT, only `peft-sensi measure FOLDER` works (see `device`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..utils.errors import TRAINING_STACK


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process. `arguments` defaults to the process's own, `sys.argv[1:]`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich", "click", *TRAINING_STACK):
            raise
        if arguments[:1] == ["measure"]:
            from .device import main as measure_on_device

            measure_on_device(arguments[1:], missing)
        extra = "" if missing in TRAINING_STACK else "[cli]"
        sys.exit(f"error: the command needs {missing}: pip install 'peft-sensi{extra}'")
    app(args=arguments, prog_name="peft-sensi")


if __name__ == "__main__":
    main()
