"""Models of images and texts, which consist of two transformers: both are trimmed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from family_checks import (
    VOCABULARY,
    Case,
    check_empty_sublayers,
    check_gates_equal_removal,
    check_generation,
    check_merge_equals_unmerged,
    check_merged_files,
    check_sums,
    check_trim,
    image_batch,
    token_batch,
)
from test_families import LAYERS
from tiny import some_slow
from transformers import AutoConfig, AutoModelForImageTextToText

from peft_sensi import build_anatomy, compute_scores
from peft_sensi.anatomy.families import layouts_of
from peft_sensi.scoring.examples import examples_in
from peft_sensi.scoring.gates import gate_gradients
from peft_sensi.scoring.gates_reference import gate_gradients_reference


IMAGE, START = 4, 6  # tokens
IMAGES = {**LAYERS, "image_size": 12, "patch_size": 4}
TEXTS = {**LAYERS, "hidden_size": 36, "vocab_size": VOCABULARY, "pad_token_id": 1, "model_type": "llama"}
QWEN_IMAGES = {"num_heads": 4, "depth": 2, "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1}
QWEN_TEXTS = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2},
    **{"intermediate_size": 43, "vocab_size": VOCABULARY, "pad_token_id": 1},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 5, "vision_start_token_id": START, "vision_end_token_id": 7}


def texts_after(patches: int, size: int, length: int, **options: Any) -> dict[str, torch.Tensor]:
    """Texts with so many tokens in front of them, in whose place the patches of an image come."""
    found = token_batch(size, length - patches, task="CAUSAL_LM", **options)
    ids = found["input_ids"]
    found["input_ids"] = ids.where((ids < IMAGE) | (ids > 7), 9)
    for name, value in (("input_ids", IMAGE), ("attention_mask", 1), ("labels", -100)):
        found[name] = torch.cat([torch.full((size, patches), value), found[name]], dim=1)
    return found


def batch(size: int = 4, length: int = 14, *, several: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    """One image for each text. `several`: the model takes several, so images have a dimension more."""
    images = image_batch(size, **options)["pixel_values"]
    return texts_after(9, size, length, **options) | {"pixel_values": images[:, None] if several else images}


def typed_batch(size: int = 4, length: int = 14, **options: Any) -> dict[str, torch.Tensor]:
    """With types of tokens: 1 for those of an image."""
    found = batch(size, length, **options)
    return found | {"token_type_ids": (found["input_ids"] == IMAGE).long()}


def qwen_batch(size: int = 4, length: int = 16, *, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """The images are one list of patches, so the tensors of the batch cannot be divided into examples."""
    found = texts_after(10, size, length, seed=seed, **options)
    found["input_ids"][:, 0] = START
    patches = torch.randn(size * 9, 3 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    images = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 3, 3]] * size)}
    return found | images | {"mm_token_type_ids": (found["input_ids"] == IMAGE).long()}


def google(model_type: str, texts: dict[str, Any], **changes: Any) -> Case:
    text = {**TEXTS, "num_key_value_heads": 1, "head_dim": 10, **texts}
    config = partial(AutoConfig.for_model, model_type, vision_config={**IMAGES, "model_type": "siglip_vision_model"},
                     text_config=text, image_token_index=IMAGE, **changes)  # fmt: skip
    return Case(model_type, config, AutoModelForImageTextToText, typed_batch, "CAUSAL_LM", length=14,
                attention=("eager",))  # fmt: skip


def several_images(model_type: str) -> Case:
    config = partial(AutoConfig.for_model, model_type, vision_config=IMAGES, text_config=TEXTS, image_token_id=IMAGE,
                     scale_factor=1, pad_token_id=1)  # fmt: skip
    return Case(model_type, config, AutoModelForImageTextToText, partial(batch, several=True), "CAUSAL_LM", length=14)


def qwen(model_type: str, **images: Any) -> Case:
    config = partial(AutoConfig.for_model, model_type, vision_config={**QWEN_IMAGES, **images}, text_config=QWEN_TEXTS,
                     **QWEN_TOKENS)  # fmt: skip
    return Case(model_type, config, AutoModelForImageTextToText, qwen_batch, "CAUSAL_LM", length=16)


KINDS = ["sliding_attention", "full_attention"]  # a cache measures one layer of each kind
CASES = [
    # It does not use the last layer of the images.
    Case("llava", partial(AutoConfig.for_model, "llava", vision_config={**IMAGES, "model_type": "clip_vision_model"},
                          text_config=TEXTS, image_token_index=IMAGE, image_seq_length=9),
         AutoModelForImageTextToText, batch, "CAUSAL_LM", length=14),
    google("gemma3", {"model_type": "gemma3_text", "sliding_window": 4, "layer_types": KINDS}, mm_tokens_per_image=9,
           boi_token_index=5, eoi_token_index=7),
    google("paligemma", {"model_type": "gemma"}, projection_dim=36),
    several_images("smolvlm"),
    several_images("idefics3"),
    qwen("qwen2_vl", embed_dim=48, hidden_size=32, mlp_ratio=2),
    qwen("qwen2_5_vl", hidden_size=48, out_hidden_size=32, intermediate_size=43, window_size=8,
         fullatt_block_indexes=[1]),
    qwen("qwen3_vl", hidden_size=48, out_hidden_size=32, intermediate_size=43, num_position_embeddings=16,
         deepstack_visual_indexes=[0]),
]  # fmt: skip


BY_NAME = {case.name: case for case in CASES}
VARIANTS = ("gemma3", "idefics3", "paligemma", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("case", some_slow(CASES, *VARIANTS), ids=str)
def test_images_and_texts(case, tmp_path):
    """FLOPs are not compared: they are counted with one length for images and texts."""
    for check in (check_merge_equals_unmerged, check_sums, check_empty_sublayers, check_generation):
        check(case)
    for attention in case.attention:
        check_gates_equal_removal(case, attention)
    check_trim(case, tmp_path / "trim")
    check_merged_files(case, tmp_path / "merged")


def example_with_images(case: Case, sizes: list[tuple[int, int]], texts: int, seed: int) -> dict[str, torch.Tensor]:
    """One example: images of these sizes in patches, and so many tokens of text. All but the first have labels."""
    generator = torch.Generator().manual_seed(seed)
    is_qwen = case.name.startswith("qwen")
    ids = [token for height, width in sizes for token in [START] * is_qwen + [IMAGE] * (height * width)]
    words = torch.randint(8, VOCABULARY, (texts,), generator=generator).tolist()
    labels = [-100] * (len(ids) + 1) + words[1:]
    found = {"input_ids": torch.tensor([ids + words]), "labels": torch.tensor([labels])}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if is_qwen:
        count = sum(height * width for height, width in sizes)
        found["pixel_values"] = torch.randn(count, 3 * 4 * 4, generator=generator)
        found["image_grid_thw"] = torch.tensor([(1, *size) for size in sizes]).long().view(-1, 3)
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long()
    else:
        found["pixel_values"] = torch.randn(len(sizes), 3, 12, 12, generator=generator)
    if "token_type_ids" in case.batch():
        found["token_type_ids"] = (found["input_ids"] == IMAGE).long()
    if case.name in ("smolvlm", "idefics3"):
        found["pixel_values"] = found["pixel_values"][None]
    return found


def joined(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of examples with texts of different lengths and different numbers of images."""
    found = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if name in ("image_grid_thw", "pixel_values") and values[0].dim() < 5:
            found[name] = torch.cat(values)
            continue
        longest = max(value.shape[1] for value in values)
        fill = {"input_ids": 1, "labels": -100}.get(name, 0)
        rows = []
        for value in values:
            padding = value.new_full((1, longest - value.shape[1], *value.shape[2:]), fill)
            rows.append(torch.cat([value, padding], dim=1))
        found[name] = torch.cat(rows)
    return found


IMAGES_OF_EXAMPLES = {
    "one each": [1, 1, 1],
    "two each": [2, 2, 2],
    "one to three": [1, 3, 2],
    "as many as examples": [2, 0, 1],
    "one less": [1, 0, 1],
}


@pytest.mark.parametrize("images", IMAGES_OF_EXAMPLES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_images_of_an_example_share_its_gates(case, images):
    """The scores are those of the examples one by one, whatever the numbers and sizes of their images."""
    numbers = IMAGES_OF_EXAMPLES[images]
    if 0 in numbers and case.name in ("smolvlm", "idefics3"):
        numbers = [max(number, 1) for number in numbers]
    sizes = [(3, 3)] * 6
    if case.name.startswith("qwen") and images != "two each":
        sizes = [(2, 2), (4, 3), (3, 3), (2, 5), (1, 4), (3, 2)]
    singles = []
    for i in range(3):
        own = sizes[sum(numbers[:i]) : sum(numbers[: i + 1])]
        singles.append(example_with_images(case, own, texts=3 + 2 * i, seed=i))
    model, batch = case.model(), joined(singles)
    singles = [{k: v for k, v in single.items() if v.numel()} for single in singles]  # some have no images
    anatomy = case.anatomy(model)
    assert examples_in(batch) == 3
    fast = gate_gradients(model, anatomy, batch)
    slow = [gate_gradients_reference(model, anatomy, single) for single in singles]
    scores = compute_scores(model, [batch], priming_steps=0, progress=False).values
    assert any("vision" in name or "visual" in name for name in fast)
    for name, rows in fast.items():
        expected = torch.cat([gradients[name] for gradients in slow])
        torch.testing.assert_close(rows.expand_as(expected), expected, atol=2e-6, rtol=2e-3)
        torch.testing.assert_close(scores[name], expected.square().mean(0), atol=1e-8, rtol=5e-3)


def test_a_described_model_is_one_model():
    """Layouts of the user's own belong to the whole model, whose config says which layers a cache measures."""
    base = BY_NAME["gemma3"].model()
    known = build_anatomy(base)
    assert known.model_type == "gemma3"
    (layout,) = layouts_of(base.config.text_config)
    described = build_anatomy(base, blocks=[replace(layout, layer="language_model.layers.*")])
    texts = [group for group in known.groups if "language_model" in group.name]
    assert list(described.groups) == texts and {group.least for group in texts if group.kind == "head"} == {1}
