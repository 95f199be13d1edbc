"""Merged models on disk: what is loaded is what was saved, nothing foreign is built, nothing valid is ever lost."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from processes import PATIENCE
from safetensors.torch import load, load_file, save_file
from tiny import (
    assert_same_tensors,
    logits,
    only_slow,
    snapshot,
    tiny_batches,
    tiny_config,
    tiny_model,
    train,
    trained,
    wrap,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertTokenizerFast,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sensi import BlockLayout, SensiConfig, SensiError, SensiLoadError, build_anatomy, load_merged, save_merged
from peft_sensi.anatomy.families import FAMILIES as LAYOUTS
from peft_sensi.cli.checks import check_out
from peft_sensi.merging.foreign import check_counts
from peft_sensi.planning.allocate import make_plan
from peft_sensi.utils.states import TRIMMED


def ffn_only(family: str) -> BlockLayout:
    return replace(LAYOUTS[family][0], q="", k="", v="", o="", head_size="")


def trained_llama(**config):
    base = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True)).eval()
    model = wrap(base, task_type="CAUSAL_LM", **config)
    train(model, [{**b, "labels": b["input_ids"]} for b in tiny_batches(2, labels=False)], steps=2)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    """The logits, or a question's start logits."""
    with torch.no_grad():
        return model.eval()(**tiny_batches(1, seed=99, labels=False)[0])[0]


def weights_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def unhashed(folder: Path) -> dict:
    """The config without its hash, as in folders of the first versions, so that the other checks are reached."""
    values = json.loads((folder / "config.json").read_text())
    del values["peft_sensi_hash"]
    return values


def rewrite(folder: Path, **changes) -> None:
    values = unhashed(folder)
    record = changes.pop("record", {})
    if isinstance(values.get("peft_sensi"), dict):
        values["peft_sensi"] |= record
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.fixture
def folder(both_forms, tmp_path) -> Path:
    """A merged BERT with other widths in each layer."""
    return shutil.copytree(both_forms["record"], tmp_path / "merged")


def test_what_is_loaded_is_what_was_merged(family, tmp_path):
    model = trained(family, budget=0.5).train()
    before = snapshot(model)
    assert save_merged(model, tmp_path) is False
    assert_same_tensors(snapshot(model), before)
    assert model.training and model.base_model.plan().trims
    again = load_merged(tmp_path)
    merged = model.merge_and_unload()
    assert type(again) is type(merged) and not again.training
    assert_same_tensors(snapshot(again), snapshot(merged))
    assert torch.equal(logits(again), logits(merged))
    assert again.config.id2label == merged.config.id2label
    train(again, steps=1)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "MASKED_LM", "FEATURE_EXTRACTION"])
def test_tasks_and_tied_weights(task, tmp_path):
    model = wrap(tiny_model("bert", task), budget=0.5, task_type=None if task == "MASKED_LM" else task)
    save_merged(model, tmp_path)
    again, merged = load_merged(tmp_path), model.merge_and_unload()
    assert type(again) is type(merged)
    assert torch.equal(outputs(again), outputs(merged))
    if task == "MASKED_LM":
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert "cls.predictions.decoder.weight" not in load_file(weights_file(tmp_path))


def test_grouped_queries_rotary_tables_and_generation(tmp_path):
    model = trained_llama(budget=0.5, score="random")
    save_merged(model, tmp_path)
    again, merged = load_merged(tmp_path), model.merge_and_unload()
    assert torch.equal(logits(again), logits(merged))
    ids = tiny_batches(1, padding=False, labels=False)[0]["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(again.generate(ids, **options), merged.generate(ids, **options))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_each_tensor_keeps_its_dtype(tmp_path):
    merged = trained("bert", budget=0.5).merge_and_unload().bfloat16()
    merged.classifier.float()
    save_merged(merged, tmp_path)
    again = load_merged(tmp_path)
    assert_same_tensors(snapshot(again), snapshot(merged))
    assert {p.dtype for p in again.parameters()} == {torch.float32, torch.bfloat16}


def test_save_pretrained_of_a_merged_model(tmp_path):
    model = trained("bert", budget=0.5)
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_merged(tmp_path)), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["peft_sensi"]["load_with"] == "peft_sensi.load_merged"
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [AutoModelForSequenceClassification, BertForSequenceClassification])
@pytest.mark.parametrize("ignore", [False, True])
def test_stock_loaders_find_no_weights(loader, ignore, folder):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        loader.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_a_process_without_the_package(folder, tmp_path):
    """The modeling file needs Transformers only; what it loads can be saved and is loaded here again."""
    torch.save((tiny_batches(1, seed=99, labels=False)[0], logits(load_merged(folder))), tmp_path / "case.pt")
    code = f"""
import sys
sys.modules["peft_sensi"] = sys.modules["peft"] = None  # an import of them raises
import torch
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained({str(folder)!r}, trust_remote_code=True)
batch, expected = torch.load({str(tmp_path / "case.pt")!r})
assert torch.equal(model(**batch).logits, expected)
model.save_pretrained({str(tmp_path / "again")!r})
assert not hasattr(model.config, "peft_sensi_hash")
again = Auto.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert torch.equal(again(**batch).logits, expected)
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=PATIENCE)
    assert torch.equal(logits(load_merged(tmp_path / "again")), logits(load_merged(folder)))


@pytest.mark.parametrize("task", ["SequenceClassification", *only_slow("TokenClassification", "QuestionAnswering")])
@pytest.mark.parametrize("family", ["llama", *only_slow("qwen2")])
def test_a_class_that_builds_its_base_model_by_the_config(family, task, tmp_path):
    """It found our file in the config, and asked the user whether to run it, who had said yes already."""
    config = tiny_config("llama", pad_token_id=0)
    if family == "qwen2":
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
                 "intermediate_size", "pad_token_id")  # fmt: skip
        config = AutoConfig.for_model("qwen2", **{name: getattr(config, name) for name in sizes})
    auto = getattr(transformers, f"AutoModelFor{task}")
    model = wrap(auto.from_config(config), budget=0.45, score="random", multiple_of=1, seed=5, task_type=None)
    assert save_merged(model, tmp_path) is False
    merged, batch = load_merged(tmp_path).eval(), tiny_batches(1, labels=False)[0]
    foreign = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(foreign).__name__.startswith("Sensi")
    for own, theirs in zip(merged(**batch).values(), foreign(**batch).values(), strict=True):
        assert not isinstance(own, torch.Tensor) or torch.equal(own, theirs)
    foreign.save_pretrained(tmp_path / "again")
    assert_same_tensors(snapshot(load_merged(tmp_path / "again")), snapshot(merged))


def test_a_class_that_checks_the_class_of_its_config(tmp_path):
    """It refused ours, whose class is a subclass of the generated file."""
    encoder = tiny_config("bert")
    decoder = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, pad_token_id=0
    )
    model = wrap(EncoderDecoderModel(config), budget=0.45, score="random", multiple_of=1, seed=5, task_type=None)
    assert save_merged(model, tmp_path) is False
    merged, ids = load_merged(tmp_path).eval(), tiny_batches(1, labels=False)[0]["input_ids"]
    foreign = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(foreign).config_class is type(foreign.config)
    with torch.no_grad():
        assert torch.equal(foreign(ids, decoder_input_ids=ids).logits, merged(ids, decoder_input_ids=ids).logits)
    foreign.save_pretrained(tmp_path / "again")
    assert_same_tensors(snapshot(load_merged(tmp_path / "again")), snapshot(merged))


def test_a_merged_model_can_be_trimmed_again(folder, tmp_path):
    base = load_merged(folder)
    model = wrap(base, budget=0.6)
    train(model)
    save_merged(model, tmp_path / "twice")
    merged = model.merge_and_unload()
    again = load_merged(tmp_path / "twice")
    assert_same_tensors(snapshot(again), snapshot(merged))
    assert again.num_parameters() < load_merged(folder).num_parameters()


def test_an_untrimmed_model_is_a_plain_checkpoint(tmp_path):
    model = trained("bert", budget={"trainable": 0.1})
    assert save_merged(model, tmp_path) is True
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    stock = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same_tensors(snapshot(stock), snapshot(model.merge_and_unload()))
    assert_same_tensors(snapshot(load_merged(tmp_path)), snapshot(stock))


# -- uniform widths ---------------------------------------------------------------------------------------------------


def test_uniform_ffn_trims_are_plain_checkpoints(family, tmp_path):
    base = tiny_model(family)
    model = wrap(base, budget=0.5, widths="uniform", blocks=[ffn_only(base.config.model_type)])
    train(model)
    assert save_merged(model, tmp_path) is True
    merged = model.merge_and_unload()
    stock = type(merged).from_pretrained(tmp_path)
    assert_same_tensors(snapshot(stock), snapshot(merged))
    merged.save_pretrained(tmp_path / "stock")
    assert_same_tensors(snapshot(type(merged).from_pretrained(tmp_path / "stock")), snapshot(merged))


@pytest.mark.parametrize("widths", ["free", "uniform"])
def test_models_that_were_made_from_one_config_are_left_alone(widths, tmp_path):
    config = tiny_config("llama")
    merged, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    before = config.to_dict()
    merged = wrap(merged, budget=0.5, task_type="CAUSAL_LM", widths=widths, multiple_of=1).merge_and_unload()
    assert other.config.to_dict() == config.to_dict() == before != merged.config.to_dict()
    assert merged.model.config is merged.config and merged.model.layers[0].self_attn.config is merged.config
    other.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(again.state_dict(), other.state_dict())


def test_uniform_heads_and_neurons_of_llama(tmp_path):
    model = trained_llama(budget=0.5, widths="uniform")
    assert save_merged(model, tmp_path) is True
    merged = model.merge_and_unload()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock), logits(merged))
    kept = (stock.config.num_attention_heads, stock.config.num_key_value_heads, stock.config.head_dim)
    assert kept == (2, 1, 8) and stock.config.intermediate_size < 64


def test_bert_cannot_say_that_it_has_fewer_heads(tmp_path):
    """Its config derives the head size from the number of heads, so that would be another function."""
    model = trained("bert", budget={"params": 0.5}, widths="uniform")
    assert save_merged(model, tmp_path) is False
    assert torch.equal(logits(load_merged(tmp_path)), logits(model.merge_and_unload()))


DECODERS = {
    "gpt2": {"n_embd": 48, "n_head": 6, "n_layer": 2},
    "phi3": {},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 48},
    "qwen2": {},
    "mixtral": {"num_local_experts": 2},
}
DECODER_SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def wrapped_decoder(family: str, **config):
    sizes = {} if family == "gpt2" else dict(DECODER_SIZES)
    sizes |= {name: DECODER_SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **DECODERS[family])).eval()
    return wrap(base, task_type="CAUSAL_LM", budget=0.5, score="random", **config)


@pytest.mark.parametrize("decoder", DECODERS)
def test_fused_transposed_and_shared_projections(decoder, tmp_path):
    model = wrapped_decoder(decoder)
    assert save_merged(model, tmp_path) is False
    again, merged = load_merged(tmp_path), model.merge_and_unload()
    assert_same_tensors(snapshot(again), snapshot(merged))
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("decoder", ["phi3", "qwen2", "mixtral"])
def test_configs_that_can_say_it_though_they_do_not_declare_it(decoder, tmp_path):
    """`head_dim` is read by classes whose config has no such field; Mixtral's checkpoints have names of their own."""
    model = wrapped_decoder(decoder, widths="uniform")
    assert save_merged(model, tmp_path) is True
    again, merged = load_merged(tmp_path), model.merge_and_unload()
    assert_same_tensors(snapshot(again), snapshot(merged))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock), logits(merged))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [0.5, {"trainable": 0.1}], ids=str)
def test_any_number_of_labels_where_the_family_has_another_default(count, budget, tmp_path):
    """Transformers does not write two labels, the default of all configs; the default of BART is three."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"vocab_size": 64, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_labels": count}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = AutoConfig.for_model("bart", **sizes, **tokens)
    base = AutoModelForSequenceClassification.from_config(config).eval()
    plain = save_merged(wrap(base, budget=budget, score="random"), tmp_path)
    assert load_merged(tmp_path).config.id2label == base.config.id2label and len(base.config.id2label) == count
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=not plain)
    assert stock.config.num_labels == count


THREE_LAYERS = build_anatomy(tiny_model("bert", num_hidden_layers=3))


@given(st.integers(0, 2**32 - 1), st.floats(0.35, 1.0), st.floats(0.35, 1.0), st.sampled_from([1, 3, 8]))
@settings(max_examples=30)
def test_uniform_plans_are_exact(seed, params, flops, multiple_of):
    anatomy = THREE_LAYERS
    rng = np.random.default_rng(seed)
    scores = {g.name: rng.random(g.size) for g in anatomy.groups}
    budget = {"params": params, "flops": flops}
    plan = make_plan(anatomy, scores, budget, multiple_of=multiple_of, uniform=True)
    allowed = (int(params * anatomy.prunable_params), int(flops * 2 * anatomy.prunable_macs(128)))
    spent = (plan.kept_params, plan.kept_flops)
    assert all(a <= b for a, b in zip(spent, allowed, strict=True))
    for kind, step in (("head", 1), ("neuron", multiple_of)):
        groups = [g for g in anatomy.groups if g.kind == kind]
        counts = {int((plan.of(g) > 0).sum()) for g in groups}
        assert len(counts) == 1
        count = counts.pop()
        for group in groups:
            kept = plan.of(group) > 0
            assert count == group.size or scores[group.name][kept].min() >= scores[group.name][~kept].max()
        more = min(step, groups[0].size - count)
        price = (
            sum(more * g.unit_params for g in groups),
            sum(2 * more * g.unit_macs(128) for g in groups),
        )
        assert more == 0 or any(s + p > a for s, p, a in zip(spent, price, allowed, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": "equal"}, "must be one of free, uniform"),
        ({"widths": "uniform", "budget": {"trainable": 0.1}}, "no effect"),
        ({"widths": "uniform", "update": "low_rank", "rank": 2}, "no effect"),
        ({"widths": "uniform", "granularity": "tensor", "budget": 0.5}, "whole sublayers"),
    ],
)
def test_uniform_is_refused_where_it_means_nothing(fields, message):
    with pytest.raises(SensiError, match=message):
        SensiConfig(**fields)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_saved(tmp_path, bert):
    with pytest.raises(SensiError, match="not a model class of Transformers"):
        save_merged(nn.Linear(2, 2), tmp_path)
    with pytest.raises(SensiError, match="load and adapt a BertForSequenceClassification instead"):
        save_merged(type("Mine", (BertForSequenceClassification,), {})(bert.config), tmp_path)
    with pytest.raises(SensiError, match="not one of this package"):
        save_merged(get_peft_model(copy.deepcopy(bert), LoraConfig(target_modules=["query"])), tmp_path)
    with pytest.raises(SensiError, match="contains adapter layers"):
        save_merged(trained("bert", budget=0.5).base_model.model, tmp_path)
    other = copy.deepcopy(bert)
    other.extra = nn.Linear(2, 2)
    with pytest.raises(SensiError, match="extra.bias"):
        save_merged(other, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SensiError, match="is a file"):
        save_merged(bert, tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SensiError, match="adapter_config.json"):
        save_merged(bert, tmp_path)


RECORDS = {
    "a newer format": {"format_version": 2},
    "no version": {"format_version": None},
    "a class of torch": {"architecture": "torch"},
    "a path": {"architecture": "os.system"},
    "a class that is no model": {"architecture": "BertConfig"},
    "an auto class": {"architecture": "AutoModel"},
    "the bare base class": {"architecture": "PreTrainedModel"},
    "another family": {"architecture": "GPT2Model"},
    "another task": {"architecture": "BertForTokenClassification"},
    "no class": {"architecture": None},
    "weights elsewhere": {"weights": "../model.safetensors"},
    "weights of another kind": {"weights": "pytorch_model.bin"},
    "missing weights": {"weights": "sensi_model-0123456789abcdef.safetensors"},
    "shapes of nothing": {"shapes": {"bert.nothing.weight": [1, 1]}},
    "a shape of the wrong order": {"shapes": {"classifier.weight": [96]}},
    "a negative length": {"shapes": {"classifier.weight": [-1, 32]}},
    "a boolean length": {"shapes": {"classifier.weight": [True, 32]}},
    "a huge length": {"shapes": {"classifier.weight": [10**12, 32]}},
    "a large length": {"shapes": {"classifier.weight": [2**30, 32]}},
    "no shapes": {"shapes": {}},
    "no mapping of shapes": {"shapes": []},
    "an attribute that is none": {"attributes": {"bert.nothing": 1}},
    "a private attribute": {"attributes": {"bert._version": 1}},
    "an attribute that is no number": {"attributes": {"bert.config": 1}},
    "an attribute with text": {"attributes": {"bert.encoder.layer.0.attention.self.num_attention_heads": "x"}},
    "an attribute out of range": {"attributes": {"num_labels": float("inf")}},
}


@pytest.mark.parametrize("case", RECORDS)
def test_foreign_records_are_refused(case, folder):
    rewrite(folder, record=RECORDS[case])
    with pytest.raises(SensiLoadError):
        load_merged(folder)


CONFIGS = {
    "no record": {"peft_sensi": None},
    "a record that is a list": {"peft_sensi": [1]},
    "too many layers": {"num_hidden_layers": 10**9},
    "another number of layers": {"num_hidden_layers": 3},
    "a huge vocabulary": {"vocab_size": 10**12},
    "another model type": {"model_type": "gpt2"},
    "no number": {"hidden_size": "many"},
    "a size that does not divide": {"num_attention_heads": 5},
    "an unknown activation": {"hidden_act": "os.system"},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_foreign_configs_are_refused(case, folder):
    rewrite(folder, **CONFIGS[case])
    with pytest.raises(SensiLoadError):
        load_merged(folder)


def test_damaged_weights_are_refused(folder):
    rewrite(folder)
    path = weights_file(folder)
    whole, tensors = path.read_bytes(), load(path.read_bytes())
    name = "bert.encoder.layer.0.output.dense.weight"
    changes = {
        "lacks": {k: v for k, v in tensors.items() if k != name},
        "does not have": tensors | {"extra": torch.ones(1)},
        "has shape": tensors | {name: tensors[name][:, :-1].contiguous()},
        "NaN": tensors | {name: tensors[name] * float("nan")},
        "has dtype": tensors | {name: tensors[name].int()},
    }
    for message, changed in changes.items():
        save_file(changed, path)
        with pytest.raises(SensiLoadError, match=message):
            load_merged(folder)
    for broken in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(SensiLoadError, match="not a whole safetensors"):
            load_merged(folder)
    path.unlink()
    with pytest.raises(SensiLoadError, match="lacks"):
        load_merged(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(SensiLoadError, match="cannot be read"):
        load_merged(folder)
    with pytest.raises(SensiLoadError, match="There is no folder"):
        load_merged(folder / "nowhere")


def test_nothing_that_a_file_names_is_run(folder, tmp_path):
    expected = logits(load_merged(folder))
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n"
    for path in folder.glob("*.py"):
        path.write_text(trap)
    (folder / "evil.py").write_text(trap)
    rewrite(
        folder,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
        attn_implementation="someone/kernels",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        trust_remote_code=True,
        task_specific_params={"nested": {"auto_map": {"AutoConfig": "evil.Config"}}},
    )
    assert torch.equal(logits(load_merged(folder)), expected)
    assert not (tmp_path / "sprung").exists()


# -- nothing is lost --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """Makes the n-th change of a name in the folder the last one, before it happens."""

    def arm(n: int) -> list[str]:
        calls: list[str] = []

        def guarded(name: str):
            real = getattr(os, name)

            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) >= n:
                    raise Killed
                return real(*args, **kwargs)

            return call

        for name in ("replace", "link", "unlink"):
            monkeypatch.setattr(os, name, guarded(name))
        return calls

    yield arm


def test_the_modeling_file_can_be_left_out(tmp_path):
    model = wrap(tiny_model(), budget=0.5)
    assert not save_merged(model, tmp_path, modeling=False)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert load_merged(tmp_path).num_parameters() == model.merge_and_unload().num_parameters()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("trimmed", "plain"), ("plain", "trimmed")),
        *(pytest.param(kind, kind, marks=pytest.mark.slow) for kind in ("trimmed", "plain")),
    ],
)
def test_a_save_that_is_cut_off_leaves_the_old_model_or_the_new_one(old, new, tmp_path, kill_at, monkeypatch):
    models = {
        "trimmed": [trained("bert", budget=b).merge_and_unload() for b in (0.5, 0.7)],
        "plain": [tiny_model("bert", seed=s, intermediate_size=i) for s, i in ((1, 64), (2, 48))],
    }
    before, after = models[old][0], models[new][1]
    expected = [logits(before), logits(after)]
    n, seen, done = 1, set(), False
    while not done:
        folder = tmp_path / str(n)
        save_merged(before, folder)
        (folder / "vocab.txt").write_text("a")
        with monkeypatch.context():
            kill_at(n)
            try:
                save_merged(after, folder)
                done = True
            except Killed:
                pass
            finally:
                monkeypatch.undo()
        found = logits(load_merged(folder))
        index = next(i for i, e in enumerate(expected) if e.shape == found.shape and torch.equal(found, e))
        seen.add(index)
        assert index == 1 or not done
        if "peft_sensi" not in json.loads((folder / "config.json").read_text()):  # a plain checkpoint
            assert torch.equal(logits(BertForSequenceClassification.from_pretrained(folder)), found)
        save_merged(after, folder)
        assert torch.equal(logits(load_merged(folder)), expected[1])
        left = {p.name for p in folder.iterdir() if not p.name.startswith("modeling_")}
        assert left == {"config.json", weights_file(folder).name, "vocab.txt"}
        n += 1
    assert seen == {0, 1} and n > 5


def test_a_base_is_never_overwritten(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for widths in ("free", "uniform"):
        with pytest.raises(SensiError, match="another folder"):
            save_merged(trained(budget=0.5, widths=widths), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    own = tmp_path / "own"
    for budget in ({"trainable": 0.1}, {"trainable": 0.2}):  # its own checkpoint may be written again
        assert save_merged(trained(budget=budget), own)


@pytest.mark.parametrize("form", ["record", "plain"])
def test_a_merged_model_that_was_trained_on_is_not_overwritten(form, both_forms, tmp_path):
    """Its config has our fields, but another program has saved the weights: perhaps the base of the next adapter."""
    model = load_merged(both_forms[form])
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "model.safetensors" in before and b"peft_sensi" in before["config.json"]
    with pytest.raises(SensiError, match="another folder"):
        save_merged(load_merged(both_forms[form]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert save_merged(model, tmp_path) is (form == "plain")  # nothing is lost where the values are the same
    assert torch.equal(logits(load_merged(tmp_path)), logits(model))


@pytest.mark.parametrize("form", ["record", "plain"])
def test_an_adapter_beside_a_merged_model(form, both_forms, tmp_path):
    folder = shutil.copytree(both_forms[form], tmp_path / "merged")
    expected = logits(load_merged(folder))
    with pytest.raises(SensiError, match="holds a model"):  # of the command, before a long training
        check_out(folder)
    model = trained(budget={"trainable": 0.1})
    with pytest.warns(UserWarning, match="merged model"):
        model.save_pretrained(folder)
    assert torch.equal(logits(load_merged(folder)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), folder)), logits(model))
    with pytest.raises(SensiError, match="another folder"):
        save_merged(model, folder)


def test_a_model_that_lost_sublayers_can_be_wrapped_again(tmp_path):
    model = trained(budget=0.1, min_units=0)
    assert any(
        not (model.base_model.plan().of(group) != TRIMMED).any() for group in build_anatomy(tiny_model()).groups
    )
    save_merged(model, tmp_path)
    again = wrap(load_merged(tmp_path), budget=0.9, min_units=0, calibration=tiny_batches(2))
    train(again)
    assert torch.isfinite(logits(again.merge_and_unload())).all()


@pytest.mark.parametrize("saver", ["save_merged", "save_pretrained"])
def test_a_t5_without_any_neuron_can_be_loaded(saver, tmp_path):
    """T5 divides by its number of neurons when it initializes weights, also before it loads them."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = wrap(
        T5ForConditionalGeneration(config).eval(), budget=1e-4, score="magnitude", min_units=0, task_type=None
    )
    assert model.base_model.plan().kept_params == 0
    ids = torch.randint(3, 40, (2, 8))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        if saver == "save_merged":
            assert not save_merged(model, tmp_path), "not a plain checkpoint, because T5 could not build it"
        else:
            model.merge_and_unload().save_pretrained(tmp_path)
        found = load_merged(tmp_path).eval()(input_ids=ids, labels=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_published_names_of_a_trimmed_model_are_read(tmp_path):
    """ViT's own `save_pretrained` writes the names that its family was published under."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=12, patch_size=4, hidden_size=24, num_attention_heads=3, num_hidden_layers=2,
                       intermediate_size=40, num_labels=3)  # fmt: skip
    model = wrap(ViTForImageClassification(config).eval(), budget=0.5, score="random", task_type=None)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_same_tensors(snapshot(load_merged(tmp_path)), snapshot(merged))


@pytest.mark.parametrize("budget", [{"trainable": 0.2}, 0.5])
def test_names_that_only_one_class_was_published_under_are_read(budget, tmp_path):
    """GPT-NeoX calls its head `embed_out` in files. Transformers knows this by the class, not by the family."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
                           intermediate_size=64, max_position_embeddings=40)  # fmt: skip
    model = wrap(GPTNeoXForCausalLM(config).eval(), budget=budget, score="random", task_type="CAUSAL_LM")
    merged = model.merge_and_unload()
    save_merged(merged, tmp_path)
    assert_same_tensors(snapshot(load_merged(tmp_path)), snapshot(merged))


@pytest.mark.parametrize("budget", [{"trainable": 0.2}, 0.5])
def test_tensors_that_are_never_saved_are_computed(budget, tmp_path):
    """Marian's positions are sines, and `save_pretrained` leaves them out."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                          decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
                          eos_token_id=1, decoder_start_token_id=0, max_position_embeddings=40)  # fmt: skip
    model = wrap(MarianMTModel(config).eval(), budget=budget, score="random", task_type="SEQ_2_SEQ_LM")
    merged = model.merge_and_unload()
    save_merged(merged, tmp_path)
    assert_same_tensors(snapshot(load_merged(tmp_path)), snapshot(merged))


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": 5},
        {"architectures": {"a": 1}},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"num_labels": 10**6},
        {"num_hidden_layers": 10**6},
        {"encoder": {"num_hidden_layers": 10**6}},
        {"num_groups": [10**7]},
        {"max_position_embeddings": 10**12},
        {"peft_sensi": {"architecture": None}},
        {"peft_sensi": {"attributes": {"bert.encoder.layer.0.attention.self.num_attention_heads": 10**400}}},
    ],
)
def test_configs_that_ask_for_nonsense(change, tmp_path):
    save_merged(trained(budget=0.5), tmp_path)
    values = unhashed(tmp_path)
    if "peft_sensi" in change:
        change = {"peft_sensi": values["peft_sensi"] | change["peft_sensi"]}
    elif "architectures" in change:
        save_merged(trained(budget={"trainable": 0.1}), tmp_path / "plain")
        tmp_path = tmp_path / "plain"
        values = unhashed(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(SensiLoadError):
        load_merged(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 600 + "1" + "}" * 600])
def test_configs_that_are_nested_too_deeply(text, tmp_path):
    save_merged(trained(budget=0.5), tmp_path)
    values = unhashed(tmp_path)
    deep = text if text.startswith("[") else json.dumps(values)[:-1] + f', "deep": {text}}}'
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(SensiLoadError):
        load_merged(tmp_path)


# -- the hash ---------------------------------------------------------------------------------------------------------


EDITS = {
    "a constant of the norms": {"layer_norm_eps": 0.1},
    "a number of another type": {"layer_norm_eps": 0},
    "a decoder": {"is_decoder": True},
    "tied weights": {"tie_word_embeddings": False},
    "another activation": {"hidden_act": "relu"},
    "labels in another order": {"id2label": {"0": "LABEL_1", "1": "LABEL_0", "2": "LABEL_2"}},
    "a million layers": {"num_hidden_layers": 10**6},
    "a million labels": {"num_labels": 10**6},
    "a field that is gone": {"layer_norm_eps": None},
}


def edited(folder: Path, changes: dict) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


TENSORS = {
    "a tensor less": lambda t: {k: v for k, v in t.items() if k != "classifier.bias"},
    "another dtype": lambda t: t | {"classifier.bias": t["classifier.bias"].half()},
    "integers": lambda t: t | {"classifier.bias": t["classifier.bias"].int()},
    "a tensor more": lambda t: t | {"extra": torch.ones(1)},
}


@pytest.fixture(scope="module")
def both_forms(tmp_path_factory) -> dict[str, Path]:
    """A merged model with a record of its widths, and a plain checkpoint."""
    place = tmp_path_factory.mktemp("forms")
    for form, budget in (("record", 0.5), ("plain", {"trainable": 0.1})):
        assert save_merged(trained("bert", budget=budget, score="random"), place / form) is (form == "plain")
    return {form: place / form for form in ("record", "plain")}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("form", ["record", "plain"])
def test_an_edited_config_is_refused(form, edit, both_forms, remote, tmp_path):
    folder = shutil.copytree(both_forms[form], tmp_path / "folder")
    edited(folder, EDITS[edit])
    with pytest.raises(SensiLoadError, match=r"config\.json was changed"):
        load_merged(folder)
    if form == "record":
        with pytest.raises(ValueError, match=r"config\.json was changed"):
            remote(folder)


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("form", ["record", "plain"])
def test_changed_tensors_are_refused(form, change, both_forms, remote, tmp_path):
    folder = shutil.copytree(both_forms[form], tmp_path / "folder")
    save_file(
        TENSORS[change](load(weights_file(folder).read_bytes())), weights_file(folder), metadata={"format": "pt"}
    )
    with pytest.raises(SensiLoadError, match="tensors of the weights file were changed"):
        load_merged(folder)
    if form == "record":
        with pytest.raises(ValueError, match="tensors of the weights file were changed"):
            remote(folder)


def not_finite(path: Path) -> None:
    tensors = load(path.read_bytes())
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


# Changes of the weights file that a hash of its header does not show.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "NaN": not_finite,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "cut off in the header": lambda path: path.write_bytes(path.read_bytes()[:99]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(4)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_on_both_ways(damage, both_forms, remote, tmp_path):
    folder = shutil.copytree(both_forms["record"], tmp_path / "folder")
    DAMAGES[damage](weights_file(folder))
    with pytest.raises(SensiLoadError, match="NaN or infinity" if damage == "NaN" else "not a whole safetensors file"):
        load_merged(folder)
    with pytest.raises((OSError, ValueError), match="NaN or inf" if damage == "NaN" else "not a whole safetensors fi"):
        remote(folder)


def test_without_the_hash_a_lost_tensor_is_refused_by_the_modeling_file(both_forms, remote, tmp_path):
    folder = shutil.copytree(both_forms["record"], tmp_path / "folder")
    rewrite(folder)
    expected = logits(load_merged(both_forms["record"]))
    assert torch.equal(logits(load_merged(folder)), expected)
    assert torch.equal(logits(remote(folder)), expected)
    save_file(
        TENSORS["a tensor less"](load(weights_file(folder).read_bytes())),
        weights_file(folder),
        metadata={"format": "pt"},
    )
    with pytest.raises(OSError, match=r"lacks the tensor 'classifier\.bias'"):
        remote(folder)


def test_a_plain_checkpoint_can_be_saved_again_by_others(both_forms, tmp_path):
    stock = BertForSequenceClassification.from_pretrained(both_forms["plain"])
    stock.config.problem_type = "single_label_classification"
    stock.save_pretrained(tmp_path)
    assert torch.equal(logits(load_merged(tmp_path)), logits(stock))


def test_a_loaded_model_does_not_depend_on_its_file(both_forms, tmp_path):
    """Its tensors are in memory: to write over a file that is mapped would end the process."""
    for form, folder in both_forms.items():
        folder = shutil.copytree(folder, tmp_path / form)
        model = load_merged(folder)
        expected = logits(model)
        path = weights_file(folder)
        with path.open("r+b") as file:
            file.write(b"\0" * path.stat().st_size)
        assert torch.equal(logits(model), expected)


# -- models that the modeling file has loaded -------------------------------------------------------------------------


def test_a_model_of_the_modeling_file_can_be_saved_wrapped_and_trimmed(both_forms, remote, tmp_path):
    model = remote(both_forms["record"])
    cls, config = type(model), type(model.config)
    assert save_merged(model, tmp_path / "again") is False
    assert (type(model), type(model.config)) == (cls, config)
    for loader in (load_merged, remote):
        assert torch.equal(logits(loader(tmp_path / "again")), logits(model))
    assert type(load_merged(tmp_path / "again")) is BertForSequenceClassification
    adapted = wrap(model, budget=0.6)
    train(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "own")
    save_merged(merged, tmp_path / "ours")
    for loader in (load_merged, remote):
        for folder in ("own", "ours"):
            assert_same_tensors(snapshot(loader(tmp_path / folder)), snapshot(merged))


@pytest.mark.parametrize("task", ["SEQ_CLS", "MASKED_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("family", ["bert", *only_slow("distilbert")])
def test_the_base_model_of_a_folder_with_a_head(family, task, remote, tmp_path):
    """`AutoModel` takes the base model out of a checkpoint with a head. It is itself saved, loaded and wrapped."""
    task_type = None if task == "MASKED_LM" else task
    model = wrap(tiny_model(family, task), budget=0.5, score="random", task_type=task_type).merge_and_unload()
    save_merged(model, tmp_path / "merged")
    batch = tiny_batches(1, labels=False)[0]

    @torch.no_grad()
    def states(found):
        return found.eval()(**batch).last_hidden_state

    expected = states(model.base_model)
    inner = remote(tmp_path / "merged", "AutoModel")
    assert torch.equal(states(inner), expected)
    assert type(inner).__bases__[-1] is type(model.base_model)
    inner.save_pretrained(tmp_path / "own")
    save_merged(inner, tmp_path / "ours")
    for folder in ("own", "ours"):
        assert type(load_merged(tmp_path / folder)) is type(model.base_model)
        for again in (load_merged(tmp_path / folder), remote(tmp_path / folder, "AutoModel")):
            assert torch.equal(states(again), expected)
    if task == "SEQ_CLS":
        with pytest.raises(OSError, match="lacks the tensor"):
            remote(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert wrap(inner, budget=0.5, task_type="FEATURE_EXTRACTION").plan().trims


def test_a_loaded_model_knows_its_folder_and_generation_settings(both_forms, tmp_path):
    model = load_merged(both_forms["record"])
    assert model.name_or_path == model.config.name_or_path == str(both_forms["record"])
    assert wrap(model).peft_config["default"].base_model_name_or_path == str(both_forms["record"])
    decoder = trained_llama(budget=0.5).merge_and_unload()
    decoder.generation_config.update(eos_token_id=[2, 5], max_new_tokens=3)
    save_merged(decoder, tmp_path)
    again = load_merged(tmp_path).generation_config
    assert (again.eos_token_id, again.max_new_tokens) == ([2, 5], 3)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(SensiLoadError, match=r"generation_config\.json"):
        load_merged(tmp_path)


def test_sentence_transformers(tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    words = [f"w{i}" for i in range(59)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    tiny_model("bert", "FEATURE_EXTRACTION").save_pretrained(tmp_path / "base")

    def load(name: str, **options):
        return sentence_transformers.SentenceTransformer(str(tmp_path / name), device="cpu", **options)

    def vectors(model):
        return model.encode(["w1 w2 w3", "w4 w5 w6 w7 w8"], convert_to_tensor=True)

    model = load("base")
    name = next(n for n, child in model[0].named_children() if type(child).__name__ == "BertModel")
    merged = wrap(getattr(model[0], name), budget=0.5, task_type="FEATURE_EXTRACTION").merge_and_unload()
    setattr(model[0], name, merged)
    model.save(str(tmp_path / "merged"))
    save_merged(merged, tmp_path / "merged")
    again = load("merged", trust_remote_code=True)
    assert torch.equal(vectors(again), vectors(model))
    again.save(str(tmp_path / "saved"))
    assert torch.equal(vectors(load("saved", trust_remote_code=True)), vectors(model))
    with pytest.raises(OSError, match="no file named"):
        load("merged")

    adapted = load("base")
    adapted.add_adapter(SensiConfig(budget={"trainable": 0.1}, score="magnitude", task_type="FEATURE_EXTRACTION"))
    adapted.save(str(tmp_path / "adapter"))
    assert torch.equal(vectors(load("adapter")), vectors(adapted))


def test_a_folder_that_does_not_exist_and_one_without_a_model(tmp_path):
    with pytest.raises(SensiLoadError, match="There is no folder .*nothing. Check the path, or download"):
        load_merged(tmp_path / "nothing")
    with pytest.raises(SensiLoadError, match="holds no config.json: it is not a merged model"):
        load_merged(tmp_path)


@contextmanager
def full_disk():
    """No file can grow beyond 1,000 bytes, as on a disk without room. Not a fixture: pytest's own log must grow."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_nothing_stays_behind(tmp_path):
    model = wrap(tiny_model(), budget=0.5)
    (tmp_path / "old").mkdir()
    with full_disk():
        with pytest.raises(SensiError, match=r"merged could not be written .*Nothing was changed\."):
            save_merged(model, tmp_path / "new" / "merged")
        with pytest.raises(SensiError, match=r"old could not be written"):
            save_merged(model, tmp_path / "old")
    assert list(tmp_path.iterdir()) == [tmp_path / "old"] and not list((tmp_path / "old").iterdir())


def test_shards_of_a_plain_save_are_loaded(tmp_path):
    model = wrap(tiny_model(), budget=0.5).merge_and_unload()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same_tensors(snapshot(load_merged(tmp_path / "shards")), snapshot(model))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    for value in ("../model.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({**places, "weight_map": dict.fromkeys(places["weight_map"], value)}))
        with pytest.raises(SensiLoadError, match="weight_map"):
            load_merged(tmp_path / "shards")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    with pytest.raises(SensiLoadError, match="lacks the weights .* Rename 'model.fp16.safetensors'"):
        load_merged(tmp_path / "variant")


def test_the_base_inside_of_clips_projection_models_is_found(tmp_path):
    """Transformers does not know the name under which these classes hold it."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    clip = CLIPTextConfig(**sizes, vocab_size=64, bos_token_id=1, eos_token_id=2)
    merged = wrap(CLIPTextModelWithProjection(clip), budget=0.5, score="magnitude", task_type=None)
    save_merged(merged, tmp_path / "a")
    ids = torch.tensor([[1, 5, 6, 2]])
    with torch.no_grad():
        expected = load_merged(tmp_path / "a").text_model(ids).last_hidden_state
        found = AutoModel.from_pretrained(tmp_path / "a", trust_remote_code=True)
        assert torch.equal(found.eval()(ids).last_hidden_state, expected)
        found.save_pretrained(tmp_path / "b")
        again = AutoModel.from_pretrained(tmp_path / "b", trust_remote_code=True)
        assert torch.equal(again.eval()(ids).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["t5", *only_slow("mt5", "umt5")])
def test_auto_model_finds_a_base_whose_parts_are_those_of_the_whole(family, tmp_path):
    """T5 with a head has no submodule with the base model: its encoder and decoder are its own."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model(family, **sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert (
        save_merged(wrap(model, budget=0.45, score="random", multiple_of=1, seed=5, task_type=None), tmp_path) is False
    )
    merged, ids = load_merged(tmp_path).eval(), torch.randint(3, 40, (2, 8))
    expected = merged(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    found = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    found.save_pretrained(tmp_path / "again")
    for base in (found, AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()):
        assert type(base).__name__ == f"Sensi{type(model).__name__.replace('ForConditionalGeneration', 'Model')}"
        assert torch.equal(base(ids, decoder_input_ids=ids).last_hidden_state, expected.decoder_hidden_states[-1])
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(whole(ids, decoder_input_ids=ids).logits, expected.logits)


def test_numbers_that_json_lacks_are_read_in_the_form_of_transformers(tmp_path):
    """Mamba 2 has an infinite limit in its config."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "head_dim": 8}
    config = AutoConfig.for_model("mamba2", **sizes, num_heads=8, n_groups=1)
    assert math.inf in config.time_step_limit
    model = wrap(AutoModelForCausalLM.from_config(config), budget={"trainable": 0.05}, task_type=None)
    assert save_merged(model, tmp_path) is True
    again = load_merged(tmp_path)
    assert list(again.config.time_step_limit) == list(config.time_step_limit)
    assert_same_tensors(snapshot(again), snapshot(model.merge_and_unload()))


def test_positions_without_a_table_may_be_many_also_in_the_model_inside():
    """Models of images and texts have the config of their text model inside of theirs."""
    rotary = {"rope_parameters": {"rope_theta": 1e4}, "max_position_embeddings": 2**20}
    tensors = {"weight": torch.zeros(4, 150)}
    check_counts({"text_config": rotary}, tensors)
    for values in ({"max_position_embeddings": 2**20}, {"text_config": rotary, "max_position_embeddings": 2**20}):
        with pytest.raises(SensiLoadError, match="max_position_embeddings"):
            check_counts(values, tensors)
