"""Checks of a `SensiConfig`: the values that each field may have, and the combinations of fields that are refused.

All rules are rows of tables. `docs/recipes.md` shows the combinations that are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..layers.compression import KINDS
from ..layers.updates import SUPPORTS, UPDATES
from ..scoring.methods import METHODS
from ..scoring.priming import OPTIMIZERS
from ..scoring.scores import Scores
from ..utils.checks import check_types, is_number, shown
from ..utils.errors import SensiError


ALSO_TRAIN = ("output_biases", "removed_biases", "biases", "norms", "pooler", "tokens", "embeddings")
GRANULARITIES = ("unit", "tensor", "weight")
MOST_CUTS = 10_000
_LARGEST_SCALE = 1e4

# Field -> the allowed values.
_CHOICES = {
    "score": METHODS,
    "granularity": GRANULARITIES,
    "update": (None, *UPDATES),
    "support": (None, *SUPPORTS),
    "priming_optimizer": tuple(OPTIMIZERS),
    "widths": ("free", "uniform"),
}

# Field -> the part of an update that it belongs to.
_PART_OF = {
    "rank": "low_rank",
    "scale": "low_rank",
    "sparse": "sparse",
    "support": "sparse",
    "retention": "dense",
    "tuned_layers": "dense",
}

# Phase -> its fields with their smallest and largest value, and the description for the error message.
_PHASES: dict[str, tuple[dict[str, tuple[float, float]], str]] = {
    "freeze_dense": ({"epochs": (0, 1e6)}, "`epochs`, a number"),
    "draw_mask": ({"at": (0, 1)}, "`at`, a share of the training"),
    "cut": (
        {"start": (0, 1), "end": (0, 1), "cuts": (1, MOST_CUTS)},
        f"`start` <= `end`, shares of the training, `cuts`, a whole number of at most {MOST_CUTS}, and maybe `refit`, "
        f"True or False",
    ),
}


def _reasons(c: Any) -> dict[str, Any]:
    """For each reason to refuse a config: whether it holds. The first one that holds gives the error."""
    update, phase, also = c.update or "dense", c.phase, set(c.also_train or ())
    dense, trims, trainable = c.tunes_units, c.limits.trims, c.limits.trainable is not None
    # At the wrap, the rank of a low-rank update can follow from the limit.
    ranked = update == "low_rank" and trainable and c.plan is None
    return {
        # -- update: the fields that it needs
        f"update={update!r} needs `rank`. With update='low_rank', a `trainable` limit can take its place.": (
            "low_rank" in c.parts and c.rank is None and not ranked
        ),
        f"update={update!r} needs `sparse`, the number of trained values in each matrix.": (
            "sparse" in c.parts and c.sparse is None
        ),
        "update='mask' needs `sparsity`, the share of the weights that the mask removes.": (
            update == "mask" and c.sparsity is None
        ),
        # -- granularity
        f"granularity='weight' is not possible with update={update!r}: use update='sparse' to tune single weights, or "
        "update='mask' to remove some.": c.granularity == "weight" and (dense or update == "low_rank"),
        "granularity='tensor' either removes sublayers (under a limit on `params`, `flops` or a latency) or tunes "
        "whole Linears (under a `trainable` limit): give one kind of limit.": (
            c.granularity == "tensor" and trims and trainable
        ),
        f"granularity='tensor' tunes whole Linears, but update={update!r} tunes none: use update='dense'.": (
            c.granularity == "tensor" and not dense
        ),
        # -- fields that choose how much is tuned or kept
        f"A `trainable` limit chooses units to tune, or a rank. The size of update={update!r} follows from `rank`, "
        "`sparse` or `sparsity` instead: leave the limit out.": trainable and not dense and update != "low_rank",
        "The rank follows from the `trainable` limit: give `rank` or the limit, but not both.": (
            ranked and c.rank is not None
        ),
        "`retention` chooses the tuned neurons, and a `trainable` limit chooses them too: give one of the two.": (
            trainable and c.retention is not None
        ),
        "granularity='tensor' removes whole sublayers, so widths='uniform' (the same number of units in all blocks) "
        "is not possible.": c.widths == "uniform" and c.granularity == "tensor",
        "widths='uniform' has no effect without a limit on `params`, `flops` or a latency: nothing is trimmed.": (
            c.widths == "uniform" and not (trims or c.chooses_nothing or c.plan is not None)
        ),
        # -- schedule
        f"The phase 'freeze_dense' has no effect with update={update!r}, which has no dense part.": (
            phase == "freeze_dense" and not dense
        ),
        "The phase 'draw_mask' needs `sparsity`, and an update that does not learn its mask.": (
            phase == "draw_mask" and (c.sparsity is None or update == "mask")
        ),
        "The phase 'cut' trims to a limit on `params`, `flops` or a latency during training and needs the whole "
        "base: give such a limit, no `trainable` limit, and `keep_base=True`.": (
            phase == "cut" and (not trims or trainable or not c.keep_base)
        ),
        "score='mask' is learned during priming, so it cannot rank units for the phase 'cut'.": (
            phase == "cut" and c.score == "mask"
        ),
        "The phase 'cut' removes units and `sparsity` masks weights: give one of the two.": (
            phase == "cut" and c.sparsity is not None
        ),
        # -- what is trained beside the units
        "Under a `trainable` limit `also_train` may hold 'biases' (of all targeted Linears), but neither "
        "'output_biases' nor 'removed_biases'.": trainable and {"output_biases", "removed_biases"} & also,
        "`also_train` has 'tokens', some rows of the embeddings, and 'embeddings', all of them: give only one.": (
            {"tokens", "embeddings"} <= also
        ),
        "'tokens' in `also_train` are units of a dense update: use update='dense' and granularity='unit'.": (
            "tokens" in also and not (dense and c.granularity == "unit")
        ),
        "score='movement' is measured during priming, which leaves embeddings alone: it cannot rank 'tokens'.": (
            "tokens" in also and c.score == "movement"
        ),
        # -- run-time inputs and stored fields
        "`compressed` describes a finished adapter: call `model.compress(...)` instead.": (
            c.compressed is not None and c.plan is None
        ),
        "`plan` is finished, so nothing is scored or refitted: leave `calibration` and `scores` out.": (
            c.plan is not None and (c.calibration is not None or c.scores is not None)
        ),
        "`loss_fn` has no effect without `calibration`.": c.loss_fn is not None and c.calibration is None,
        "`refit=True` needs `calibration`: the kept units are fitted to the activations of these batches.": (
            c.refit and c.calibration is None and c.plan is None
        ),
        "`refit=True` changes values that a `trainable` limit may freeze: leave one of the two out.": (
            c.refit and trainable
        ),
    }


def check_config(config: Any) -> None:
    """Checks the values of all fields, then the combination. Raises `SensiError` with the reason."""
    _check_values(config)
    if config.schedule is not None:
        _check_schedule(config.schedule)
    update = config.update or "dense"
    for name, part in _PART_OF.items():
        if getattr(config, name) is not None and part not in config.parts:
            raise SensiError(f"`{name}` belongs to {part!r}, so it has no effect with update={update!r}.")
    for reason, holds in _reasons(config).items():
        if holds:
            raise SensiError(reason)


def recheck(config: Any) -> None:
    """Checks an adapter's config again: its fields may have been set. Raises the errors of a new config."""
    check_types(vars(config))
    check_config(config)


def _check_values(config: Any) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            names = ", ".join(choice for choice in choices if choice is not None)
            raise SensiError(f"`{name}` must be one of {names}, got {getattr(config, name)!r}.")
    if config.scale is not None and not (is_number(config.scale) and 0 < config.scale <= _LARGEST_SCALE):
        raise SensiError(f"`scale` must be a number in (0, {_LARGEST_SCALE:g}], got {shown(config.scale)}.")
    if any(name not in ALSO_TRAIN for name in config.also_train or ()):
        raise SensiError(f"`also_train` must be a list of {', '.join(ALSO_TRAIN)}, got {config.also_train!r}.")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(config, name), str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise SensiError(f"`{name}` is no regular expression: {error}, got {shown(pattern)}.") from None
    kinds = compressed_kinds(config.update)
    if config.compressed not in (None, *kinds):
        raise SensiError(
            f"`compressed` must be None or one of {', '.join(kinds)} with update={config.update!r}, got "
            f"{config.compressed!r}."
        )
    if config.scores is not None and not isinstance(config.scores, Scores):
        found = type(config.scores).__name__
        raise SensiError(f"`scores` must be a `Scores`, as `compute_scores` returns, got {found}.")


def _check_schedule(schedule: Mapping[str, Any]) -> None:
    phase = schedule.get("phase")
    if not isinstance(phase, str) or phase not in _PHASES:
        raise SensiError(f"`schedule` has the phase {shown(phase)}; the phases are {', '.join(_PHASES)}.")
    fields, description = _PHASES[phase]
    optional = {"refit"} if phase == "cut" and isinstance(schedule.get("refit", True), bool) else set()
    good = set(schedule) - optional == {"phase", *fields} and all(
        is_number(schedule[name]) and low <= schedule[name] <= high for name, (low, high) in fields.items()
    )
    if good and phase == "cut":
        good = isinstance(schedule["cuts"], int) and schedule["start"] <= schedule["end"]
    if not good:
        raise SensiError(f"The phase {phase!r} needs {description}, and nothing else; got {shown(dict(schedule))}.")


def compressed_kinds(update: str | None) -> tuple[str, ...]:
    """The forms in which an adapter with this update can be stored: masks as bits, everything else in narrow types."""
    return ("bits",) if update == "mask" else tuple(KINDS)
