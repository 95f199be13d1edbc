"""Heads and transformers are found by the model's structure, whatever the user has called them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import assert_same_tensors, logits, snapshot, tiny_batches, tiny_config, tiny_model
from torch import nn
from transformers import AutoModel, BertPreTrainedModel, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_sensi import (
    BlockLayout,
    Schedule,
    SensiConfig,
    SensiError,
    build_anatomy,
    compute_scores,
    load_merged,
    save_merged,
)
from peft_sensi.anatomy.task_heads import task_head


class Own(nn.Module):
    """A user's module around a transformer, with a head of any name."""

    def __init__(self, family: str = "bert", head: str = "out", inside: str = "encoder") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            setattr(self, inside, AutoModel.from_config(tiny_config(family)))
            self.drop = nn.Dropout(0.0)
            setattr(self, head, self.make_head())
        self.names = inside, head

    def make_head(self) -> nn.Module:
        return nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        inside, head = (getattr(self, name) for name in self.names)
        hidden = inside(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        logits = self.decide(head, self.drop(hidden))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def decide(self, head, hidden):
        return head(hidden)


class Stacked(Own):
    def make_head(self):
        return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


class Listed(Own):
    """PEFT cannot save a list of modules whole, but its parts."""

    def make_head(self):
        return nn.ModuleList([nn.Linear(32, 3), nn.Linear(32, 3)])

    def decide(self, head, hidden):
        return head[0](hidden) + head[1](hidden)


class Deep(nn.Module):
    """A transformer below another module, which has a part of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.names = Own(head="project"), None

    def forward(self, **batch):
        return self.tower(**batch)


class Derived(BertPreTrainedModel):
    """A class of Transformers' kind that calls its transformer something else than `bert`."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config)
        self.answer = nn.Linear(32, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        logits = self.answer(self.backbone(input_ids, attention_mask).pooler_output)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Prefixed(BertPreTrainedModel):
    """Transformers' name for the transformer, a second transformer beside it, and two heads in a list."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert, self.other = AutoModel.from_config(config), AutoModel.from_config(config)
        self.heads = nn.ModuleList([nn.Linear(32, 3), nn.Linear(32, 3)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        parts = zip(self.heads, (self.bert, self.other), strict=True)
        logits = sum(head(part(input_ids, attention_mask).pooler_output) for head, part in parts)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Chain(nn.Sequential):
    """The parts have numbers, like the layers of the transformer."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(AutoModel.from_config(tiny_config("bert")), nn.Linear(32, 3))

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        logits = self[1](self[0](input_ids, attention_mask).pooler_output)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Pair(nn.Module):
    """Two transformers of different families, and a head over both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one = AutoModel.from_config(tiny_config("bert", num_hidden_layers=1))
            self.two = AutoModel.from_config(tiny_config("distilbert", num_hidden_layers=1))
            self.join = nn.Linear(64, 3)

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        hidden = [part(input_ids, attention_mask).last_hidden_state[:, 0] for part in (self.one, self.two)]
        logits = self.join(torch.cat(hidden, -1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


MODELS = {
    "query": (lambda: Own(head="query"), ["query"]),
    "chain": (Chain, ["1"]),
    "pair": (Pair, ["join"]),
    "out": (Own, ["out"]),
    "out on distilbert": (lambda: Own("distilbert"), ["out"]),
    "head": (lambda: Own(head="head", inside="transformer"), ["head"]),
    "stacked": (lambda: Stacked(head="ffn_out"), ["ffn_out"]),
    "listed": (lambda: Listed(head="heads"), ["heads.0", "heads.1"]),
    "deep": (Deep, ["tower.project"]),
    "derived": (lambda: Derived(tiny_config("bert")), ["answer"]),
    "prefixed": (lambda: Prefixed(tiny_config("bert", num_hidden_layers=1)), ["heads.0", "heads.1"]),
    "a classifier with a head of its own": (
        lambda: nn.ModuleDict({"inner": tiny_model(), "extra": nn.Linear(3, 3)}),
        ["inner.classifier", "extra"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_what_is_outside_the_transformer(name):
    make, expected = MODELS[name]
    model = make()
    assert task_head(model) == expected
    anatomy = build_anatomy(model)
    assert len([group for group in anatomy.groups if group.trimmable]) == 4 and anatomy.model_type
    head = tuple(f"{path}." for path in expected)
    assert anatomy.total_params == sum(p.numel() for n, p in model.named_parameters() if not n.startswith(head))


NATIVE = {"bert": ["classifier"], "roberta": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}


@pytest.mark.parametrize("family", NATIVE)
def test_heads_of_transformers_models_are_as_before(family):
    assert task_head(tiny_model(family)) == NATIVE[family]
    assert task_head(AutoModel.from_config(tiny_config(family))) == []
    assert task_head(tiny_model(family, "MASKED_LM")) == []


def test_a_problem_type_of_the_users_own_does_not_spoil_the_file(tmp_path):
    base = tiny_model()
    base.config.problem_type = "ordinal"  # for the user's own loss
    model = get_peft_model(base, SensiConfig(budget=0.5, score="magnitude", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    batch = tiny_batches(1, labels=False)[0]
    assert torch.equal(PeftModel.from_pretrained(tiny_model(), tmp_path)(**batch).logits, model(**batch).logits)


def test_a_model_of_speech_is_trained_and_saved(tmp_path):
    """Its head is called as the output layer of a language model, but it has no embeddings."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    layers = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=12, **sizes, **layers, **positions)).eval()

    model = get_peft_model(make(), SensiConfig(budget={"trainable": 0.1}, score="magnitude"))
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    sound = {"input_values": torch.randn(2, 400), "labels": torch.tensor([[1, 2], [3, 4]])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**sound).loss.backward()
    optimizer.step()
    expected = model(**sound).logits
    assert not torch.equal(expected, make()(**sound).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(**sound).logits, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "own" not in name])
def test_such_models_are_trained_saved_and_loaded(name, tmp_path):
    make, expected = MODELS[name]
    torch.manual_seed(0)
    base = make()
    batches = tiny_batches(3)
    config = SensiConfig(budget=0.5, calibration=batches, priming_steps=2, calibration_steps=2)
    start = snapshot(base)
    model = get_peft_model(base, config)
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "modules_to_save" in n.split(".")]
    assert not plain  # a head called `out` does not bring in everything whose name ends like this
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for path in expected:
        assert any(name.startswith(f"base_model.model.{path}.modules_to_save.default.") for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    batch = tiny_batches(1, seed=9)[0]
    outputs = model(**batch).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, outputs)
    torch.testing.assert_close(again.merge_and_unload()(**batch).logits, outputs, atol=1e-5, rtol=1e-4)
    assert_same_tensors(snapshot(model.unload()), start)


def twins():
    """A user's model that holds one transformer under two names."""
    model = Own()
    model.other = model.encoder
    return model


def shared_layer():
    model = tiny_model()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    return model


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("make", [twins, shared_layer])
def test_a_part_with_two_names_comes_back(make, tmp_path):
    model = get_peft_model(make(), SensiConfig(budget=0.5, score="magnitude"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1 if p.requires_grad else 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(again), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query"),
        ("classifier", "extra"),
    ],
)
def test_a_module_in_two_places_is_refused_before_anything_is_touched(one, two):
    """PEFT would replace it in one of them, and the other would stay as it is without a word."""
    base = tiny_model()
    base.set_submodule(two, base.get_submodule(one))
    before = [*base.named_modules()], snapshot(base)
    with pytest.raises(SensiError, match="several places"):
        get_peft_model(base, SensiConfig(budget=0.5, score="magnitude"))
    assert [*base.named_modules()] == before[0]
    assert_same_tensors(snapshot(base), before[1])


def test_heads_that_share_a_weight_are_reported():
    base = Listed(head="heads")
    base.heads[1].weight = base.heads[0].weight
    with pytest.warns(UserWarning, match="'heads.0.weight' and 'heads.1.weight' are one parameter"):
        get_peft_model(base, SensiConfig(budget=0.5, score="magnitude"))


def test_a_parameter_that_stays_frozen_is_reported():
    model = Own()
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="'scale' is outside of the transformer and stays frozen"):
        get_peft_model(model, SensiConfig(budget=0.5, score="random"))


@pytest.mark.parametrize("make", [tiny_model, lambda: Prefixed(tiny_config("bert", num_hidden_layers=1))])
def test_a_parameter_of_a_transformers_model_that_stays_frozen_is_reported(make):
    model = make()
    model.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])
    with pytest.warns(UserWarning, match="'scales.0' is outside of the transformer and stays frozen"):
        get_peft_model(model, SensiConfig(budget=0.5, score="random", task_type="SEQ_CLS"))


def test_a_model_of_own_blocks_says_what_stays_frozen():
    """Without a transformer inside, nothing tells a new head from other parts."""
    layout = BlockLayout(layer="layers.*", up="wide", down="narrow")

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            parts = {"wide": nn.Linear(8, 16), "narrow": nn.Linear(16, 8)}
            self.layers, self.decide = nn.ModuleList([nn.ModuleDict(parts)]), nn.Linear(8, 2)

        def forward(self, x):
            return self.decide(self.layers[0]["narrow"](self.layers[0]["wide"](x).relu()))

    options = {"budget": 0.5, "blocks": [layout], "score": "random"}
    with pytest.warns(UserWarning, match="stay frozen, such as 'decide'"):
        get_peft_model(Blocks(), SensiConfig(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Blocks(), SensiConfig(**options, modules_to_save=["decide"]))
    assert model.base_model.model.decide.modules_to_save["default"].weight.requires_grad


def test_scores_of_a_users_own_model_hold_its_head():
    scores = compute_scores(Own(), tiny_batches(2), priming_steps=1, progress=False)
    assert set(scores.head) == {"out.weight", "out.bias"}


# -- models inside of other wrappers ----------------------------------------------------------------------------------


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}
OPTIONS = {"budget": 0.5, "score": "random", "task_type": "SEQ_CLS"}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_model_in_a_wrapper_is_adapted_like_the_model_itself(name, tmp_path):
    plain = get_peft_model(tiny_model(), SensiConfig(**OPTIONS))
    base = tiny_model()
    base.name_or_path = "somewhere"
    with pytest.warns(UserWarning, match="put into the model inside"):
        model = get_peft_model(WRAPPERS[name](base), SensiConfig(**OPTIONS))
    assert model.base_model.model is base and model.peft_config["default"].base_model_name_or_path == "somewhere"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }
    model.save_pretrained(tmp_path)
    outputs = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), outputs)
    with pytest.warns(UserWarning, match="put into the model inside"):
        again = PeftModel.from_pretrained(WRAPPERS[name](tiny_model()), tmp_path)
    assert torch.equal(logits(again), outputs)


@pytest.mark.parametrize("name", WRAPPERS)
def test_other_entrances_look_into_wrappers(name, tmp_path):
    wrapper = WRAPPERS[name](tiny_model())
    anatomy = build_anatomy(tiny_model())
    assert build_anatomy(wrapper) == anatomy
    scores = compute_scores(wrapper, score="random")
    assert scores.values.keys() == compute_scores(tiny_model(), score="random").values.keys()
    model = get_peft_model(tiny_model(), SensiConfig(**OPTIONS))
    save_merged(WRAPPERS[name](model), tmp_path)
    torch.testing.assert_close(logits(load_merged(tmp_path)), logits(model), atol=1e-5, rtol=1e-5)


def test_a_part_that_was_compiled_on_its_own_is_refused():
    model = tiny_model()
    model.bert.encoder = torch.compile(model.bert.encoder, backend="eager")
    with pytest.raises(SensiError, match=r"'bert.encoder' was compiled.*`model.bert.encoder.compile\(\)`"):
        get_peft_model(model, SensiConfig(**OPTIONS))
    model = tiny_model()
    model.bert.encoder.compile(backend="eager")
    get_peft_model(model, SensiConfig(**OPTIONS))


# -- calls that are easily mistaken -----------------------------------------------------------------------------------


def test_a_schedule_is_stepped_with_the_optimizer():
    config = SensiConfig(**OPTIONS | {"budget": 1.0}, schedule={"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2})
    schedule = Schedule(get_peft_model(tiny_model(), copy.deepcopy(config)), 10)
    with pytest.raises(SensiError, match="done_steps"):
        schedule.step(3)


def test_adapters_cannot_be_averaged_into_a_new_one():
    model = get_peft_model(tiny_model(), SensiConfig(**OPTIONS))
    with pytest.raises(SensiError, match="saves modules whole.*set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "mixed")


def test_the_status_names_the_method():
    model = get_peft_model(tiny_model(), SensiConfig(**OPTIONS))
    assert model.get_model_status().peft_types == {"default": "SENSI"}
