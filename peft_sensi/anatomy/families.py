"""The table of model families: which layouts a model has, by the `model_type` of its config.

A family with variants has a function from the config to the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .decoders import DECODERS, Layouts
from .layouts import BlockLayout


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

# BERT with the LayerNorms before the sublayers. Each such family names the norm before its FFN.
_BERT_PRE_NORM = replace(_BERT, attention_norm="", ffn_norm="")
_ALBERT = BlockLayout(
    layer="encoder.albert_layer_groups.*.albert_layers.*",
    q="attention.query",
    k="attention.key",
    v="attention.value",
    o="attention.dense",
    up="ffn",
    down="ffn_output",
    head_size="attention.attention_head_size",
    head_counts=("attention.num_attention_heads",),
    head_widths=("attention.all_head_size",),
    attention_norm="attention.LayerNorm",
    ffn_norm="full_layer_layer_norm",
    repeats=("config.num_hidden_layers", "config.num_hidden_groups"),
)
_DEBERTA_V2 = replace(
    _BERT,
    q="attention.self.query_proj",
    k="attention.self.key_proj",
    v="attention.self.value_proj",
    relative="attention.self",
    min_heads=1,  # without heads, its code cannot infer its shapes
)
_MPNET = replace(
    _BERT,
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    o="attention.attn.o",
    head_size="attention.attn.attention_head_size",
    head_counts=(),
    head_widths=(),
    attention_norm="attention.LayerNorm",
    fixed_heads=True,
)
_MOBILEBERT = (
    replace(_BERT, ffn_norm="output.LayerNorm"),
    BlockLayout(
        layer="encoder.layer.*.ffn.*", up="intermediate.dense", down="output.dense", ffn_norm="output.LayerNorm"
    ),
)


def _t5(config: Any) -> Layouts:
    """All layers of a stack share a position bias with one column per head, so heads are fixed. FFNs may be gated."""
    layouts = []
    for stack, ffn in (("encoder", 1), ("decoder", 2)):
        own, other, dense = "layer.0.SelfAttention", "layer.1.EncDecAttention", f"layer.{ffn}.DenseReluDense"
        layer = BlockLayout(
            layer=f"{stack}.block.*",
            q=f"{own}.q",
            k=f"{own}.k",
            v=f"{own}.v",
            o=f"{own}.o",
            up=f"{dense}.{'wi_1' if config.is_gated_act else 'wi'}",
            gate=f"{dense}.wi_0" if config.is_gated_act else "",
            down=f"{dense}.wo",
            head_size=f"{own}.key_value_proj_dim",
            fixed_heads=True,
        )
        layouts.append(layer)
        if stack == "decoder":
            projections: dict[str, Any] = {part: f"{other}.{part}" for part in "qkvo"}
            layouts.append(replace(layer, **projections, up="", gate="", down="", cross=True))
    return tuple(layouts)


def _bart(norm_first: bool = False) -> Layouts:
    """Self-attention, cross-attention and FFN of encoder and decoder. `norm_first`: norms come before sublayers."""

    def heads(stack: str, name: str, norm: str, **more: Any) -> BlockLayout:
        projections: dict[str, Any] = {part: f"{name}.{part}_proj" for part in "qkv"}
        return BlockLayout(
            layer=f"{stack}.layers.*",
            **projections,
            o=f"{name}.out_proj",
            head_size=f"{name}.head_dim",
            head_counts=(f"{name}.num_heads",),
            attention_norm=norm,
            **more,
        )

    # The residual sum after a sublayer enters the sublayer's own norm or, with `norm_first`, the next sublayer's norm.
    own, cross, last = "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"
    encoder = replace(heads("encoder", "self_attn", last if norm_first else own), up="fc1", down="fc2")
    decoder = heads("decoder", "self_attn", cross if norm_first else own, cached=True)
    across = heads("decoder", "encoder_attn", last if norm_first else cross, cross=True)
    across = replace(across, up="fc1", down="fc2")
    ffn_norm = "" if norm_first else last
    return replace(encoder, ffn_norm=ffn_norm), decoder, replace(across, ffn_norm=ffn_norm)


_VIT = BlockLayout(
    layer="layers.*",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    o="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    head_size="attention.head_dim",
    head_counts=("attention.num_attention_heads",),
    attention_norm="layernorm_after",
)

_LIKE_BERT = (
    "bert bert-generation camembert data2vec-text electra ernie layoutlm rembert roberta roformer "
    "splinter xlm-roberta xmod"
).split()
FAMILIES: dict[str, Layouts | Callable[[Any], Layouts]] = {
    **DECODERS,
    **dict.fromkeys(_LIKE_BERT, (_BERT,)),
    **dict.fromkeys(("bart", "blenderbot-small", "marian", "plbart"), _bart()),
    **dict.fromkeys(("blenderbot", "m2m_100", "mbart", "pegasus"), _bart(norm_first=True)),
    **dict.fromkeys(("deit", "vit"), (_VIT,)),
    **dict.fromkeys(("mt5", "t5", "umt5"), _t5),
    "albert": (_ALBERT,),
    "deberta-v2": (_DEBERTA_V2,),
    "distilbert": (_DISTILBERT,),
    "esm": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "megatron-bert": (replace(_BERT_PRE_NORM, attention_norm="ln"),),
    "mobilebert": _MOBILEBERT,
    "mpnet": (_MPNET,),
    "roberta-prelayernorm": (replace(_BERT_PRE_NORM, attention_norm="intermediate.LayerNorm"),),
    "xlm-roberta-xl": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
}


def layouts_of(config: Any) -> Layouts:
    """The layouts for a model with this config. Unknown families have none."""
    entry = FAMILIES.get(getattr(config, "model_type", "") or "", ())
    return entry(config) if callable(entry) else entry
