"""Checks of a `SensiConfig`: the values that each field may have, and the combinations of fields that are refused.

All rules are rows of tables. `docs/recipes.md` shows the combinations that are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..layers.compression import KINDS
from ..layers.updates import SUPPORTS, UPDATES
from ..scoring.criteria import METHODS
from ..scoring.priming import OPTIMIZERS
from ..scoring.scores import Scores
from ..utils.checks import is_number, shown
from ..utils.errors import SensiError


ALSO_TRAIN = ("output_biases", "removed_biases", "biases", "norms", "pooler", "tokens", "embeddings")
GRANULARITIES = ("unit", "tensor", "weight")
MOST_CUTS = 10_000

# Field -> the allowed values.
_CHOICES = {
    "score": METHODS,
    "granularity": GRANULARITIES,
    "update": (None, *UPDATES),
    "support": (None, *SUPPORTS),
    "priming_optimizer": tuple(OPTIMIZERS),
    "widths": ("free", "uniform"),
}

# Field -> the smallest whole number, and whether None is allowed.
_COUNTS = {
    "calibration_steps": (1, False),
    "priming_steps": (0, False),
    "sequence_length": (1, True),
    "multiple_of": (1, False),
    "min_units": (0, False),
    "seed": (0, False),
    "rank": (1, True),
    "sparse": (1, True),
    "tuned_layers": (1, True),
}

# Field -> the part of an update that it belongs to.
_PART_OF = {"rank": "low_rank", "sparse": "sparse", "support": "sparse"}

# Phase -> its fields with their smallest and largest value, and the description for the error message.
_PHASES: dict[str, tuple[dict[str, tuple[float, float]], str]] = {
    "freeze_dense": ({"epochs": (0, 1e6)}, "`epochs`, a number"),
    "draw_mask": ({"at": (0, 1)}, "`at`, a share of the training"),
    "cut": (
        {"start": (0, 1), "end": (0, 1), "cuts": (1, MOST_CUTS)},
        f"`start` <= `end`, shares of the training, and `cuts`, a whole number of at most {MOST_CUTS}",
    ),
}

# (condition under which a config `c` is refused, the reason). The first row that holds gives the error. `{update}` in
# a reason stands for the config's update.
_REFUSED: tuple[tuple[Callable[[Any], Any], str], ...] = (
    # -- update: the fields that it needs
    (
        lambda c: c.update == "low_rank" and c.rank is None and (c.limits.trainable is None or c.plan is not None),
        "update='low_rank' needs `rank`, or a `trainable` limit from which the rank follows.",
    ),
    (
        lambda c: "low_rank" in c.parts and c.update != "low_rank" and c.rank is None,
        "update={update!r} needs `rank`.",
    ),
    (
        lambda c: "sparse" in c.parts and c.sparse is None,
        "update={update!r} needs `sparse`, the number of trained values in each matrix.",
    ),
    (
        lambda c: c.update == "mask" and c.sparsity is None,
        "update='mask' needs `sparsity`, the share of the weights that the mask removes.",
    ),
    # -- granularity
    (
        lambda c: c.granularity == "weight" and (c.tunes_units or c.update == "low_rank"),
        "granularity='weight' is not possible with update={update!r}: use update='sparse' to tune single weights, or "
        "update='mask' to remove some.",
    ),
    (
        lambda c: c.granularity == "tensor" and c.limits.trims and c.limits.trainable is not None,
        "granularity='tensor' either removes sublayers (under a limit on `params` or `flops`) or tunes whole Linears "
        "(under a `trainable` limit): give one kind of limit.",
    ),
    (
        lambda c: c.granularity == "tensor" and not c.tunes_units,
        "granularity='tensor' tunes whole Linears, but update={update!r} tunes none: use update='dense'.",
    ),
    # -- fields that choose how much is tuned or kept
    (
        lambda c: c.limits.trainable is not None and not c.tunes_units and c.update != "low_rank",
        "A `trainable` limit chooses units to tune, or a rank. The size of update={update!r} follows from `rank`, "
        "`sparse` or `sparsity` instead: leave the limit out.",
    ),
    (
        lambda c: c.limits.trainable is not None and c.update == "low_rank" and c.rank is not None and c.plan is None,
        "The rank follows from the `trainable` limit: give `rank` or the limit, but not both.",
    ),
    (
        lambda c: c.retention is not None and c.limits.trainable is not None,
        "`retention` chooses the tuned neurons, and a `trainable` limit chooses them too: give one of the two.",
    ),
    (
        lambda c: c.retention is not None and not c.tunes_units,
        "`retention` chooses the tuned neurons of a dense update, but update={update!r} has no dense part.",
    ),
    (
        lambda c: c.widths == "uniform" and c.granularity == "tensor",
        "granularity='tensor' removes whole sublayers, so widths='uniform' (the same number of units in all blocks) "
        "is not possible.",
    ),
    (
        lambda c: c.widths == "uniform" and not (c.limits.trims or c.chooses_nothing or c.plan is not None),
        "widths='uniform' has no effect without a limit on `params` or `flops`: nothing is trimmed.",
    ),
    (
        lambda c: c.tuned_layers is not None and not c.tunes_units,
        "`tuned_layers` chooses the layers of a dense update, but update={update!r} has no dense part.",
    ),
    # -- schedule
    (
        lambda c: c.phase == "freeze_dense" and not c.tunes_units,
        "The phase 'freeze_dense' has no effect with update={update!r}, which has no dense part.",
    ),
    (
        lambda c: c.phase == "draw_mask" and (c.sparsity is None or c.update == "mask"),
        "The phase 'draw_mask' needs `sparsity`, and an update that does not learn its mask.",
    ),
    (
        lambda c: c.phase == "cut" and c.update == "mask",
        "The phase 'cut' cannot be combined with update='mask', which learns a mask of single weights.",
    ),
    (
        lambda c: c.phase == "cut" and (not c.limits.trims or c.limits.trainable is not None or not c.keep_base),
        "The phase 'cut' trims to a limit on `params` or `flops` during training and needs the whole base: give such "
        "a limit, no `trainable` limit, and `keep_base=True`.",
    ),
    (
        lambda c: c.phase == "cut" and c.score == "mask",
        "score='mask' is learned during priming, so it cannot rank units for the phase 'cut'.",
    ),
    (
        lambda c: c.phase == "cut" and c.sparsity is not None,
        "The phase 'cut' removes units and `sparsity` masks weights: give one of the two.",
    ),
    # -- what is trained beside the units
    (
        lambda c: c.limits.trainable is not None and {"output_biases", "removed_biases"} & set(c.also_train or ()),
        "Under a `trainable` limit `also_train` may hold 'biases' (of all targeted Linears), but neither "
        "'output_biases' nor 'removed_biases'.",
    ),
    (
        lambda c: {"tokens", "embeddings"} <= set(c.also_train or ()),
        "`also_train` has 'tokens', some rows of the embeddings, and 'embeddings', all of them: give only one.",
    ),
    (
        lambda c: "tokens" in (c.also_train or ()) and not (c.tunes_units and c.granularity == "unit"),
        "'tokens' in `also_train` are units of a dense update: use update='dense' and granularity='unit'.",
    ),
    (
        lambda c: "tokens" in (c.also_train or ()) and c.score == "movement",
        "score='movement' is measured during priming, which leaves embeddings alone: it cannot rank 'tokens'.",
    ),
    # -- run-time inputs and stored fields
    (
        lambda c: c.compressed is not None and c.plan is None,
        "`compressed` describes a finished adapter: call `model.base_model.compress(...)` instead.",
    ),
    (
        lambda c: c.loss_fn is not None and c.calibration is None,
        "`loss_fn` has no effect without `calibration`.",
    ),
    (
        lambda c: c.refit and c.calibration is None and c.plan is None,
        "`refit=True` needs `calibration`: the kept units are fitted to the activations of these batches.",
    ),
    (
        lambda c: c.refit and c.limits.trainable is not None,
        "`refit=True` changes values that a `trainable` limit may freeze: leave one of the two out.",
    ),
)


def check_config(config: Any) -> None:
    """Checks the values of all fields, then the combination. Raises `SensiError` with the reason."""
    _check_values(config)
    if config.schedule is not None:
        _check_schedule(config.schedule)
    update = config.update or "dense"
    for name, part in _PART_OF.items():
        if getattr(config, name) is not None and part not in config.parts:
            raise SensiError(f"`{name}` has no effect with update={update!r}: it belongs to {part!r}.")
    for refuses, reason in _REFUSED:
        if refuses(config):
            raise SensiError(reason.format(update=update))


def _check_values(config: Any) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            names = ", ".join(choice for choice in choices if choice is not None)
            raise SensiError(f"`{name}` must be one of {names}, got {getattr(config, name)!r}.")
    for name, (smallest, optional) in _COUNTS.items():
        value = getattr(config, name)
        if not (value is None and optional) and not (type(value) is int and smallest <= value < 2**31):
            raise SensiError(f"`{name}` must be a whole number of at least {smallest}, got {shown(value)}.")
    for name in ("sparsity", "retention"):
        value = getattr(config, name)
        if value is not None and not (is_number(value) and 0 <= value < 1):
            raise SensiError(f"`{name}` must be a share in [0, 1), got {shown(value)}.")
    if config.priming_lr <= 0:
        raise SensiError(f"`priming_lr` must be positive, got {config.priming_lr!r}.")
    if any(name not in ALSO_TRAIN for name in config.also_train or ()):
        raise SensiError(f"`also_train` must be a list of {', '.join(ALSO_TRAIN)}, got {config.also_train!r}.")
    kinds = compressed_kinds(config.update)
    if config.compressed not in (None, *kinds):
        raise SensiError(
            f"`compressed` must be None or one of {', '.join(kinds)} with update={config.update!r}, got "
            f"{config.compressed!r}."
        )
    if config.scores is not None and not isinstance(config.scores, Scores):
        raise SensiError(
            f"`scores` must be a `Scores`, as `compute_scores` returns, got {type(config.scores).__name__}."
        )


def _check_schedule(schedule: Mapping[str, Any]) -> None:
    phase = schedule.get("phase")
    if not isinstance(phase, str) or phase not in _PHASES:
        raise SensiError(f"`schedule` has the phase {shown(phase)}; the phases are {', '.join(_PHASES)}.")
    fields, description = _PHASES[phase]
    good = set(schedule) == {"phase", *fields} and all(
        is_number(schedule[name]) and low <= schedule[name] <= high for name, (low, high) in fields.items()
    )
    if good and phase == "cut":
        good = isinstance(schedule["cuts"], int) and schedule["start"] <= schedule["end"]
    if not good:
        raise SensiError(f"The phase {phase!r} needs {description}, and nothing else; got {shown(dict(schedule))}.")


def compressed_kinds(update: str | None) -> tuple[str, ...]:
    """The forms in which an adapter with this update can be stored: masks as bits, everything else in narrow types."""
    return ("bits",) if update == "mask" else tuple(KINDS)
