"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


TRIMMED, FROZEN, TUNED = 0, 1, 2


STATES = {TUNED: "tuned", FROZEN: "frozen", TRIMMED: "trimmed"}


KINDS = {"head": "heads", "neuron": "neurons", "row": "rows", "token": "tokens", "tensor": "tensors"}


@dataclass(frozen=True)
class Row:
    """One group of units. `states` is uint8, one a unit; `block` is the layer's path, or the module's outside one."""

    name: str
    block: str
    kind: str
    states: np.ndarray

    @property
    def size(self) -> int:
        return len(self.states)

    def count(self, *states: int) -> int:
        return int(np.isin(self.states, states).sum())
