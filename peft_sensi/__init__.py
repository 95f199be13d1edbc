"""Sensitivity-ranked tuning and trimming of transformers, as a PEFT method. Importing it registers the method."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from .utils.errors import TRAINING_STACK as _TRAINING_STACK
from .utils.errors import how_to_install as _how_to_install


# The program `peft-sensi` prints its help without PyTorch and PEFT, which take seconds to import. Each of its commands
# calls `register` before anything else. This, or the use of a public name, then imports everything (see `_load`).
_later: bool = globals().get("_later", os.path.basename((sys.argv or [""])[0]) in ("peft-sensi", "peft-sensi.exe"))
_missing: str | None = None

try:
    if TYPE_CHECKING or not _later:
        from peft import mapping as _mapping

        from . import recipes
        from .anatomy.build import build_anatomy
        from .anatomy.latency import LatencyTable
        from .anatomy.layouts import BlockLayout
        from .anatomy.units import Anatomy
        from .merging.latency import export_graphs, measure_latency
        from .merging.load import load_merged
        from .merging.onnx import export_onnx
        from .merging.save import save_merged
        from .planning.allocate import make_plan
        from .planning.budget import Budget
        from .planning.plan import Plan
        from .reporting.hub import hook_cards as _hook_cards
        from .scoring.compute import compute_scores
        from .scoring.scores import Scores
        from .tuner.caches import hook_caches as _hook_caches
        from .tuner.callback import SensiCallback
        from .tuner.config import SensiConfig, SensiPeftType
        from .tuner.model import SensiModel
        from .tuner.peft_calls import hook_peft_calls as _hook_peft_calls
        from .tuner.schedule import Schedule
        from .utils.errors import AnatomyError, BudgetError, CalibrationError, SensiError, SensiLoadError
except ModuleNotFoundError as _error:
    # A device that only measures latencies has neither PyTorch nor PEFT. The modules that it needs
    # (`cli.device`, `merging.latency_graphs`) can be imported all the same.
    if (_error.name or "").partition(".")[0] not in _TRAINING_STACK:
        raise
    _missing = _error.name


def _load() -> None:
    """Runs this file again, with all imports."""
    global _later
    _later = False
    importlib.reload(sys.modules[__name__])


def __getattr__(name: str) -> Any:
    if name in __all__ and _later:
        _load()
        return getattr(sys.modules[__name__], name)
    if name in __all__ and _missing:
        raise _not_installed(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _not_installed(name: str) -> ImportError:
    return ImportError(
        f"peft_sensi.{name} needs {_missing}, which is not installed. Without it, only `peft-sensi measure FOLDER` "
        f"works. Install the package with its dependencies: {_how_to_install()}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Registers the method with PEFT. Importing the package does this; another call changes nothing.

    This writes into PEFT's tables: `peft.utils.register_peft_method` accepts only members of PEFT's own enum, and PEFT
    has no entry point for plugins. Raises `SensiError` if another package uses the same name, and `ImportError` if
    PEFT or PyTorch is not installed.
    """
    if _later:
        return _load()
    if _missing:
        raise _not_installed("register")
    name = SensiPeftType.SENSI
    entries: tuple[tuple[dict[Any, Any], Any], ...] = (
        (_mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SensiConfig),
        (_mapping.PEFT_TYPE_TO_TUNER_MAPPING, SensiModel),
        (_mapping.PEFT_TYPE_TO_PREFIX_MAPPING, SensiModel.prefix),
    )
    for table, value in entries:
        if (taken := table.setdefault(name, value)) is not value:
            raise SensiError(
                f"Another package has already registered a PEFT method called {name.value!r}: {taken!r}. "
                f"Import only one of the two in a process."
            )
    _hook_cards()
    _hook_peft_calls()
    _hook_caches()


if _missing is None and not _later:
    register()

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "AnatomyError",
    "BlockLayout",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "LatencyTable",
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
    "export_graphs",
    "export_onnx",
    "load_merged",
    "make_plan",
    "measure_latency",
    "recipes",
    "save_merged",
]
