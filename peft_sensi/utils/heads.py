"""What the config of a model says about its task head. It needs the standard library only."""

from collections.abc import Mapping
from typing import Any


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def label_names(id2label: Any) -> list[str]:
    """The names of the classes in a Transformers config, in the order of their numbers.

    The list is empty if the numbers do not count from 0, and for `LABEL_0`, `LABEL_1` and so on, which are the names
    that Transformers gives if nobody has named the classes.
    """
    found = {str(number): str(name) for number, name in id2label.items()} if isinstance(id2label, Mapping) else {}
    numbers = [str(i) for i in range(len(found))]
    if found.keys() != set(numbers) or all(found[i] == f"LABEL_{i}" for i in numbers):
        return []
    return [found[i] for i in numbers]


def is_regressor(problem_type: str | None, outputs: int | None) -> bool:
    """Whether a head predicts a number: its config says so, or it has one output and the config says nothing."""
    return problem_type == "regression" or (problem_type is None and outputs == 1)
