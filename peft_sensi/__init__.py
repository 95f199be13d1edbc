"""Sensitivity-ranked tuning and trimming of transformers, as a PEFT method. Importing it registers the method."""

from __future__ import annotations

from typing import Any

from peft import mapping as _mapping

from . import recipes
from .anatomy.build import build_anatomy
from .anatomy.layouts import BlockLayout
from .anatomy.units import Anatomy
from .merging.load import load_merged
from .merging.onnx import export_onnx
from .merging.save import save_merged
from .planning.allocate import make_plan
from .planning.budget import Budget
from .planning.plan import Plan
from .reporting.hub import hook_cards as _hook_cards
from .scoring.compute import compute_scores
from .scoring.scores import Scores
from .tuner.config import SensiConfig, SensiPeftType
from .tuner.entrances import hook_entrances as _hook_entrances
from .tuner.model import SensiModel
from .tuner.schedule import Schedule, SensiCallback
from .utils.errors import AnatomyError, BudgetError, CalibrationError, SensiError, SensiLoadError


def register() -> None:
    """Registers the method with PEFT. Importing the package does this; another call changes nothing.

    This writes into PEFT's tables: `peft.utils.register_peft_method` accepts only members of PEFT's own enum, and PEFT
    has no entry point for plugins. Raises `SensiError` if another package uses the same name.
    """
    name = SensiPeftType.SENSI
    entries: tuple[tuple[dict[Any, Any], Any], ...] = (
        (_mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SensiConfig),
        (_mapping.PEFT_TYPE_TO_TUNER_MAPPING, SensiModel),
        (_mapping.PEFT_TYPE_TO_PREFIX_MAPPING, SensiModel.prefix),
    )
    for table, value in entries:
        if (taken := table.setdefault(name, value)) is not value:
            raise SensiError(f"Another package has already registered a PEFT method called {name.value!r}: {taken!r}.")
    _hook_cards()
    _hook_entrances()


register()

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "AnatomyError",
    "BlockLayout",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Plan",
    "Schedule",
    "Scores",
    "SensiCallback",
    "SensiConfig",
    "SensiError",
    "SensiLoadError",
    "SensiModel",
    "build_anatomy",
    "compute_scores",
    "export_onnx",
    "load_merged",
    "make_plan",
    "recipes",
    "save_merged",
]
