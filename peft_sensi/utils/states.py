"""The three states of a unit, and the states of one group of units as an array.

A *unit* is what is ranked: an attention head, an FFN neuron, a row of a Linear or a token (see `anatomy.units`). A
*group* holds the units of one sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


TRIMMED, FROZEN, TUNED = 0, 1, 2
# No plan holds this state. Tables and pictures give it to frozen units whose matrices have an update all the same (a
# low-rank one, single values or a mask).
UPDATED = 3
# The order in which tables and pictures show the states.
STATES = {TUNED: "tuned", UPDATED: "updated", FROZEN: "frozen", TRIMMED: "trimmed"}
KINDS = {"head": "heads", "neuron": "neurons", "row": "rows", "token": "tokens", "tensor": "tensors"}


@dataclass(frozen=True)
class Row:
    """One group of units, as tables and pictures show it.

    Attributes:
        name: The group's name, such as `bert.encoder.layer.0.heads`.
        block: Path of the transformer block of the group. For a group outside of blocks, path of its module.
        kind: A key of `KINDS`.
        states: The state of each unit, uint8.
        update: What the matrices of `UPDATED` units have: `low-rank, rank 8, on 72 matrices`, for example.
    """

    name: str
    block: str
    kind: str
    states: np.ndarray
    update: str = ""

    @property
    def size(self) -> int:
        return len(self.states)

    @property
    def kept(self) -> int:
        """The number of units that stay in the model."""
        return self.size - self.count(TRIMMED)

    def count(self, *states: int) -> int:
        """The number of units in one of these states."""
        return int(np.isin(self.states, states).sum())


def shown_states(rows: Sequence[Row]) -> dict[int, str]:
    """The states that occur in these rows and their names, in the order of `STATES`."""
    names = STATES | {UPDATED: next((row.update for row in rows if row.update), STATES[UPDATED])}
    return {state: name for state, name in names.items() if any(row.count(state) for row in rows)}
