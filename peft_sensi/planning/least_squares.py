"""The closed form of the refit (see `refit`): activations and targets go in; weights, biases and errors come out."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from ..utils import distributed


RIDGE = 1e-2  # relative to the mean of the Gram matrix's diagonal
STEPS = (0.0, 0.5, 1.0)  # parts of the way from the old values to the solution

# Weight `[out, kept columns]`, the columns in ascending order, and bias `[out]` or `None`. Both are float32.
Values = tuple[torch.Tensor, torch.Tensor | None]


def token_weights(target: torch.Tensor) -> torch.Tensor:
    """The weight of each token's squared error, `[tokens]`: 1 / var of `target` `[tokens, features]`.

    A norm follows, which divides the error by the standard deviation.
    """
    if not len(target):
        return target.new_zeros(0)  # `var` would warn
    return 1.0 / target.var(dim=-1).clamp_min(1e-6)


class LeastSquares:
    """Weighted ridge regression for the change of a weight `[out, kept]` and of its bias `[out]`, if there is one.

    With a bias, activations and errors are centered by their weighted means. Sums are float64 (float32 on MPS).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        out, kept = weight.shape
        double = torch.float64 if weight.device.type != "mps" else torch.float32
        self.zz, self.rz = weight.new_zeros(kept, kept, dtype=double), weight.new_zeros(out, kept, dtype=double)
        self.z, self.r = weight.new_zeros(kept, dtype=double), weight.new_zeros(out, dtype=double)
        self.total = weight.new_zeros((), dtype=double)

    def add(self, z: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        """Adds the tokens of one batch to the normal equations: `residual + W z + b` should become `target`.

        `z` is `[tokens, kept]`, `residual` and `target` are `[tokens, out]`.
        """
        w = token_weights(target)[:, None]
        error = target - residual - F.linear(z, self.weight, self.bias)
        zw = z * w
        self.zz += z.t() @ zw
        self.rz += error.t() @ zw
        self.z += zw.sum(0)
        self.r += (error * w).sum(0)
        self.total += w.sum()

    def solve(self) -> Values | None:
        """The new values from the tokens of all processes, or `None`. Call it only once: it overwrites the sums."""
        distributed.all_sum([self.zz, self.rz, self.z, self.r, self.total], "refitting")
        if not self.weight.shape[1] or self.total <= 0:
            return None
        center = float(self.bias is not None)
        mean_z, mean_r = center * self.z / self.total, center * self.r / self.total
        # These are the largest matrices of a refit, so they are changed in place and freed early.
        gram = self.zz.div_(self.total).addr_(mean_z, mean_z, alpha=-1.0)
        cross = self.rz.div_(self.total).addr_(mean_r, mean_z, alpha=-1.0)
        del self.zz, self.rz
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
        factor, info = torch.linalg.cholesky_ex(gram)
        del gram
        if info or not torch.isfinite(factor).all():
            return None
        change = torch.cholesky_solve(cross.t(), factor).t()
        del cross, factor
        weight = self.weight + change.float()
        bias = None if self.bias is None else self.bias + (mean_r - change @ mean_z).float()
        finite = torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())
        return (weight, bias) if finite else None


class GuardErrors:
    """Compares steps from the old to the new values: their squared errors after a LayerNorm, on held-out tokens."""

    def __init__(self, old: Values, new: Values) -> None:
        self.old, self.new = old, new
        self.errors = [0.0] * len(STEPS)

    def add(self, z: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        """Adds the errors of one batch. The shapes are those of `LeastSquares.add`."""
        start, end = residual + F.linear(z, *self.old), residual + F.linear(z, *self.new)
        normed = F.layer_norm(target, target.shape[-1:])
        for i, step in enumerate(STEPS):
            values = F.layer_norm(torch.lerp(start, end, step), normed.shape[-1:])
            self.errors[i] += float((values - normed).square().sum())

    def best(self) -> Values | None:
        """The values after the step with the smallest error in all processes; `None` if that is no step at all."""
        errors = np.sum(distributed.gather("checking a refit", self.errors), axis=0)
        step = STEPS[int(np.argmin(errors))]
        if step == 0.0:
            return None
        (old_weight, old_bias), (new_weight, new_bias) = self.old, self.new
        bias = None if old_bias is None or new_bias is None else torch.lerp(old_bias, new_bias, step)
        return torch.lerp(old_weight, new_weight, step), bias
