"""The three states of a unit, and the states of one group of units as an array.

A *unit* is what is ranked: an attention head, an FFN neuron, a row of a Linear or a token (see `anatomy.units`). A
*group* holds the units of one sublayer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


TRIMMED, FROZEN, TUNED = 0, 1, 2
STATES = {TUNED: "tuned", FROZEN: "frozen", TRIMMED: "trimmed"}  # the order in which tables and pictures show them
KINDS = {"head": "heads", "neuron": "neurons", "row": "rows", "token": "tokens", "tensor": "tensors"}


@dataclass(frozen=True)
class Row:
    """One group of units, as tables and pictures show it.

    Attributes:
        name: The group's name, such as `bert.encoder.layer.0.heads`.
        block: Path of the transformer block of the group. For a group outside of blocks, path of its module.
        kind: A key of `KINDS`.
        states: The state of each unit, uint8.
    """

    name: str
    block: str
    kind: str
    states: np.ndarray

    @property
    def size(self) -> int:
        return len(self.states)

    def count(self, *states: int) -> int:
        """The number of units in one of these states."""
        return int(np.isin(self.states, states).sum())
