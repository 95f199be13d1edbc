"""The closed form behind the refit, and its guard."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from ..utils import distributed


RIDGE = 1e-2
STEPS = (0.0, 0.5, 1.0)

# Weight `[out, kept columns]` (columns in ascending order) and bias `[out]` if the module has one, float32.
Values = tuple[torch.Tensor, torch.Tensor | None]


class LeastSquares:
    """Accumulates the weighted normal equations of the change of `weight` and `bias`; centered if there is a bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        out, kept = weight.shape
        double = torch.float64 if weight.device.type != "mps" else torch.float32
        self.zz, self.rz = weight.new_zeros(kept, kept, dtype=double), weight.new_zeros(out, kept, dtype=double)
        self.z, self.r = weight.new_zeros(kept, dtype=double), weight.new_zeros(out, dtype=double)
        self.total = weight.new_zeros((), dtype=double)

    def add(self, z: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        w = 1.0 / target.var(dim=-1, keepdim=True).clamp_min(1e-6)
        error = target - residual - F.linear(z, self.weight, self.bias)
        zw = z * w
        self.zz += z.t() @ zw
        self.rz += error.t() @ zw
        self.z += zw.sum(0)
        self.r += (error * w).sum(0)
        self.total += w.sum()

    def solve(self) -> Values | None:
        """The solution for the tokens of all processes, if there is one. To be called once: it uses the sums up."""
        distributed.all_sum([self.zz, self.rz, self.z, self.r, self.total], "refitting")
        if not self.weight.shape[1] or self.total <= 0:
            return None
        center = float(self.bias is not None)
        mean_z, mean_r = center * self.z / self.total, center * self.r / self.total
        # In place, and each freed as soon as it can be: these are the largest matrices of a refit.
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
    """Errors after a LayerNorm, on held-out tokens, of going part of the way from the old to the new values."""

    def __init__(self, old: Values, new: Values) -> None:
        self.old, self.new = old, new
        self.errors = [0.0] * len(STEPS)

    def add(self, z: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        start, end = residual + F.linear(z, *self.old), residual + F.linear(z, *self.new)
        normed = F.layer_norm(target, target.shape[-1:])
        for i, step in enumerate(STEPS):
            self.errors[i] += float(
                (F.layer_norm(torch.lerp(start, end, step), normed.shape[-1:]) - normed).square().sum()
            )

    def best(self) -> Values | None:
        self.errors = [
            sum(values) for values in zip(*distributed.gather("checking a refit", self.errors), strict=True)
        ]
        step = STEPS[int(np.argmin(self.errors))]
        if step == 0.0:
            return None
        (old_weight, old_bias), (new_weight, new_bias) = self.old, self.new
        bias = None if old_bias is None or new_bias is None else torch.lerp(old_bias, new_bias, step)
        return torch.lerp(old_weight, new_weight, step), bias
