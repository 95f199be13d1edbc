"""A `trainable` limit that decides a rank: when it does, and how large the rank is."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_batches, tiny_model

from peft_sensi import BudgetError, SensiConfig, SensiError, compute_scores


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


def test_saved_loaded_merged_and_compressed(large, tmp_path):
    base = copy.deepcopy(large)
    model = steps(wrapped(large, budget={"trainable": 0.02, "flops": 0.5}, calibration=tiny_batches()), 1e-3)
    batch = tiny_batches()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, expected)
        loaded.base_model.compress("bfloat16")
        assert torch.allclose(loaded(**batch).logits, expected, atol=2e-2)
        assert torch.allclose(model.merge_and_unload()(**batch).logits, expected, atol=1e-5)
