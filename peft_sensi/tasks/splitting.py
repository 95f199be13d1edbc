"""Rows go in; training and validation rows come out, with the same share of every class in both."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

from ..utils.errors import DataError


def hold_out(strata: Sequence[Hashable], share: float, seed: int, what: str = "rows") -> tuple[list[int], list[int]]:
    """The row numbers for training and for validation, both in increasing order.

    Args:
        strata: For each row, its class. Validation gets `share` of each, and training at least one row of each.
        share: The share of all rows that is held out, between 0 and 1.
        seed: The seed of the random choice.
        what: What is held out, for the error.

    Raises:
        DataError: One side would be empty.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number, stratum in enumerate(strata):
        members[stratum].append(number)
    count = round(len(strata) * share)
    if not 0 < count < len(strata):
        raise DataError(
            f"Too few {what} ({len(strata)}) to hold out {100 * share:.3g} % of them: give a file with "
            f"--validation, or another --validation-share."
        )
    generator = random.Random(seed)
    for numbers in members.values():
        generator.shuffle(numbers)
    held = {stratum: min(int(len(numbers) * share), len(numbers) - 1) for stratum, numbers in members.items()}
    # The classes with the largest rest get one row more, until there are enough.
    rest = sorted(members, key=lambda s: (held[s] - len(members[s]) * share, -len(members[s])))
    while (left := count - sum(held.values())) > 0:
        growing = [stratum for stratum in rest if held[stratum] < len(members[stratum]) - 1][:left]
        if not growing:
            break  # every class has one training row, and no more
        for stratum in growing:
            held[stratum] += 1
    chosen = {number for stratum, numbers in members.items() for number in numbers[: held[stratum]]}
    if not chosen:
        raise DataError("Every class has one row only, so none can be held out: give a file with --validation.")
    return [i for i in range(len(strata)) if i not in chosen], sorted(chosen)


def by_group(groups: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """As `hold_out`, but rows of the same group (such as questions about one text) stay together."""
    distinct = list(dict.fromkeys(groups))
    train, _ = hold_out([None] * len(distinct), share, seed, "different texts")
    kept = {distinct[i] for i in train}
    sides = [[i for i, group in enumerate(groups) if (group in kept) is side] for side in (True, False)]
    return sides[0], sides[1]


def sample(count: int, at_most: int | None, seed: int) -> list[int]:
    """At most so many of `count` row numbers, chosen at random, in increasing order."""
    if at_most is None or at_most >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), at_most))
