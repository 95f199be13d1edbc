"""Runs command lines, and draws what they print on a terminal as an SVG picture. Needs the extra `cli`.

    cd FOLDER  # with the files and models that the lines name
    python .../examples/terminal_picture.py docs/terminal.svg "peft-sensi plan all-MiniLM-L6-v2 --data train.tsv"

Only standard output is drawn, with colors. The picture loads nothing from elsewhere: it uses the reader's own font.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text


# rich's template names a font on the network. A picture in a README must not load anything.
WEB_FONT = re.compile(r"@font-face\s*{[^}]*}")


def run(line: str, columns: int) -> str:
    """What a command line prints on a terminal of this width. Raises `SystemExit` if it fails."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(columns)}
    words = shlex.split(line)
    if words[0] == "peft-sensi":  # of this environment, whether or not it is on the path
        words = [sys.executable, "-c", "from peft_sensi.cli import main; main()", *words[1:]]
    done = subprocess.run(words, stdout=subprocess.PIPE, env=environment, text=True)
    if done.returncode:
        raise SystemExit(f"`{line}` failed with status {done.returncode}")
    return done.stdout


def draw(session: list[tuple[str, str]], path: Path, columns: int, title: str) -> None:
    """Writes the picture of command lines and what they printed (with ANSI colors)."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, highlight=False)
    for line, printed in session:
        console.print(Text.assemble(("$ ", "bold green"), (line, "bold")))
        console.print(Text.from_ansi(printed), soft_wrap=True)
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id="terminal")
    svg = WEB_FONT.sub("", svg).replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("lines", nargs="+", metavar="LINE")
    parser.add_argument("--columns", type=int, default=88)
    parser.add_argument("--title", default="peft-sensi")
    options = parser.parse_args(arguments)
    draw(
        [(line, run(line, options.columns)) for line in options.lines], options.picture, options.columns, options.title
    )


if __name__ == "__main__":
    main()
