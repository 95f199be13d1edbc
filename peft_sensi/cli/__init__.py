"""The command `peft-sensi`. Arguments and files go in; tables or JSON, adapters, models and cards come out.

Results go to stdout, everything else to stderr. Exit status: 0 for success, 1 for a problem with a file, a model or a
budget (one line says which), 2 for wrong arguments, 130 for an interruption with Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process. `arguments` defaults to the process's own, `sys.argv[1:]`."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"error: the command needs {error.name}: pip install 'peft-sensi[cli]'")
    app(args=None if arguments is None else list(arguments), prog_name="peft-sensi")


if __name__ == "__main__":
    main()
