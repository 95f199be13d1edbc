"""The layouts of encoders, of encoder-decoders, and of models of images and of speech, by their `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .layouts import BlockLayout, Family, Layouts, attention_fields, ffn_fields, is_lone_decoder


_BERT = BlockLayout(
    "encoder.layer.*",
    **attention_fields(
        "attention.{self.query,self.key,self.value,output.dense}",
        size="self.attention_head_size",
        count="self.num_attention_heads",
        width="self.all_head_size",
    ),
    **ffn_fields("{intermediate,output}.dense"),
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
    **attention_fields("attention.{q,k,v,out}_lin", size="attention_head_size", count="n_heads"),
    **ffn_fields("ffn.{lin1,lin2}"),
    attention_norm="sa_layer_norm",
    ffn_norm="output_layer_norm",
)
_ALBERT = BlockLayout(
    "encoder.albert_layer_groups.*.albert_layers.*",
    **attention_fields(
        "attention.{query,key,value,dense}", "attention_head_size", count="num_attention_heads", width="all_head_size"
    ),
    **ffn_fields("{ffn,ffn_output}"),
    attention_norm="attention.LayerNorm",
    ffn_norm="full_layer_layer_norm",
    repeats=("config.num_hidden_layers", "config.num_hidden_groups"),
)
_DEBERTA_V2 = replace(
    _BERT,
    **attention_fields("attention.{self.query_proj,self.key_proj,self.value_proj,output.dense}"),
    relative="attention.self",
    min_heads=1,  # without heads, its code cannot infer its shapes
)
# One Linear holds queries, keys and values of each head, and their biases are parameters of the attention.
_DEBERTA = replace(
    _BERT,
    **attention_fields("attention.{self.in_proj,output.dense}", size="self.attention_head_size"),
    head_counts=(),
    head_widths=(),
    interleaved=True,
    fixed_heads=True,
)
# Its attention has no Linears. The layers are in `transformer`, except in a bare `XLNetModel`.
_XLNET = BlockLayout("layer.*", **ffn_fields("ff.{layer_1,layer_2}"), ffn_norm="ff.layer_norm", tokens_first=True)
_MPNET = replace(
    _BERT,
    **attention_fields("attention.attn.{q,k,v,o}", size="attention_head_size"),
    head_counts=(),
    head_widths=(),
    attention_norm="attention.LayerNorm",
    fixed_heads=True,
)
_MOBILEBERT_FFN = BlockLayout(
    "encoder.layer.*.ffn.*", **ffn_fields("{intermediate,output}.dense"), ffn_norm="output.LayerNorm"
)
_VIT = BlockLayout(
    "layers.*",
    **attention_fields("attention.{q,k,v,o}_proj", size="head_dim", count="num_attention_heads"),
    **ffn_fields("mlp.{fc1,fc2}"),
    attention_norm="layernorm_after",
)
_DATA2VEC_VISION = replace(
    _BERT_PRE_NORM,
    **attention_fields(
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
    **attention_fields("attention.{q,k,v,o}_proj", size="head_dim", count="num_attention_heads"),
    **ffn_fields("mlp.{fc1,fc2}"),
    attention_norm="norm2",
    attention_factor="layer_scale1.lambda1",
    ffn_factor="layer_scale2.lambda1",
)


def _dinov2(config: Any) -> Layouts:
    return (replace(_DINO, **ffn_fields("mlp.{up,gate,down}_proj")) if config.use_swiglu_ffn else _DINO,)


def _dinov3(config: Any) -> Layouts:
    attention = attention_fields("attention.{q,k,v,o}_proj", size="head_dim", count="num_heads")
    ffn = ffn_fields("mlp.{up,gate,down}_proj" if config.use_gated_mlp else "mlp.{up,down}_proj")
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
    **attention_fields("self_attn.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
    **ffn_fields("mlp.{fc1,fc2}"),
    attention_norm="layer_norm2",
)


_QWEN_VISION = BlockLayout(
    "blocks.*",
    **attention_fields("attn.{qkv,proj}", size="head_dim", count="num_heads"),
    **ffn_fields("mlp.{up,gate,down}_proj"),
    attention_norm="norm2",
    min_heads=1,  # without heads, its code cannot infer its shapes
)


def _speech_encoder(config: Any) -> Layouts:
    """Wav2Vec2's layers. With `do_stable_layer_norm`, norms come before the sublayers."""
    norm_first = getattr(config, "do_stable_layer_norm", False)
    layout = BlockLayout(
        "encoder.layers.*",
        **attention_fields("attention.{q,k,v,out}_proj", size="head_dim", count="num_heads"),
        **ffn_fields("feed_forward.{intermediate_dense,output_dense}"),
        attention_norm="final_layer_norm" if norm_first else "layer_norm",
        ffn_norm="" if norm_first else "final_layer_norm",
    )
    return (layout,)


def _t5(config: Any) -> Layouts:
    """All layers of a stack share a position bias with one column per head, so heads are fixed. FFNs may be gated."""
    dense = "DenseReluDense." + ("{wi_1,wi_0,wo}" if config.is_gated_act else "{wi,wo}")
    own = attention_fields("layer.0.SelfAttention.{q,k,v,o}", size="key_value_proj_dim")
    encoder = BlockLayout("encoder.block.*", **own, **ffn_fields(f"layer.1.{dense}"), fixed_heads=True)
    decoder = BlockLayout("decoder.block.*", **own, **ffn_fields(f"layer.2.{dense}"), fixed_heads=True)
    across = attention_fields("layer.1.EncDecAttention.{q,k,v,o}")
    return encoder, decoder, replace(decoder, **across, up="", gate="", down="", cross=True)


def _bart(norm_first: bool = False, alone: bool = False) -> Layouts:
    """Self-attention, cross-attention and FFN of encoder and decoder. `norm_first`: norms come before sublayers.

    `alone`: the decoder runs without the cross-attention and without its norm.
    """

    def heads(stack: str, module: str, norm: str, **more: Any) -> BlockLayout:
        attention = attention_fields(f"{module}." + "{q,k,v,out}_proj", size="head_dim", count="num_heads")
        return BlockLayout(f"{stack}.layers.*", **attention, attention_norm=norm, **more)

    # The residual sum after a sublayer enters the sublayer's own norm or, with `norm_first`, the next sublayer's norm.
    own, cross, last = "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"
    following = last if alone else cross
    ffn = ffn_fields("{fc1,fc2}") | {"ffn_norm": "" if norm_first else last}
    return (
        heads("encoder", "self_attn", last if norm_first else own, **ffn),
        heads("decoder", "self_attn", following if norm_first else own, cached=True),
        heads("decoder", "encoder_attn", last if norm_first else cross, cross=True, **ffn),
    )


def _mbart(config: Any) -> Layouts:
    return _bart(norm_first=True, alone=is_lone_decoder(config))


def _whisper(config: Any) -> Layouts:
    """Without heads, its code cannot infer its shapes."""
    return tuple(replace(layout, min_heads=1) for layout in _mbart(config))


# Like BART, but its code reads the width of all heads from an attribute.
_MVP = tuple(
    replace(layout, head_widths=(f"{layout.o.rpartition('.')[0]}.embed_dim",), min_heads=1) for layout in _bart()
)


def _layoutlmv3(config: Any) -> Layouts:
    """BERT's layers. A position bias has one entry per head. Without heads, the code cannot infer its shapes."""
    has_bias = config.has_relative_attention_bias or config.has_spatial_attention_bias
    return (replace(_BERT, min_heads=1, fixed_heads=has_bias),)


_LIKE_BERT = (
    "bert bert-generation camembert data2vec-text electra ernie fnet layoutlm markuplm rembert roberta roc_bert "
    "roformer splinter tapas xlm-roberta"
).split()
_LIKE_CLIP = (
    "clip clip_text_model clip_vision_model idefics3_vision metaclip_2 metaclip_2_text_model metaclip_2_vision_model "
    "siglip siglip_text_model siglip_vision_model smolvlm_vision"
).split()
_LIKE_VIT = "audio-spectrogram-transformer deit ijepa vit vit_msn vivit".split()
_LIKE_WAV2VEC2 = "data2vec-audio hubert sew unispeech unispeech-sat wav2vec2".split()
ENCODERS: dict[str, Family] = {
    **dict.fromkeys(_LIKE_BERT, (_BERT,)),
    **dict.fromkeys(("bart", "blenderbot-small", "marian", "plbart"), _bart()),
    **dict.fromkeys(("blenderbot", "m2m_100", "mbart", "pegasus"), _mbart),
    **dict.fromkeys(_LIKE_CLIP, (_CLIP,)),
    **dict.fromkeys(_LIKE_VIT, (_VIT,)),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _dinov2),
    **dict.fromkeys(("mt5", "t5", "umt5"), _t5),
    **dict.fromkeys(_LIKE_WAV2VEC2, _speech_encoder),
    "albert": (_ALBERT,),
    "beit": _with_factors(_VIT),
    # Sparse attention looks at random blocks, which are drawn for each head. Short inputs switch it off for good.
    "big_bird": (replace(_BERT, fixed_heads=True),),
    "data2vec-vision": _with_factors(_DATA2VEC_VISION),
    "deberta": (_DEBERTA,),
    "deberta-v2": (_DEBERTA_V2,),
    "dinov3_vit": _dinov3,
    "distilbert": (_DISTILBERT,),
    "esm": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "layoutlmv3": _layoutlmv3,
    "luke": (replace(_BERT, fixed_heads=True),),  # each attention has further Linears, for entities
    "megatron-bert": (replace(_BERT_PRE_NORM, attention_norm="ln"),),
    "mobilebert": (_BERT, _MOBILEBERT_FFN),
    "mpnet": (_MPNET,),
    "mvp": _MVP,
    "qwen2_vl_vision": (replace(_QWEN_VISION, **ffn_fields("mlp.{fc1,fc2}")),),
    "qwen2_5_vl_vision": (_QWEN_VISION,),
    "qwen3_vl_vision": (replace(_QWEN_VISION, **ffn_fields("mlp.{linear_fc1,linear_fc2}")),),
    "roberta-prelayernorm": (replace(_BERT_PRE_NORM, attention_norm="intermediate.LayerNorm"),),
    "whisper": _whisper,
    "xlm-roberta-xl": (replace(_BERT_PRE_NORM, attention_norm="LayerNorm"),),
    "xlnet": (_XLNET,),
    "xmod": _xmod,
}
