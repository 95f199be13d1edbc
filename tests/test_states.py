"""What an adapter must survive between two calls: merged, without its base, loaded without memory, oddly named."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import TRIM, TUNE, logits, tiny_model, train, trained, wrap
from torch import nn

from peft_sensi import SensiConfig, SensiError


def test_the_plan_can_be_read_while_the_adapter_is_merged():
    model = wrap(tiny_model(), **TRIM)
    plan = model.base_model.plan()
    model.merge_adapter()
    assert model.base_model.plan() == plan


def test_the_plan_can_be_read_without_the_base(budget):
    whole, small = wrap(tiny_model(), **budget), wrap(tiny_model(), keep_base=False, **budget)
    assert small.base_model.plan() == whole.base_model.plan()


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
def test_reload_without_the_base(family, budget, options, tmp_path):
    """Under `low_cpu_mem_usage` new parameters lose their values, and the part of the base that is kept is one."""
    model = trained(family, keep_base=False, **budget)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path, **options).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("first", [TRIM, TUNE], ids=["trim", "tune"])
def test_no_adapter_is_added_to_a_merged_one(first, tmp_path):
    model = trained(**first)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(SensiError, match="unmerge_adapter"):
        model.add_adapter("second", SensiConfig(task_type="SEQ_CLS", **TUNE))
    with pytest.raises(SensiError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "second")
    model.unmerge_adapter()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


def test_a_module_of_the_base_may_be_called_like_our_parameters():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.sensi_lin, self.sensi_head = (nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sensi_head(self.sensi_lin(self.lin(x)))

    def wrapped() -> PeftModel:
        config = SensiConfig(target_modules=["lin", "sensi_lin"], modules_to_save=["sensi_head"], init_weights=False)
        return get_peft_model(Odd(), config)

    model, again = wrapped(), wrapped()
    nn.init.ones_(model.base_model.model.sensi_head.modules_to_save["default"].weight)
    assert not set_peft_model_state_dict(again, get_peft_model_state_dict(model)).unexpected_keys
    x = torch.randn(2, 5)
    assert torch.equal(again(x), model(x))


def test_a_second_adapter_cannot_take_the_base_from_the_first(tmp_path):
    first = trained(adapter_name="a", **TUNE)
    before = logits(first)
    dropping = SensiConfig(budget={"trainable": 0.1}, score="magnitude", task_type="SEQ_CLS", keep_base=False)
    with pytest.raises(SensiError, match=r"\['a'\]"):
        first.add_adapter("b", dropping)
    wrap(tiny_model(), keep_base=False, **TUNE).save_pretrained(tmp_path)
    with pytest.raises(SensiError, match="keep_base"):
        first.load_adapter(tmp_path, "b")
    assert torch.equal(logits(first), before) and set(first.peft_config) == {"a"}


def test_merging_another_than_the_active_adapter_takes_its_head_too():
    model = trained(adapter_name="a", **TRIM)
    model.add_adapter("b", SensiConfig(budget=0.4, score="magnitude", task_type="SEQ_CLS"))
    model.set_adapter("b")
    train(model)
    expected = logits(model)
    model.set_adapter("a")
    with pytest.raises(SensiError, match="set_adapter"):
        model.merge_adapter(["b"])
    assert torch.allclose(logits(model.merge_and_unload(adapter_names=["b"])), expected, atol=1e-5)


def test_scores_of_a_deleted_adapter_are_forgotten(tmp_path):
    wrap(tiny_model(), budget=0.4).save_pretrained(tmp_path)
    model = wrap(tiny_model(), **TRIM)
    model.add_adapter("b", SensiConfig(budget=0.5, score="random", task_type="SEQ_CLS"))
    model.delete_adapter("b")
    model.load_adapter(tmp_path, "b")
    assert "b" not in model.base_model._sensi_scores
