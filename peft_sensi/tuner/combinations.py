"""Which phases a schedule may have, and what they need: checked with the config, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..layers.updates import SUPPORTS, UPDATES
from ..utils.checks import is_number
from ..utils.errors import SensiError


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


def check_update(update: str, rank_follows: bool = False, **fields: Any) -> None:
    """Refuses combinations that mean nothing. Raises `SensiError` with the reason.

    `rank_follows` says that the rank of a low-rank update follows from a limit.
    """
    if update not in UPDATES:
        raise SensiError(f"`update` must be one of {', '.join(UPDATES)}, got {update!r}.")
    parts = update.split("+")
    needs = {"rank": "low_rank", "sparse": "sparse", "support": "sparse"}
    for name, part in needs.items():
        if fields[name] is not None and part not in parts:
            raise SensiError(f"`{name}` has no effect with update={update!r}: it belongs to {part!r}.")
    if "low_rank" in parts and fields["rank"] is None and not (rank_follows and update == "low_rank"):
        raise SensiError(f"update={update!r} needs `rank`{', or a `trainable` limit' * (update == 'low_rank')}.")
    if "sparse" in parts and fields["sparse"] is None:
        raise SensiError(f"update={update!r} needs `sparse`, the number of trained values in each matrix.")
    if fields["support"] not in (None, *SUPPORTS):
        raise SensiError(f"`support` must be one of {', '.join(SUPPORTS)}, got {fields['support']!r}.")
    if update == "mask" and fields["sparsity"] is None:
        raise SensiError("update='mask' needs `sparsity`, the share of the weights that the mask removes.")
