"""The table of model families: which layouts a model has, by the `model_type` of its config."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .layouts import BlockLayout


Layouts = tuple[BlockLayout, ...]


def _expand(paths: str) -> list[str]:
    """The paths of a text with braces: `mlp.{up,down}_proj` is `mlp.up_proj` and `mlp.down_proj`."""
    start, names, end = re.split("[{}]", paths)
    return [f"{start}{name}{end}" for name in names.split(",")]


def _attention(linears: str, size: str = "", count: str = "", width: str = "") -> dict[str, Any]:
    """The attention's fields of a `BlockLayout`.

    `linears` are `q`, `k`, `v` and `o` as in `_expand`, or one fused Linear and `o`. The attributes that hold the head
    size, the number of heads and the width of all heads belong to the module whose path ends at the brace.
    """
    *inputs, o = _expand(linears)
    module = linears.partition("{")[0]
    attributes = {
        "head_size": size and module + size,
        "head_counts": count and (module + count,),
        "head_widths": width and (module + width,),
    }
    projections = dict(zip("qkvo", [*(inputs * 3)[:3], o], strict=True))
    return projections | {name: value for name, value in attributes.items() if value}


def _ffn(linears: str) -> dict[str, Any]:
    """The FFN's fields: `up` and `down`, or `up`, `gate` and `down`, as in `_expand`."""
    up, *gate, down = _expand(linears)
    return {"up": up, "gate": "".join(gate), "down": down}


# -- encoders, encoder-decoders, models of images and of speech -------------------------------------------------------

_BERT = BlockLayout(
    "encoder.layer.*",
    **_attention(
        "attention.{self.query,self.key,self.value,output.dense}",
        size="self.attention_head_size",
        count="self.num_attention_heads",
        width="self.all_head_size",
    ),
    **_ffn("{intermediate,output}.dense"),
    attention_norm="attention.output.LayerNorm",
    ffn_norm="output.LayerNorm",
)
# BERT with the LayerNorms before the sublayers. Each such family names the norm before its FFN.
_BERT_PRE_NORM = replace(_BERT, attention_norm="", ffn_norm="")


def _xmod(config: Any) -> Layouts:
    """An adapter for each language follows the FFN. The FFN's sum enters the adapter's norm, which may be shared."""
    attention_norm = "output.LayerNorm" if config.pre_norm else "attention.output.LayerNorm"
    ffn_norm = "output.adapter_layer_norm" if config.adapter_layer_norm else "output.LayerNorm"
    return (replace(_BERT, attention_norm=attention_norm, ffn_norm=ffn_norm),)


_DISTILBERT = BlockLayout(
    "transformer.layer.*",
    **_attention("attention.{q,k,v,out}_lin", size="attention_head_size", count="n_heads"),
    **_ffn("ffn.{lin1,lin2}"),
    attention_norm="sa_layer_norm",
    ffn_norm="output_layer_norm",
)
_ALBERT = BlockLayout(
    "encoder.albert_layer_groups.*.albert_layers.*",
    **_attention(
        "attention.{query,key,value,dense}", "attention_head_size", count="num_attention_heads", width="all_head_size"
    ),
    **_ffn("{ffn,ffn_output}"),
    attention_norm="attention.LayerNorm",
    ffn_norm="full_layer_layer_norm",
    repeats=("config.num_hidden_layers", "config.num_hidden_groups"),
)
_DEBERTA_V2 = replace(
    _BERT,
    **_attention("attention.{self.query_proj,self.key_proj,self.value_proj,output.dense}"),
    relative="attention.self",
    min_heads=1,  # without heads, its code cannot infer its shapes
)
_MPNET = replace(
    _BERT,
    **_attention("attention.attn.{q,k,v,o}", size="attention_head_size"),
    head_counts=(),
    head_widths=(),
    attention_norm="attention.LayerNorm",
    fixed_heads=True,
)
_MOBILEBERT_FFN = BlockLayout(
    "encoder.layer.*.ffn.*", **_ffn("{intermediate,output}.dense"), ffn_norm="output.LayerNorm"
)
_VIT = BlockLayout(
    "layers.*",
    **_attention("attention.{q,k,v,o}_proj", size="head_dim", count="num_attention_heads"),
    **_ffn("mlp.{fc1,fc2}"),
    attention_norm="layernorm_after",
)
_DATA2VEC_VISION = replace(
    _BERT_PRE_NORM,
    **_attention(
        "attention.{attention.query,attention.key,attention.value,output.dense}",
        size="attention.attention_head_size",
        count="attention.num_attention_heads",
        width="attention.all_head_size",
    ),
    attention_norm="layernorm_after",
)
# LayerScale, a factor for each feature, follows each sublayer.
_DINO = BlockLayout(
    "encoder.layer.*",
    **_attention("attention.{q,k,v,o}_proj", size="head_dim", count="num_attention_heads"),
    **_ffn("mlp.{fc1,fc2}"),
    attention_norm="norm2",
    attention_factor="layer_scale1.lambda1",
    ffn_factor="layer_scale2.lambda1",
)


def _dinov2(config: Any) -> Layouts:
    return (replace(_DINO, **_ffn("mlp.{up,gate,down}_proj")) if config.use_swiglu_ffn else _DINO,)


def _dinov3(config: Any) -> Layouts:
    attention = _attention("attention.{q,k,v,o}_proj", size="head_dim", count="num_heads")
    ffn = _ffn("mlp.{up,gate,down}_proj" if config.use_gated_mlp else "mlp.{up,down}_proj")
    return (replace(_DINO, layer="layer.*", **attention, **ffn),)


def _with_factors(layout: BlockLayout) -> Callable[[Any], Layouts]:
    """BEiT's LayerScale. Where a position bias is added, it has one entry per head, so heads are fixed."""

    def layouts(config: Any) -> Layouts:
        has_bias = config.use_relative_position_bias or config.use_shared_relative_position_bias
        factors = ("lambda_1", "lambda_2") if config.layer_scale_init_value > 0 else ("", "")
        return (replace(layout, attention_factor=factors[0], ffn_factor=factors[1], fixed_heads=has_bias),)

    return layouts


_CLIP = BlockLayout(
    "encoder.layers.*",
    **_attention("self_attn.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
    **_ffn("mlp.{fc1,fc2}"),
    attention_norm="layer_norm2",
)


def _speech_encoder(config: Any) -> Layouts:
    """Wav2Vec2's layers. With `do_stable_layer_norm`, norms come before the sublayers."""
    norm_first = getattr(config, "do_stable_layer_norm", False)
    layout = BlockLayout(
        "encoder.layers.*",
        **_attention("attention.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
        **_ffn("feed_forward.{intermediate_dense,output_dense}"),
        attention_norm="final_layer_norm" if norm_first else "layer_norm",
        ffn_norm="" if norm_first else "final_layer_norm",
    )
    return (layout,)


def _t5(config: Any) -> Layouts:
    """All layers of a stack share a position bias with one column per head, so heads are fixed. FFNs may be gated."""
    dense = "DenseReluDense." + ("{wi_1,wi_0,wo}" if config.is_gated_act else "{wi,wo}")
    own = _attention("layer.0.SelfAttention.{q,k,v,o}", size="key_value_proj_dim")
    encoder = BlockLayout("encoder.block.*", **own, **_ffn(f"layer.1.{dense}"), fixed_heads=True)
    decoder = BlockLayout("decoder.block.*", **own, **_ffn(f"layer.2.{dense}"), fixed_heads=True)
    across = _attention("layer.1.EncDecAttention.{q,k,v,o}")
    return encoder, decoder, replace(decoder, **across, up="", gate="", down="", cross=True)


def _bart(norm_first: bool = False) -> Layouts:
    """Self-attention, cross-attention and FFN of encoder and decoder. `norm_first`: norms come before sublayers."""

    def heads(stack: str, module: str, norm: str, **more: Any) -> BlockLayout:
        attention = _attention(f"{module}." + "{q,k,v,out}_proj", size="head_dim", count="num_heads")
        return BlockLayout(f"{stack}.layers.*", **attention, attention_norm=norm, **more)

    # The residual sum after a sublayer enters the sublayer's own norm or, with `norm_first`, the next sublayer's norm.
    own, cross, last = "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"
    ffn = _ffn("{fc1,fc2}") | {"ffn_norm": "" if norm_first else last}
    return (
        heads("encoder", "self_attn", last if norm_first else own, **ffn),
        heads("decoder", "self_attn", cross if norm_first else own, cached=True),
        heads("decoder", "encoder_attn", last if norm_first else cross, cross=True, **ffn),
    )


# -- decoders, and ModernBERT, whose layers are similar ---------------------------------------------------------------

# Most newer decoders use Llama's names. Their code infers the number of heads from shapes, so no attribute holds it.
_LLAMA = BlockLayout(
    "layers.*",
    **_attention("self_attn.{q,k,v,o}_proj", size="head_dim"),
    **_ffn("mlp.{up,gate,down}_proj"),
    attention_norm="post_attention_layernorm",
    cached=True,
)
_GRANITE = replace(_LLAMA, attention_factor="residual_multiplier", ffn_factor="residual_multiplier")
_ATTENTION_ONLY = replace(_LLAMA, up="", gate="", down="")  # the experts of a mixture have no units
# A norm is applied to the sublayer's output before it is added. The refit fits the input of that norm.
_NORMED_TWICE = replace(_LLAMA, ffn_norm="post_feedforward_layernorm")
# Queries and keys are normalized over all heads together, so trimming one head would change the others.
_NORMED_ACROSS_HEADS = replace(_NORMED_TWICE, fixed_heads=True)
_FUSED_GATE = replace(_LLAMA, **_ffn("mlp.{gate_up,gate_up,down}_proj"))
_GPT2 = BlockLayout(
    "h.*",
    **_attention("attn.{c_attn,c_proj}", size="head_dim", count="num_heads", width="split_size"),
    **_ffn("mlp.{c_fc,c_proj}"),
    attention_norm="ln_2",
    cached=True,
)
_GPTJ = BlockLayout(
    "h.*",
    **_attention("attn.{q,k,v,out}_proj", size="head_dim", count="num_attention_heads"),
    **_ffn("mlp.{fc_in,fc_out}"),
    min_heads=1,
    cached=True,
)
_GPT_NEO = BlockLayout(
    "h.*",
    **_attention("attn.attention.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
    **_ffn("mlp.{c_fc,c_proj}"),
    attention_norm="ln_2",
    min_heads=1,
    cached=True,
)
_GPT_NEOX = BlockLayout(
    "layers.*",
    **_attention("attention.{query_key_value,dense}", size="head_size"),
    **_ffn("mlp.{dense_h_to_4h,dense_4h_to_h}"),
    interleaved=True,
    cached=True,
)
_MODERNBERT = BlockLayout(
    "layers.*", **_attention("attn.{Wqkv,Wo}", size="head_dim"), **_ffn("mlp.{Wi,Wi,Wo}"), attention_norm="mlp_norm"
)
_OPT = BlockLayout(
    "layers.*",
    **_attention("self_attn.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
    **_ffn("{fc1,fc2}"),
    attention_norm="final_layer_norm",
    min_heads=1,
    cached=True,
)
_OPT_NORM_LAST = replace(_OPT, attention_norm="self_attn_layer_norm", ffn_norm="final_layer_norm")
_STABLELM = replace(
    _LLAMA, head_counts=("self_attn.num_heads",), kv_head_counts=("self_attn.num_key_value_heads",), min_heads=1
)


def _norm_after_attention(config: Any) -> str:
    """With parallel residuals, attention and FFN are added together, and the layer returns the sum."""
    return "" if config.use_parallel_residual else "post_attention_layernorm"


_LIKE_BERT = (
    "bert bert-generation camembert data2vec-text electra ernie layoutlm rembert roberta roformer splinter xlm-roberta"
).split()
_LIKE_LLAMA = (
    "cwm ernie4_5 gemma helium hunyuan_v1_dense llama ministral ministral3 mistral olmo qwen2 qwen3 seed_oss smollm3"
).split()
_LIKE_CLIP = "clip clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model".split()
# A family with variants has a function from the config to the layouts.
FAMILIES: dict[str, Layouts | Callable[[Any], Layouts]] = {
    **dict.fromkeys(_LIKE_BERT, (_BERT,)),
    **dict.fromkeys(("bart", "blenderbot-small", "marian", "plbart"), _bart()),
    **dict.fromkeys(("blenderbot", "m2m_100", "mbart", "pegasus"), _bart(norm_first=True)),
    **dict.fromkeys(_LIKE_CLIP, (_CLIP,)),
    **dict.fromkeys(("deit", "ijepa", "vit", "vit_msn", "vivit"), (_VIT,)),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _dinov2),
    **dict.fromkeys(("mt5", "t5", "umt5"), _t5),
    **dict.fromkeys(("data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2"), _speech_encoder),
    "albert": (_ALBERT,),
    "beit": _with_factors(_VIT),
    "data2vec-vision": _with_factors(_DATA2VEC_VISION),
    "deberta-v2": (_DEBERTA_V2,),
    "dinov3_vit": _dinov3,
    "distilbert": (_DISTILBERT,),
    "esm": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "megatron-bert": (replace(_BERT_PRE_NORM, attention_norm="ln"),),
    "mobilebert": (_BERT, _MOBILEBERT_FFN),
    "mpnet": (_MPNET,),
    "roberta-prelayernorm": (replace(_BERT_PRE_NORM, attention_norm="intermediate.LayerNorm"),),
    # Without heads, its code cannot infer its shapes.
    "whisper": tuple(replace(layout, min_heads=1) for layout in _bart(norm_first=True)),
    "xlm-roberta-xl": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "xmod": _xmod,
    # decoders and ModernBERT
    **dict.fromkeys(_LIKE_LLAMA, (_LLAMA,)),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), (_ATTENTION_ONLY,)),
    **dict.fromkeys(("exaone4", "gemma2", "gemma3_text"), (_NORMED_TWICE,)),
    **dict.fromkeys(("olmo2", "olmo3"), (_NORMED_ACROSS_HEADS,)),
    **dict.fromkeys(("arcee", "jais2", "nemotron"), (replace(_LLAMA, gate=""),)),
    "apertus": (replace(_LLAMA, gate="", attention_norm="feedforward_layernorm"),),
    "biogpt": (_OPT,),
    # A norm of queries and keys that has weights for each head does not allow heads to be trimmed.
    "cohere": lambda config: (replace(_LLAMA, attention_norm="", fixed_heads=config.use_qk_norm),),
    "cohere2": (replace(_LLAMA, attention_norm=""),),
    "glm": (_FUSED_GATE,),
    "glm4": (replace(_FUSED_GATE, attention_norm="post_self_attn_layernorm", ffn_norm="post_mlp_layernorm"),),
    "gpt2": (_GPT2,),
    "gpt_neo": (_GPT_NEO,),
    "gpt_neox": lambda config: (replace(_GPT_NEOX, attention_norm=_norm_after_attention(config)),),
    "gptj": (_GPTJ,),
    "granite": (_GRANITE,),
    "granitemoe": (replace(_ATTENTION_ONLY, attention_factor="residual_multiplier"),),
    # Where the outputs of its sublayers enter a norm, the factor follows the norm.
    "hyperclovax": lambda config: (
        replace(_LLAMA, attention_norm="post_norm1", ffn_norm="post_norm2") if config.use_post_norm else _GRANITE,
    ),
    "modernbert": (_MODERNBERT,),
    "modernbert-decoder": (replace(_MODERNBERT, **_attention("attn.{q_proj,k_proj,v_proj,Wo}"), cached=True),),
    "opt": lambda config: (_OPT if config.do_layer_norm_before else _OPT_NORM_LAST,),
    "phi": (replace(_LLAMA, o="self_attn.dense", **_ffn("mlp.{fc1,fc2}"), attention_norm=""),),
    # The code splits the fused projection at sizes that all layers read from the same config.
    "phi3": (replace(_FUSED_GATE, **_attention("self_attn.{qkv,o}_proj"), fixed_heads=True),),
    "stablelm": lambda config: (
        replace(_STABLELM, attention_norm=_norm_after_attention(config), fixed_heads=config.qk_layernorm),
    ),
    "starcoder2": (replace(_LLAMA, **_ffn("mlp.{c_fc,c_proj}")),),
    "vaultgemma": (replace(_LLAMA, attention_norm="pre_feedforward_layernorm"),),
}


def layouts_of(config: Any) -> Layouts:
    """The layouts for a model with this config. Unknown families have none."""
    entry = FAMILIES.get(getattr(config, "model_type", "") or "", ())
    return entry(config) if callable(entry) else entry
