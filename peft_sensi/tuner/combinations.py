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


# A rule: whether it refuses a config, and the reason for the error message.
Rule = tuple[bool, str]


def _rules(c: Any) -> list[Rule]:
    """All rules for the combination of a config's fields. The first one that refuses it gives the error."""
    return [*_size_rules(c), *_schedule_rules(c), *_also_train_rules(c), *_input_rules(c)]


def _size_rules(c: Any) -> list[Rule]:
    """Rules about the update, the granularity and the fields that choose how much is tuned or kept."""
    update, dense = c.update or "dense", c.tunes_units
    trims, trainable = c.limits.trims, c.limits.trainable is not None
    # At the wrap, the rank of a low-rank update can follow from the limit.
    ranked = update == "low_rank" and trainable and c.plan is None
    has_use = trims or c.chooses_nothing or c.plan is not None
    return [
        (
            "low_rank" in c.parts and c.rank is None and not ranked,
            f"update={update!r} needs `rank`. With update='low_rank', a `trainable` limit can take its place.",
        ),
        (
            "sparse" in c.parts and c.sparse is None,
            f"update={update!r} needs `sparse`, the number of trained values in each matrix.",
        ),
        (
            update == "mask" and c.sparsity is None,
            "update='mask' needs `sparsity`, the share of the weights that the mask removes.",
        ),
        (
            c.granularity == "weight" and (dense or update == "low_rank"),
            f"granularity='weight' is not possible with update={update!r}: use update='sparse' to tune single "
            "weights, or update='mask' to remove some.",
        ),
        (
            c.granularity == "tensor" and trims and trainable,
            "granularity='tensor' either removes sublayers (under a limit on `params`, `flops` or a latency) or tunes "
            "whole Linears (under a `trainable` limit): give one kind of limit.",
        ),
        (
            c.granularity == "tensor" and not dense,
            f"granularity='tensor' tunes whole Linears, but update={update!r} tunes none: use update='dense'.",
        ),
        (
            trainable and not dense and update != "low_rank",
            f"A `trainable` limit chooses units to tune, or a rank. The size of update={update!r} follows from "
            "`rank`, `sparse` or `sparsity` instead: leave the limit out.",
        ),
        (
            ranked and c.rank is not None,
            "The rank follows from the `trainable` limit: give `rank` or the limit, but not both.",
        ),
        (
            trainable and c.retention is not None,
            "`retention` chooses the tuned neurons, and a `trainable` limit chooses them too: give one of the two.",
        ),
        (
            c.widths == "uniform" and c.granularity == "tensor",
            "granularity='tensor' removes whole sublayers, so widths='uniform' (the same number of units in all "
            "blocks) is not possible.",
        ),
        (
            c.widths == "uniform" and not has_use,
            "widths='uniform' has no effect without a limit on `params`, `flops` or a latency: nothing is trimmed.",
        ),
    ]


def _schedule_rules(c: Any) -> list[Rule]:
    update, trims, trainable = c.update or "dense", c.limits.trims, c.limits.trainable is not None
    return [
        (
            c.phase == "freeze_dense" and not c.tunes_units,
            f"The phase 'freeze_dense' has no effect with update={update!r}, which has no dense part.",
        ),
        (
            c.phase == "draw_mask" and (c.sparsity is None or update == "mask"),
            "The phase 'draw_mask' needs `sparsity`, and an update that does not learn its mask.",
        ),
        (
            c.phase == "cut" and (not trims or trainable or not c.keep_base),
            "The phase 'cut' trims to a limit on `params`, `flops` or a latency during training and needs the whole "
            "base: give such a limit, no `trainable` limit, and `keep_base=True`.",
        ),
        (
            c.phase == "cut" and c.score == "mask",
            "score='mask' is learned during priming, so it cannot rank units for the phase 'cut'.",
        ),
        (
            c.phase == "cut" and c.sparsity is not None,
            "The phase 'cut' removes units and `sparsity` masks weights: give one of the two.",
        ),
    ]


def _also_train_rules(c: Any) -> list[Rule]:
    """Rules about what is trained beside the units."""
    also, trainable = set(c.also_train or ()), c.limits.trainable is not None
    has_units = c.tunes_units and c.granularity == "unit"
    return [
        (
            trainable and bool({"output_biases", "removed_biases"} & also),
            "Under a `trainable` limit `also_train` may hold 'biases' (of all targeted Linears), but neither "
            "'output_biases' nor 'removed_biases'.",
        ),
        (
            {"tokens", "embeddings"} <= also,
            "`also_train` has 'tokens', some rows of the embeddings, and 'embeddings', all of them: give only one.",
        ),
        (
            "tokens" in also and not has_units,
            "'tokens' in `also_train` are units of a dense update: use update='dense' and granularity='unit'.",
        ),
        (
            "tokens" in also and c.score == "movement",
            "score='movement' is measured during priming, which leaves embeddings alone: it cannot rank 'tokens'.",
        ),
    ]


def _input_rules(c: Any) -> list[Rule]:
    """Rules about the data of a wrap, and about fields that a finished adapter stores."""
    return [
        (
            c.compressed is not None and c.plan is None,
            "`compressed` describes a finished adapter: call `model.compress(...)` instead.",
        ),
        (
            c.plan is not None and (c.calibration is not None or c.scores is not None),
            "`plan` is finished, so nothing is scored or refitted: leave `calibration` and `scores` out.",
        ),
        (c.loss_fn is not None and c.calibration is None, "`loss_fn` has no effect without `calibration`."),
        (
            bool(c.refit) and c.calibration is None and c.plan is None,
            "`refit=True` needs `calibration`: the kept units are fitted to the activations of these batches.",
        ),
        (
            bool(c.refit) and c.limits.trainable is not None,
            "`refit=True` changes values that a `trainable` limit may freeze: leave one of the two out.",
        ),
    ]


def check_config(config: Any) -> None:
    """Checks the values of all fields, then the combination. Raises `SensiError` with the reason."""
    _check_values(config)
    if config.schedule is not None:
        _check_schedule(config.schedule)
    update = config.update or "dense"
    for name, part in _PART_OF.items():
        if getattr(config, name) is not None and part not in config.parts:
            raise SensiError(f"`{name}` belongs to {part!r}, so it has no effect with update={update!r}.")
    for refuses, reason in _rules(config):
        if refuses:
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
