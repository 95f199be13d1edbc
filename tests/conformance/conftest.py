"""Applies the tables of `deselected.py`, and keeps them honest: an entry that no test needs is an error.

Each test runs with all budgets for one family of models, and with one budget for the other families. `make slow` runs
the other combinations. They repeat the same paths through our code.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest

from .deselected import DESELECTED, EXPECTED_ERRORS


_COUNTS: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "skipf: a slip of the pen in PEFT's tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = {item: item.nodeid.split("::", 1)[1] for item in items if item.path.name == "test_peft_suite.py"}
    unused = {*EXPECTED_ERRORS, *(pattern for patterns in DESELECTED.values() for pattern in patterns)}
    dropped = []
    for item, name in ours.items():
        if _is_repeated(item):
            item.add_marker(pytest.mark.slow)
        for reason, patterns in DESELECTED.items():
            if matching := {pattern for pattern in patterns if fnmatchcase(name, pattern)}:
                unused -= matching
                _COUNTS[reason] += 1
                dropped.append(item)
                break
        for pattern, (error, reason) in EXPECTED_ERRORS.items():
            if fnmatchcase(name, pattern):
                unused.discard(pattern)
                item.add_marker(pytest.mark.xfail(raises=error, reason=reason, strict=True))
                _shorten_report(item, error)
    if dropped:
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=dropped)
    if unused and ours and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"deselected.py names tests that PEFT does not have: {sorted(unused)}")


def _is_repeated(item: pytest.Item) -> bool:
    """Whether the family is not the first one, and the budget is not the one that both trims and tunes."""
    places = item.callspec.indices if hasattr(item, "callspec") else {}
    is_a_product = "model_id" in places and "config_kwargs" in places and "test_name" not in places
    return is_a_product and places["model_id"] > 0 and "trim-tune" not in item.name


def _shorten_report(item: pytest.Item, error: type[Exception]) -> None:
    """Reports an expected error without a traceback, for which pytest would parse PEFT's long files of tests."""
    whole = item.repr_failure

    def short(excinfo: Any, *args: Any, **kwargs: Any) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, error) else whole(excinfo, *args, **kwargs)

    item.repr_failure = short  # type: ignore[method-assign]


def pytest_report_collectionfinish() -> list[str]:
    return [f"PEFT's own tests: {count} deselected, each {reason}" for reason, count in _COUNTS.most_common()]
