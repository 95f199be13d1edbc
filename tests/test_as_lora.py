"""Conversion of adapters to LoRA, by PEFT's `convert_to_lora` and `save_as_lora`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, save_as_lora
from test_families_decoders import GPT2
from tiny import TRIM, TUNE, VOCABULARY, logits, tiny_batches, tiny_model, train, trained, wrap
from transformers import GPT2Config, GPT2ForSequenceClassification

from peft_sensi import SensiConfig


LOW_RANK = {"budget": {"trainable": 0.1}, "update": "low_rank"}


def gpt2() -> GPT2ForSequenceClassification:
    """Its Linears are `Conv1D`, whose weights are transposed."""
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(
        GPT2Config(**{**GPT2, "vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0})
    ).eval()


@pytest.mark.parametrize("make", [tiny_model, gpt2])
@pytest.mark.parametrize("also_train", [None, ["norms"]])
def test_a_low_rank_update_becomes_the_same_lora_adapter(make, also_train, tmp_path):
    model = wrap(make(), **LOW_RANK, also_train=also_train)
    train(model)
    save_as_lora(tmp_path, model, rank=model.active_peft_config.rank)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert isinstance(loaded.active_peft_config, LoraConfig)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(loaded), logits(make()), atol=1e-3)


def test_layers_without_the_adapter_do_not_change():
    model = trained(adapter_name="a", **LOW_RANK, target_modules=["query"])
    model.add_adapter("b", SensiConfig(score="magnitude", task_type="SEQ_CLS", target_modules=["value"], **LOW_RANK))
    _, tensors = convert_to_lora(model, rank=1, adapter_name="a")
    for name, tensor in tensors.items():
        if "value" in name and "lora_B" in name:
            assert not tensor.any()
    assert any("query" in name for name in tensors)


@pytest.mark.parametrize(
    "fields",
    [TRIM, TUNE, {**LOW_RANK, "budget": {"params": 0.5, "trainable": 0.1}}, {"update": "sparse", "sparse": 40}],
    ids=["trimmed", "units", "trimmed low-rank", "sparse"],
)
def test_what_lora_cannot_express_is_refused(fields):
    model = trained(**fields)
    before = logits(model, tiny_batches(1)[0])
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)
    assert not model.supports_lora_conversion()
    assert torch.equal(logits(model, tiny_batches(1)[0]), before)
