"""Which phases a schedule may have, and what they need: checked with the config, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .utils.checks import is_number
from .utils.errors import SensiError


MOST_CUTS = 10_000


def check_schedule(schedule: Any, update: str, sparsity: float | None) -> None:
    """Checks `SensiConfig.schedule` (its forms are described in `schedule`). Raises `SensiError`."""

    def is_upto(name: str, most: float) -> bool:
        value = schedule.get(name)
        return is_number(value) and 0 <= value <= most

    if not isinstance(schedule, Mapping):
        raise SensiError(f"`schedule` must be a dict with a `phase`, got {schedule!r}.")
    phase = schedule.get("phase")
    if phase == "freeze_dense":
        if set(schedule) != {"phase", "epochs"} or not is_upto("epochs", 1e6):
            raise SensiError("The phase 'freeze_dense' needs `epochs`, a number, and nothing else.")
        if "dense" not in update.split("+"):
            raise SensiError(
                f"The phase 'freeze_dense' has no effect with update={update!r}, which has no dense part."
            )
    elif phase == "draw_mask":
        if set(schedule) != {"phase", "at"} or not is_upto("at", 1.0):
            raise SensiError("The phase 'draw_mask' needs `at`, a share of the training, and nothing else.")
        if sparsity is None or update == "mask":
            raise SensiError("The phase 'draw_mask' needs a `sparsity`, and an update that does not learn its mask.")
    elif phase == "cut":
        good = set(schedule) == {"phase", "start", "end", "cuts"} and is_upto("start", 1.0) and is_upto("end", 1.0)
        cuts = schedule.get("cuts")
        if (
            not good
            or isinstance(cuts, bool)
            or not isinstance(cuts, int)
            or not 1 <= cuts <= MOST_CUTS
            or schedule["start"] > schedule["end"]
        ):
            raise SensiError(
                f"The phase 'cut' needs `start` <= `end`, shares of the training, and `cuts`, a whole number of at "
                f"most {MOST_CUTS}."
            )
        if update == "mask":
            raise SensiError("Units cannot be cut during training while update='mask' learns to mask weights.")
    else:
        raise SensiError(f"`schedule` has the phase {phase!r}; the phases are 'cut', 'freeze_dense' and 'draw_mask'.")
