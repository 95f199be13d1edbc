"""The layouts of decoders, and of encoders with layers like Llama's, by their `model_type`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .layouts import BlockLayout, Family, Layouts, attention_fields, ffn_fields


# Most newer decoders use Llama's names. Their code infers the number of heads from shapes, so no attribute holds it.
_LLAMA = BlockLayout(
    "layers.*",
    **attention_fields("self_attn.{q,k,v,o}_proj", size="head_dim"),
    **ffn_fields("mlp.{up,gate,down}_proj"),
    attention_norm="post_attention_layernorm",
    cached=True,
)
_GRANITE = replace(_LLAMA, attention_factor="residual_multiplier", ffn_factor="residual_multiplier")
_ATTENTION_ONLY = replace(_LLAMA, up="", gate="", down="")  # the experts of a mixture have no units
_GRANITE_EXPERTS = replace(_ATTENTION_ONLY, attention_factor="residual_multiplier")
_NOMIC = replace(_LLAMA, ffn_norm="post_mlp_layernorm", cached=False)  # encoders with norms after the sublayers
# A norm is applied to the sublayer's output before it is added. The refit fits the input of that norm.
_NORMED_TWICE = replace(_LLAMA, ffn_norm="post_feedforward_layernorm")
# Queries and keys are normalized over all heads together, so trimming one head would change the others.
_NORMED_ACROSS_HEADS = replace(_NORMED_TWICE, fixed_heads=True)
_FUSED_GATE = replace(_LLAMA, **ffn_fields("mlp.{gate_up,gate_up,down}_proj"))
_GPT2 = BlockLayout(
    "h.*",
    **attention_fields("attn.{c_attn,c_proj}", size="head_dim", count="num_heads", width="split_size"),
    **ffn_fields("mlp.{c_fc,c_proj}"),
    attention_norm="ln_2",
    cached=True,
)
_GPTJ = BlockLayout(
    "h.*",
    **attention_fields("attn.{q,k,v,out}_proj", size="head_dim", count="num_attention_heads"),
    **ffn_fields("mlp.{fc_in,fc_out}"),
    min_heads=1,
    cached=True,
)
_GPT_NEO = BlockLayout(
    "h.*",
    **attention_fields("attn.attention.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
    **ffn_fields("mlp.{c_fc,c_proj}"),
    attention_norm="ln_2",
    min_heads=1,
    cached=True,
)
_GPT_NEOX = BlockLayout(
    "layers.*",
    **attention_fields("attention.{query_key_value,dense}", size="head_size"),
    **ffn_fields("mlp.{dense_h_to_4h,dense_4h_to_h}"),
    interleaved=True,
    cached=True,
)
# Its position bias (ALiBi) has one slope per head.
_BLOOM = replace(
    _GPT_NEOX,
    layer="h.*",
    **attention_fields("self_attention.{query_key_value,dense}", size="head_dim"),
    attention_norm="post_attention_layernorm",
    fixed_heads=True,
)
_MODERNBERT = BlockLayout(
    "layers.*",
    **attention_fields("attn.{Wqkv,Wo}", size="head_dim"),
    **ffn_fields("mlp.{Wi,Wi,Wo}"),
    attention_norm="mlp_norm",
)
_OPT = BlockLayout(
    "layers.*",
    **attention_fields("self_attn.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
    **ffn_fields("{fc1,fc2}"),
    attention_norm="final_layer_norm",
    min_heads=1,
    cached=True,
)
_OPT_NORM_LAST = replace(_OPT, attention_norm="self_attn_layer_norm", ffn_norm="final_layer_norm")
_XGLM = replace(_OPT, head_widths=("self_attn.embed_dim",))
_STABLELM = replace(
    _LLAMA, head_counts=("self_attn.num_heads",), kv_head_counts=("self_attn.num_key_value_heads",), min_heads=1
)


def _norm_after_attention(config: Any) -> str:
    """With parallel residuals, attention and FFN are added together, and the layer returns the sum."""
    return "" if config.use_parallel_residual else "post_attention_layernorm"


def _falcon(config: Any) -> Layouts:
    """Only in the newer architecture, heads can be cut: its groups of query heads have a key and a value head each.

    An ALiBi has one slope per head there, too.
    """
    is_new = config.new_decoder_architecture
    layout = replace(
        _BLOOM,
        fixed_heads=not is_new or config.alibi,
        head_counts=("self_attention.num_heads",),
        kv_head_counts=("self_attention.num_kv_heads",),
        min_heads=1,
        attention_norm="" if is_new or config.parallel_attn else _BLOOM.attention_norm,
    )
    return (layout,)


_LIKE_LLAMA = (
    "cwm ernie4_5 gemma glm4_moe helium hunyuan_v1_dense llama ministral ministral3 mistral olmo qwen2 qwen2_vl_text "
    "qwen2_5_vl_text qwen3 qwen3_vl_text seed_oss smollm3"
).split()
DECODERS: dict[str, Family] = {
    **dict.fromkeys(_LIKE_LLAMA, (_LLAMA,)),
    **dict.fromkeys(("ernie4_5_moe", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe"), (_ATTENTION_ONLY,)),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), (_GRANITE_EXPERTS,)),
    **dict.fromkeys(("gte", "nomic_bert"), (_NOMIC,)),
    **dict.fromkeys(("exaone4", "gemma2", "gemma3_text"), (_NORMED_TWICE,)),
    **dict.fromkeys(("olmo2", "olmo3"), (_NORMED_ACROSS_HEADS,)),
    **dict.fromkeys(("arcee", "jais2", "nemotron"), (replace(_LLAMA, gate=""),)),
    "apertus": (replace(_LLAMA, gate="", attention_norm="feedforward_layernorm"),),
    "biogpt": (_OPT,),
    "bloom": (_BLOOM,),
    # A norm of queries and keys that has weights for each head does not allow heads to be trimmed.
    "cohere": lambda config: (replace(_LLAMA, attention_norm="", fixed_heads=config.use_qk_norm),),
    "cohere2": (replace(_LLAMA, attention_norm=""),),
    "eurobert": (replace(_LLAMA, cached=False),),
    "falcon": _falcon,
    "glm": (_FUSED_GATE,),
    "glm4": (replace(_FUSED_GATE, attention_norm="post_self_attn_layernorm", ffn_norm="post_mlp_layernorm"),),
    "gpt2": (_GPT2,),
    "gpt_neo": (_GPT_NEO,),
    "gpt_neox": lambda config: (replace(_GPT_NEOX, attention_norm=_norm_after_attention(config)),),
    "gptj": (_GPTJ,),
    "granite": (_GRANITE,),
    # Where the outputs of its sublayers enter a norm, the factor follows the norm.
    "hyperclovax": lambda config: (
        replace(_LLAMA, attention_norm="post_norm1", ffn_norm="post_norm2") if config.use_post_norm else _GRANITE,
    ),
    "jina_embeddings_v3": (replace(_NOMIC, **ffn_fields("mlp.{fc1,fc2}")),),
    "modernbert": (_MODERNBERT,),
    "modernbert-decoder": (replace(_MODERNBERT, **attention_fields("attn.{q_proj,k_proj,v_proj,Wo}"), cached=True),),
    "opt": lambda config: (_OPT if config.do_layer_norm_before else _OPT_NORM_LAST,),
    "phi": (replace(_LLAMA, o="self_attn.dense", **ffn_fields("mlp.{fc1,fc2}"), attention_norm=""),),
    # The code splits the fused projection at sizes that all layers read from the same config.
    "phi3": (replace(_FUSED_GATE, **attention_fields("self_attn.{qkv,o}_proj"), fixed_heads=True),),
    "stablelm": lambda config: (
        replace(_STABLELM, attention_norm=_norm_after_attention(config), fixed_heads=config.qk_layernorm),
    ),
    "starcoder2": (replace(_LLAMA, **ffn_fields("mlp.{c_fc,c_proj}")),),
    "vaultgemma": (replace(_LLAMA, attention_norm="pre_feedforward_layernorm"),),
    "xglm": (_XGLM,),
}
