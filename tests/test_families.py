"""Families of encoders, encoder-decoders and image models: one table, one set of checks."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from family_checks import (
    VOCABULARY,
    Case,
    check_costs,
    check_disable_adapter,
    check_empty_sublayers,
    check_gates_equal_removal,
    check_generation,
    check_merge_equals_unmerged,
    check_merged_files,
    check_save_load,
    check_sums,
    check_training_step,
    check_trim,
    image_batch,
    run,
    token_batch,
)
from peft import PeftModel
from test_families_decoders import GPT2
from tiny import TRIM, TUNE, train, wrap
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForVideoClassification,
    BertConfig,
    EncoderDecoderConfig,
    GPT2Config,
    VisionEncoderDecoderConfig,
    ViTConfig,
)

from peft_sensi import SensiError, build_anatomy
from peft_sensi.merging.load import load_merged
from peft_sensi.merging.save import save_merged


# 3 heads of size 10. The FFN's width is odd.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 43,
    "max_position_embeddings": 24,
    "num_labels": 3,
    "pad_token_id": 1,
}

LAYERS = {k: SIZES[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")}


def config(model_type, **changes):
    return partial(AutoConfig.for_model, model_type, **{**SIZES, **changes})


def classifier(model_type, name="", **changes):
    """A classifier of token sequences."""
    fields = {key: changes.pop(key) for key in ("attention", "heads") if key in changes}
    auto = AutoModelForSequenceClassification
    return Case(name or model_type, config(model_type, **changes), auto, token_batch, "SEQ_CLS", **fields)


# 2 encoder layers of 3 heads, 2 decoder layers of 5, FFNs of different widths.
BOTH_STACKS = {
    "vocab_size": VOCABULARY,
    "d_model": 30,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 43,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 24,
    "num_labels": 3,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 30,
    "d_kv": 7,
    "d_ff": 43,
    "num_layers": 2,
    "num_decoder_layers": 2,  # Transformers itself cannot cache for stacks of different depths
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def translator(model_type, name="", sizes=BOTH_STACKS, **changes):
    """An encoder-decoder that writes its input."""
    fields = {key: changes.pop(key) for key in ("attention", "heads") if key in changes}
    batch = partial(token_batch, task="SEQ_2_SEQ_LM")
    config = partial(AutoConfig.for_model, model_type, **{**sizes, **changes})
    return Case(name or model_type, config, AutoModelForSeq2SeqLM, batch, "SEQ_2_SEQ_LM", **fields)


def images(model_type, name="", tokens=10, heads=True, **changes):
    """A classifier of 12 x 12 images in 9 patches."""
    sizes = {**LAYERS, "image_size": 12, "patch_size": 4}
    if model_type in ("clip", "metaclip_2", "siglip"):
        sizes = {"vision_config": sizes}
    config = partial(AutoConfig.for_model, model_type, **sizes, num_labels=3, **changes)
    return Case(name or model_type, config, AutoModelForImageClassification, image_batch, length=tokens, heads=heads)


def joined(kind, encoder, decoder):
    """The config of an encoder-decoder that is made of two models of other families."""
    config = kind.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    return config


def caption_batch(size: int = 4, length: int = 10, *, seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    """Images, and texts of 10 tokens, as many as an image has."""
    texts = token_batch(size, length, seed=seed, padded=padded, task="SEQ_2_SEQ_LM")
    return {"pixel_values": image_batch(size, seed=seed)["pixel_values"], "labels": texts["labels"]}


def video_batch(size: int = 4, length: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Pairs of images, which become 9 patches."""
    batch = image_batch(size, length, **options)
    return batch | {"pixel_values": torch.stack([batch["pixel_values"], batch["pixel_values"].flip(0)], dim=1)}


def speech_batch(
    size: int = 4, length: int = 9, *, seed: int = 0, padded: bool = True, labels: int = 3
) -> dict[str, torch.Tensor]:
    """Waves that become 9 frames."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_values": torch.randn(size, 100, generator=generator),
        "labels": torch.randint(0, labels, (size,), generator=generator),
    }


def spectrum_batch(size: int = 4, length: int = 9, *, seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    """Spectra that become 9 frames, and texts of 9 tokens."""
    labels = token_batch(size, length, seed=seed, padded=padded, task="SEQ_2_SEQ_LM")["labels"]
    return {
        "input_features": torch.randn(size, 8, 18, generator=torch.Generator().manual_seed(seed)),
        "labels": labels,
    }


def mel_batch(size: int = 4, length: int = 9, *, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Spectra that become 9 patches."""
    waves = speech_batch(size, seed=seed)
    return waves | {"input_values": torch.randn(size, 12, 12, generator=torch.Generator().manual_seed(seed))}


def speech(model_type, name="", **changes):
    """A classifier of short waves."""
    convolutions = {"conv_dim": (14, 14), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "conv_pos_kernel_size": 3}
    sizes = (
        LAYERS | convolutions | positions | {"apply_spec_augment": False, "classifier_proj_size": 13, "num_labels": 3}
    )
    config = partial(AutoConfig.for_model, model_type, **{**sizes, **changes})
    return Case(name or model_type, config, AutoModelForAudioClassification, speech_batch)


# Its encoder takes twice as many frames as it has positions.
WHISPER = {**BOTH_STACKS, "num_mel_bins": 8, "max_source_positions": 9, "max_target_positions": 24,
           "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip

LAYOUTLM3 = {"has_relative_attention_bias": False, "has_spatial_attention_bias": False, "visual_embed": False,
             "coordinate_size": 5, "shape_size": 5, "attention": ("eager",)}  # fmt: skip
DEBERTA = {"relative_attention": True, "pooler_hidden_size": 30, "attention": ("eager",), "type_vocab_size": 0}

CASES = [
    classifier("bert"),
    classifier("roberta"),
    classifier("electra", embedding_size=14),
    classifier("distilbert", dim=30, n_heads=3, n_layers=2, hidden_dim=43),
    # Each of 2 layers runs 3 and 2 times.
    classifier("albert", embedding_size=14, num_hidden_layers=5, num_hidden_groups=2),
    classifier("albert", "albert-inner", embedding_size=14, num_hidden_layers=2, inner_group_num=2),
    # As microsoft/deberta-v3: shared keys, buckets, normed positions.
    classifier(
        "deberta-v2",
        "deberta-v3",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        **DEBERTA,
    ),
    classifier(
        "deberta-v2",
        share_att_key=False,
        pos_att_type=["c2p", "p2c"],
        position_buckets=5,
        conv_kernel_size=3,
        **DEBERTA,
    ),
    classifier("deberta-v2", "deberta-c2p", share_att_key=False, pos_att_type=["c2p"], **DEBERTA),
    classifier("deberta-v2", "deberta-p2c-shared", share_att_key=True, pos_att_type=["p2c"], **DEBERTA),
    classifier("deberta-v2", "deberta-absolute", **{**DEBERTA, "relative_attention": False}),
    classifier("mpnet", attention=("eager",), heads=False),
    translator("t5", sizes=T5_SIZES, heads=False),
    translator(
        "t5", "t5-gated", sizes=T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False, heads=False
    ),
    translator("mt5", sizes=T5_SIZES, heads=False),
    translator("umt5", sizes=T5_SIZES, heads=False),
    translator("bart"),
    classifier("bart", "bart-classifier", **BOTH_STACKS),
    classifier("t5", "t5-classifier", **T5_SIZES, heads=False),
    images("vit"),
    images("vit", "vit-no-bias", qkv_bias=False),
    images("deit", tokens=11, architectures=["DeiTForImageClassification"]),
    images("clip"),
    images("siglip", tokens=9),
    images("dinov2"),
    images("dinov2", "dinov2-gated", use_swiglu_ffn=True),
    images("beit"),
    images("beit", "beit-relative", use_relative_position_bias=True, heads=False),
    speech("wav2vec2"),
    speech("wav2vec2", "wav2vec2-norm-first", do_stable_layer_norm=True),
    Case("whisper", partial(AutoConfig.for_model, "whisper", **WHISPER), AutoModelForSpeechSeq2Seq, spectrum_batch),
]  # fmt: skip
# Those whose parts are all in another case above.
VARIANTS = {
    *("deberta-c2p", "deberta-p2c-shared", "deberta-absolute", "vit-no-bias"),
    *("t5", "mt5", "umt5", "bart-classifier", "electra", "deberta-v2", "wav2vec2-norm-first", "siglip"),
    *("dinov2-gated", "beit-relative"),
}
assert VARIANTS < set(map(str, CASES))
# The same layouts as above.
RELATIVES = [
    classifier("data2vec-text"),
    classifier("ernie"),
    classifier("esm", token_dropout=False, position_embedding_type="rotary"),
    classifier("layoutlm"),
    classifier("megatron-bert", attention=("eager",)),
    classifier(
        "mobilebert", true_hidden_size=30, intra_bottleneck_size=30, embedding_size=14, num_feedforward_networks=2
    ),
    classifier("rembert", input_embedding_size=14, attention=("eager",)),
    classifier("roberta-prelayernorm"),
    # The class of its head has "LayerNorm" in its name.
    Case("roberta-prelayernorm-lm", config("roberta-prelayernorm"), AutoModelForMaskedLM,
         partial(token_batch, task="MASKED_LM"), None),
    classifier("roformer", embedding_size=14, attention=("eager",)),
    classifier("xlm-roberta"),
    classifier("xlm-roberta-xl"),
    classifier("xmod", default_language="en_XX"),
    classifier("xmod", "xmod-pre-norm", default_language="en_XX", pre_norm=True),
    classifier("xmod", "xmod-own-norm", default_language="en_XX", adapter_layer_norm=True),
    classifier("camembert"),
    Case("bert-generation", config("bert-generation", is_decoder=True), AutoModelForCausalLM,
         partial(token_batch, task="CAUSAL_LM"), "CAUSAL_LM"),
    # Its logits of padding are the smallest number there is, beside which nothing else matters.
    Case("splinter", config("splinter", question_token_id=5), AutoModelForQuestionAnswering,
         partial(token_batch, task="QUESTION_ANS", padded=False), "QUESTION_ANS", attention=("eager",)),
    translator("mbart"),
    translator("marian"),
    translator("pegasus"),
    translator("m2m_100"),
    translator("blenderbot"),
    translator("blenderbot-small"),
    translator("plbart"),
    # Other layouts.
    classifier("big_bird", attention=("eager",), heads=False),
    classifier("big_bird", "big_bird-full", attention_type="original_full", attention=("eager",), heads=False),
    classifier("deberta", pooler_hidden_size=30, attention=("eager",), heads=False),
    classifier("deberta", "deberta-relative", relative_attention=True, pos_att_type=["c2p", "p2c"],
               position_biased_input=False, pooler_hidden_size=30, attention=("eager",), heads=False),
    classifier("eurobert", num_key_value_heads=3),
    classifier("fnet", attention=("eager",), heads=False),
    classifier("gte"),
    classifier("jina_embeddings_v3"),
    classifier("layoutlmv3", **LAYOUTLM3),
    classifier("layoutlmv3", "layoutlmv3-relative", **{**LAYOUTLM3, "has_relative_attention_bias": True}, heads=False),
    classifier("luke", entity_vocab_size=20, entity_emb_size=6, attention=("eager",), heads=False),
    classifier("markuplm", attention=("eager",)),
    classifier("nomic_bert"),
    classifier("roc_bert", pronunciation_vocab_size=60, shape_vocab_size=60, pronunciation_embed_dim=6,
               shape_embed_dim=6),
    classifier("tapas", type_vocab_sizes=[3, 5, 5, 2, 5, 5, 5], attention=("eager",)),
    Case("xlnet", partial(AutoConfig.for_model, "xlnet", vocab_size=VOCABULARY, d_model=30, n_head=3, n_layer=2,
                          d_inner=43, num_labels=3, pad_token_id=1), AutoModelForSequenceClassification, token_batch,
         "SEQ_CLS", heads=False, attention=("eager",)),
    translator("mvp", attention=("eager",)),
    Case("encoder-decoder", partial(joined, EncoderDecoderConfig, BertConfig(**SIZES), BertConfig(**SIZES)),
         AutoModelForSeq2SeqLM, partial(token_batch, task="SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM", attention=("eager",)),
    Case("vision-encoder-decoder", partial(joined, VisionEncoderDecoderConfig,
                                           ViTConfig(**LAYERS, image_size=12, patch_size=4), GPT2Config(**GPT2)),
         AutoModelForImageTextToText, caption_batch, length=10, attention=("eager",)),
    # Models of images and of speech.
    Case("audio-spectrogram-transformer",
         partial(AutoConfig.for_model, "audio-spectrogram-transformer", **LAYERS, patch_size=4, frequency_stride=4,
                 time_stride=4, max_length=12, num_mel_bins=12, num_labels=3),
         AutoModelForAudioClassification, mel_batch, length=11),
    images("metaclip_2"),
    speech("sew", squeeze_factor=1),
    images("dinov2_with_registers", tokens=14),
    images("beit", "beit-shared", use_shared_relative_position_bias=True, layer_scale_init_value=0.0, heads=False),
    images("data2vec-vision"),
    images("data2vec-vision", "data2vec-vision-shared", use_shared_relative_position_bias=True, heads=False),
    images("data2vec-vision", "data2vec-vision-no-scale", layer_scale_init_value=0.0),
    images("ijepa", tokens=9),
    images("vit_msn"),
    Case("vivit", partial(AutoConfig.for_model, "vivit", **LAYERS, image_size=12, num_frames=2, tubelet_size=[2, 4, 4],
                          num_labels=3), AutoModelForVideoClassification, video_batch, length=10),
    speech("data2vec-audio"),
    speech("hubert"),
    speech("unispeech"),
    speech("unispeech-sat"),
]  # fmt: skip


def parameters(is_wanted=lambda case: True):
    """The cases that are wanted. The variants and the relatives take part in slow runs only."""
    slow = {*VARIANTS, *map(str, RELATIVES)}
    wanted = filter(is_wanted, [*CASES, *RELATIVES])
    return [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in slow else ()) for case in wanted]


@pytest.fixture(params=parameters())
def case(request) -> Case:
    return request.param


def test_gates_equal_removal(case):
    for attention in case.attention:
        check_gates_equal_removal(case, attention)


def test_merge_equals_unmerged(case):
    check_merge_equals_unmerged(case)


def test_sums(case):
    check_sums(case)


def test_costs(case):
    check_costs(case)


def test_save_and_load(case, tmp_path):
    check_save_load(case, tmp_path)


def test_trim(case, tmp_path):
    check_trim(case, tmp_path)


def test_disable_adapter(case):
    check_disable_adapter(case)


def test_empty_sublayers(case):
    check_empty_sublayers(case)


# Transformers does not save Marian's fixed positions, nor can `load_merged` build them yet.
@pytest.mark.parametrize("case", parameters(lambda case: case.name != "marian"))
def test_merged_files(case, tmp_path):
    check_merged_files(case, tmp_path)


@pytest.mark.parametrize("case", parameters(lambda case: case.task_type == "SEQ_2_SEQ_LM"))
def test_generation(case):
    check_generation(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v3", "mpnet", "t5-gated", "bart", "vit"])
def test_bases_in_16_bits(name, dtype, tmp_path):
    case = next(c for c in CASES if c.name == name)

    def batch(seed=3):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.batch(seed=seed).items()}

    base = case.model(dtype=dtype)
    before = run(base, batch())
    assert before.dtype == dtype
    # Priming differentiates in the base's type, and these random models overflow float16.
    data = {"calibration": [batch(seed) for seed in range(3)]} if dtype == torch.bfloat16 else {}
    model = case.wrap(base, budget=0.55, **data)
    assert model.base_model.plan().trims
    if dtype == torch.bfloat16:
        model.train()
        model(**batch(seed=5)).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert {p.dtype for n, p in model.named_parameters() if "sensi_weight" in n} == {torch.float32}
    expected = run(model, batch())
    assert expected.dtype == dtype and torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(case.model(dtype=dtype), tmp_path), batch()), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, batch()), before)
    small = model.merge_and_unload()
    assert {p.dtype for p in small.parameters()} == {dtype}
    torch.testing.assert_close(run(small, batch()), expected, atol=0.03 * float(expected.abs().max()), rtol=0)


def test_calibration_and_training(case, tmp_path):
    check_training_step(case, tmp_path)


@pytest.mark.parametrize("name", ["albert", "bart", "bert", "distilbert", "xlnet"])
def test_models_without_a_head_have_the_same_units(name):
    """In these, the paths of the layers are shorter."""
    (case,) = [case for case in (*CASES, *RELATIVES) if case.name == name]
    units = [
        sorted((group.kind, group.size) for group in build_anatomy(model).groups)
        for model in (AutoModel.from_config(case.config()), case.model())
    ]
    assert units[0] == units[1] != []


def test_the_length_is_that_of_the_images():
    """A model for images of 20 x 20, which is given smaller ones. Without images, the config's size counts."""
    case = images("dinov2")
    model = case.auto.from_config(case.config(image_size=20))
    for data, length in (({}, 26), ({"calibration": [case.batch()], "score": "fisher"}, 10)):
        wrapped = case.wrap(model, budget={"flops": 0.6}, **data)
        assert wrapped.base_model.plan().sequence_length == length
        model = wrapped.unload()
    wrapped = case.wrap(model, budget=1.0, calibration=[case.batch()])
    assert wrapped.base_model.trim({"flops": 0.6}, calibration=[case.batch()]).sequence_length == 10
    assert wrapped.training and not any(m._forward_pre_hooks for m in wrapped.modules())


@pytest.mark.parametrize("is_gated", [False, True])
def test_dinov3(is_gated, tmp_path):
    """Transformers has no class with a task head for it."""

    def batch(size=4, length=0, **options):
        images = image_batch(size, **options)
        del images["labels"]
        return images

    sizes = {**LAYERS, "hidden_size": 24, "image_size": 12, "patch_size": 4, "num_register_tokens": 2}
    case = Case(
        "dinov3",
        partial(AutoConfig.for_model, "dinov3_vit", **sizes, use_gated_mlp=is_gated),
        AutoModel,
        batch,
        length=12,
    )
    for check in (check_gates_equal_removal, check_sums, check_costs):
        check(case)
    model = case.wrap(case.model(), budget=0.5)
    assert model.base_model.plan().sequence_length == case.length
    save_merged(model, tmp_path)
    images = case.batch()
    torch.testing.assert_close(run(load_merged(tmp_path), images), run(model, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart-classifier", "bart", "t5-gated"])
def test_tied_embeddings_are_not_trained(name):
    case = next(c for c in CASES if c.name == name)
    with pytest.raises(SensiError, match="tied"):
        case.wrap(case.model(), budget=0.5, also_train=["embeddings"])


@pytest.mark.parametrize("fields", [TUNE, TRIM, {**TUNE, "modules_to_save": ["batch_norm"]}], ids=str)
def test_statistics_of_batch_norms_are_saved_or_said(fields, tmp_path):
    """PEFT does not save buffers of the base. An adapter that trims trains and saves norms."""
    case = speech("hubert", conv_pos_batch_norm=True)
    base, batches = case.auto.from_config(case.config()), [speech_batch(seed=i) for i in range(3)]
    start = copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = wrap(base, task_type=None, calibration=batches, **fields)
    said = any("batch_norm' is a batch norm (1 of them" in str(warning.message) for warning in caught)
    assert said == (fields == TUNE)
    train(model, batches)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(start, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits) != said
