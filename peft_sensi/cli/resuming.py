"""What an interrupted training has left in its folder: its state (`UNFINISHED`) and checkpoints of Trainer.

All commands import this for their messages, so Accelerate is imported inside the only function that needs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.checks import is_count
from ..utils.errors import SensiError
from ..utils.files import read_json_object
from ..utils.formatting import listed
from ..utils.hub_names import UNFINISHED


if TYPE_CHECKING:
    from ..tasks.task import Task


TRAINER_STATE = "trainer_state.json"  # in a checkpoint of Trainer
# Types in the state of a training (see `run.Run`), and what is there once a stage of `trim` has begun.
_STATE: dict[str, Any] = {
    "options": dict, "stage": str, "steps": int | None, "seconds": float, "preparation": float, "before": dict,
    "trimmed": dict, "doubts": list, "score": str, "finished": list, "data_sha256": dict, "classes": list,
}  # fmt: skip
_OF_STAGE = {"heal": ("before", "trimmed", "preparation")}


def can_resume(folder: Path | None) -> bool:
    """Whether what was interrupted in this folder has left something that --resume goes on from."""
    state = {} if folder is None else read_json_object(folder / UNFINISHED, optional=True)
    has_checkpoint = folder is not None and last_checkpoint(folder) is not None
    return bool(state) and (state.get("steps") is not None or "finished" in state or has_checkpoint)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is complete: its last file, which says what was trained, can be read.

    The newest one may lack files, because the disk was full or the process was killed.
    """
    complete = []
    for path in checkpoints_in(folder):
        with suppress(FileNotFoundError, SensiError):
            step = read_json_object(path / TRAINER_STATE).get("global_step")
            complete += [(step, path)] if is_count(step) else []
    return max(complete, default=(0, None))[1]


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders that have names of Trainer's checkpoints. Others, such as `checkpoint-best`, are the user's own."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    return sorted(path for path in found if path.name.removeprefix("checkpoint-").isdecimal())


def resumed_state(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an interrupted training in this folder had done. Raises `SensiError` if its options were others."""
    state = read_state(folder)
    check_same_options(state, options)
    if saved_training(folder, state) is None:
        raise SensiError(
            f"{folder} has no checkpoint to go on from: Ctrl-C, SIGTERM and SIGHUP leave one after the first step of "
            f"a training. Start again with --overwrite."
        )
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """What a command has noted in the folder of an interrupted training. Raises `SensiError` if it is damaged."""
    state = read_json_object(folder / UNFINISHED)
    is_right = all(isinstance(state[name], kind) for name, kind in _STATE.items() if name in state)
    if not is_right or any(name not in state for name in _OF_STAGE.get(state.get("stage", ""), ())):
        raise SensiError(f"{folder / UNFINISHED} is damaged: start again with --overwrite.")
    return state


def check_same_options(state: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises `SensiError` if what was interrupted had other options, which are in its state."""
    now, before = json.loads(json.dumps(options, default=str)), state.get("options", {})
    if changed := [name for name in now if now[name] != before.get(name) and (now[name] or before.get(name))]:
        name = changed[0]
        was, is_now = (
            "not given" if value in (None, False, []) else repr(value) for value in (before.get(name), now[name])
        )
        raise SensiError(f"--resume goes on with the same options, but {name} was {was}, and is {is_now} now.")


def note_data(state: dict[str, Any], task: Task) -> None:
    """Adds the hashes of the data files and the names of the classes to the state of a training.

    Raises `SensiError` if what was interrupted has read other data: its head would have other classes, in silence.
    """
    before = state.get("data_sha256", task.hashes)
    if changed := [file for file in {**before, **task.hashes} if before.get(file) != task.hashes.get(file)]:
        raise SensiError(
            f"--resume goes on with the same data, but {changed[0]} has changed since the training began. Start again "
            f"with --overwrite."
        )
    if (classes := state.get("classes", task.labels.names)) != task.labels.names:
        raise SensiError(
            f"--resume goes on with the same classes, but they were {listed(classes)}, and the data now has "
            f"{listed(task.labels.names)}. Start again with --overwrite."
        )
    state |= {"data_sha256": task.hashes, "classes": task.labels.names}


def saved_training(folder: Path, state: Mapping[str, Any]) -> str | None:
    """Where an interrupted training has saved its adapter: its last checkpoint, or the folder if it was finished."""
    place = last_checkpoint(folder) if state.get("steps") is None else folder
    return None if place is None else str(place)


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a training in this folder, also those that lack files if the training is ours."""
    from accelerate import PartialState

    if PartialState().process_index == 0:
        are_ours = (folder / UNFINISHED).is_file()
        for path in checkpoints_in(folder):
            if are_ours or (path / TRAINER_STATE).is_file():
                if path.is_symlink():  # the user has moved it to another disk
                    path.unlink()
                else:
                    shutil.rmtree(path)
