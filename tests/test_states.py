"""Adapters in unusual states: merged, without the base, with odd names, or beside another adapter that is rebuilt."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load, save_file
from tiny import TRIM, TUNE, assert_same_tensors, logits, snapshot, tiny_batches, tiny_model, train, trained, wrap
from torch import nn

from peft_sensi import Schedule, SensiConfig, SensiError, SensiLoadError
from peft_sensi.layers.layer import layers_of


def test_the_plan_can_be_read_while_the_adapter_is_merged():
    model = wrap(tiny_model(), **TRIM)
    plan = model.base_model.plan()
    model.merge_adapter()
    assert model.base_model.plan() == plan


def test_the_plan_can_be_read_without_the_base(budget):
    whole, small = wrap(tiny_model(), **budget), wrap(tiny_model(), keep_base=False, **budget)
    assert small.base_model.plan() == whole.base_model.plan()


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
def test_reload_without_the_base(family, budget, options, saved_adapter):
    """Under `low_cpu_mem_usage` new parameters lose their values, and the part of the base that is kept is one."""
    expected, folder = saved_adapter(family, keep_base=False, **budget)
    loaded = PeftModel.from_pretrained(tiny_model(family), folder, **options).eval()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_several_threads_can_call_an_adapter(family, budget, kind, saved_adapter):
    """The first calls make the cached weights."""
    _, folder = saved_adapter(family, **budget)
    model = PeftModel.from_pretrained(tiny_model(family), folder).eval()
    if kind:
        model.base_model.compress(kind)
    expected = logits(copy.deepcopy(model))
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: logits(model), range(24)))


def test_the_active_adapter_is_meant_where_none_is_named():
    model = wrap(tiny_model(), budget=1.0)
    model.add_adapter("small", config(budget=0.5))
    assert model.plan().params_share == 1.0
    model.set_adapter("small")
    assert model.plan() == model.plan("small") != model.plan("default")
    model.trim(0.4)
    assert model.plan("small").params_share <= 0.4 and "scored by magnitude" in model.explain()
    model.base_model.compress("bfloat16")
    assert (model.peft_config["small"].compressed, model.peft_config["default"].compressed) == ("bfloat16", None)
    model.delete_adapter("default")
    assert model.plan().params_share <= 0.4


def test_one_of_several_active_adapters_must_be_named():
    options = {"task_type": "FEATURE_EXTRACTION", "also_train": [], **TUNE}
    model = wrap(tiny_model(task="FEATURE_EXTRACTION"), **options)
    model.add_adapter("other", SensiConfig(score="magnitude", **options))
    model.base_model.set_adapter(["default", "other"])
    for call in (model.plan, model.explain, lambda: model.trim(0.5), lambda: model.compress("bfloat16")):
        with pytest.raises(SensiError, match="name one of"):
            call()
    assert model.plan("other").trainable_share < 1.0


def test_a_plan_without_tokens_is_not_loaded_into_a_model_that_trains_them():
    model = trained(budget=1.0, calibration=tiny_batches())
    with pytest.raises(SensiLoadError, match="trains no rows of embeddings: wrap the model without `calibration`"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(trained(budget=0.5)))


def test_trained_tokens_are_not_loaded_into_a_model_without_them():
    state = get_peft_model_state_dict(trained(budget=1.0, calibration=tiny_batches()))
    model = trained(**HALF)
    with pytest.raises(SensiLoadError, match="wrapped without `calibration`"):
        set_peft_model_state_dict(model, state)


def test_an_unknown_adapter_is_not_activated():
    model = trained(**TRIM)
    expected = logits(model)
    for names in ("other", ["other"], ["default", "other"]):
        with pytest.raises(SensiError, match="no adapter 'other'"):
            model.base_model.set_adapter(names)
    assert torch.equal(logits(model), expected)


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


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_of_few_layers_is_not_merged_beside_an_active_one_that_trims(family):
    """Layers that it does not have went on trimming for the active adapter, next to layers merged whole."""
    model = trained(family, adapter_name="a", **TRIM)
    name = {"bert": "intermediate.dense", "llama": "up_proj"}[family]
    low_rank = {"budget": {"trainable": 0.02}, "update": "low_rank", "target_modules": [name]}
    model.add_adapter("b", SensiConfig(**low_rank))  # without a task type, it saves no module whole
    before = logits(model)
    with pytest.raises(SensiError, match="merged together|set_adapter"):
        model.merge_adapter(["b"])
    assert torch.equal(logits(model), before) and not any(layer.merged for layer in layers_of(model).values())


def test_what_is_merged_already_counts_when_a_model_is_unloaded():
    model = trained(adapter_name="a", **TRIM)
    model.add_adapter("b", SensiConfig(budget=0.4, score="magnitude", task_type="SEQ_CLS"))
    model.merge_adapter()
    before = logits(model)
    with pytest.raises(SensiError, match="merged together"):
        model.merge_and_unload(adapter_names=["b"])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_disabled_adapters_are_not_merged_in_place(family):
    model = trained(family, **TRIM)
    model.base_model.disable_adapter_layers()
    base = logits(model)
    with pytest.raises(SensiError, match="disabled, and a merge would use them"):
        model.merge_adapter()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    after = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), after, atol=1e-5)


def test_scores_of_a_deleted_adapter_are_forgotten(tmp_path):
    wrap(tiny_model(), budget=0.4).save_pretrained(tmp_path)
    model = wrap(tiny_model(), **TRIM)
    model.add_adapter("b", SensiConfig(budget=0.5, score="random", task_type="SEQ_CLS"))
    model.delete_adapter("b")
    model.load_adapter(tmp_path, "b")
    assert model.base_model.scores_of("b") is None


COPIES = [TRIM, TUNE, {"budget": 0.5, "retention": 0.5}, {"update": "low_rank", "rank": 2},
          {"update": "sparse", "sparse": 5}, {"update": "mask", "sparsity": 0.5}]  # fmt: skip


@pytest.mark.parametrize("copied", [False, True], ids=["its config", "a copy of its config"])
@pytest.mark.parametrize("options", COPIES, ids=str)
def test_an_adapter_from_the_config_of_another_starts_from_its_values(options, copied):
    """As TRL makes the frozen reference "ref" of a trained adapter: the reference is the trained model."""
    model = trained(**options)
    config = model.peft_config["default"]
    model.add_adapter("ref", copy.deepcopy(config) if copied else config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    train(model)
    assert not torch.equal(logits(model), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_an_adapter_with_the_same_settings_starts_afresh():
    model = trained(**TRIM)
    fresh = logits(wrap(tiny_model(), **TRIM))
    model.add_adapter("second", SensiConfig(score="magnitude", task_type="SEQ_CLS", **TRIM))
    changed = copy.deepcopy(model.peft_config["default"])
    changed.plan, changed.budget = None, 0.3
    model.add_adapter("third", changed)
    model.set_adapter("second")
    assert torch.equal(logits(model), fresh)
    model.set_adapter("third")
    assert torch.equal(logits(model), logits(wrap(tiny_model(), budget=0.3)))


# -- two adapters: one is rebuilt, the other stays as it is -----------------------------------------------------------


# Three plans that concern different layers; a checkpoint fits a model with the same `also_train`.
HALF = {**TRIM, "also_train": ["norms"]}
FEW = {**TUNE, "also_train": ["norms"]}
BOTH = {"budget": {"params": 0.6, "trainable": 0.03}, "also_train": ["norms"]}


def config(**options) -> SensiConfig:
    return SensiConfig(score="magnitude", task_type="SEQ_CLS", **options)


def activity(model: nn.Module) -> tuple:
    """Which adapters are active where, and what requires gradients."""
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = {n: (list(m.active_adapters), m.disable_adapters) for n, m in wrapped}
    named = model.named_parameters()
    flags = {n.replace(".base_layer", "").replace(".original_module", ""): p.requires_grad for n, p in named}
    return model.active_adapters, active, flags


def assert_same_activity(model: nn.Module, before: tuple) -> None:
    """The same adapters are active in every module, new ones included, and the same tensors require gradients."""
    names, active, flags = activity(model)
    assert names == before[0]
    assert {n: state for n, state in active.items() if n in before[1]} == before[1]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len({str(active[n]) for n in layers}) == 1
    assert len({tuple(map(id, m.sensi_saved_modules)) for m in layers.values()}) == 1
    assert not [n for n, flag in flags.items() if before[2].get(n, flag) != flag]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("first", "second"), [(FEW, HALF), (HALF, BOTH), (BOTH, FEW)])
def test_loading_another_plan_into_an_inactive_adapter(first, second, trainable):
    """As `Trainer` does when it resumes: the layers of that adapter are rebuilt, and the active one is not touched."""
    source = trained(**second)
    model = trained(adapter_name="a", **first)
    model.add_adapter("b", config(budget=0.4))
    model.set_adapter("b", inference_mode=not trainable)
    if trainable:
        train(model)
    expected, before = logits(model), activity(model)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), adapter_name="a")
    assert_same_activity(model, before)
    assert torch.equal(logits(model), expected)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "a" in n.split(".")]
    model.set_adapter("a")
    assert torch.equal(logits(model), logits(source))
    trainables = sum(p.numel() for p in source.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainables
    model.set_adapter("b")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("trainable", [True, False])
def test_loading_another_plan_into_the_active_adapter(trainable):
    source = trained(**BOTH)
    model = trained(adapter_name="a", **HALF)
    model.add_adapter("b", config(**FEW))
    model.set_adapter("a", inference_mode=not trainable)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), adapter_name="a")
    names, active, _ = activity(model)
    assert names == ["a"] and all(state == (["a"], False) for state in active.values())
    assert torch.equal(logits(model), logits(source))
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == trainable * sum(p.numel() for p in source.parameters() if p.requires_grad)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".b")]


def test_loading_another_plan_while_adapters_are_disabled():
    source, model = trained(**BOTH), trained(**HALF)
    base = logits(tiny_model())
    with model.disable_adapter():
        set_peft_model_state_dict(model, get_peft_model_state_dict(source))
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), logits(source))
    train(model)
    assert not torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("fault", ["shape", "stray"])
@pytest.mark.parametrize("active", ["a", "b"])
def test_another_plan_that_cannot_be_loaded_changes_nothing(active, fault):
    model = trained(adapter_name="a", **HALF)
    model.add_adapter("b", config(budget=0.4))
    model.set_adapter(active)
    expected, before, tensors = logits(model), activity(model), snapshot(model)
    fields = dict(vars(model.peft_config["a"]))
    state = get_peft_model_state_dict(trained(**BOTH))
    if fault == "shape":
        name = next(n for n in state if "sensi_weight" in n)
        state[name] = state[name][:-1]
    else:
        state["base_model.model.bert.pooler.dense.weight"] = torch.zeros(32, 32)
    with pytest.raises(SensiLoadError):
        set_peft_model_state_dict(model, state, adapter_name="a")
    assert_same_tensors(snapshot(model), tensors)
    assert activity(model) == before and vars(model.peft_config["a"]) == fields
    assert torch.equal(logits(model), expected)


def test_another_plan_is_not_loaded_into_a_merged_model():
    model = trained(adapter_name="a", **HALF)
    model.add_adapter("b", config(**FEW))
    model.merge_adapter()
    expected, tensors = logits(model), snapshot(model)
    with pytest.raises(SensiError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(trained(**BOTH)), adapter_name="b")
    assert_same_tensors(snapshot(model), tensors)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", ["add", "load", "load to train", "load while disabled", "fail"])
@pytest.mark.parametrize("trainable", [True, False])
def test_a_second_adapter_leaves_the_first_active(how, trainable, tmp_path):
    trained(**BOTH).save_pretrained(tmp_path)
    model = trained(adapter_name="a", **TUNE)
    model.set_adapter("a", inference_mode=not trainable)
    expected = logits(model)
    if how == "load while disabled":
        model.base_model.disable_adapter_layers()
    before = activity(model)
    if how == "add":
        model.add_adapter("b", config(**BOTH))
    elif how == "fail":
        weights = load((tmp_path / "adapter_model.safetensors").read_bytes())
        weights["base_model.model.classifier.weight"][:] = float("nan")
        weights["base_model.model.classifier.extra"] = torch.ones(1)
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(SensiLoadError):
            model.load_adapter(tmp_path, "b")
    else:
        model.load_adapter(tmp_path, "b", is_trainable=how == "load to train")
    assert_same_activity(model, before)
    if how == "load while disabled":
        assert torch.equal(logits(model), logits(tiny_model()))
        model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), expected)


def test_cuts_of_one_adapter_end_beside_another():
    """A frozen layer of the adapter has only a gate, which goes at the end: nothing else becomes active there."""
    phase = {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}
    model = wrap(tiny_model(), "a", budget=0.95, tuned_layers=1, multiple_of=1, schedule=phase)
    model.add_adapter("b", config(**TUNE))
    schedule = Schedule(model, 4)
    schedule.step(done_steps=2)
    train(model)
    expected, before = logits(model), activity(model)
    gone = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and "a" in m.sensi_slices}
    schedule.finish()
    gone -= {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and "a" in m.sensi_slices}
    assert gone, "no layer has lost the adapter"
    names, active, flags = activity(model)
    assert names == ["a"] and all(state == (["a"], False) for state in active.values())
    assert not [n for n, flag in flags.items() if before[2].get(n, flag) != flag]
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["add", "load"])
def test_an_adapter_that_comes_after_the_last_was_deleted_is_active(way, tmp_path):
    """PEFT has no active adapter then, and refused to add one."""
    first = trained(adapter_name="a", **TRIM)
    first.save_pretrained(tmp_path)
    model = wrap(tiny_model(), "b", **TUNE)
    model.delete_adapter("b")
    if way == "load":
        model.load_adapter(tmp_path / "a", "a", is_trainable=True)
    else:
        model.add_adapter("a", config(**TRIM))
        set_peft_model_state_dict(model, get_peft_model_state_dict(first, adapter_name="a"), "a")
    assert model.active_adapters == ["a"] and model.active_adapter == "a"
    assert torch.equal(logits(model), logits(first))
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, first)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize("deleted", ["a", "c"])
def test_deleting_an_adapter_activates_the_same_one_everywhere(deleted):
    """The adapters that stay are on different layers."""
    model = trained(adapter_name="a", **TUNE)
    for name, layer in (("b", 1), ("c", 0)):
        model.add_adapter(name, config(**FEW, target_modules=[f"layer.{layer}.intermediate.dense"]))
        model.set_adapter(name)
        train(model)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    unchanged = logits(model)
    model.delete_adapter(deleted)
    assert model.active_adapters == ["b" if deleted == "a" else "a"]
    assert torch.equal(logits(model), expected if deleted == "a" else unchanged)
    model.set_adapter("b")
    assert torch.equal(logits(model), expected)
