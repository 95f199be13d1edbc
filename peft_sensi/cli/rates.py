"""A wrapped model goes in; the peak learning rate that suits what the wrap chose comes out."""

from __future__ import annotations

from typing import Any

from ..utils.states import TUNED


SCALED_RANK, MASK, WHOLE = 2e-3, 3e-3, 5e-5
# For the values that start from pretrained ones: at least this share of the base's values is trained, and the rate.
BY_SHARE = ((0.25, 1e-4), (0.02, 3e-4), (0.0, 2e-3))


def default_rate(model: Any) -> float:
    """The default of --lr for a model with an adapter.

    The rates are those at which the rows of `docs/quality.md` and `docs/results-systems.md` were measured, rounded. A
    low-rank update with the default scale needs the same rate at every rank. Dense units, and low-rank terms with
    `scale=1`, need higher rates the fewer values are trained. If all heads and neurons are tuned, this is full
    fine-tuning, and has its rate.
    """
    config = model.active_peft_config
    if "mask" in config.parts:
        return MASK
    if config.parts == ["low_rank"] and config.scale not in (None, 1.0):
        return SCALED_RANK
    if tunes_all_units(model):
        return WHOLE
    share = model.base_model.plan().trainable_share
    return next(rate for least, rate in BY_SHARE if share >= least)


def tunes_all_units(model: Any) -> bool:
    """Whether all heads and neurons are trained as a whole. Tokens need not be."""
    plan = model.base_model.plan()
    groups = [group for group in plan.anatomy.groups if group.kind != "token"]
    return model.active_peft_config.parts == ["dense"] and all((plan.of(group) == TUNED).all() for group in groups)


def rate_line(rate: float, model: Any) -> str:
    """What the default was chosen for, in words for the user."""
    if tunes_all_units(model):
        return f"learning rate {rate:g}, the default if all heads and neurons are tuned (--lr)"
    config, share = model.active_peft_config, model.base_model.plan().trainable_share
    update = " + ".join(part.replace("_", "-") for part in config.parts)
    return f"learning rate {rate:g}, the default for a {update} update of {share:.1%} of the base (--lr)"
