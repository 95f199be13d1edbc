"""Checks that come before anything slow: the files that will be written, what they need, and the smallest budget."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..utils.errors import BudgetError, SensiError, how_to_install
from ..utils.files import existing_parent
from ..utils.hub_names import UNFINISHED
from .resuming import can_resume, checkpoints_in


PICTURES = (".png", ".svg", ".pdf")
SCORES = "scores.safetensors"  # what `train` and `sweep` save for other budgets
TABLE, PICTURE = "sweep.json", "sweep.png"  # what `sweep` saves at its end


def check_out(
    folder: Path,
    overwrite: bool = False,
    resume: bool = False,
    more: Iterable[str] = (),
    rows: Iterable[str] = (),
) -> None:
    """Checks, before a long training, that the adapter can be saved in this folder. Creates nothing.

    `more` are names of further files that the command writes into it, and `rows` are the data that it reads.

    Raises:
        SensiError: The folder holds a model, or results that neither `overwrite` nor `resume` allows to change; or it
            is one of the folders `rows`; or nothing can be written to it.
    """
    from ..merging.foreign import MODEL_CONFIG, MODEL_WEIGHTS, OTHER_WEIGHTS, OWN_WEIGHTS
    from ..reporting.pretrained import TOKENIZER_FILES
    from ..reporting.saved import CONFIG, METRICS, WEIGHTS

    if not resume:
        check_apart(folder, rows)
    if folder.exists() and not folder.is_dir():
        raise SensiError(f"{folder} is a file: --out needs the path of a folder.")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    others = [MODEL_WEIGHTS, *OTHER_WEIGHTS]
    if not (overwrite and CONFIG in names):  # adapters of older versions have one, which `train` then removes
        others.append(MODEL_CONFIG)
    if found := [name for name in names if name in others or OWN_WEIGHTS.fullmatch(name)]:
        raise SensiError(
            f"{folder} holds a model, or a part of one ({found[0]}), and could not be loaded any more with an adapter "
            f"in it: give another folder as --out."
        )
    written = (CONFIG, WEIGHTS, METRICS, UNFINISHED, TABLE, *more, *TOKENIZER_FILES)
    own = [name for name in written if (folder / name).exists()]
    own += [path.name for path in checkpoints_in(folder)]  # a training removes those of an earlier one in its folder
    if own and not overwrite and not resume:
        ways = "give another --out, or replace it with --overwrite"
        if can_resume(folder):
            ways = "go on with --resume, or start again with --overwrite"
        raise SensiError(f"{folder} has the results of another run ({own[0]}): {ways}.")
    if resume and UNFINISHED not in own:
        raise SensiError(f"{folder} has no interrupted training to go on with: leave out --resume.")
    _check_folder_writable(folder, "--out")


def check_merged(folder: Path, overwrite: bool) -> None:
    """Checks that a merged model, its tokenizer and its metrics can be saved in this folder. Creates nothing."""
    from ..merging.foreign import MODEL_CONFIG
    from ..merging.save import check_folder
    from ..reporting.pretrained import TOKENIZER_FILES
    from ..reporting.saved import METRICS

    check_folder(folder)
    check_new([folder / name for name in (MODEL_CONFIG, METRICS, *TOKENIZER_FILES)], overwrite)
    _check_folder_writable(folder, "OUT")


def check_apart(out: Path, rows: Iterable[str], is_file: bool = False) -> None:
    """Checks that --out is not among the rows: of a folder of rows, all files are read, and so would be this one.

    Raises:
        SensiError: It is one of the files `rows`, or would be in one of the folders `rows`.
    """
    for name in rows:
        if not (place := Path(name)).exists():  # a data set of the Hub
            continue
        if is_file and out.resolve() == place.resolve():
            raise SensiError(f"--out {out} is the file of the rows, and would be replaced: give another name.")
        if place.is_dir() and (out.parent if is_file else out).resolve() == place.resolve():
            where = "is in the folder" if is_file else "is the folder"
            raise SensiError(
                f"--out {out} {where} of the rows, and the next command would read what is written there as rows: "
                f"give a path outside of {name}{'' if is_file else ', or a new folder in it'}."
            )


def check_new(paths: Iterable[Path], overwrite: bool) -> None:
    """The rule of all commands for what they would replace: not without --overwrite, and before any work is done."""
    if not overwrite and (found := [path for path in paths if path.exists()]):
        raise SensiError(f"{found[0]} exists: give another name, or replace it with --overwrite.")


def check_files(paths: Mapping[str, Path | None], overwrite: bool) -> None:
    """Checks that the files that these options name can be written, and are new. Creates their folders."""
    given = {option: path for option, path in paths.items() if path is not None}
    for option, path in given.items():
        check_place(path, option)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SensiError(f"{option}: the folder {path.parent} cannot be created: {error.strerror}.") from None
    check_new(given.values(), overwrite)
    if overwrite and not given:
        raise SensiError(f"--overwrite is about {' and '.join(paths)}: leave it out.")


def check_place(path: Path, option: str) -> None:
    """Checks that a file can be written here, if its folder is created."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise SensiError(f"{path} is {what}: {option} needs the path of a file.")
    _check_folder_writable(path.parent, option)


def check_picture(path: Path | None) -> None:
    """Checks that the picture of --plot can be drawn, and that the name of the file fits."""
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise SensiError(f"{path}: --plot writes {', '.join(PICTURES)}, not {path.suffix or 'a name without ending'}.")
    if find_spec("matplotlib") is None:
        raise SensiError(f"--plot needs matplotlib: {how_to_install('plots')}")


def check_budget(
    anatomy: Any,
    limits: Mapping[str, Any] | None,
    latency: Iterable[Any] | None = None,
    option: str = "--budget",
    **widths: Any,
) -> None:
    """Raises `BudgetError` if not even the smallest plan fits the limits. `option` is the one for parameters.

    `latency` are the tables, or their paths. Limits on latencies without a table are checked later, when this machine
    is measured. `widths` are arguments of `make_plan`.
    """
    import numpy as np

    from ..planning.allocate import make_plan
    from ..planning.budget import TIMES
    from ..planning.costs import tables_by_limit

    tables = tables_by_limit(list(latency or ()))
    known = {name: limit for name, limit in (limits or {}).items() if name not in TIMES or name in tables}
    if not known or not anatomy.groups:
        return
    generator = np.random.default_rng(0)
    scores = {group.name: generator.random(group.size) + 0.5 for group in anatomy.groups}
    with budget_advice(option):
        make_plan(anatomy, scores, known, latency=tables or None, **widths)


@contextmanager
def budget_advice(option: str = "--budget") -> Iterator[None]:
    """In errors about limits that are too small, replaces the advice for Python by the options of the command."""
    try:
        yield
    except BudgetError as error:
        if not error.limits:
            raise
        options = [option if name == "params" else f"--{name.replace('_', '-')}" for name in error.limits]
        raise BudgetError(error.problem, f"Give a larger {' or '.join(options)}.") from None


def check_latency_tables(paths: Iterable[Path] | None, limits: Mapping[str, Any] | None) -> None:
    """Raises the error of a table that cannot be read, and `SensiError` if a limit on times has none among them.

    Without any table, this machine is measured; beside the table of another device, that would be a mistake.
    """
    from ..planning.budget import TIMES
    from ..planning.costs import tables_by_limit

    tables = tables_by_limit(list(paths or ()))
    for name in TIMES:
        if tables and name in (limits or {}) and name not in tables:
            how = "with" if name == "decode_latency" else "without"
            raise SensiError(
                f"--{name.replace('_', '-')} needs a table that was measured {how} --decode, and none of "
                f"--latency-table is one."
            )


def _check_folder_writable(folder: Path, option: str) -> None:
    try:
        tempfile.TemporaryFile(dir=existing_parent(folder)).close()
    except OSError as error:
        raise SensiError(f"{option}: nothing can be written to {folder}: {error.strerror}.") from None
