"""Two adapters of different kinds on one base: each one is what it would be alone, or it is refused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny import BOTH, LABELS, TRIM, TUNE, VOCABULARY, logits, tiny_batches, tiny_model, train, trained, wrap
from transformers import AutoModelForSequenceClassification, DebertaV2Config, GPT2Config

from peft_sensi import SensiConfig, SensiError, SensiLoadError


ALL_LINEAR = {"update": "low_rank", "rank": 2, "target_modules": "all-linear"}
TENSORS = {"granularity": "tensor", "budget": {"trainable": 0.3}}
SUBLAYERS = {"granularity": "tensor", "budget": 1.0}


def config(**fields) -> SensiConfig:
    return SensiConfig(**{"score": "magnitude", "task_type": "SEQ_CLS", **fields})


def pair(first: dict, second: dict, make=tiny_model) -> PeftModel:
    model = wrap(make(), score="magnitude", **first)
    model.add_adapter("second", config(**second))
    return model


def make_deberta():
    """Its attention reshapes by the number of heads that the module has as an attribute."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    base = DebertaV2Config(vocab_size=VOCABULARY, num_labels=LABELS, relative_attention=True, pos_att_type=["c2p"],
                           initializer_range=0.2, **sizes)  # fmt: skip
    return with_config(base)


def make_gpt2():
    return with_config(GPT2Config(vocab_size=VOCABULARY, num_labels=LABELS, n_embd=32, n_head=4, n_layer=2,
                                  n_positions=32, pad_token_id=0))  # fmt: skip


def with_config(base):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(base).eval()


@pytest.mark.parametrize("make", [make_deberta, make_gpt2])
@pytest.mark.parametrize(
    "other", [TENSORS, SUBLAYERS, TUNE, ALL_LINEAR | {"exclude_modules": ["pooler.dense"]}], ids=str
)
@pytest.mark.parametrize("trims_first", [False, True])
def test_each_has_the_heads_that_it_keeps(make, other, trims_first):
    """The attributes of an attention module that count heads were set by the units of the first adapter."""
    plans = (TRIM, other) if trims_first else (other, TRIM)
    model = pair(*plans, make)
    for name, fields in zip(("default", "second"), plans, strict=True):
        model.set_adapter(name)
        alone = wrap(make(), score="magnitude", **fields)
        torch.testing.assert_close(logits(model), logits(alone))
    small = model.merge_and_unload()
    torch.testing.assert_close(logits(small), logits(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [TRIM, BOTH, {**TRIM, "modules_to_save": ["embeddings"]}], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["dense", "query"], r".*(dense|query)"], ids=str)
def test_targets_inside_modules_that_the_first_one_saves(first, targets, tmp_path):
    """Otherwise the second would change the first one's copy of the pooler, and no file could hold either."""
    model = pair(first, {**TRIM, "target_modules": targets})
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        train(model)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), folder)), expected[name])


TOKENS, EMBEDDINGS = {**TRIM, "also_train": ["tokens"]}, {**TRIM, "also_train": ["embeddings"]}
NO_PLACE = [
    (TRIM, ALL_LINEAR, "'bert.pooler.dense' is a module, or inside one"),
    (ALL_LINEAR, TRIM, "'bert.pooler' cannot be trained and saved whole"),
    (EMBEDDINGS, TOKENS, 'leave "tokens" out of `also_train`'),
    (TOKENS, EMBEDDINGS, "changes 'bert.embeddings.word_embeddings'"),
    ({**TRIM, "modules_to_save": ["embeddings"]}, TOKENS, "'bert.embeddings.word_embeddings'"),
]


@pytest.mark.parametrize(("first", "second", "message"), NO_PLACE)
def test_what_has_no_place_is_refused(first, second, message, tmp_path):
    model = wrap(tiny_model(), score="magnitude", **first)
    train(model)
    expected = logits(model)
    with pytest.raises(SensiError, match=message):
        model.add_adapter("second", config(**second))
    wrap(tiny_model(), score="magnitude", **second).save_pretrained(tmp_path)
    with pytest.raises(SensiLoadError):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]


def test_tokens_are_no_default_beside_embeddings_that_are_saved_whole():
    model = wrap(tiny_model(), score="magnitude", **TRIM, also_train=["embeddings"])
    fields = {"score": "fisher", "calibration": tiny_batches(2), "priming_steps": 0}
    model.add_adapter("second", config(**TRIM, **fields))
    assert "tokens" not in model.peft_config["second"].also_train
    assert "tokens" in wrap(tiny_model(), **TRIM, **fields).peft_config["default"].also_train


@pytest.mark.parametrize(
    "names", [["embeddings"], ["Norm"], ["word_embeddings", "embeddings"], ["dense.weight"]], ids=str
)
def test_names_that_fit_modules_inside_of_each_other(names, tmp_path):
    """PEFT would wrap `embeddings`, and the `word_embeddings` inside of it once more."""
    model = trained(**TRIM, modules_to_save=names)
    assert not any("modules_to_save" in n.split("modules_to_save", 1)[-1] for n, _ in model.named_modules())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


@pytest.mark.parametrize("first", [{"budget": {"trainable": 0.1}, "update": "dense"}, TRIM], ids=str)
def test_warnings_about_excluded_names(first, recwarn):
    """PEFT says that nothing was excluded if the units of the module may be trimmed, or if it is in a saved module."""
    model = wrap(tiny_model(), exclude_modules=["query"], score="magnitude", **first)
    assert not any("query" in target for target in model.plan().targets)
    model.add_adapter("second", config(**{**ALL_LINEAR, "exclude_modules": ["pooler.dense"]}))
    assert not [w for w in recwarn if "exclude" in str(w.message)]
    with pytest.warns(UserWarning, match="`exclude_modules` names 'quary', but no module"):
        wrap(tiny_model(), exclude_modules=["quary"], **TRIM)


def test_a_name_inside_the_task_head_means_the_head(tmp_path):
    """The head is saved whole anyway, and PEFT would wrap its `out_proj` once more."""
    model = trained("roberta", **TRIM, modules_to_save=["out_proj"])
    assert "out_proj" not in model.peft_config["default"].modules_to_save
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("roberta"), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "second", [{"budget": {"trainable": 0.05}}, {"budget": 0.5}, {"budget": 0.5, "also_train": []}]
)
def test_a_base_that_holds_the_adapter_already_is_refused(second, tmp_path):
    """As when a cell of a notebook is run again. The first adapter's layers would stay where the second has none."""
    base = tiny_model()
    first = wrap(base, budget=0.5)
    train(first)
    before = logits(first)
    first.save_pretrained(tmp_path)
    for again in (lambda: wrap(base, **second), lambda: PeftModel.from_pretrained(base, tmp_path)):
        with pytest.warns(UserWarning), pytest.raises(SensiError, match="unload.*on that model"):
            again()
    assert torch.equal(logits(first), before)
    first.unload()
    wrap(base, **second)


def test_values_are_not_loaded_into_a_merged_adapter(tmp_path):
    """Its head and norms would become the new ones at once, and its merged Linears would not."""
    model = trained(budget={"trainable": 0.1})
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(SensiError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")
