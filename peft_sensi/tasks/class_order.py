"""What a model predicts and the labels of the rows go in; whether the names of its classes were guessed wrong."""

from __future__ import annotations

import numpy as np

from ..utils.errors import DataError
from ..utils.formatting import listed
from .labels import Labels


CHANCE = 0.001  # an order is wrong if a constant answer would be as good as the best order less often than this


def check_order(labels: Labels, predicted: np.ndarray, expected: np.ndarray) -> None:
    """Raises `DataError` if a guessed order of the names (`Labels.guessed`) is plainly wrong.

    That is so if another order halves the errors, at least, and is better than any constant answer.

    Args:
        predicted, expected: Class numbers, int `[rows]`; for several labels, bool `[rows, classes]`.
    """
    if not labels.guessed or not len(expected):
        return
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import binomtest

    if labels.several:
        pairs = predicted.T.astype(int) @ expected.astype(int)  # [class of the model, label]
        # A cell is right if both say yes, or both say no.
        right, weight, count = int(predicted.size - predicted.sum() - expected.sum()), 2, predicted.size
        constant = int(np.maximum(expected.sum(0), (~expected).sum(0)).sum())
    else:
        pairs = np.zeros((len(labels.names),) * 2, dtype=int)
        np.add.at(pairs, (predicted, expected), 1)
        right, weight, count, constant = 0, 1, len(expected), int(pairs.sum(0).max())
    _, order = linear_sum_assignment(pairs, maximize=True)
    now = right + weight * int(np.trace(pairs))
    best = right + weight * int(pairs[np.arange(len(order)), order].sum())
    is_sure = binomtest(best, count, constant / count, alternative="greater").pvalue < CHANCE
    if best > now and 2 * (count - best) <= count - now and is_sure:
        raise DataError(
            f"The classes of the model have no names, and the order {listed(labels.names)} is probably wrong: "
            f"{now / count:.0%} of the labels are right. In the order {listed([labels.names[i] for i in order])} it "
            f"would be {best / count:.0%}. Write the names in the right order into `id2label` of the model's "
            f"config.json, or write the numbers of its classes, from 0 on, into the data."
        )
