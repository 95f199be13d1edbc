"""The settings of a scoring, which `compute_scores` and the tuner hand down as one value."""

from __future__ import annotations

from dataclasses import dataclass

from .calibration import LossFn


@dataclass(frozen=True)
class ScoringOptions:
    """How units are scored. `compute_scores` describes the fields; `SensiConfig` has fields of the same names."""

    score: str = "fisher"
    calibration_steps: int = 24
    priming_steps: int = 40
    priming_lr: float = 1e-4
    priming_optimizer: str = "adamw"
    loss_fn: LossFn | None = None
    seed: int = 0
    progress: bool = True
