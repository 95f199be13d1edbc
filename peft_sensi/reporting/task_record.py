"""What a training has recorded about its task in `metrics.json`: `Task.record` writes it, and this module reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.checks import is_count
from ..utils.files import read_json_object
from ..utils.task_types import TYPE_OF_KIND
from .saved import METRICS


_TYPES: dict[str, tuple[type, ...]] = {
    "silent": (bool,), "problem_type": (str,), "label_separator": (str, type(None)), "labels": (list,),
    "text_columns": (list,), "label_columns": (list,),
}  # fmt: skip
_LEAST = {"max_length": 2, "stride": 0, "max_answer_length": 1}  # numbers of tokens, and the smallest that make sense


def metrics_of(folder: Path) -> dict[str, Any]:
    """What the command wrote into `metrics.json`; empty if there is no such file, or something else in it."""
    return read_json_object(folder / METRICS, optional=True)


def saved_record(folder: str | Path) -> dict[str, Any]:
    """The record of the task in a folder's `metrics.json`, as `record_of` made it; `{}` if there is none."""
    return checked_record(metrics_of(Path(folder)).get("task"))


def checked_record(record: Any) -> dict[str, Any]:
    """The record without entries of another type than expected, because the file may come from anywhere."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in TYPE_OF_KIND:
        return {}
    return {"kind": kind} | {name: value for name, value in record.items() if _fits(name, value)}


def _fits(name: str, value: Any) -> bool:
    kinds = _TYPES.get(name, ())
    if name in _LEAST:
        return is_count(value, _LEAST[name])
    if isinstance(value, list):
        return list in kinds and all(isinstance(item, str) for item in value)
    return isinstance(value, kinds)
