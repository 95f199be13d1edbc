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
_ATTENTION_ONLY = replace(_LLAMA, up="", gate="", down="")  # the experts of a mixture stay as they are
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
_FUSED_GATE = replace(_LLAMA, up="mlp.gate_up_proj", gate="mlp.gate_up_proj")
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
_GPTJ = BlockLayout(
    layer="h.*",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    o="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
    head_size="attn.head_dim",
    head_counts=("attn.num_attention_heads",),
    min_heads=1,
    cached=True,
)
_GPT_NEO = BlockLayout(
    layer="h.*",
    q="attn.attention.q_proj",
    k="attn.attention.k_proj",
    v="attn.attention.v_proj",
    o="attn.attention.out_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    head_size="attn.attention.head_dim",
    head_counts=("attn.attention.num_heads",),
    attention_norm="ln_2",
    min_heads=1,
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


_OPT = BlockLayout(
    layer="layers.*",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.out_proj",
    up="fc1",
    down="fc2",
    head_size="self_attn.head_dim",
    head_counts=("self_attn.num_heads",),
    attention_norm="final_layer_norm",
    min_heads=1,
    cached=True,
)


def _opt(config: Any) -> tuple[BlockLayout, ...]:
    if config.do_layer_norm_before:
        return (_OPT,)
    return (replace(_OPT, attention_norm="self_attn_layer_norm", ffn_norm="final_layer_norm"),)


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
    "apertus": (replace(_LLAMA, gate="", attention_norm="feedforward_layernorm"),),
    "arcee": (replace(_LLAMA, gate=""),),
    "biogpt": (_OPT,),
    "cohere": _cohere,
    "cohere2": (replace(_LLAMA, attention_norm=""),),
    "cwm": (_LLAMA,),
    "ernie4_5": (_LLAMA,),
    "exaone4": (_NORMED_TWICE,),
    "gemma": (_LLAMA,),
    "gemma2": (_NORMED_TWICE,),
    "gemma3_text": (_NORMED_TWICE,),
    "glm": (_FUSED_GATE,),
    "glm4": (replace(_FUSED_GATE, attention_norm="post_self_attn_layernorm", ffn_norm="post_mlp_layernorm"),),
    "gpt2": (_GPT2,),
    "gpt_neo": (_GPT_NEO,),
    "gpt_neox": _gpt_neox,
    "gptj": (_GPTJ,),
    "granite": (_LLAMA,),
    "granitemoe": (_ATTENTION_ONLY,),
    "helium": (_LLAMA,),
    "hunyuan_v1_dense": (_LLAMA,),
    "hyperclovax": (_LLAMA,),
    "jais2": (replace(_LLAMA, gate=""),),
    "llama": (_LLAMA,),
    "ministral": (_LLAMA,),
    "ministral3": (_LLAMA,),
    "mistral": (_LLAMA,),
    "mixtral": (_ATTENTION_ONLY,),
    "modernbert": (_MODERNBERT,),
    "modernbert-decoder": (replace(_MODERNBERT, q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", cached=True),),
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
    "vaultgemma": (replace(_LLAMA, attention_norm="pre_feedforward_layernorm"),),
}
