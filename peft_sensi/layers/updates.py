"""The kinds of trained tensors: dense slices, low-rank terms, single values and binary masks, and how they start.

An `update` is one of `UPDATES`; some combine two kinds by `+`. The adapted weight is always

    (base with the tuned rows or columns replaced + scale * up @ down + values at their positions) * mask

The mask comes last, so a masked weight is zero in the merged model too (DSEE, arXiv 2111.00160).
"""

from __future__ import annotations

import torch


UPDATES = ("dense", "low_rank", "sparse", "low_rank+sparse", "dense+low_rank", "mask")
SUPPORTS = ("magnitude", "random", "decomposition")
_DECOMPOSITION_ROUNDS = 10


def default_scale(rank: int) -> float:
    """The factor of a low-rank term: 1 / rank.

    A step of Adam moves each entry of `up` and `down` by about the learning rate, whatever its gradient. After `t`
    steps at the rate `lr`, a weight has moved by up to `rank * (lr * t)^2`, a sum over the ranks. With this factor the
    bound is the same for every rank, and so is the range of useful learning rates.
    """
    return 1 / rank


def start_of_down(scale: float, rank: int, fan: int) -> float:
    """The standard deviation of `down`, `[rank, fan]`, at the start, when `up` is zero.

    While `up` is small, a step of Adam at the rate `lr` moves a weight by about `lr * scale * sqrt(rank)` times this
    deviation: a sum over the ranks, with random signs. With `1 / sqrt(fan)`, as in LoRA (arXiv 2106.09685), and the
    scale `1 / rank`, high ranks would start slowly. So `down` is larger by up to `sqrt(rank)`, and the first steps are
    those of rank 1. With a scale of `1 / sqrt(rank)` or more (Kalajdzievski 2023), the start is that of LoRA.
    """
    return min(rank**0.5, max(1.0, 1 / (scale * rank**0.5))) / max(1, fan) ** 0.5


def sparse_support(weight: torch.Tensor, count: int, support: str, rank: int, seed: int) -> torch.Tensor:
    """Flat positions (int32, ascending, at most `count`) of the single values of a matrix that are trained.

    `support` is one of:

    - `magnitude`: the largest |W|; among equal values, the smaller position is taken.
    - `random`: random positions by `seed`.
    - `decomposition`: the largest entries of `W - L`, with `L` of the given rank (see `_sparse_part`).
    - `first`: the first positions; for adapters whose positions come from a file.
    """
    count = min(count, weight.numel())
    if support == "first":
        return torch.arange(count, dtype=torch.int32, device=weight.device)
    if support == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        chosen = torch.randperm(weight.numel(), generator=generator, device="cpu")[:count]
    else:
        matrix = weight.detach().float().cpu()
        if support == "decomposition":
            matrix = _sparse_part(matrix, count, rank)
        chosen = matrix.abs().flatten().argsort(descending=True, stable=True)[:count]
    return chosen.sort().values.to(torch.int32).to(weight.device)


def _sparse_part(weight: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """`W - L` for a decomposition `W = L + S`: `L` has low rank, `S` has `count` nonzero entries.

    Alternates between the best `L` (by singular value decomposition) and the best `S` (DSEE, arXiv 2111.00160).
    """
    # With the full rank of the matrix, `L` would be `W`, and no entry would stand out.
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


def masked_count(numel: int, sparsity: float) -> int:
    """How many of so many weights a mask removes."""
    return int(sparsity * numel + 1e-9)


def top_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """A mask (bool, of the shape of `scores`) that is false for the `floor(sparsity * numel)` smallest scores.

    Among equal scores, the first ones are removed.
    """
    flat = scores.detach().flatten()
    removed = masked_count(flat.numel(), sparsity)
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # `kthvalue` and not `sort`, for speed: a learned mask is computed in every step.
    threshold = flat.kthvalue(removed).values
    ties = flat == threshold
    # No shape here depends on values, so a model can be exported while it learns its mask.
    kept_ties = ties & (ties.cumsum(0, dtype=torch.int32) > removed - (flat < threshold).sum())
    return ((flat > threshold) | kept_ties).view_as(scores)


def learned_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """`top_mask` in the dtype of the scores. The gradient goes to the scores unchanged (straight-through estimator,
    Bengio et al. 2013, arXiv 1308.3432)."""
    return top_mask(scores, sparsity).to(scores.dtype) + (scores - scores.detach())


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask with one bit per entry: uint8 `[ceil(numel / 8)]`. The first entry is the highest bit."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: torch.Tensor, shape: torch.Size | tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack_mask`: a bool tensor of the given shape."""
    numel = shape[0] * shape[1]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:numel].view(*shape).bool()
