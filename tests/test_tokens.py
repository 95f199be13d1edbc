"""Tokens as units: which rows of the input embeddings are trained, and what the adapter does with them."""

from __future__ import annotations

import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_undo import state
from tiny import (
    VOCABULARY,
    assert_same_tensors,
    clone,
    logits,
    only_slow,
    snapshot,
    tiny_batches,
    tiny_model,
    train,
)
from torch import nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config, DebertaV2ForMaskedLM

from peft_sensi import (
    SensiConfig,
    SensiError,
    SensiLoadError,
    build_anatomy,
    compute_scores,
    load_merged,
    save_merged,
)
from peft_sensi.anatomy.modules import input_embedding
from peft_sensi.layers.embedding import SensiEmbedding
from peft_sensi.layers.layer import SensiLayer
from peft_sensi.scoring.gates import gate_gradients
from peft_sensi.scoring.gates_reference import gate_gradients_reference
from peft_sensi.utils.states import TUNED


TABLES = {
    "bert": "bert.embeddings.word_embeddings",
    "roberta": "roberta.embeddings.word_embeddings",
    "electra": "electra.embeddings.word_embeddings",
    "distilbert": "distilbert.embeddings.word_embeddings",
}


def few_tokens(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches with few different tokens, so that most of the vocabulary is never seen."""
    batches = tiny_batches(count)
    return [{**b, "input_ids": torch.where(b["input_ids"] > 0, b["input_ids"] % 15 + 2, 0)} for b in batches]


def seen(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return sorted({int(i) for b in batches for i in b["input_ids"][b["attention_mask"].bool()]})


def wrapped(base: nn.Module, **fields) -> PeftModel:
    fields = {"budget": 0.5, "calibration": few_tokens(), "task_type": "SEQ_CLS", "priming_steps": 2, **fields}
    return get_peft_model(base, SensiConfig(**fields))


def table_of(model: PeftModel, family: str = "bert") -> nn.Module:
    return model.base_model.model.get_submodule(TABLES[family])


def tuned_tokens(model: PeftModel, family: str = "bert") -> list[int]:
    plan = model.base_model.plan()
    return (plan.of(plan.anatomy.by_name[f"{TABLES[family]}.tokens"]) == TUNED).nonzero()[0].tolist()


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("score", ["fisher", "taylor", "mask", *only_slow("random", "magnitude")])
def test_the_tokens_of_the_calibration_data_are_trained(family, score):
    base = tiny_model(family)
    before = base.get_input_embeddings().weight.detach().clone()
    batches = few_tokens()
    model = wrapped(base, calibration=batches, score=score)
    assert tuned_tokens(model, family) == seen(batches)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and TABLES[family] in n]
    assert trained == [f"base_model.model.{TABLES[family]}.sensi_weight.default"]
    plan = model.base_model.plan()
    own = [n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n and "pre_cl" not in n]
    assert plan.trainable_params == sum(model.get_parameter(name).numel() for name in own)
    train(model, batches)
    merged = model.merge_and_unload().get_input_embeddings()
    assert type(merged) is nn.Embedding
    moved = (merged.weight != before).any(1).nonzero()[:, 0].tolist()
    assert set(moved) <= set(seen(batches)) and len(moved) > len(seen(batches)) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_pass_is_that_of_the_whole_table(dtype):
    model = wrapped(tiny_model(dtype=dtype))
    layer = table_of(model)
    assert isinstance(layer, SensiEmbedding)
    with torch.no_grad():
        layer.sensi_weight["default"].normal_()
    ids = torch.randint(0, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(0))
    table = layer.get_adapted_weight("default")[0].to(dtype)
    y = layer(ids)
    assert y.dtype == dtype and torch.equal(y, table[ids])
    weights = torch.randn(y.shape, dtype=dtype)
    (y * weights).sum().backward()
    (expected,) = torch.autograd.grad(
        (layer.get_adapted_weight("default")[0][ids] * weights).sum(), layer.sensi_weight["default"]
    )
    torch.testing.assert_close(layer.sensi_weight["default"].grad, expected, atol=1e-2, rtol=1e-2)
    assert layer.base_layer.weight.grad is None
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), y)


def test_a_model_that_multiplies_with_the_table_uses_the_trained_rows():
    """The newer output layer of DeBERTa takes the table itself and does not call the embedding."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    base = DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=VOCABULARY, legacy=False, **sizes)).eval()
    if base._tied_weights_keys:
        pytest.skip("this version of Transformers names a weight that the output layer does not have")
    batches = [{**batch, "labels": batch["input_ids"]} for batch in few_tokens()]
    model = wrapped(base, calibration=batches, task_type=None)
    layer = model.base_model.model.deberta.embeddings.word_embeddings
    model(**batches[0]).loss.backward()
    assert layer.sensi_weight["default"].grad.any(1).all()
    train(model, batches)
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


def test_fast_gradients_equal_the_reference(family):
    model = tiny_model(family)
    if family not in TABLES:
        pytest.skip("no table in the list")
    anatomy = build_anatomy(model, [TABLES[family]])
    batch = few_tokens(1)[0]
    fast, slow = gate_gradients(model, anatomy, batch), gate_gradients_reference(model, anatomy, batch)
    name = f"{TABLES[family]}.tokens"
    assert slow[name].abs().max() > 1e-4
    torch.testing.assert_close(fast[name], slow[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["plan", "dict"])
def test_the_plan_of_another_model_brings_its_tokens(form, tmp_path):
    """Without `calibration`, which a finished plan does not take, nothing else says which tokens are trained."""
    plan = wrapped(tiny_model()).plan()
    given = plan if form == "plan" else plan.to_dict()
    model = get_peft_model(tiny_model(), SensiConfig(plan=given, task_type="SEQ_CLS"))
    assert model.plan() == plan
    rows = model.get_input_embeddings().sensi_weight["default"]
    assert rows.requires_grad and len(rows) == len(seen(few_tokens()))
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_rows_of_a_base_that_was_unfrozen_are_not_trained():
    """They would be trained, and the adapter's file would not have them."""
    model = wrapped(tiny_model())
    embeddings = model.get_input_embeddings()
    with pytest.warns(UserWarning, match="Weights of the base require gradients"):
        embeddings.base_layer.weight.requires_grad_(True)
        model.train()(**tiny_batches(1)[0]).loss.backward()
    assert embeddings.base_layer.weight.grad is None and embeddings.sensi_weight["default"].grad.any()


def test_files_merging_and_switching_are_exact(tmp_path):
    base = tiny_model()
    before, batch = snapshot(base), tiny_batches(1, seed=3)[0]
    model = wrapped(base)
    train(model, few_tokens())
    logits = model(**batch).logits
    with model.disable_adapter():
        looked_up = table_of(model)(batch["input_ids"])
    assert torch.equal(looked_up, before[f"{TABLES['bert']}.weight"][batch["input_ids"]])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)
    again.merge_adapter()
    torch.testing.assert_close(again(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    again.unmerge_adapter()
    assert torch.equal(again(**batch).logits, logits)
    for kind, error in (("bfloat16", 1e-2), ("int8", 5e-2)):
        small = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        small.base_model.compress(kind)
        torch.testing.assert_close(small(**batch).logits, logits, atol=error * float(logits.abs().max()), rtol=error)
    assert_same_tensors(snapshot(model.unload()), before)


def test_without_its_base(tmp_path):
    batch, batches = tiny_batches(1, seed=3)[0], few_tokens()
    one, other = (wrapped(tiny_model(), keep_base=keep, seed=1) for keep in (True, False))
    train(one, batches)
    train(other, batches)
    torch.testing.assert_close(other(**batch).logits, one(**batch).logits, atol=1e-5, rtol=1e-5)


def test_two_adapters_add_up_what_they_changed():
    model = wrapped(tiny_model(), budget=1.0)
    model.add_adapter(
        "other", SensiConfig(budget=1.0, calibration=tiny_batches(), task_type="SEQ_CLS", priming_steps=0)
    )
    layer, base = table_of(model), tiny_model().get_input_embeddings().weight
    with torch.no_grad():
        for name in ("default", "other"):
            layer.sensi_weight[name].add_(1.0)
    ids = torch.arange(VOCABULARY)[None]
    changes = []
    for names in ("default", "other"):
        model.set_adapter(names)
        changes.append(layer(ids)[0] - base)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(ids)[0], base + changes[0] + changes[1])


def test_under_a_limit_the_most_sensitive_tokens_are_trained():
    base, limit = tiny_model(), 3000
    scores = compute_scores(base, few_tokens(), priming_steps=2, progress=False)
    config = SensiConfig(budget={"trainable": limit}, also_train=["tokens"], scores=scores, task_type="SEQ_CLS")
    plan = get_peft_model(base, config).base_model.plan()
    values = scores.values[f"{TABLES['bert']}.tokens"]
    states = torch.from_numpy(plan.of(plan.anatomy.by_name[f"{TABLES['bert']}.tokens"]).copy()) == TUNED
    assert 0 < int(states.sum()) < len(seen(few_tokens())) and plan.trainable_params <= limit
    assert values[states].min() >= values[~states].max()


def test_a_large_limit_does_not_reach_tokens_that_were_never_seen():
    model = wrapped(tiny_model(), budget={"trainable": 0.95}, also_train=["tokens"])
    assert tuned_tokens(model) == seen(few_tokens())


def test_when_there_are_no_tokens_to_choose():
    for fields in (
        {"calibration": None, "score": "magnitude"},  # nobody says which
        {"budget": {"trainable": 0.1}},  # a limit is for the units of the blocks
        {"also_train": ["norms"], "refit": False},
        {"modules_to_save": ["word_embeddings"]},
        {"modules_to_save": ["embeddings"]},
        {"score": "movement"},
        {"granularity": "tensor"},
        {"update": "low_rank", "rank": 2},
    ):
        model = wrapped(tiny_model(), **fields)
        assert not any(isinstance(m, SensiEmbedding) for m in model.modules()), fields
    excluded = wrapped(tiny_model(), exclude_modules=["word_embeddings"])
    assert not any(isinstance(m, SensiEmbedding) for m in excluded.modules())
    named = wrapped(tiny_model(), target_modules=["query", "word_embeddings"], calibration=None, score="magnitude")
    assert tuned_tokens(named) == list(range(1, VOCABULARY)), "no data says more, and padding is zero"


def test_one_scoring_serves_tokens_too():
    base, batches = tiny_model(), few_tokens()
    scores = compute_scores(base, batches, priming_steps=2, calibration_steps=3, progress=False)
    model = wrapped(base, scores=scores, calibration=None)
    assert tuned_tokens(model) == seen(batches)
    blocks = {name: value for name, value in scores.values.items() if not name.endswith(".tokens")}
    old = type(scores)(blocks, scores.method, scores.sequence_length)
    assert not any(
        isinstance(m, SensiEmbedding) for m in wrapped(tiny_model(), scores=old, calibration=None).modules()
    )


def test_embeddings_that_are_shared_stay_as_they_are():
    model = tiny_model(task="MASKED_LM")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert input_embedding(model) is None
    batches = tiny_batches(task="MASKED_LM")
    fields = {"budget": 0.5, "calibration": batches, "priming_steps": 0}
    assert not any(isinstance(m, SensiEmbedding) for m in get_peft_model(model, SensiConfig(**fields)).modules())
    with pytest.raises(SensiError, match="no other module shares"):
        get_peft_model(tiny_model(task="MASKED_LM"), SensiConfig(also_train=["tokens"], **fields))
    with pytest.raises(SensiError, match="is tied to the embeddings"):
        get_peft_model(tiny_model(task="MASKED_LM"), SensiConfig(target_modules=["word_embeddings"], **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"also_train": ["tokens", "embeddings"]}, "some rows of the embeddings, and 'embeddings', all"),
        ({"also_train": ["tokens"], "update": "low_rank", "rank": 2}, "units of a dense update"),
        ({"also_train": ["tokens"], "granularity": "tensor"}, "units of a dense update"),
        ({"also_train": ["tokens"], "score": "movement"}, "leaves embeddings alone"),
        ({"target_modules": ["word_embeddings", "query"], "update": "low_rank", "rank": 2}, "cannot reach them"),
    ],
)
def test_what_cannot_be_combined(fields, message):
    with pytest.raises(SensiError, match=message):
        wrapped(tiny_model(), **fields)


def test_cuts_during_training_keep_the_tokens():
    from peft_sensi import Schedule

    schedule = {"phase": "cut", "start": 0.0, "end": 0.5, "cuts": 2}
    batches = few_tokens()
    model = wrapped(tiny_model(), schedule=schedule)
    phases = Schedule(model, 6, calibration=batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(6):
        phases.step(optimizer)
        model(**batches[step % 3]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = table_of(model).sensi_weight["default"].detach().clone()
    phases.finish()
    assert tuned_tokens(model) == seen(batches) and model.base_model.plan().trims
    assert torch.equal(table_of(model).sensi_weight["default"], before)


@pytest.mark.parametrize("size", [VOCABULARY + 1, VOCABULARY + 64, VOCABULARY - 1, 50])
@pytest.mark.parametrize("transformers", [False, True], ids=["peft", "transformers"])
def test_a_base_with_another_number_of_tokens(size, transformers, tmp_path):
    """Some tools resize the embeddings to the tokenizer before they load an adapter. Tokens are known by number."""
    model = wrapped(tiny_model())
    train(model)
    model.save_pretrained(tmp_path)
    base = tiny_model()
    base.resize_token_embeddings(size, mean_resizing=False)
    if transformers:
        base.load_adapter(str(tmp_path))
        loaded = base
    else:
        loaded = PeftModel.from_pretrained(base, tmp_path)
    batch = {k: v for k, v in few_tokens(1)[0].items() if k != "labels"}
    expected = model.eval()(**batch).logits
    assert torch.equal(loaded.eval()(**batch).logits, expected)
    if not transformers:
        assert tuned_tokens(loaded) == tuned_tokens(model)
        loaded.save_pretrained(tmp_path / "again")
        again = tiny_model()
        again.resize_token_embeddings(size, mean_resizing=False)
        assert torch.equal(PeftModel.from_pretrained(again, tmp_path / "again").eval()(**batch).logits, expected)


def test_a_base_without_a_trained_token_is_refused(tmp_path):
    wrapped(tiny_model()).save_pretrained(tmp_path)
    base = tiny_model()
    base.resize_token_embeddings(10)
    with pytest.raises(SensiLoadError, match="token"):
        PeftModel.from_pretrained(base, tmp_path)


def test_another_base_with_another_number_of_tokens_is_refused(tmp_path):
    wrapped(tiny_model()).save_pretrained(tmp_path)
    base = tiny_model(seed=1)
    base.resize_token_embeddings(VOCABULARY + 1)
    with pytest.raises(SensiLoadError, match="another base model"):
        PeftModel.from_pretrained(base, tmp_path)


# -- another number of tokens after the wrap -------------------------------------------------------------------------


KNOWN = {k: v for k, v in few_tokens(1)[0].items() if k != "labels"}  # tokens that are there in every size


def untied(task: str = "MASKED_LM") -> nn.Module:
    return tiny_model(task=task, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("size", "how", "fields"),
    [
        (VOCABULARY + 8, "PeftModel", {}),
        (VOCABULARY - 4, "the model inside", {}),
        (None, "add_adapter", {}),
        (VOCABULARY - 4, "PeftModel", {"also_train": ["norms", "embeddings"]}),
    ],
)
def test_embeddings_with_trained_rows_cannot_be_resized(size, how, fields):
    if how == "add_adapter":
        model = inner = tiny_model()
        inner.add_adapter(SensiConfig(budget=0.5, calibration=few_tokens(), priming_steps=0, **fields))
    else:
        model = wrapped(tiny_model(), **fields)
        inner = model.base_model.model
        model = model if how == "PeftModel" else inner
    train(model)
    before, expected = state(inner), logits(model, KNOWN)
    pad = {"pad_to_multiple_of": 48} if size is None else {}
    with pytest.raises(SensiError, match="Resize the base model first"):
        model.resize_token_embeddings(size, mean_resizing=False, **pad)
    assert state(inner) == before and torch.equal(logits(model, KNOWN), expected)


def test_a_trained_output_layer_cannot_be_resized_either():
    fields = {
        "calibration": tiny_batches(task="MASKED_LM"),
        "priming_steps": 0,
        "exclude_modules": ["word_embeddings"],
    }
    model = get_peft_model(untied(), SensiConfig(budget=0.5, target_modules=["query", "dense", "decoder"], **fields))
    assert isinstance(model.get_output_embeddings(), SensiLayer) and type(model.get_input_embeddings()) is nn.Embedding
    with pytest.raises(SensiError, match="Resize the base model first"):
        model.resize_token_embeddings(VOCABULARY + 8)
    assert len(model.get_input_embeddings().weight) == VOCABULARY, "Transformers would have changed it already"


def test_resizing_to_the_same_number_of_tokens_changes_nothing():
    model = wrapped(tiny_model())
    for arguments in ((), (VOCABULARY,), (VOCABULARY - 3, 8), (None, 8)):
        assert model.resize_token_embeddings(*arguments) is table_of(model)


@pytest.mark.parametrize(
    ("size", "mean_resizing"), [(VOCABULARY + 8, False), (VOCABULARY + 8, True), (VOCABULARY - 4, True)]
)
@pytest.mark.parametrize(
    "make", [tiny_model, lambda: tiny_model(task="MASKED_LM"), untied], ids=["cls", "tied", "untied"]
)
def test_embeddings_that_no_adapter_trains_are_resized(size, mean_resizing, make, tmp_path):
    base = make()
    task = "SEQ_CLS" if base.get_output_embeddings() is None else "MASKED_LM"
    config = SensiConfig(
        budget=0.5, calibration=tiny_batches(task=task), priming_steps=0, exclude_modules=["word_embeddings"]
    )
    model = get_peft_model(base, config)
    before, width = logits(model, KNOWN), None if task == "SEQ_CLS" else min(size, VOCABULARY)
    model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    outputs = logits(model, KNOWN)
    torch.testing.assert_close(outputs[..., :width], before[..., :width])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = make()
    base.resize_token_embeddings(size, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), KNOWN)[..., :width], outputs[..., :width])


@pytest.mark.parametrize("how", ["auto", True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"also_train": ["embeddings"]}, {"modules_to_save": ["word_embeddings"]}, {"keep_base": False}],
    ids=str,
)
def test_resized_embeddings_that_the_adapter_trains_are_saved_with_it(fields, how, tmp_path):
    """PEFT adds all entries of embeddings to the file if the vocabulary was resized."""
    tiny_model().save_pretrained(tmp_path / "base")

    def resized(seed: int) -> nn.Module:  # new tokens start from other values each time
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
        return base

    batch = {"input_ids": torch.tensor([[5, VOCABULARY + 5, 7, VOCABULARY]])}
    batches = [{**batch, "labels": torch.tensor([1])}]
    model = wrapped(resized(0), calibration=batches, **fields)
    train(model, batches)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=how)
    again = PeftModel.from_pretrained(resized(1), tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(model, batch))
    if "keep_base" not in fields:
        with model.disable_adapter(), again.disable_adapter():
            assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("size", [VOCABULARY + 8, VOCABULARY - 4])
@pytest.mark.parametrize("make", [tiny_model, untied], ids=["cls", "untied"])
def test_a_merged_model_is_resized_saved_and_wrapped_again(size, make, tmp_path):
    base = make()
    batches = few_tokens() if base.get_output_embeddings() is None else tiny_batches(task="MASKED_LM")
    fields = {"budget": 0.5, "calibration": batches, "priming_steps": 0}
    model = get_peft_model(base, SensiConfig(**fields)).merge_and_unload()
    model.resize_token_embeddings(size)
    save_merged(model, tmp_path)
    again = load_merged(tmp_path)
    assert torch.equal(logits(again, KNOWN), logits(model, KNOWN))
    if size > VOCABULARY:
        assert get_peft_model(again, SensiConfig(**fields)).base_model.plan().trims


def test_a_field_of_lora_that_trl_asks_for():
    """TRL reads and sets it if `chat_template_path` adds tokens. `hasattr`, as PEFT uses it, must say no."""
    config = SensiConfig(budget=0.5)
    for each in (config, clone(config), pickle.loads(pickle.dumps(config))):
        with pytest.raises(SensiError, match="before the wrap"):
            assert each.trainable_token_indices is None
        assert not hasattr(each, "trainable_token_indices") and getattr(each, "trainable_token_indices", 1) == 1
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            assert each.other


def test_the_tokens_of_several_tables_are_added_up():
    names = ["query", "value", "output.dense", "intermediate.dense", "word_embeddings", "position_embeddings"]
    plan = wrapped(tiny_model(), budget=1.0, target_modules=names).base_model.plan()
    groups = [group for group in plan.anatomy.groups if group.kind == "token"]
    tuned = sum(int((plan.of(group) == TUNED).sum()) for group in groups)
    assert len(groups) == 2 and plan.facts(str)["tokens trained"] == f"{tuned:,} of {sum(g.size for g in groups):,}"
