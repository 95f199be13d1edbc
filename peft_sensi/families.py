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
    refit.

    One fused Linear is named several times: as `q`, `k` and `v` (or as `k` and `v`, or `up` and `gate`) it holds their
    rows one block after another in this order, or, with `interleaved`, those of each head together. `fixed_heads` can
    be tuned but not trimmed. Where the layer's code cannot run without heads, `min_heads` of them stay; with `cached`,
    one stays in those layers by whose keys a cache for generation measures its length: the first of each kind in
    `config.layer_types`.
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
    "bert": (_BERT,),
    "camembert": (_BERT,),
    "distilbert": (_DISTILBERT,),
    "electra": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
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
