"""Loads models and data for the commands. Errors have advice for the command, not for Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import OtherBaseError, SensiError
from ..utils.hub_names import absolute
from .arguments import refuse
from .terminal import print_understood, step


if TYPE_CHECKING:
    from ..reporting.saved import SavedAdapter
    from ..tasks.predicting import Predictor


def load_base(model: str, data: list[str] | None, needs_data: bool = True, **options: Any) -> tuple[Any, Any]:
    """Loads the base model, and the task of the data if there is some (else `None`).

    The model gets a fresh head for the labels of the data. `options` are those of `tasks.kinds.read_task`.
    """
    from transformers import set_seed

    from ..reporting.saved import is_adapter
    from ..tasks.models import load_for

    if is_adapter(model):  # Transformers would load its base with the adapter, which this training would then lose
        raise SensiError(
            f"{model} is an adapter, and this command starts from a whole model: give its base, or merge it first. "
            f"`peft-sensi trim` makes an adapter smaller."
        )
    place = absolute(model)
    set_seed(options["seed"])  # the fresh head is random
    if not data:
        if needs_data:
            raise SensiError(
                "Give --data, labeled rows to compute scores from. Only --score magnitude and --score random need no "
                "data."
            )
        with step("loading the model"):
            return load_for(options["kind"] or "text", place), None
    task = read_data(model, data, **options)
    with step("loading the model"):
        return load_for(task, place), task


def read_data(model: str, data: Any, doubts: Sequence[str] = (), **options: Any) -> Any:
    """`tasks.kinds.read_task`, with lines that say what was understood, and what may be wrong (also `doubts`)."""
    from ..tasks.kinds import read_task

    with step("reading the data"):
        task = read_task(model, data, **options)
    print_understood(task.lines, [*task.doubts, *doubts])
    return task


def load_saved(name: str, base: str | None, json: bool) -> tuple[Any, Any]:
    """The adapter or merged model, opened and loaded. Raises `SensiError`."""
    from ..merging.load import load_merged
    from ..reporting.saved import load_adapter
    from ..reporting.saved_merged import SavedMerged, open_saved

    saved = open_saved(name)
    with step("loading the model", show=not json):
        if isinstance(saved, SavedMerged):
            refuse_base(name, base)
            return saved, load_merged(saved.folder)
        check_base(saved, base)
        with command_advice():
            return saved, load_adapter(saved, base)


def load_predictor(name: str, base: str | None, show: bool = True) -> Predictor:
    """The adapter, merged model or ONNX file, ready to predict. Raises `SensiError`."""
    from ..reporting.onnx_folder import find_onnx
    from ..reporting.saved import SavedAdapter
    from ..reporting.saved_merged import open_saved
    from ..tasks.predicting import open_predictor

    with step(f"loading {name}", show=show):
        saved = open_saved(name) if find_onnx(Path(name)) is None else None
        if isinstance(saved, SavedAdapter):
            check_base(saved, base)
        else:
            refuse_base(name, base)
        with command_advice():
            return open_predictor(name, base)


@contextlib.contextmanager
def command_advice() -> Iterator[None]:
    """In errors about another base, replaces the advice for Python."""
    try:
        yield
    except OtherBaseError as error:
        raise OtherBaseError(error.problem, "Give the base that it was made for with --base.") from error


def takes_texts(model: Any) -> bool:
    """Whether the model, or the base of the adapter, takes token ids."""
    from ..tuner.wrapping import root_of

    return "input_ids" in signature(root_of(model).forward).parameters


def refuse_base(name: str, base: str | None) -> None:
    """Raises `SensiError` if --base was given for a model that needs none."""
    refuse({"--base": base}, f"is about adapters, and {name} is a whole model")


def check_base(saved: SavedAdapter, base: str | None) -> None:
    """Raises `SensiError` if the base model's configuration cannot be loaded."""
    from transformers import AutoConfig

    from ..reporting.pretrained import load_pretrained

    named = base or saved.base
    if not named:
        raise SensiError(f"{saved.name} does not name its base model: add --base with a folder or a name on the Hub.")
    try:
        load_pretrained(AutoConfig, named)
    except SensiError as error:
        where = "The model of --base" if base else f"The base model of {saved.name}"
        advice = "check its name" if base else "add --base with its folder here, or its name on the Hub"
        raise SensiError(f"{where}, {named}, was not found: {advice}. ({error})") from error
