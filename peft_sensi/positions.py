"""What relative positions cost a head in disentangled attention (DeBERTa, He et al. 2020, arXiv 2006.03654)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RelativePositions:
    """How one attention uses relative positions.

    Their keys and queries come from `projections` (names of Linears) that run on nothing else, or, if `shared`, from
    the tokens' own, which then run once more for each of the `rows` positions. Each token is multiplied with all rows
    once for each of the `products`: content with position (c2p) and position with content (p2c).
    """

    rows: int = 0
    products: int = 0
    projections: tuple[str, ...] = ()
    shared: bool = False


def relative_positions(attention: Any) -> RelativePositions:
    """Reads a `DisentangledSelfAttention` of Transformers."""
    if not attention.relative_attention:
        return RelativePositions()
    names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    kinds = [kind for kind in names if kind in attention.pos_att_type]
    shared = bool(attention.share_att_key)
    projections = () if shared else tuple(names[kind] for kind in kinds)
    return RelativePositions(2 * int(attention.pos_ebd_size), len(kinds), projections, shared)
