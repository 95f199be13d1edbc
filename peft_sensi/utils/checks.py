"""Types of a config's fields, checked before anything is done with a value.

A config that came out of a file is foreign: it is held to more. PEFT matches some names as regular expressions, and
layouts of blocks name attributes that are read and set, so a file may hold plain names only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .errors import SensiError, SensiLoadError


_COLLECTIONS = (list, tuple, set, frozenset)
_REGEX_SIGNS = set("\\^$*+?{}[]()|")
_PATH = re.compile(r"[A-Za-z0-9]\w*(\.[A-Za-z0-9]\w*)*")
_LAYER_PATH = re.compile(r"(\w+|\*)(\.(\w+|\*))*")
# More than any model has modules, and few enough to match against them in no time.
_MOST_NAMES, _LONGEST_NAME, _MOST_STARS = 20_000, 512, 8


def is_number(value: Any) -> bool:
    """A finite number that a float can hold, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _is_names(value: Any) -> bool:
    return isinstance(value, _COLLECTIONS) and all(isinstance(name, str) for name in value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


def _is_fingerprint(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or set(value) != {"shapes", "marks"}:
        return False
    shapes, marks = value["shapes"], value["marks"]
    return (
        isinstance(shapes, Mapping)
        and isinstance(marks, list)
        and all(isinstance(s, list) and all(type(n) is int for n in s) for s in shapes.values())
        and all(is_number(mark) for mark in marks)
    )


_NAMES_OR_NONE = (lambda v: v is None or _is_names(v), "a list of names or None")
_NAMES_OR_TEXT = (lambda v: v is None or isinstance(v, str) or _is_names(v), "a list of names, a string or None")
_TEXT_OR_NONE = (_is_text, "a string or None")
_TEXT = (lambda v: isinstance(v, str), "a string")
_TRUTH = (lambda v: isinstance(v, bool), "True or False")
_TYPES = {
    "target_modules": _NAMES_OR_TEXT,
    "exclude_modules": _NAMES_OR_TEXT,
    "modules_to_save": _NAMES_OR_NONE,
    "also_train": _NAMES_OR_NONE,
    "score": _TEXT,
    "granularity": _TEXT,
    "update": _TEXT_OR_NONE,
    "support": _TEXT_OR_NONE,
    "compressed": _TEXT_OR_NONE,
    "blocks": (lambda v: v is None or isinstance(v, (list, tuple)), "a list of layouts or None"),
    "schedule": (_is_mapping, "a dict or None"),
    "refit": (lambda v: v is None or isinstance(v, bool), "True, False or None"),
    "keep_base": _TRUTH,
    "init_weights": _TRUTH,
    "inference_mode": _TRUTH,
    "priming_lr": (is_number, "a finite number"),
    "fingerprint": (_is_fingerprint, "None, or a dict of `shapes` and a list of finite `marks`"),
    "auto_mapping": (lambda v: _is_mapping(v) and all(map(_is_text, (v or {}).values())), "a dict of strings or None"),
    "revision": _TEXT_OR_NONE,
    "peft_version": _TEXT_OR_NONE,
}


def check_types(values: Mapping[str, Any]) -> None:
    """Raises `SensiError` for the first field whose type is wrong; says key, expected and found."""
    for name, (good, expected) in _TYPES.items():
        if name in values and not good(values[name]):
            raise SensiError(f"`{name}` must be {expected}, got {shown(values[name])}.")


def check_foreign(values: Mapping[str, Any]) -> None:
    """What a file may not ask for, though a user may. To be called after `check_types`. Raises `SensiLoadError`."""
    for name in ("target_modules", "exclude_modules", "modules_to_save", "also_train"):
        value = values.get(name)
        if isinstance(value, str):
            if name != "target_modules" or value.lower() != "all-linear":
                raise SensiLoadError(
                    f"`{name}` must be a list of module names in a file, got the string {shown(value)}: a regular "
                    f"expression from a file is not run. Saved adapters hold the modules that it matched."
                )
        elif value is not None:
            if len(value) > _MOST_NAMES or any(len(entry) > _LONGEST_NAME for entry in value):
                raise SensiLoadError(f"`{name}` must hold at most {_MOST_NAMES} names of {_LONGEST_NAME} characters.")
            # PEFT builds a regular expression around these.
            if name == "modules_to_save" and (bad := [e for e in value if not e or _REGEX_SIGNS & set(e)]):
                raise SensiLoadError(f"`{name}` must hold plain names of modules, got {shown(bad[0])}.")
    for layout in values.get("blocks") or ():
        if isinstance(layout, Mapping):
            _check_layout(layout)


def _check_layout(layout: Mapping[str, Any]) -> None:
    for name, value in layout.items():
        if name == "head_size" and type(value) is int:
            continue
        for path in value if isinstance(value, _COLLECTIONS) else [value]:
            pattern = _LAYER_PATH if name == "layer" else _PATH
            good = isinstance(path, str) and len(path) <= _LONGEST_NAME and path.count("*") <= _MOST_STARS
            if path != "" and not (good and pattern.fullmatch(path)):
                raise SensiLoadError(f"`blocks`: `{name}` must hold plain paths of public names, got {shown(path)}.")


def shown(value: Any) -> str:
    """`repr` that never floods a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."
