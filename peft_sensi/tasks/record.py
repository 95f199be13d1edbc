"""The folder of an adapter goes in; what its training has recorded about the task comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.checks import is_count
from ..utils.files import read_json_object
from .task import KINDS


_TYPES: dict[str, tuple[type, ...]] = {
    "silent": (bool,), "problem_type": (str,), "label_separator": (str, type(None)), "labels": (list,),
    "text_columns": (list,), "label_columns": (list,),
}  # fmt: skip
_LEAST = {"max_length": 2, "stride": 0, "max_answer_length": 1}  # numbers of tokens, and the smallest that make sense


def saved_record(folder: str | Path) -> dict[str, Any]:
    """The record of the task in a folder's `metrics.json`, as `record_of` made it; `{}` if there is none."""
    return checked_record(read_json_object(Path(folder) / "metrics.json", optional=True).get("task"))


def checked_record(record: Any) -> dict[str, Any]:
    """The record without entries of another type than expected, because the file may come from anywhere."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        return {}
    return {"kind": kind} | {name: value for name, value in record.items() if _fits(name, value)}


def _fits(name: str, value: Any) -> bool:
    kinds = _TYPES.get(name, ())
    if name in _LEAST:
        return is_count(value, _LEAST[name])
    if isinstance(value, list):
        return list in kinds and all(isinstance(item, str) for item in value)
    return isinstance(value, kinds)


def kind_of_model(task_type: str | None, architectures: list[str] | None = None) -> str | None:
    """The kind of an adapter's task type, or of a model's class (`BertForTokenClassification`); `None` if unknown."""
    by_type = {KINDS[kind][0]: kind for kind in KINDS}
    by_class = {KINDS[kind][1].removeprefix("AutoModel"): kind for kind in KINDS}
    ends = [kind for end, kind in by_class.items() if any(name.endswith(end) for name in architectures or [])]
    return by_type.get(task_type or "") or (ends[0] if ends else None)
