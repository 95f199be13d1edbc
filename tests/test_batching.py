"""Caches that take the number of heads from the config."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_config
from transformers import GenerationConfig, LlamaForCausalLM

from peft_sensi import SensiConfig, SensiError


def decoder(budget, **options):
    torch.manual_seed(0)
    config = SensiConfig(budget=budget, score="random", seed=1, task_type="CAUSAL_LM", **options)
    return get_peft_model(LlamaForCausalLM(tiny_config("llama")), config).eval()


def test_trimmed_heads_are_refused_and_not_lost_in_a_thread():
    model, settings = decoder(0.5), GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    for call in (model.generate_batch, model.base_model.model.generate_batch):
        with pytest.raises(SensiError, match="Continuous batching"):
            call(inputs=[[5, 6, 7]], generation_config=settings)
    with model.disable_adapter():
        model.init_continuous_batching(generation_config=settings)
    small = decoder(0.5, widths="uniform").merge_and_unload()
    assert small.config.num_key_value_heads == 1
    for whole in (small, decoder({"trainable": 0.1})):
        whole.init_continuous_batching(generation_config=settings)


def test_layers_with_different_numbers_of_heads_are_refused_after_a_merge():
    plan = decoder(1.0).plan().without({"model.layers.0.heads": [True, False]})
    config = SensiConfig(plan=plan, task_type="CAUSAL_LM")
    merged = get_peft_model(LlamaForCausalLM(tiny_config("llama")), config).merge_and_unload()
    assert [layer.self_attn.k_proj.out_features for layer in merged.model.layers] == [8, 16]
    with pytest.raises(SensiError, match="Continuous batching"):
        merged.generate_batch(inputs=[[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("merged", [False, True])
def test_chunks_of_a_prompt_in_a_static_cache(merged):
    model = decoder(0.5)
    model = model.merge_and_unload() if merged else model
    ids = torch.arange(5, 14)[None]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **options)
    static = {"cache_implementation": "static", "prefill_chunk_size": 4}
    assert torch.equal(model.generate(input_ids=ids, **options, **static), expected)
