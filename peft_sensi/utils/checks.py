"""Checks of values that come from outside: the types of a config's fields, and what a config file may contain.

A config from a file is not trusted, so `check_foreign` allows less than a user may write in code. PEFT treats some
names as regular expressions, and block layouts name attributes that are read and set. So files may hold plain names
only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any, TypeGuard

from .errors import SensiError, SensiLoadError
from .heads import PROBLEM_TYPES


_COLLECTIONS = (list, tuple, set, frozenset)
_REGEX_SIGNS = set("\\^$*+?{}[]()|")
_MODULE_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_LAYER_PATH = re.compile(r"([\w-]+|\*)(\.([\w-]+|\*))*")
# Fields of a block layout with paths of attributes. In a file these must be public: no part begins with an underscore.
_ATTRIBUTES = ("head_size", "head_counts", "kv_head_counts", "head_widths", "repeats")
_ATTRIBUTE_PATH = re.compile(r"[A-Za-z0-9]\w*(\.[A-Za-z0-9]\w*)*")
# No model has more modules than this, and matching names against this many is still fast.
_MOST_NAMES, _LONGEST_NAME, _MOST_STARS = 20_000, 512, 8
_LARGEST_NUMBER = 2**16  # of a block layout: sizes of heads, and how often a layer runs


def is_number(value: Any) -> bool:
    """Whether this is a finite number that fits into a float. In this module, booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def is_count(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether this is a whole number of at least `least` that fits into 32 bits."""
    return type(value) is int and least <= value < 2**31


MOST_THREADS = 1024  # a runtime ends the whole process if it cannot start as many as it is asked for


def is_threads(value: Any) -> bool:
    """Whether this is a number of threads that a runtime may be asked for."""
    return is_count(value) and value <= MOST_THREADS


def check_threads(threads: Any) -> None:
    """Raises `SensiError` if this is neither `None` nor a number of threads."""
    if threads is not None and not is_threads(threads):
        raise SensiError(f"`threads` must be a whole number from 1 to {MOST_THREADS}, got {shown(threads)}.")


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _is_names(value: Any) -> bool:
    return isinstance(value, _COLLECTIONS) and all(isinstance(name, str) for name in value)


def _is_fingerprint(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) - {"quantized", "vectors"} != {"shapes", "marks"}:
        return value is None
    shapes, marks, vectors = value["shapes"], value["marks"], value.get("vectors", {})
    return (
        isinstance(shapes, Mapping)
        and isinstance(marks, list)
        and all(isinstance(s, list) and all(type(n) is int for n in s) for s in shapes.values())
        and isinstance(vectors, Mapping)
        and all(is_number(mark) for mark in (*marks, *vectors.values()))
        and isinstance(value.get("quantized", False), bool)
    )


def _is_head_settings(value: Any) -> bool:
    if not isinstance(value, Mapping) or not set(value) <= {"labels", "problem_type", "pad_token_id"}:
        return value is None
    labels, problem, pad = (value.get(key) for key in ("labels", "problem_type", "pad_token_id"))
    return (
        (labels is None or (isinstance(labels, list) and all(isinstance(name, str) for name in labels)))
        and (problem is None or problem in PROBLEM_TYPES)
        and (pad is None or type(pad) is int)
    )


_NAMES_OR_NONE = (lambda v: v is None or _is_names(v), "a list of names or None")
_NAMES_OR_TEXT = (lambda v: v is None or isinstance(v, str) or _is_names(v), "a list of names, a string or None")
_TEXT_OR_NONE = (_is(str, NoneType), "a string or None")
_TEXT = (_is(str), "a string")
_BOOL = (_is(bool), "True or False")


def _count(smallest: int, or_none: bool = False) -> tuple[Callable[[Any], bool], str]:
    def is_good(value: Any) -> bool:
        return (value is None and or_none) or is_count(value, smallest)

    return is_good, f"a whole number of at least {smallest}"


_SHARE = (lambda v: v is None or (is_number(v) and 0 <= v < 1), "a share in [0, 1)")
# For each field: a function that says whether a value is accepted, and a description for the message.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_modules": _NAMES_OR_TEXT,
    "exclude_modules": _NAMES_OR_TEXT,
    "modules_to_save": _NAMES_OR_NONE,
    "also_train": _NAMES_OR_NONE,
    # An argument of `compute_scores` and `make_plan`.
    "targets": (lambda v: isinstance(v, Iterable | None) and not isinstance(v, str), "a list of names or None"),
    "score": _TEXT,
    "granularity": _TEXT,
    "update": _TEXT_OR_NONE,
    "support": _TEXT_OR_NONE,
    "compressed": _TEXT_OR_NONE,
    "blocks": (_is(list, tuple, NoneType), "a list of layouts or None"),
    "schedule": (_is(Mapping, NoneType), "a dict or None"),
    "refit": (_is(bool, NoneType), "True, False or None"),
    "keep_base": _BOOL,
    "init_weights": _BOOL,
    "inference_mode": _BOOL,
    "priming_lr": (lambda v: is_number(v) and v > 0, "a finite number above 0"),
    "calibration_steps": _count(1),
    "priming_steps": _count(0),
    "multiple_of": _count(1),
    "min_units": _count(0),
    "seed": _count(0),
    "always_trained": (lambda v: type(v) is int and v >= 0, "a whole number of at least 0"),
    "sequence_length": _count(1, or_none=True),
    "rank": _count(1, or_none=True),
    "sparse": _count(1, or_none=True),
    "tuned_layers": _count(1, or_none=True),
    "sparsity": _SHARE,
    "retention": _SHARE,
    "fingerprint": (_is_fingerprint, "None, or a dict of `shapes` and a list of finite `marks`"),
    "head_settings": (_is_head_settings, "None, or a dict of `labels`, `problem_type` and `pad_token_id`"),
    "auto_mapping": (
        lambda v: v is None or (isinstance(v, Mapping) and all(isinstance(entry, str | None) for entry in v.values())),
        "a dict of strings or None",
    ),
    "base_model_name_or_path": _TEXT_OR_NONE,
    "revision": _TEXT_OR_NONE,
    "peft_version": _TEXT_OR_NONE,
}


def check_types(values: Mapping[str, Any]) -> None:
    """Raises `SensiError` for a field of a config, or an argument of the same name, that has a wrong type or range."""
    for name, (is_good, expected) in _TYPES.items():
        if name in values and not is_good(values[name]):
            raise SensiError(f"`{name}` must be {expected}, got {shown(values[name])}.")


def check_foreign(values: Mapping[str, Any]) -> None:
    """Raises `SensiLoadError` if a config from a file holds more than plain names. Call `check_types` first.

    Regular expressions, and too many or too long names are refused.
    """
    for name in ("target_modules", "exclude_modules", "modules_to_save", "also_train"):
        value = values.get(name)
        if isinstance(value, str):
            if name != "target_modules" or value.lower() != "all-linear":
                raise SensiLoadError(
                    f"`{name}` must be a list of module names in a file, got the string {shown(value)}. Regular "
                    f"expressions from files are not run; a saved adapter lists the modules that matched."
                )
        elif value is not None:
            if len(value) > _MOST_NAMES or any(len(entry) > _LONGEST_NAME for entry in value):
                raise SensiLoadError(f"`{name}` must hold at most {_MOST_NAMES} names of {_LONGEST_NAME} characters.")
            # PEFT builds a regular expression from these.
            if name == "modules_to_save" and (bad := [e for e in value if not e or _REGEX_SIGNS & set(e)]):
                raise SensiLoadError(f"`{name}` must hold plain names of modules, got {shown(bad[0])}.")


def check_paths(layouts: Iterable[Mapping[str, Any]]) -> None:
    """Raises `SensiError` if a block layout could not be loaded from a file, which holds plain paths only."""
    for name, value in (field for layout in layouts for field in layout.items()):
        if isinstance(value, int) and 0 <= value <= _LARGEST_NUMBER:
            continue  # a number or a flag; `BlockLayout.from_dict` checks which fields are
        kind, pattern = "module", _LAYER_PATH if name == "layer" else _MODULE_PATH
        if name in _ATTRIBUTES:
            kind, pattern = "public attribute", _ATTRIBUTE_PATH
        for path in value if isinstance(value, _COLLECTIONS) else [value]:  # one path or several
            good = isinstance(path, str) and len(path) <= _LONGEST_NAME and path.count("*") <= _MOST_STARS
            if path != "" and not (good and pattern.fullmatch(path)):
                raise SensiError(f"`blocks`: `{name}` must hold plain paths of {kind}s, got {shown(path)}.")


def shown(value: Any) -> str:
    """`repr` of a value for a message, at most 120 characters long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."
