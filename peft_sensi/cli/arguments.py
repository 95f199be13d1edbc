"""The arguments that several commands take, and how they are read and checked."""

from __future__ import annotations

import enum
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .. import recipes
from ..merging.load import OTHER_WEIGHTS, WEIGHTS
from ..planning.budget import Budget
from ..scoring.criteria import METHODS
from ..utils.errors import SensiError


Score = enum.StrEnum("Score", {name: name for name in METHODS})  # type: ignore[misc]
Recipe = enum.StrEnum("Recipe", {name: name for name in recipes.RECIPES})  # type: ignore[misc]
FISHER = Score("fisher")


class Style(enum.StrEnum):
    light = "light"
    dark = "dark"


BUDGET, DATA = "The budget", "The data"
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model on the Hub, or a folder.", show_default=False)]
Adapter = Annotated[
    str,
    typer.Argument(metavar="ADAPTER", help="An adapter's folder, or its name on the Hub.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show Python's traceback when something goes wrong.")]
Base = Annotated[str | None, typer.Option(metavar="MODEL", help="The base model, if not the one the adapter names.")]
Params = Annotated[
    str | None,
    typer.Option("--budget", "--params", metavar="LIMIT", rich_help_panel=BUDGET,
                 help="Parameters of heads and neurons that stay: a share (0.5) or a count (40000000)."),
]  # fmt: skip
Flops = Annotated[str | None, typer.Option(metavar="LIMIT", rich_help_panel=BUDGET, help="The same for their FLOPs.")]
Trainable = Annotated[
    str | None,
    typer.Option(metavar="LIMIT", rich_help_panel=BUDGET, help="Values to tune: a share of the base, or a count."),
]
Ranking = Annotated[
    Score, typer.Option("--score", metavar="NAME", help="fisher, taylor, mask, movement, magnitude or random.")
]
SavedScores = Annotated[
    Path | None, typer.Option("--scores", metavar="FILE", help="Scores from --save-scores, instead of scoring again.")
]
Text_ = Annotated[
    str | None, typer.Option("--text-column", metavar="NAME", rich_help_panel=DATA, help="Found if there is no doubt.")
]
Pair = Annotated[
    str | None, typer.Option("--pair-column", metavar="NAME", rich_help_panel=DATA, help="The second of two texts.")
]
Label = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", rich_help_panel=DATA, help="Default: label.")
]
Regression = Annotated[
    bool,
    typer.Option("--regression", rich_help_panel=DATA, help="Labels are amounts, not classes."),
]
MaxLength = Annotated[
    int, typer.Option(min=2, metavar="N", rich_help_panel=DATA, help="Longer texts are cut, in tokens.")
]
MaxRows = Annotated[
    int | None, typer.Option(min=2, metavar="N", rich_help_panel=DATA, help="A random choice of so many rows.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows in a batch.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Of everything random.")]


def check_out(folder: Path) -> None:
    """Before hours of training: whether the adapter can go there. Raises `SensiError`."""
    if folder.exists() and not folder.is_dir():
        raise SensiError(f"{folder} is a file; --out names a folder.")
    if found := [name for name in (WEIGHTS, *OTHER_WEIGHTS) if (folder / name).exists()]:
        raise SensiError(f"{folder} holds a model ({found[0]}), which the adapter would spoil: give another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SensiError(f"Nothing can be written to {folder}: {error}.") from None


def limits_of(params: str | None, flops: str | None, trainable: str | None) -> dict[str, float | int] | None:
    """Options as a budget: `0.5` is a share, `40000000` a count. `None` lets the library choose its default."""
    given = {"params": params, "flops": flops, "trainable": trainable}
    return {name: number(name, text) for name, text in given.items() if text is not None} or None


def number(name: str, text: str) -> float | int:
    try:
        value: float | int = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        try:
            value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise SensiError(f"--{name} {text}: a limit is a share such as 0.5 or 50%, or a whole count.") from None
        value = int(value) if value > 1 and value.is_integer() else value
    Budget.parse({name: value})
    return value
