"""How a family of models describes where its layers keep their heads and neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..utils.errors import AnatomyError


@dataclass(frozen=True)
class BlockLayout:
    """Where a transformer layer keeps its heads and neurons: one row of the table of families (`families`).

    Names are paths below the layer module. `layer` is the end of the layer's own path, with `*` for its index. Leave
    the attention names or the FFN names empty for a layer that has only the other; a field that names nothing is
    skipped. `head_size` is a number or the path of an attribute that holds it. `head_counts`, `kv_head_counts` and
    `head_widths` are attributes that must follow the number of heads (resp. heads times head size) of a trimmed layer.
    The two norms are the modules whose *input* is the residual sum after the sublayer; they weigh the errors of the
    refit. Leave them empty where that sum is what the layer returns.

    One fused Linear is named several times: as `q`, `k` and `v` (or as `k` and `v`, or `up` and `gate`) it holds their
    rows one block after another in this order, or, with `interleaved`, those of each head together. `fixed_heads` can
    be tuned but not trimmed. Where the layer's code cannot run without heads, `min_heads` of them stay; with `cached`,
    one stays in those layers by whose keys a cache for generation measures its length: the first of each kind in
    `config.layer_types`. `cross` marks attention to another sequence, which has a group of its own. `relative` is the
    path of an attention that projects relative positions, too (see `positions`). `repeats` is how often the layer runs
    in one pass: a number, or the paths of two attributes, the number of runs of all layers and that of the layers (the
    first `*` of `layer`) over which they are spread.
    """

    layer: str
    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    up: str = ""
    gate: str = ""
    down: str = ""
    head_size: int | str = ""
    head_counts: tuple[str, ...] = ()
    kv_head_counts: tuple[str, ...] = ()
    head_widths: tuple[str, ...] = ()
    attention_norm: str = ""
    ffn_norm: str = ""
    fixed_heads: bool = False
    interleaved: bool = False
    min_heads: int = 0
    cached: bool = False
    cross: bool = False
    relative: str = ""
    repeats: int | tuple[str, ...] = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockLayout:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise AnatomyError(f"A block layout has no field {unknown[0]!r}; its fields are {sorted(known)}.")
        if not isinstance(values.get("layer"), str) or not values["layer"]:
            raise AnatomyError(
                "A block layout needs `layer`, the path of the layer modules, such as 'encoder.layer.*'."
            )
        kinds: dict[str, Any] = {f.name: (list, tuple) if f.default == () else type(f.default) for f in fields(cls)}
        kinds |= {"layer": str, "head_size": (int, str), "repeats": (int, list, tuple)}
        for name, value in values.items():
            if not isinstance(value, kinds[name]):
                raise AnatomyError(f"The field {name!r} of a block layout cannot be {value!r}.")
        fitting: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
        return cls(**fitting)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v and (k, v) != _ONCE}


_ONCE = ("repeats", 1)
