"""Applies the tables of `deselected.py`, and keeps them honest: an entry that no test needs is an error."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

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
    if dropped:
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=dropped)
    if unused and ours and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"deselected.py names tests that PEFT does not have: {sorted(unused)}")


def pytest_report_collectionfinish() -> list[str]:
    return [f"PEFT's own tests: {count} deselected, each {reason}" for reason, count in _COUNTS.most_common()]
