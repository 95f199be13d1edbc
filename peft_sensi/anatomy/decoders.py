"""The layouts of decoder families, and of ModernBERT, whose layers are similar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .layouts import BlockLayout


Layouts = tuple[BlockLayout, ...]

# Most newer decoders use Llama's names. Their code infers the number of heads from shapes, so no attribute holds it.
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
_ATTENTION_ONLY = replace(_LLAMA, up="", gate="", down="")  # the experts of a mixture have no units
# A norm is applied to the sublayer's output before it is added. The refit fits the input of that norm.
_NORMED_TWICE = replace(_LLAMA, attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm")
# Queries and keys are normalized over all heads together, so trimming one head would change the others.
_NORMED_ACROSS_HEADS = replace(_NORMED_TWICE, fixed_heads=True)
# The code splits the fused projection at sizes that all layers read from the same config.
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


def _opt(config: Any) -> Layouts:
    if config.do_layer_norm_before:
        return (_OPT,)
    return (replace(_OPT, attention_norm="self_attn_layer_norm", ffn_norm="final_layer_norm"),)


def _gpt_neox(config: Any) -> Layouts:
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


def _stablelm(config: Any) -> Layouts:
    return (
        replace(
            _LLAMA,
            head_counts=("self_attn.num_heads",),
            kv_head_counts=("self_attn.num_key_value_heads",),
            attention_norm="" if config.use_parallel_residual else "post_attention_layernorm",
            fixed_heads=config.qk_layernorm,  # one norm for each head
            min_heads=1,
        ),
    )


def _cohere(config: Any) -> Layouts:
    return (replace(_LLAMA, attention_norm="", fixed_heads=config.use_qk_norm),)  # one norm for each head


_LIKE_LLAMA = (
    "cwm ernie4_5 gemma granite helium hunyuan_v1_dense hyperclovax llama ministral ministral3 "
    "mistral olmo qwen2 qwen3 seed_oss smollm3"
).split()
DECODERS: dict[str, Layouts | Callable[[Any], Layouts]] = {
    **dict.fromkeys(_LIKE_LLAMA, (_LLAMA,)),
    **dict.fromkeys(("granitemoe", "mixtral", "qwen2_moe", "qwen3_moe"), (_ATTENTION_ONLY,)),
    **dict.fromkeys(("exaone4", "gemma2", "gemma3_text"), (_NORMED_TWICE,)),
    **dict.fromkeys(("olmo2", "olmo3"), (_NORMED_ACROSS_HEADS,)),
    **dict.fromkeys(("arcee", "jais2", "nemotron"), (replace(_LLAMA, gate=""),)),
    "apertus": (replace(_LLAMA, gate="", attention_norm="feedforward_layernorm"),),
    "biogpt": (_OPT,),
    "cohere": _cohere,
    "cohere2": (replace(_LLAMA, attention_norm=""),),
    "glm": (_FUSED_GATE,),
    "glm4": (replace(_FUSED_GATE, attention_norm="post_self_attn_layernorm", ffn_norm="post_mlp_layernorm"),),
    "gpt2": (_GPT2,),
    "gpt_neo": (_GPT_NEO,),
    "gpt_neox": _gpt_neox,
    "gptj": (_GPTJ,),
    "modernbert": (_MODERNBERT,),
    "modernbert-decoder": (replace(_MODERNBERT, q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", cached=True),),
    "opt": _opt,
    "phi": (_PHI,),
    "phi3": (_PHI3,),
    "stablelm": _stablelm,
    "starcoder2": (_STARCODER2,),
    "vaultgemma": (replace(_LLAMA, attention_norm="pre_feedforward_layernorm"),),
}
