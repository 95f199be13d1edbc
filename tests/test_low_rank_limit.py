"""A `trainable` limit that decides a rank: when it does, how large the rank is, and the scale of low-rank terms."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import tiny_batches, tiny_model, wrap

from peft_sensi import BudgetError, SensiConfig, SensiError, SensiLoadError, compute_scores
from peft_sensi.layers.layer import layers_of


def trained(model: torch.nn.Module) -> int:
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.requires_grad and "classifier" not in n and "modules_to_save" not in n)


def wrapped(base: torch.nn.Module, **fields):
    return get_peft_model(base, SensiConfig(task_type="SEQ_CLS", **fields))


@pytest.fixture
def large():
    """Wide enough that a rank fits into two percent."""
    return tiny_model("bert", hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=6000)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize(
    "budget", [{"trainable": 0.05}, {"trainable": 4321}, {"trainable": 0.1, "params": 0.5}], ids=str
)
def test_the_rank_is_the_largest_that_fits(family, budget):
    model = wrapped(tiny_model(family), budget=budget, update="low_rank", calibration=tiny_batches())
    config, plan = model.peft_config["default"], model.base_model.plan()
    limit = budget["trainable"] if budget["trainable"] > 1 else int(budget["trainable"] * plan.anatomy.total_params)
    assert config.rank >= 1 and trained(model) == plan.trainable_params
    assert plan.trainable_params <= limit < plan.trainable_params * (config.rank + 1) // config.rank
    assert plan.params_share <= budget.get("params", 1)
    assert not any((plan.of(group) == 2).any() for group in plan.anatomy.groups)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_limit_alone_means_low_rank_up_to_half_of_the_weights(family):
    base = tiny_model(family)
    model = wrapped(copy.deepcopy(base), budget={"trainable": 0.1}, calibration=tiny_batches())
    plan = model.base_model.plan()
    weights = sum(model.base_model.model.get_submodule(name).base_layer.weight.numel() for name in plan.targets)
    assert model.peft_config["default"].update == "low_rank"
    assert not any((plan.of(group) == 2).any() for group in plan.anatomy.groups)
    for limit, update in ((weights // 2, "low_rank"), (weights // 2 + 1, "dense")):
        assert wrapped(copy.deepcopy(base), budget={"trainable": limit}).peft_config["default"].update == update
    both = wrapped(base, budget={"trainable": 0.1, "params": 0.5}, calibration=tiny_batches(), priming_steps=1)
    assert both.peft_config["default"].update == "dense"


def test_a_small_limit_means_low_rank_by_default_and_a_larger_one_units(large):
    small = wrapped(copy.deepcopy(large), budget={"trainable": 0.02})
    config = small.peft_config["default"]
    assert config.update == "low_rank" and config.rank >= 1
    both = wrapped(copy.deepcopy(large), budget={"trainable": 0.02, "flops": 0.5}, calibration=tiny_batches())
    assert both.peft_config["default"].rank > config.rank  # what is trimmed needs no update
    assert both.base_model.plan().flops_share <= 0.5
    for fields in (
        {"budget": {"trainable": 0.1}},
        {"budget": {"trainable": 0.02}, "score": "random"},
        {"budget": {"trainable": 0.02}, "update": "dense"},
        {"budget": {"trainable": 0.002}},  # no room for a rank
        {"budget": {"trainable": 0.005}, "also_train": ["biases"]},  # nor here, beside the biases
    ):
        model = wrapped(copy.deepcopy(large), calibration=tiny_batches(), priming_steps=1, **fields)
        assert model.peft_config["default"].update == "dense"
        assert any((model.base_model.plan().of(g) == 2).any() for g in model.base_model.plan().anatomy.groups)
    user = SensiConfig(budget={"trainable": 0.02}, task_type="SEQ_CLS")
    get_peft_model(copy.deepcopy(large), user)
    assert (user.update, user.rank) == (None, None)


def test_given_scores_rank_the_trimmed_units_and_bring_the_head(large):
    scores = compute_scores(large, tiny_batches(), calibration_steps=2, priming_steps=4, progress=False)
    model = wrapped(large, budget={"trainable": 0.02, "flops": 0.5}, scores=scores)
    assert model.peft_config["default"].update == "low_rank"
    head = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(head, scores.head["classifier.weight"])


def test_what_cannot_be_is_an_error(large):
    before = copy.deepcopy(large.state_dict())
    with pytest.raises(BudgetError, match="needs at least"):
        wrapped(large, budget={"trainable": 100}, update="low_rank")
    assert all(torch.equal(before[name], value) for name, value in large.state_dict().items())
    with pytest.raises(SensiError, match="not both"):
        SensiConfig(budget={"trainable": 0.1}, update="low_rank", rank=4)
    with pytest.raises(SensiError, match="`trainable` limit"):
        SensiConfig(update="low_rank")


def steps(model: torch.nn.Module, lr: float) -> torch.nn.Module:
    """A few steps of Adam on the low-rank factors alone."""
    factors = [p for name, p in model.named_parameters() if "sensi_" in name and p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=lr, weight_decay=0.0, eps=1e-12)
    model.eval()  # no dropout
    for batch in tiny_batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_same_movement_of_the_factors_moves_the_weights_as_far_at_every_rank():
    moved = {}
    for rank in (1, 2, 7, 16):
        model = wrapped(tiny_model(), update="low_rank", rank=rank)
        assert model.peft_config["default"].scale == 1 / rank
        layer = layers_of(model)["base_model.model.bert.encoder.layer.0.attention.self.query"]
        for name in ("down", "up"):
            torch.nn.init.constant_(layer.part(name, "default"), 0.1)  # as after 100 steps of Adam at 1e-3
        change = layer.get_adapted_weight("default")[0] - layer.base_layer.weight
        moved[rank] = change.abs().max().item()
    assert max(moved.values()) == pytest.approx(0.01, rel=1e-4) == min(moved.values())


@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_first_step_moves_the_weights_as_far_at_every_rank(scale):
    """With `scale=2` at every rank the start is that of LoRA, and the movement grows by the root of the rank."""
    moved = {}
    for rank in (1, 16):
        torch.manual_seed(0)
        model = wrapped(tiny_model(hidden_size=256), update="low_rank", rank=rank, scale=scale)
        layer = layers_of(model)["base_model.model.bert.encoder.layer.0.attention.self.query"]
        up = layer.part("up", "default")
        with torch.no_grad():
            up.copy_(0.01 * torch.randn_like(up).sign())
        change = layer.get_adapted_weight("default")[0] - layer.base_layer.weight
        moved[rank] = change.square().mean().sqrt().item()
    assert moved[16] == pytest.approx(moved[1] * (1 if scale is None else 4), rel=0.1)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"update": "low_rank", "rank": 4, "scale": 0.3}, 0.3),
        ({"update": "low_rank", "rank": 4, "scale": 2}, 2.0),
        # The learning rate of these is that of their other part.
        ({"update": "low_rank+sparse", "rank": 4, "sparse": 5}, 1.0),
        ({"update": "dense+low_rank", "rank": 4, "retention": 0.5, "also_train": []}, 1.0),
    ],
    ids=str,
)
def test_the_scale_multiplies_the_term_however_it_is_computed(fields, scale):
    """The forward pass, its gradients and the merged weight against the formula."""
    layers = layers_of(steps(wrapped(tiny_model(), **fields), 1e-2))
    layer = layers["base_model.model.bert.encoder.layer.1.output.dense"]
    down, up = (layer.part(name, "default") for name in ("down", "up"))
    assert up.abs().max() > 0
    term = (scale * up @ down).detach()
    x = torch.randn(3, layer.in_features)
    y = layer(x)
    weight, bias = (value.detach() for value in layer.get_adapted_weight("default"))
    down.grad = up.grad = None
    y.sum().backward()
    torch.testing.assert_close(down.grad, scale * up.detach().sum(0)[:, None] * x.sum(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(up.grad, scale * (x @ down.detach().T).sum(0).expand_as(up), atol=1e-5, rtol=1e-4)
    torch.nn.init.zeros_(up)
    order = layer.sensi_slices["default"].kept.argsort()
    without = layer.get_adapted_weight("default")[0].detach()
    torch.testing.assert_close(weight, without + term[:, order])
    x_in_base_order = x[:, order]
    torch.testing.assert_close(y.detach(), torch.nn.functional.linear(x_in_base_order, weight, bias))


@pytest.mark.parametrize("scale", [0, -1, float("nan"), True, "1", 1e9])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(SensiError, match="`scale` must be"):
        SensiConfig(update="low_rank", rank=2, scale=scale)
    with pytest.raises(SensiError, match="no effect"):
        SensiConfig(scale=0.5)


@pytest.mark.parametrize(
    ("fields", "name", "values"),
    [
        ({"update": "low_rank", "rank": 4}, "scale", (0.25, 1.0)),
        ({"update": "mask", "sparsity": 0.5}, "sparsity", (0.5, 0.75)),
    ],
    ids=str,
)
def test_values_are_not_loaded_under_another_setting(fields, name, values, tmp_path):
    """A resumed training never reads the checkpoint's config, and the shapes do not show these settings."""
    value, another = values
    steps(wrapped(tiny_model(), **fields), 1e-2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    same, other = wrapped(tiny_model(), **fields), wrapped(tiny_model(), **{**fields, name: another})
    set_peft_model_state_dict(same, tensors)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SensiLoadError, match=f"`{name}` = {value}, .*`{name}={value}`"):
        set_peft_model_state_dict(other, tensors)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{name}": {value}', f'"{name}": {another}'))
    with pytest.raises(SensiLoadError, match="different settings"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_saved_loaded_merged_and_compressed(large, tmp_path):
    base = copy.deepcopy(large)
    model = steps(wrapped(large, budget={"trainable": 0.02, "flops": 0.5}, calibration=tiny_batches()), 1e-2)
    assert model.peft_config["default"].scale < 1
    batch = tiny_batches()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, expected)
        loaded.base_model.compress("bfloat16")
        assert torch.allclose(loaded(**batch).logits, expected, atol=2e-2)
        assert torch.allclose(model.merge_and_unload()(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("budget", [{"trainable": 0.3}, {"trainable": 0.3, "params": 0.5}])
def test_a_limit_counts_the_low_rank_term_beside_units(budget):
    model = wrap(tiny_model(), budget=budget, update="dense+low_rank", rank=4)
    plan, beside = model.plan(), {"classifier"}
    found = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not beside & set(n.split(".")))
    assert plan.trainable_params == found <= 0.3 * plan.anatomy.total_params
    with pytest.raises(BudgetError, match="trainable|trained"):
        wrap(tiny_model(), budget={"trainable": 0.05}, update="dense+low_rank", rank=8)
