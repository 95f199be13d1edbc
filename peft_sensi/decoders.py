"""Where decoders keep their heads and neurons, and ModernBERT, whose layers are like theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .layouts import BlockLayout


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
# Experts of a mixture stay as they are: Mixtral has no other FFN, Qwen's mixtures have it in their dense layers.
# The sublayer's output goes through a norm before it is added, and so that output is all that the refit can see.
_NORMED_TWICE = replace(_LLAMA, attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm")
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


DECODERS: dict[str, tuple[BlockLayout, ...] | Callable[[Any], tuple[BlockLayout, ...]]] = {
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
    "mixtral": (_LLAMA,),
    "modernbert": (_MODERNBERT,),
    "nemotron": (_NEMOTRON,),
    "olmo": (_LLAMA,),
    "olmo2": (_NORMED_ACROSS_HEADS,),
    "olmo3": (_NORMED_ACROSS_HEADS,),
    "opt": _opt,
    "phi": (_PHI,),
    "phi3": (_PHI3,),
    "qwen2": (_LLAMA,),
    "qwen2_moe": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "qwen3_moe": (_LLAMA,),
    "seed_oss": (_LLAMA,),
    "smollm3": (_LLAMA,),
    "stablelm": _stablelm,
    "starcoder2": (_STARCODER2,),
}
