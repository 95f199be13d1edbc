"""The arguments that several commands share, with their help texts, and the checks of their values."""

from __future__ import annotations

import enum
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo

from ..planning.budget import LIMITS, TIMES, Budget, nanoseconds
from ..plotting.canvas import STYLES
from ..recipes import RECIPES
from ..scoring.methods import METHODS
from ..utils.errors import BudgetError, SensiError


Score = enum.StrEnum("Score", {name: name for name in METHODS})  # type: ignore[misc]
Recipe = enum.StrEnum("Recipe", {name: name for name in RECIPES})  # type: ignore[misc]
Style = enum.StrEnum("Style", {name: name for name in STYLES})  # type: ignore[misc]
ClassWeights = enum.StrEnum("ClassWeights", {"balanced": "balanced"})  # type: ignore[misc]
FISHER, LIGHT = Score("fisher"), Style("light")
CALIBRATION_STEPS, PRIMING_STEPS = 8, 48


def option(names: str, metavar: str | None, help: str, panel: str | None = None, **limits: Any) -> Any:
    """An option with one or several names, which `--help` shows in a panel of its own if `panel` is given.

    A flag has no `metavar`. Without a text, typer would show `<bool>` for it, as if it took a value.
    """
    return typer.Option(*names.split(), metavar=metavar or "", help=help, rich_help_panel=panel, **limits)


def argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


BUDGET, DATA = "The budget", "The data"
Model = Annotated[str, argument("MODEL", "The name of a model on the Hub, or a folder.")]
Adapter = Annotated[str, argument("ADAPTER", "The name of an adapter on the Hub, or a folder.")]
AdapterOrMerged = Annotated[
    str, argument("ADAPTER_OR_MERGED", "An adapter or a merged model: a folder, or its name on the Hub.")
]
Repo = Annotated[str, argument("REPO", "The name on the Hub: user/name.")]
Json = Annotated[bool, option("--json", None, "Print one JSON value instead of tables.")]
Base = Annotated[
    str | None, option("--base", "MODEL", "Use this base model. Default: the one that the adapter names.")
]


def _limit(names: str, help: str) -> tuple[Any, None]:
    return Annotated[str | None, option(names, "LIMIT", help, BUDGET)], None


# The names are those of the arguments of `limits_of`, and `latency_table`.
BUDGET_OPTIONS: dict[str, tuple[Any, Any]] = {
    "params": _limit(
        "--budget --params",
        "Parameters of heads and neurons to keep: a share (0.5) or a count (40000000). Default: 0.5, without another "
        "limit.",
    ),
    "flops": _limit("--flops", "FLOPs of heads and neurons to keep: a share or a count."),
    "latency": _limit("--latency", "Latency of the model: a share (0.5) or a time (12ms)."),
    "decode_latency": _limit("--decode-latency", "Latency of one decoding step: a share or a time."),
    "latency_table": (
        Annotated[
            list[Path] | None,
            option(
                "--latency-table", "FILE", "A table of `peft-sensi measure`. Default: measure this machine.", BUDGET
            ),
        ],
        None,
    ),
    "trainable": _limit("--trainable", "Values to train: a share of the base's parameters, or a count."),
}
Ranking = Annotated[
    Score | None,
    option("--score", "NAME", "Rank by fisher, taylor, mask, movement, magnitude or random. Default: fisher."),
]
SavedScores = Annotated[
    Path | None, option("--scores", "FILE", "Use the scores in this file, which `plan --save-scores` wrote.")
]
Weights = Annotated[
    ClassWeights | None,
    option(
        "--class-weights",
        "balanced",
        "Let all classes count the same in the loss, however rare. Default: all rows do.",
    ),
]
BatchSize = Annotated[int, option("--batch-size", "N", "Rows in each batch.", min=1)]
Bf16 = Annotated[
    bool | None,
    option("--bf16/--no-bf16", None, "Train with bfloat16 mixed precision. Default: if that is faster here."),
]
Overwrite = Annotated[bool, option("--overwrite", None, "Replace the results of another run in the folder.")]
OverwriteFiles = Annotated[bool, option("--overwrite", None, "Replace what an earlier run has written.")]
Resume = Annotated[
    bool, option("--resume", None, "Go on with a training that was interrupted, with the same options.")
]
Seed = Annotated[int, option("--seed", "N", "The seed of all random choices.", min=0, max=2**32 - 1)]
Results = Annotated[
    Path | None,
    option("--results", "FILE", "Results for the card, as JSON. Default: metrics.json of the adapter, if any."),
]
License = Annotated[
    str | None, option("--license", "NAME", "The license for the card, such as apache-2.0. Default: none.")
]


# Of the options of a training, those that are no part of it: a training goes on with other ones.
_MAY_CHANGE = ("out_folder", "overwrite", "resume", "as_json")


def with_options(**tables: Mapping[str, tuple[Any, Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of tables. The values of each table come as one dict, the argument of its name.

    So a command lists its own options only, and a new option of a table appears in all commands that have the table.
    A command that can go on after an interruption has an argument `given`: what must be the same then, by the names
    that users see.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for names in tables.values()
            for name, (annotation, default) in names.items()
        ]
        others = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.parameters.items()
            if name not in (*tables, "given")
        ]
        shown = {each.name: _shown_name(each) for each in (*others, *shared) if each.name not in _MAY_CHANGE}

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            values = {"given": {name: given[key] for key, name in shown.items()}} if "given" in own.parameters else {}
            values |= {table: {name: given.pop(name) for name in names} for table, names in tables.items()}
            command(**values, **given)

        _set_parameters(wrapper, [*others, *shared])
        return wrapper

    return decorate


def _shown_name(parameter: inspect.Parameter) -> str:
    """The name of an option, or the placeholder of an argument."""
    entry = get_args(parameter.annotation)[1]
    return str(entry.metavar) if isinstance(entry, ArgumentInfo) else f"--{parameter.name.replace('_', '-')}"


def with_debug(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--debug` to the options of a command that `one_line_errors` has wrapped."""
    kind = Annotated[bool, option("--debug", None, "Show Python's traceback after an error.")]
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    _set_parameters(command, [*inspect.signature(command, eval_str=True).parameters.values(), debug])
    return command


def _set_parameters(command: Any, parameters: list[inspect.Parameter]) -> None:
    """Sets the parameters that typer finds: it reads the signature and the annotations."""
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Raises `SensiError` for the first of the options that has a value: it would change nothing, without a word."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise SensiError(f"{name} {why}: leave it out.")


def check_overwrite(overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise SensiError("--overwrite starts again, and --resume goes on: leave one of them out.")


def check_rate(lr: float | None) -> None:
    """Raises `SensiError` if the learning rate of `--lr` is not a positive number."""
    if lr is not None and not 0 < lr < float("inf"):
        raise SensiError(f"--lr must be a positive number, got {lr}.")


def check_epochs(epochs: float, name: str = "--epochs") -> None:
    """Raises `SensiError` if the passes over the data are infinitely many."""
    if epochs == float("inf"):
        raise SensiError(f"{name} must be a number of passes over the data, got {epochs}.")


def is_bf16(given: bool | None) -> bool:
    """Whether to train with bfloat16 mixed precision: as the option says, or else if it is faster here."""
    from ..utils.precision import bf16_pays

    return bf16_pays() if given is None else given


def limits_of(
    params: str | None = None,
    flops: str | None = None,
    trainable: str | None = None,
    latency: str | None = None,
    decode_latency: str | None = None,
) -> dict[str, Any] | None:
    """The budget that the options describe. `None`, without any option, stands for the library's default budget."""
    given = {"params": ("budget", params), "flops": ("flops", flops), "trainable": ("trainable", trainable)}
    limits: dict[str, Any] = {name: number(option, text) for name, (option, text) in given.items() if text is not None}
    for name, text in (("latency", latency), ("decode_latency", decode_latency)):
        if text is not None:
            limits[name] = text if nanoseconds(text) else number(name.replace("_", "-"), text, "a time such as 12ms")
    if limits:
        check_limits(limits)
    return limits or None


def check_limits(limits: Mapping[str, Any], option: str | None = None) -> None:
    """Raises a `BudgetError` that names the option (by default, that of the limit) and not the library's argument."""
    options = {name: f"--{name.replace('_', '-')}" for name in (*LIMITS, *TIMES)} | {"params": "--budget"}
    try:
        Budget.parse(limits)
    except BudgetError as error:
        text = re.sub(r"`(\w+)`", lambda name: option or options.get(name[1], name[0]), str(error))
        raise BudgetError(text) from None


def number(option: str, text: str, other: str = "a whole count") -> float | int:
    """Reads a share (`0.5`, `50%`) or a count (`40000000`, `40_000_000`, `40,000,000`, `4e7`)."""
    digits = text
    if "," in text:
        # 0,5 and 0,500 are decimal commas: no count starts with a zero.
        if not re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", text):
            raise SensiError(
                f"--{option} {text}: write decimals with a point, such as 0.5. Commas may only separate thousands, as "
                f"in 1,000,000."
            )
        digits = text.replace(",", "")
    with suppress(ValueError):
        return int(digits)
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise SensiError(f"--{option} {text}: a limit is a share such as 0.5 or 50%, or {other}.") from None
    return int(value) if value > 1 and value.is_integer() else value
