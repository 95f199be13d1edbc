"""`BlockLayout`: names the modules that hold the heads and neurons of a transformer layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..utils.checks import shown
from ..utils.errors import AnatomyError
from ..utils.formatting import short_repr


@dataclass(frozen=True, repr=False)
class BlockLayout:
    """Where a transformer layer keeps its heads and neurons: one row of the table in `families`.

    Names are paths of submodules below the layer. A layer without attention or FFN leaves these fields empty. One
    fused Linear is named several times: if it is `q`, `k` and `v` (or `k` and `v`, or `up` and `gate`), it holds their
    rows one after another in this order.

    Attributes:
        layer: The end of the layers' own paths, with `*` for each index, such as `encoder.layer.*`.
        q, k, v, o: Linears of queries, keys and values, and the output projection of the attention.
        up, gate, down: Linears of the FFN: input, gate (if any) and output.
        head_size: A number, or the path of an attribute that holds it.
        head_counts: Paths of attributes that hold the number of heads. A trim changes them.
        kv_head_counts: The same for the number of key/value heads.
        head_widths: The same for the number of heads times the head size.
        attention_norm, ffn_norm: The modules whose *input* is the residual sum after the attention or FFN. The refit
            (see `planning.refit`) weighs its errors by them. Leave them empty if the layer returns that sum.
        attention_factor, ffn_factor: Paths of attributes that hold a number, or a vector `[features]`, by which the
            layer multiplies the output of the attention or FFN before it adds it to the residual sum (Granite's
            multiplier, the LayerScale of DINOv2). The refit and the search for outlier units need it.
        fixed_heads: The heads can be tuned but not trimmed.
        interleaved: A fused Linear holds the queries, keys and values of each head together.
        min_heads: How many heads must stay, so that the layer's code can run.
        cached: A generation cache measures its length by the keys of the first layer of each kind in
            `config.layer_types`. One head stays in these layers.
        cross: The attention reads another sequence (cross-attention). Its heads have a group of their own.
        tokens_first: The layer's hidden states are `[tokens, batch, features]` (XLNet).
        relative: Path of an attention that projects relative positions, too (DeBERTa, see `build`).
        repeats: How often the layer runs in one pass. Either a number, or the paths of two attributes: the number of
            runs of all layers together, and the number of layers (the first `*`) that share these runs.

    Raises:
        AnatomyError: A field has a wrong type, or one that is needed is empty.
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
    attention_factor: str = ""
    ffn_factor: str = ""
    fixed_heads: bool = False
    interleaved: bool = False
    min_heads: int = 0
    cached: bool = False
    cross: bool = False
    tokens_first: bool = False
    relative: str = ""
    repeats: int | tuple[str, ...] = 1

    __repr__ = short_repr

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {f.name: (list, tuple) if f.default == () else type(f.default) for f in fields(self)}
        kinds |= {"layer": str, "head_size": (int, str), "repeats": (int, list, tuple)}
        for name, kind in kinds.items():
            value = getattr(self, name)
            parts = value if isinstance(value, (list, tuple)) else ()
            if not isinstance(value, kind) or not all(isinstance(part, str) for part in parts):
                raise AnatomyError(f"The field {name!r} of a block layout cannot be {shown(value)}.")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if not self.layer:
            raise AnatomyError(
                "A block layout needs `layer`, the path of the layer modules, such as 'encoder.layer.*'."
            )
        if self.o and not self.head_size:
            raise AnatomyError(
                f"The block layout of {self.layer!r} has an attention (`o`), and needs `head_size`: the features of a "
                f"head, or the path of an attribute that holds this number."
            )
        if isinstance(self.repeats, tuple) and len(self.repeats) != 2:
            raise AnatomyError(f"`repeats` of a block layout is a number or two paths, not {shown(self.repeats)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockLayout:
        """The layout of a JSON object. Raises `AnatomyError` for unknown fields and wrong types."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise AnatomyError(f"A block layout has no field {unknown[0]!r}. Its fields are {sorted(known)}.")
        return cls(**{"layer": "", **values})

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as a JSON object."""
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


Layouts = tuple[BlockLayout, ...]
Family = Layouts | Callable[[Any], Layouts]  # a family with variants has a function of the config


def is_lone_decoder(config: Any) -> bool:
    """Whether a model with this config is a decoder without an encoder. Its cross-attention, if any, never runs."""
    return not getattr(config, "is_encoder_decoder", True) and not getattr(config, "add_cross_attention", False)


def _expanded(paths: str) -> list[str]:
    """The paths of a text with braces: `mlp.{up,down}_proj` is `mlp.up_proj` and `mlp.down_proj`."""
    start, names, end = re.split("[{}]", paths)
    return [f"{start}{name}{end}" for name in names.split(",")]


def attention_fields(linears: str, size: str = "", count: str = "", width: str = "") -> dict[str, Any]:
    """The attention's fields of a `BlockLayout`.

    `linears` are `q`, `k`, `v` and `o` as in `_expanded`, or one fused Linear and `o`. The attributes that hold the
    head size, the number of heads and the width of all heads belong to the module whose path ends at the brace.
    """
    *inputs, o = _expanded(linears)
    module = linears.partition("{")[0]
    attributes = {
        "head_size": size and module + size,
        "head_counts": count and (module + count,),
        "head_widths": width and (module + width,),
    }
    projections = dict(zip("qkvo", [*(inputs * 3)[:3], o], strict=True))
    return projections | {name: value for name, value in attributes.items() if value}


def ffn_fields(linears: str) -> dict[str, Any]:
    """The FFN's fields: `up` and `down`, or `up`, `gate` and `down`, as in `_expanded`."""
    up, *gate, down = _expanded(linears)
    return {"up": up, "gate": "".join(gate), "down": down}
