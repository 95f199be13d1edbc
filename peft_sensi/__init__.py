"""Sensitivity-ranked tuning and trimming of transformers, as a PEFT method. Importing it registers the method."""

from . import recipes
from .allocate import make_plan
from .anatomy import build_anatomy
from .budget import Budget
from .config import SensiConfig
from .errors import AnatomyError, BudgetError, CalibrationError, SensiError, SensiLoadError
from .export import export_onnx
from .families import BlockLayout
from .merged import load_merged, save_merged
from .model import SensiModel
from .plan import Plan
from .register import register
from .schedule import Schedule, SensiCallback
from .scores import Scores, compute_scores
from .units import Anatomy


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
