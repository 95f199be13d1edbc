"""Where each family of models keeps its heads and neurons: one entry a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import AnatomyError


@dataclass(frozen=True)
class BlockLayout:
    """Where a transformer layer keeps its heads and neurons: one row of the table of families.

    Names are paths below the layer module. `layer` is the end of the layer's own path, with `*` for its index. Leave
    the attention names or the FFN names empty for a layer that has only the other; a field that names nothing is
    skipped. `head_size` is a number or the path of an attribute that holds it. `head_counts`, `kv_head_counts` and
    `head_widths` are attributes that must follow the number of heads (resp. heads times head size) of a trimmed layer.
    The two norms are the modules whose *input* is the residual sum after the sublayer; they weigh the errors of the
    refit.
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockLayout:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise AnatomyError(f"A block layout has no field {unknown[0]!r}; its fields are {sorted(known)}.")
        if not isinstance(values.get("layer"), str) or not values["layer"]:
            raise AnatomyError(
                "A block layout needs `layer`, the path of the layer modules, such as 'encoder.layer.*'."
            )
        return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}


_BERT = BlockLayout(
    layer="encoder.layer.*",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    head_size="attention.self.attention_head_size",
    head_counts=("attention.self.num_attention_heads",),
    head_widths=("attention.self.all_head_size",),
    attention_norm="attention.output.LayerNorm",
    ffn_norm="output.LayerNorm",
)
_DISTILBERT = BlockLayout(
    layer="transformer.layer.*",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    head_size="attention.attention_head_size",
    head_counts=("attention.n_heads",),
    attention_norm="sa_layer_norm",
    ffn_norm="output_layer_norm",
)

FAMILIES: dict[str, tuple[BlockLayout, ...]] = {
    "bert": (_BERT,),
    "camembert": (_BERT,),
    "distilbert": (_DISTILBERT,),
    "electra": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
}
