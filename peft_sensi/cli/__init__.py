"""The entry point of the command `peft-sensi`; the commands themselves are in `commands.py`.

Exit status: 0 done; 1 something is wrong with a file, a model or a budget (one line says what); 2 wrong arguments;
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process, as commands do."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"error: the command needs {error.name}: pip install 'peft-sensi[cli]'")
    app(args=None if arguments is None else list(arguments), prog_name="peft-sensi")


if __name__ == "__main__":
    main()
