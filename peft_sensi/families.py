"""Where each family of models keeps its heads and neurons: one entry a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
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
    refit. Leave `ffn_norm` empty where that sum is what the layer returns.

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
    interleaved: bool = False
    fixed_heads: bool = False
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
        return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v and (k, v) != _ONCE}


_ONCE = ("repeats", 1)


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

# BERT with the LayerNorms before the sublayers; a family names the norm before its FFN.
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
    min_heads=1,  # its shapes cannot be inferred from nothing
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


def _t5(config: Any) -> tuple[BlockLayout, ...]:
    """The layers of one stack share a position bias with one column a head, so heads stay; FFNs may be gated."""
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
            projections = {part: f"{other}.{part}" for part in "qkvo"}
            layouts.append(replace(layer, **projections, up="", gate="", down="", cross=True))
    return tuple(layouts)


def _bart(norm_first: bool = False) -> tuple[BlockLayout, ...]:
    """Self-attention, cross-attention and FFN of both stacks, each its own group."""

    def heads(stack: str, name: str, norm: str, **more: Any) -> BlockLayout:
        projections = {part: f"{name}.{part}_proj" for part in "qkv"}
        return BlockLayout(
            layer=f"{stack}.layers.*",
            **projections,
            o=f"{name}.out_proj",
            head_size=f"{name}.head_dim",
            head_counts=(f"{name}.num_heads",),
            attention_norm=norm,
            **more,
        )

    # The norm whose input is the sum after a sublayer is its own where it comes last, else that of the next sublayer.
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

# Llama's names, which most newer decoders share; heads are counted by -1 and by the ratio of queries to keys.
_LLAMA = BlockLayout(
    layer="layers.*",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    up="mlp.up_proj",
    gate="mlp.gate_proj",
    down="mlp.down_proj",
    head_size="self_attn.head_dim",
    attention_norm="post_attention_layernorm",
    cached=True,
)
# The sublayer's output goes through a norm before it is added, and so that output is all that the refit can see.
_NORMED_TWICE = replace(_LLAMA, attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm")
_ATTENTION_ONLY = replace(_LLAMA, up="", gate="", down="")  # the experts of a mixture stay as they are
# Norms of queries and keys over all heads together: no head can leave without changing the others.
_NORMED_ACROSS_HEADS = replace(_NORMED_TWICE, fixed_heads=True)
# The fused projection is taken apart at places that all layers read from the one config.
_PHI3 = replace(
    _LLAMA,
    q="self_attn.qkv_proj",
    k="self_attn.qkv_proj",
    v="self_attn.qkv_proj",
    up="mlp.gate_up_proj",
    gate="mlp.gate_up_proj",
    fixed_heads=True,
)
_PHI = replace(_LLAMA, o="self_attn.dense", up="mlp.fc1", gate="", down="mlp.fc2", attention_norm="")
_STARCODER2 = replace(_LLAMA, up="mlp.c_fc", gate="", down="mlp.c_proj")
_NEMOTRON = replace(_LLAMA, gate="")
_GPT2 = BlockLayout(
    layer="h.*",
    q="attn.c_attn",
    k="attn.c_attn",
    v="attn.c_attn",
    o="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    head_size="attn.head_dim",
    head_counts=("attn.num_heads",),
    head_widths=("attn.split_size",),
    attention_norm="ln_2",
    cached=True,
)
_MODERNBERT = BlockLayout(
    layer="layers.*",
    q="attn.Wqkv",
    k="attn.Wqkv",
    v="attn.Wqkv",
    o="attn.Wo",
    up="mlp.Wi",
    gate="mlp.Wi",
    down="mlp.Wo",
    head_size="attn.head_dim",
    attention_norm="mlp_norm",
)


def _opt(config: Any) -> tuple[BlockLayout, ...]:
    first = getattr(config, "do_layer_norm_before", True)
    return (
        BlockLayout(
            layer="layers.*",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            up="fc1",
            down="fc2",
            head_size="self_attn.head_dim",
            head_counts=("self_attn.num_heads",),
            attention_norm="final_layer_norm" if first else "self_attn_layer_norm",
            ffn_norm="" if first else "final_layer_norm",
            min_heads=1,
            cached=True,
        ),
    )


def _gpt_neox(config: Any) -> tuple[BlockLayout, ...]:
    return (
        BlockLayout(
            layer="layers.*",
            q="attention.query_key_value",
            k="attention.query_key_value",
            v="attention.query_key_value",
            o="attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            head_size="attention.head_size",
            attention_norm="" if config.use_parallel_residual else "post_attention_layernorm",
            interleaved=True,
            cached=True,
        ),
    )


def _stablelm(config: Any) -> tuple[BlockLayout, ...]:
    return (
        replace(
            _LLAMA,
            head_counts=("self_attn.num_heads",),
            kv_head_counts=("self_attn.num_key_value_heads",),
            attention_norm="" if config.use_parallel_residual else "post_attention_layernorm",
            fixed_heads=config.qk_layernorm,  # one norm a head
            min_heads=1,
        ),
    )


def _cohere(config: Any) -> tuple[BlockLayout, ...]:
    return (replace(_LLAMA, attention_norm="", fixed_heads=config.use_qk_norm),)  # one norm a head


FAMILIES: dict[str, tuple[BlockLayout, ...] | Callable[[Any], tuple[BlockLayout, ...]]] = {
    "albert": (_ALBERT,),
    "bart": _bart(),
    "bert": (_BERT,),
    "bert-generation": (_BERT,),
    "blenderbot": _bart(norm_first=True),
    "blenderbot-small": _bart(),
    "camembert": (_BERT,),
    "data2vec-text": (_BERT,),
    "deberta-v2": (_DEBERTA_V2,),
    "deit": (_VIT,),
    "distilbert": (_DISTILBERT,),
    "electra": (_BERT,),
    "ernie": (_BERT,),
    "esm": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "layoutlm": (_BERT,),
    "m2m_100": _bart(norm_first=True),
    "marian": _bart(),
    "mbart": _bart(norm_first=True),
    "megatron-bert": (replace(_BERT_PRE_NORM, attention_norm="ln"),),
    "mobilebert": _MOBILEBERT,
    "mpnet": (_MPNET,),
    "mt5": _t5,
    "pegasus": _bart(norm_first=True),
    "plbart": _bart(),
    "rembert": (_BERT,),
    "roberta": (_BERT,),
    "roberta-prelayernorm": (replace(_BERT_PRE_NORM, attention_norm="intermediate.LayerNorm"),),
    "roformer": (_BERT,),
    "splinter": (_BERT,),
    "t5": _t5,
    "umt5": _t5,
    "vit": (_VIT,),
    "xlm-roberta": (_BERT,),
    "xlm-roberta-xl": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "xmod": (_BERT,),
    # Decoders, and ModernBERT, whose blocks are like theirs
    "arcee": (replace(_LLAMA, gate=""),),
    "cohere": _cohere,
    "gemma": (_LLAMA,),
    "gemma2": (_NORMED_TWICE,),
    "gemma3_text": (_NORMED_TWICE,),
    "gpt2": (_GPT2,),
    "gpt_neox": _gpt_neox,
    "granite": (_LLAMA,),
    "helium": (_LLAMA,),
    "llama": (_LLAMA,),
    "ministral": (_LLAMA,),
    "mistral": (_LLAMA,),
    "mixtral": (_ATTENTION_ONLY,),
    "modernbert": (_MODERNBERT,),
    "nemotron": (_NEMOTRON,),
    "olmo": (_LLAMA,),
    "olmo2": (_NORMED_ACROSS_HEADS,),
    "olmo3": (_NORMED_ACROSS_HEADS,),
    "opt": _opt,
    "phi": (_PHI,),
    "phi3": (_PHI3,),
    "qwen2": (_LLAMA,),
    "qwen2_moe": (_ATTENTION_ONLY,),
    "qwen3": (_LLAMA,),
    "qwen3_moe": (_ATTENTION_ONLY,),
    "seed_oss": (_LLAMA,),
    "smollm3": (_LLAMA,),
    "stablelm": _stablelm,
    "starcoder2": (_STARCODER2,),
}


def layouts_of(config: Any) -> tuple[BlockLayout, ...]:
    """The layouts of the family of a model with this config; none for an unknown family."""
    entry = FAMILIES.get(getattr(config, "model_type", "") or "", ())
    return entry(config) if callable(entry) else entry
