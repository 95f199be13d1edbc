"""How the trained part of a Linear is parametrized: dense slices, low-rank terms, single values, binary masks.

An `update` is a name or several joined by `+`. The effective weight is always

    (base with its tuned slices replaced + up @ down + values at their places) * mask

so that what a mask removes stays removed when the adapter is merged (DSEE, arXiv 2111.00160).
"""

from __future__ import annotations

from typing import Any

import torch


UPDATES = ("dense", "low_rank", "sparse", "low_rank+sparse", "dense+low_rank", "mask")
SUPPORTS = ("magnitude", "random", "decomposition")
_DECOMPOSITION_ROUNDS = 10


def low_rank_start(shape: torch.Size, rank: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`down` `[rank, in]`, random with the variance 1 / in, and `up` `[out, rank]`, zero: at first nothing changes."""
    out, features = shape
    down = torch.randn(rank, features, device=like.device) / max(1, features) ** 0.5
    return down, torch.zeros(out, rank, device=like.device)


def sparse_support(weight: torch.Tensor, count: int, support: str, rank: int, seed: int) -> torch.Tensor:
    """`count` flat positions (int32, ascending) of a matrix whose values are to be trained.

    `magnitude` takes the largest |W|, `random` any, `decomposition` the largest entries of the sparse part of
    `W = L + S` with `L` of low rank, `first` (which no config may ask for) the first. Ties go to the smaller position.
    """
    count = min(count, weight.numel())
    if support == "first":
        return torch.arange(count, dtype=torch.int32, device=weight.device)
    if support == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(weight.numel(), generator=generator)[:count]
    else:
        matrix = weight.detach().float().cpu()
        if support == "decomposition":
            matrix = _sparse_part(matrix, count, rank)
        chosen = matrix.abs().flatten().argsort(descending=True, stable=True)[:count]
    return chosen.sort().values.to(torch.int32).to(weight.device)


def _sparse_part(weight: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """`W - L` after alternating between the best `L` of the rank and the best `S` with `count` entries."""
    # A rank that reaches the matrix's own would explain everything and leave nothing to choose from.
    rank = max(1, min(rank, min(weight.shape) - 1))
    sparse = torch.zeros_like(weight)
    rest = weight
    for _ in range(_DECOMPOSITION_ROUNDS):
        u, s, v = torch.linalg.svd(weight - sparse, full_matrices=False)
        rest = weight - (u[:, :rank] * s[:rank]) @ v[:rank]
        chosen = rest.abs().flatten().argsort(descending=True, stable=True)[:count]
        sparse = torch.zeros_like(weight)
        sparse.view(-1)[chosen] = rest.flatten()[chosen]
    return rest


def top_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """A mask (bool) that removes exactly `floor(sparsity * numel)` entries: those with the smallest scores."""
    flat = scores.detach().flatten()
    removed = int(sparsity * flat.numel() + 1e-9)
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # A selection and not a sort: a mask that is learned is drawn in every step.
    threshold = flat.kthvalue(removed).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero()[:, 0]
    mask[ties[len(ties) - (flat.numel() - removed - int(mask.sum())) :]] = True  # the first of equals go
    return mask.view_as(scores)


class _StraightThrough(torch.autograd.Function):
    """The mask of the scores; its gradient is passed to the scores as it is (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
        return top_mask(scores, sparsity).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def learned_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """`top_mask` that can be trained."""
    return _StraightThrough.apply(scores, sparsity)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """One bit an entry: uint8 `[ceil(numel / 8)]`, the first entry in the highest bit."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: torch.Tensor, shape: torch.Size | tuple[int, int]) -> torch.Tensor:
    """Inverse of `pack_mask`, as booleans."""
    numel = shape[0] * shape[1]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:numel].view(*shape).bool()
