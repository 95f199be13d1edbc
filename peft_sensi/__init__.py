"""Sensitivity-ranked tuning and trimming of transformers, as a PEFT method. Importing it registers the method."""

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
from .register import register
from .scoring.compute import compute_scores
from .scoring.scores import Scores
from .tuner.config import SensiConfig
from .tuner.model import SensiModel
from .tuner.schedule import Schedule, SensiCallback
from .utils.errors import AnatomyError, BudgetError, CalibrationError, SensiError, SensiLoadError


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
