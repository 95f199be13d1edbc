"""Families of decoders, and ModernBERT, whose blocks are similar: one table, one set of checks."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from family_checks import (
    VOCABULARY,
    Case,
    check_costs,
    check_disable_adapter,
    check_gates_equal_removal,
    check_generation,
    check_merge_equals_unmerged,
    check_save_load,
    check_sums,
    check_training_step,
    check_trim,
    random_plan,
    run,
    token_batch,
    train,
)
from peft import PeftModel, get_peft_model
from tiny import only_slow, some_slow
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_sensi import (
    AnatomyError,
    BlockLayout,
    BudgetError,
    SensiConfig,
    SensiError,
    SensiLoadError,
    build_anatomy,
    load_merged,
    make_plan,
    save_merged,
)
from peft_sensi.scoring.gates import gate_gradients
from peft_sensi.scoring.gates_reference import gate_gradients_reference


# 6 query heads and 3 key/value heads. The FFN's width is odd.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 43,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_head": 6,
    "n_layer": 2,
    "n_inner": 43,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
FALCON = {**TOKENS, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "ffn_hidden_size": 43,
          "max_position_embeddings": 32, "alibi": False}  # fmt: skip
OPT = {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 43, "word_embed_proj_dim": 36}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_local_experts": 4}
ACTIVE = {"output_router_logits": True}  # with the auxiliary loss


def decoder(model_type, name="", *, sizes=SIZES, heads=True, neurons=True, attention=("eager", "sdpa"), **changes):
    """A causal language model. A size that is changed to `None` is left to its default."""
    changes = {k: v for k, v in {**sizes, **changes}.items() if v is not None}
    return Case(
        name or model_type,
        partial(AutoConfig.for_model, model_type, **changes),
        AutoModelForCausalLM,
        partial(token_batch, task="CAUSAL_LM"),
        "CAUSAL_LM",
        heads=heads,
        neurons=neurons,
        attention=attention,
    )


CASES = [
    decoder("llama", head_dim=10),
    decoder("llama", "llama-tied-biases", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    decoder("mistral", num_key_value_heads=2, sliding_window=4),
    decoder("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    decoder("qwen3", head_dim=10),
    decoder("gemma", head_dim=10, num_key_value_heads=1, num_attention_heads=3),
    decoder("gpt2", sizes=GPT2),
    decoder("gpt2", "gpt2-upcast", sizes=GPT2, n_head=3, n_inner=None, reorder_and_upcast_attn=True,
            scale_attn_by_inverse_layer_idx=True),
    decoder("opt", **OPT),
    decoder("gpt_neox", num_key_value_heads=None),
    decoder("mixtral", neurons=False, intermediate_size=12, **EXPERTS),
]  # fmt: skip
MODERNBERT = Case(
    "modernbert",
    partial(AutoConfig.for_model, "modernbert", **{**SIZES, "num_hidden_layers": 4, "local_attention": 4}),
    AutoModelForMaskedLM,
    partial(token_batch, task="MASKED_LM"),
)
# Families with the same kinds of blocks, and variants.
MORE_CASES = [
    decoder("arcee"),
    decoder("cohere", use_qk_norm=False),
    decoder("cohere", "cohere-normed", use_qk_norm=True, heads=False),
    decoder("gemma2", attention=("eager",), head_dim=10, sliding_window=4, query_pre_attn_scalar=10),
    decoder("gemma3_text", head_dim=10, sliding_window=4),
    decoder("gpt_neox", "gpt_neox-sequential", num_key_value_heads=None, use_parallel_residual=False),
    decoder("apertus"),
    decoder("biogpt", num_key_value_heads=None),
    decoder("bloom", sizes={**TOKENS, "hidden_size": 36, "n_head": 6, "n_layer": 2}, heads=False,
            attention=("eager",)),
    decoder("cohere2", sliding_window=4),
    decoder("cwm", head_dim=10, sliding_window=4),
    decoder("ernie4_5"),
    decoder("ernie4_5_moe", neurons=False, moe_num_experts=4, moe_k=2, moe_intermediate_size=12),
    decoder("exaone4", sliding_window=4),
    decoder("falcon", sizes=FALCON, new_decoder_architecture=True, num_kv_heads=3),
    decoder("falcon", "falcon-alibi", sizes=FALCON, new_decoder_architecture=True, num_kv_heads=3, alibi=True,
            attention=("eager",), heads=False),
    decoder("falcon", "falcon-one-key", sizes=FALCON, heads=False),
    decoder("falcon", "falcon-sequential", sizes=FALCON, multi_query=False, parallel_attn=False, bias=True,
            heads=False),
    decoder("glm", hidden_size=48, head_dim=8),
    decoder("glm4", hidden_size=48, head_dim=8),
    decoder("glm4_moe", hidden_size=48, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=12, first_k_dense_replace=1),
    decoder("gpt_neo", num_key_value_heads=None, num_hidden_layers=None, num_layers=2, num_attention_heads=None,
            num_heads=6, attention_types=[[["global", "local"], 1]], window_size=4, attention=("eager",)),
    decoder("gptj", sizes=GPT2, n_embd=48, rotary_dim=4, attention=("eager",)),
    decoder("granitemoe", neurons=False, intermediate_size=12, **EXPERTS),
    decoder("granitemoeshared", neurons=False, num_local_experts=4, num_experts_per_tok=2, intermediate_size=12,
            shared_intermediate_size=12, residual_multiplier=0.3),
    decoder("hunyuan_v1_dense", head_dim=10),
    decoder("hyperclovax", head_dim=10),
    decoder("jais2"),
    decoder("ministral3", head_dim=10),
    decoder("modernbert-decoder", num_key_value_heads=None, local_attention=4, cls_token_id=2, sep_token_id=2),
    decoder("vaultgemma", head_dim=10, query_pre_attn_scalar=10, sliding_window=4, attention=("eager",)),
    decoder("granite", residual_multiplier=0.22),
    decoder("helium", head_dim=6),
    decoder("ministral", head_dim=10, sliding_window=4),
    decoder("nemotron"),
    decoder("olmo", clip_qkv=0.5),
    decoder("olmo2", heads=False),
    decoder("olmo3", heads=False),
    decoder("opt", "opt-normed-after", **{**OPT, "word_embed_proj_dim": 20}, do_layer_norm_before=False),
    decoder("opt", "opt-without-biases", **OPT, enable_bias=False),
    decoder("phi", hidden_size=48),
    decoder("phi3", heads=False),
    decoder("phimoe", neurons=False, num_local_experts=4, num_experts_per_tok=2, intermediate_size=12),
    decoder("qwen2_moe", neurons=False, **EXPERTS, shared_expert_intermediate_size=12),
    decoder("qwen3_moe", neurons=False, **EXPERTS, head_dim=10, mlp_only_layers=[1]),
    decoder("seed_oss", head_dim=10),
    decoder("smollm3"),
    decoder("stablelm", hidden_size=48),
    decoder("stablelm", "stablelm-parallel", hidden_size=48, use_parallel_residual=True, use_qkv_bias=True),
    decoder("stablelm", "stablelm-normed", hidden_size=48, qk_layernorm=True, heads=False),
    decoder("starcoder2"),
    decoder("xglm", sizes={**TOKENS, "d_model": 36, "attention_heads": 6, "num_layers": 2, "ffn_dim": 43,
                           "max_position_embeddings": 32}, attention=("eager",)),
]  # fmt: skip
BY_NAME = {case.name: case for case in [*CASES, *MORE_CASES]}


# Llama without these options, and GPT-2, are among the others. The windows of Mistral are those of Qwen2.
VARIANTS = ("llama-tied-biases", "gpt2-upcast", "qwen2")


@pytest.fixture(params=some_slow([*CASES, MODERNBERT], *VARIANTS), ids=str)
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("attention", ["sdpa", *only_slow("eager")])
def test_gates_equal_removal(case, attention):
    check_gates_equal_removal(case, attention)


def test_merge_equals_unmerged(case):
    check_merge_equals_unmerged(case)


@pytest.mark.parametrize("case", [*CASES, MODERNBERT, *MORE_CASES], ids=str)
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


def test_calibration_and_training(case, tmp_path):
    check_training_step(case, tmp_path)


@pytest.mark.parametrize("case", some_slow(CASES, *VARIANTS), ids=str)
def test_generation(case):
    check_generation(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_more_families(case, tmp_path):
    for attention in case.attention:
        check_gates_equal_removal(case, attention)
    check_merge_equals_unmerged(case)
    check_costs(case)
    check_generation(case)
    check_save_load(case, tmp_path / "adapter")
    check_training_step(case, tmp_path / "trainer")


# -- what is special about decoders ----------------------------------------------------------------------------------


def sizes_of(model):
    return [
        (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features, layer.self_attn.o_proj.in_features)
        for layer in model.model.layers
    ]


def test_a_unit_is_a_key_value_head_with_its_query_heads():
    case = BY_NAME["llama"]
    model = case.model()
    group = case.anatomy(model).groups[0]
    assert (group.kind, group.size, group.unit_params) == ("head", 3, 36 * (2 * 20 + 2 * 10))
    small = case.wrap(case.model(), plan=random_plan(case, model)).merge_and_unload()
    assert sizes_of(model) == [(60, 30, 60)] * 3
    assert sizes_of(small) == [(40, 20, 40)] * 3
    assert all(layer.self_attn.num_key_value_groups == 2 for layer in small.model.layers)


def test_fused_projections_are_cut_in_all_their_parts():
    """One Linear holds queries, keys and values. The merged weight has the kept rows of each, in the base's order."""
    for name in ("gpt2", "gpt_neox"):
        case = BY_NAME[name]
        base = case.model()
        plan = random_plan(case, base, tuned=1.0)
        group = plan.anatomy.groups[0]
        fused = base.get_submodule(group.sides[0].module)
        rows = fused.weight.detach().t() if name == "gpt2" else fused.weight.detach()
        heads = torch.from_numpy(np.flatnonzero(plan.of(group)))
        parts = rows.view(3, 6, 6, 36)[:, heads] if name == "gpt2" else rows.view(6, 18, 36)[heads]
        small = case.wrap(case.model(), plan=plan).merge_and_unload().get_submodule(group.sides[0].module)
        found = small.weight.t() if name == "gpt2" else small.weight
        assert torch.equal(found, parts.reshape(-1, 36))
        if name == "gpt2":
            assert (small.nx, small.nf) == (36, len(heads) * 18) and small.weight.is_contiguous()


@pytest.mark.parametrize(
    ("name", "target"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("qwen2", "k_proj")]
)
@pytest.mark.parametrize("budget", [{"trainable": 0.05}, {"params": 0.6, "trainable": 0.05}])
def test_one_projection_is_tuned(name, target, budget):
    case = BY_NAME[name]
    model = case.wrap(case.model(), budget=budget, target_modules=[target], also_train=[])
    plan, trained = model.base_model.plan(), {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(f".{target}." in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == plan.trainable_params <= 0.05 * plan.anatomy.total_params
    before = run(model, case.batch(seed=3))
    train(model, case)
    after = run(model, case.batch(seed=3))
    assert not torch.equal(before, after)
    torch.testing.assert_close(run(model.merge_and_unload(), case.batch(seed=3)), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("widths", ["free", "uniform"])
def test_merged_decoders_are_saved_and_loaded(name, widths, tmp_path):
    case = BY_NAME[name]
    model = case.wrap(case.model("sdpa"), budget=0.5, widths=widths)
    train(model, case)
    batch = case.batch(seed=3)
    prompt = {"input_ids": batch["input_ids"][::2], "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    save_merged(model, tmp_path)
    small = load_merged(tmp_path)
    torch.testing.assert_close(run(small, batch), run(model, batch), atol=1e-4, rtol=1e-4)
    assert torch.equal(small.generate(**prompt), model.generate(**prompt))


OTHER_UPDATES = {
    "low-rank": {"update": "low_rank", "rank": 2},
    "sparse": {"update": "low_rank+sparse", "rank": 2, "sparse": 20, "sparsity": 0.3},
    "mask": {"update": "mask", "sparsity": 0.5, "granularity": "weight", "budget": None},
    "sublayers": {"granularity": "tensor"},
    "base-dropped": {"keep_base": False},
    "narrow": {"also_train": []},
    "tune-some": {"budget": {"trainable": 0.1}, "update": "dense"},
    "both": {"budget": {"params": 0.6, "trainable": 0.1}, "also_train": ["biases"]},
    "cut": {"schedule": {"phase": "cut", "start": 0.0, "end": 0.5, "cuts": 1}},
}


@pytest.mark.parametrize("name", ["gpt2", "modernbert"])
@pytest.mark.parametrize("update", OTHER_UPDATES)
def test_everything_else_works_on_fused_projections_and_conv1d(name, update, tmp_path):
    case = {**BY_NAME, "modernbert": MODERNBERT}[name]
    batch, base = case.batch(seed=3), case.model()
    config = {"budget": 0.6, "score": "magnitude", **OTHER_UPDATES[update]}
    if (name, update) == ("gpt2", "sublayers"):
        with pytest.raises(BudgetError, match="cannot run without"):  # `Conv1D` fails on inputs without columns
            case.wrap(base, **config)
        return
    model = case.wrap(base, **config)
    model.base_model.sensi_stepped = frozenset({"default"})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = run(model, batch)
    for _ in range(2):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if update == "narrow":
        model.base_model.compress("int8")
    expected = run(model, batch)
    assert not torch.equal(before, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path)
    assert torch.equal(run(loaded, batch), expected)
    torch.testing.assert_close(run(model.merge_and_unload(), batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_layers_without_heads(name):
    """One head stays where the cache measures its length, and where the code cannot run without heads."""
    case = BY_NAME[name]
    anatomy = case.anatomy(case.model())
    scores = {g.name: np.full(g.size, float(g.kind == "neuron")) for g in anatomy.groups}
    plan = make_plan(anatomy, scores, 0.35, min_units=0, multiple_of=1)
    heads = [int((plan.of(g) > 0).sum()) for g in anatomy.groups if g.kind == "head"]
    # Qwen2's last two layers have a sliding window. The first layer of each kind measures a cache.
    assert heads == {"llama": [1, 0, 0], "opt": [1, 1, 1], "gpt2": [1, 1], "qwen2": [1, 1, 0]}[name]
    model = case.wrap(case.model(), plan=plan)
    batch = {k: v[::2] for k, v in case.batch(labels=False).items() if k != "labels"}  # without padding
    for trimmed in (model, copy.deepcopy(model).merge_and_unload()):
        with_cache, without = (
            trimmed.generate(**batch, do_sample=False, max_new_tokens=5, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_an_encoder_that_is_used_as_a_decoder_has_a_cache_too():
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    base = BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval()
    anatomy = build_anatomy(base)
    scores = {g.name: np.full(g.size, float(g.kind == "neuron")) for g in anatomy.groups}
    plan = make_plan(anatomy, scores, 0.35, min_units=0, multiple_of=1)
    assert [int((plan.of(g) > 0).sum()) for g in anatomy.groups if g.kind == "head"] == [1, 0, 0]
    model = get_peft_model(base, SensiConfig(plan=plan))
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    rest = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=1e-4)


def test_a_plan_without_the_heads_that_must_stay_is_refused():
    case = BY_NAME["llama"]
    plan = random_plan(case, case.model())
    nothing = [bytes(3) if g.kind == "head" else s for g, s in zip(plan.anatomy.groups, plan.states, strict=True)]
    broken = type(plan)(plan.anatomy, tuple(nothing), plan.targets, plan.sequence_length)
    with pytest.raises(SensiLoadError, match="cannot run with fewer"):
        case.wrap(case.model(), plan=broken)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "mixtral"])
def test_gradients_of_gates_are_those_of_their_definition(name):
    case = BY_NAME[name]
    model = case.model()
    batch = case.batch()
    fast = gate_gradients(model, case.anatomy(model), batch)
    slow = gate_gradients_reference(model, case.anatomy(model), batch)
    for group, expected in slow.items():
        assert fast[group].shape == expected.shape == (4, expected.shape[1])
        torch.testing.assert_close(fast[group], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", *only_slow("opt-normed-after", "gemma2", "gpt_neox", "stablelm-parallel")]
)
def test_the_refit_brings_the_outputs_closer(name):
    case = BY_NAME[name]
    base = case.model()
    test = case.batch(32, seed=99)
    expected, mask = run(base, test), test["attention_mask"].bool()
    errors = []
    for refit in (False, True):
        batches = [case.batch(16, seed=seed) for seed in range(8)]
        model = case.wrap(case.model(), budget=0.6, calibration=batches, calibration_steps=8, refit=refit, seed=1)
        errors.append(float((run(model, test) - expected)[mask].square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_tied_embeddings_are_not_parted():
    model = BY_NAME["gpt2"].model()
    assert model.lm_head.weight is model.transformer.wte.weight
    for options in ({"target_modules": ["lm_head", "c_attn"]}, {"also_train": ["embeddings"]}):
        with pytest.raises(SensiError, match="tied"):
            BY_NAME["gpt2"].wrap(model, budget=0.5, **options)
    wrapped = BY_NAME["gpt2"].wrap(model, budget=0.5, target_modules="all-linear")
    assert model.lm_head.weight is model.transformer.wte.weight and not model.lm_head.weight.requires_grad
    assert "lm_head" not in wrapped.base_model.plan().targets


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "opt"])
def test_the_head_of_a_decoder_that_classifies_is_trained(model_type, tmp_path):
    case = BY_NAME[model_type]
    classifier = Case(
        f"{model_type}-classifier",
        lambda: case.config(num_labels=3),
        AutoModelForSequenceClassification,
        token_batch,
        "SEQ_CLS",
    )
    model = classifier.wrap(classifier.model(), budget=0.5)
    assert "score" in model.peft_config["default"].modules_to_save
    check_save_load(classifier, tmp_path)
    check_training_step(classifier, tmp_path / "trainer")


def test_a_large_model_is_planned_on_meta():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # 7B
    anatomy = build_anatomy(model)
    head, neuron = anatomy.groups[:2]
    assert (head.size, head.unit_params) == (32, 4 * 128 * 4096)
    assert (neuron.size, neuron.unit_params) == (11008, 3 * 4096)
    assert anatomy.total_params == sum(p.numel() for p in model.parameters()) == 6_738_415_616
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, {"params": 0.5, "flops": 0.6})
    assert 0.499 < plan.params_share <= 0.5 and plan.flops_share <= 0.6
    wrapped = get_peft_model(model, SensiConfig(plan=plan, task_type="CAUSAL_LM"))
    shapes = {
        n: tuple(p.shape) for n, p in wrapped.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight")
    }
    assert all(p.is_meta for p in wrapped.parameters()), shapes


# -- families that the table does not have ---------------------------------------------------------------------------

UNKNOWN = {
    "gpt_oss": {"head_dim": 8, **EXPERTS},
    "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 12, "num_key_value_heads": 6},
    "mamba": {"state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_unknown_families_can_be_tuned_but_not_trimmed(model_type):
    case = decoder(model_type, **{"intermediate_size": 36, **UNKNOWN[model_type]})
    model, batch = case.model(), case.batch()
    before = run(model, batch)
    with pytest.raises(AnatomyError, match="blocks are unknown"):
        case.wrap(model, budget=0.5)
    wrapped = case.wrap(model, budget={"trainable": 0.1}, update="dense")
    torch.testing.assert_close(run(wrapped, batch), before, atol=1e-5, rtol=1e-5)
    train(wrapped, case)
    trained = run(wrapped, batch)
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(run(wrapped.merge_and_unload(), batch), trained, atol=1e-4, rtol=1e-4)


def test_weights_that_a_model_uses_without_calling_the_layer():
    """Mamba multiplies by `dt_proj.weight` itself. An adapter there must have an effect before merging, too."""
    case = decoder("mamba", **{"intermediate_size": 36, **UNKNOWN["mamba"]})
    model, batch = case.model(), case.batch()
    before = run(model, batch)
    wrapped = case.wrap(model, target_modules=["dt_proj", "x_proj"])
    train(wrapped, case)
    trained = run(wrapped, batch)
    assert (trained - before).abs().max() > 1e-3
    with wrapped.disable_adapter():
        torch.testing.assert_close(run(wrapped, batch), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(wrapped.merge_and_unload(), batch), trained, atol=1e-5, rtol=1e-5)


def test_linears_that_compute_something_else_are_left_alone():
    """Phi-MoE's router is a subclass of Linear that returns a tuple."""
    case = decoder("phimoe", intermediate_size=12, **EXPERTS)
    with pytest.warns(UserWarning, match="router"):
        wrapped = case.wrap(
            case.model(), budget={"trainable": 0.1}, target_modules="all-linear", calibration=[case.batch()]
        )
    assert not any("router" in name for name in wrapped.base_model.plan().targets)
    train(wrapped, case)


def test_heads_that_a_layout_cannot_describe():
    """A gate beside the queries and parameters across heads are noticed by their shapes."""
    layout = BlockLayout(
        layer="layers.*", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
        head_size="self_attn.head_dim",
    )  # fmt: skip
    gated = BY_NAME["llama"].model()
    for layer in gated.model.layers:
        layer.self_attn.q_proj = torch.nn.Linear(36, 120)
    with pytest.raises(AnatomyError, match="does not describe"):
        build_anatomy(gated, blocks=[layout])
    sinks = BY_NAME["llama"].model()
    for layer in sinks.model.layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(6))
    with pytest.warns(UserWarning, match="sinks"):
        anatomy = build_anatomy(sinks, blocks=[layout])
    assert anatomy.trimmable == () and anatomy.groups[0].fixed


@pytest.mark.parametrize("values", [{"interleaved": "yes"}, {"min_heads": "1"}, {"q": 3}, {"head_counts": "n_heads"}])
def test_layouts_with_fields_of_another_type(values):
    with pytest.raises(AnatomyError, match="cannot be"):
        BlockLayout.from_dict({"layer": "layers.*", **values})
