"""`SensiModel.trim`: a trained adapter is trimmed, keeps its trained values, and loads like any other."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import asdict
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from processes import run_two
from test_latency_plans import table_for
from tiny import (
    assert_same_tensors,
    clone,
    interrupted,
    logits,
    snapshot,
    tiny_batches,
    tiny_model,
    train,
    trained,
    wrap,
)
from torch.utils.data import DataLoader

from peft_sensi import Budget, BudgetError, CalibrationError, Schedule, SensiConfig, SensiError, recipes
from peft_sensi.layers.layer import layers_of
from peft_sensi.planning.budget import allowance
from peft_sensi.planning.costs import tables_by_limit
from peft_sensi.tuner import cuts, in_place, stages, wrapping
from peft_sensi.tuner.rescoring import (
    JOINT_TOKENS,
    LEAST_JOINT_TOKENS,
    REFIT_TOKENS,
    labeled_by,
    read_batches,
    to_fit_jointly,
    to_refit,
    trained_options,
)
from peft_sensi.tuner.stages import stages_to
from peft_sensi.utils.states import TRIMMED, TUNED


BATCHES = tiny_batches(6, seed=3)
FULL = {"budget": 1.0, "calibration": BATCHES}


def learned(family: str = "bert", **config):
    return trained(family, **{**FULL, **config})


def reloaded(model, folder, family: str = "bert", **changes):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(family, **changes), folder)


def test_a_trim_keeps_the_limit_and_shrinks_the_adapter(family):
    model = learned(family)
    before = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    plan = model.base_model.trim(0.5, calibration=BATCHES)
    assert plan == model.base_model.plan()
    assert 0.4 < plan.params_share <= 0.5
    after = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(after.values()) < sum(before.values())
    assert all(state in (TRIMMED, TUNED) for g in plan.anatomy.trimmable for state in plan.of(g))


@pytest.mark.parametrize(
    "field, value",
    [
        ("widths", "unif"),
        ("widths", None),
        ("multiple_of", 0),
        ("multiple_of", "8"),
        ("min_units", None),
        ("calibration_steps", -1),
        ("sequence_length", 0),
        ("score", "foo"),
        ("seed", None),
        ("refit", "yes"),
    ],
)
def test_fields_that_were_set_after_the_wrap_are_checked(field, value):
    model = learned()
    before = snapshot(model)
    setattr(model.peft_config["default"], field, value)
    with pytest.raises(SensiError, match=f"`{field}`"):
        model.base_model.trim(0.5, calibration=BATCHES)
    assert_same_tensors(snapshot(model), before)
    cutting = wrap(tiny_model(), budget=0.5, schedule=recipes.LATE_CUT)
    setattr(cutting.peft_config["default"], field, value)
    with pytest.raises(SensiError, match=f"`{field}`"):
        Schedule(cutting, 4, calibration=BATCHES)


def test_the_class_says_that_labels_are_classes_of_tokens_where_no_task_type_does():
    config = {**FULL, "task_type": None, "calibration": tiny_batches(4, task="TOKEN_CLS")}
    model = wrap(tiny_model(task="TOKEN_CLS"), **config)
    options = trained_options(model.peft_config["default"], None, score="fisher")
    drawn = labeled_by(model.base_model.model, model.peft_config["default"], config["calibration"], options)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(drawn, config["calibration"], strict=True))


def test_the_scores_use_labels_that_the_trained_model_predicts():
    changed = [{**batch, "labels": (batch["labels"] + 1) % 3} for batch in BATCHES]
    options = {"score": "fisher", "refit": False}
    plans = [learned().base_model.trim(0.5, calibration=batches, **options) for batches in (BATCHES, changed)]
    assert plans[0] == plans[1]

    def own_loss(model, batch):
        return model(**batch).loss

    plan = learned().base_model.trim(0.5, calibration=changed, loss_fn=own_loss, **options)
    assert plan != plans[0]  # an own loss may read anything from the batch, which stays as it is


def test_what_is_kept_goes_on_from_its_trained_values():
    model = learned()
    whole = clone(model)
    model.base_model.trim(0.5, calibration=BATCHES, refit=False)
    plan = model.base_model.plan()
    big, small = (m.merge_and_unload() for m in (whole, model))
    for layer in range(2):
        group = plan.anatomy.by_name[f"bert.encoder.layer.{layer}.neurons"]
        kept = torch.from_numpy((plan.of(group) != TRIMMED).nonzero()[0])
        names = ("intermediate.dense", "output.dense")
        up, down = (big.get_submodule(f"bert.encoder.layer.{layer}.{name}") for name in names)
        small_up, small_down = (small.get_submodule(f"bert.encoder.layer.{layer}.{name}") for name in names)
        assert torch.equal(small_up.weight, up.weight[kept]) and torch.equal(small_up.bias, up.bias[kept])
        assert torch.equal(small_down.weight, down.weight[:, kept]) and torch.equal(small_down.bias, down.bias)
    assert torch.equal(big.classifier.weight, small.classifier.weight)


def test_the_scores_are_those_of_the_adapted_model():
    """A neuron that training has made large is kept by magnitude, although the base's is the smallest."""
    model = wrap(tiny_model(), budget=1.0)
    layer = model.base_model.model.bert.encoder.layer[0]
    with torch.no_grad():
        for module in (layer.intermediate.dense, layer.output.dense):
            module.sensi_weight["default"].mul_(1e-3)
        layer.intermediate.dense.sensi_weight["default"][5] = 10.0
    plan = model.base_model.trim(0.3, score="magnitude", calibration=BATCHES)
    states = plan.of(plan.anatomy.by_name["bert.encoder.layer.0.neurons"])
    assert states[5] == TUNED


def test_a_refit_brings_the_output_nearer():
    model = learned()
    batch = tiny_batches(1, size=32, seed=50, labels=False)[0]
    whole = logits(model, batch)
    errors = []
    for refit in (False, True):
        one = clone(model)
        one.base_model.trim(0.5, calibration=tiny_batches(16, seed=4), refit=refit)
        errors.append(float((logits(one, batch) - whole).square().mean()))
    assert errors[1] < errors[0]


def test_a_family_from_one_training(tmp_path):
    model = learned()
    for share in (0.75, 0.5, 0.25):
        plan = model.base_model.trim(share, calibration=BATCHES)
        assert plan.params_share <= share
        again = reloaded(model, tmp_path / str(share))
        assert torch.equal(logits(again), logits(model))
        assert again.base_model.plan() == plan
        merged = clone(model).merge_and_unload()
        torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)


def test_a_second_trim_never_brings_a_unit_back():
    model = learned()
    first = model.base_model.trim(0.6, calibration=BATCHES)
    train(model)
    second = model.base_model.trim(0.3, calibration=BATCHES)
    for group in first.anatomy.trimmable:
        assert not ((first.of(group) == TRIMMED) & (second.of(group) != TRIMMED)).any()


def test_it_trains_on_after_a_trim():
    model = learned()
    model.base_model.trim(0.5, calibration=BATCHES)
    before = logits(model)
    train(model)
    assert not torch.equal(before, logits(model))


@pytest.mark.parametrize(
    "config",
    [
        {"update": "low_rank", "rank": 2, "budget": None},
        {"update": "dense+low_rank", "rank": 2},
        {"update": "low_rank+sparse", "rank": 2, "sparse": 20, "budget": None},
        {"budget": {"trainable": 0.2}, "update": "dense"},
        {"retention": 0.3, "budget": None},
        {"also_train": ["biases", "norms"]},
    ],
    ids=lambda config: "-".join(map(str, config.values()))[:30],
)
def test_every_update_that_has_units(config, tmp_path):
    model = learned(**config)
    whole = clone(model).merge_and_unload()
    plan = model.base_model.trim(0.5, calibration=BATCHES, refit=False)
    assert plan.params_share <= 0.5
    torch.testing.assert_close(logits(clone(model).merge_and_unload()), logits(model), atol=1e-4, rtol=1e-4)
    group = plan.anatomy.by_name["bert.encoder.layer.0.neurons"]
    kept = torch.from_numpy((plan.of(group) != TRIMMED).nonzero()[0])
    name = "bert.encoder.layer.0.intermediate.dense"
    small = clone(model).merge_and_unload().get_submodule(name).weight
    torch.testing.assert_close(small, whole.get_submodule(name).weight[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"params": 0.6, "flops": 0.5}], ids=["flops", "both"])
def test_other_limits(budget):
    model = learned()
    plan = model.base_model.trim(budget, calibration=BATCHES)
    assert plan.flops_share <= 0.5 and plan.params_share <= budget.get("params", 1.0)


def test_flops_are_counted_at_the_length_of_the_config():
    length = round(sum(batch["input_ids"].shape[1] for batch in BATCHES) / len(BATCHES))
    assert learned().base_model.plan().sequence_length == length != 128, "also where nothing is ranked"
    model = learned(sequence_length=64)
    assert model.base_model.trim({"flops": 0.5}, calibration=BATCHES).sequence_length == 64


def test_a_limit_on_trained_values_stays_in_the_config():
    model = learned(budget={"trainable": 0.2})
    for budget in (0.6, {"flops": 0.4}):
        model.base_model.trim(budget, calibration=BATCHES)
    assert model.peft_config["default"].budget == {"flops": 0.4, "trainable": 0.2}


@pytest.mark.parametrize("config", [{"score": "magnitude"}, {"score": "fisher"}, {"keep_base": False}], ids=str)
def test_a_trim_after_whole_sublayers_are_gone(config, tmp_path):
    model = learned(min_units=0, **config)
    for share in (0.5, 0.2, 0.05):
        plan = model.base_model.trim(share, calibration=BATCHES)
        assert plan.params_share <= share
    assert sum((plan.of(group) == TRIMMED).all() for group in plan.anatomy.trimmable) > 1
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_whole_sublayers_are_trimmed_twice():
    model = learned(granularity="tensor", score="fisher", budget={"params": 1.0})
    for share in (0.7, 0.4):
        plan = model.base_model.trim(share, calibration=BATCHES)
        assert 0 < plan.params_share <= share
        scores = model.base_model.scores_of("default")
        assert all(scores.protected[name].shape == values.shape for name, values in scores.values.items())


def test_an_undrawn_mask_is_refused(tmp_path):
    phase = {"phase": "draw_mask", "at": 0.5}
    model = wrap(tiny_model(), update="low_rank", rank=2, sparsity=0.3, schedule=phase)
    with pytest.raises(SensiError, match="has not been drawn"):
        model.base_model.trim(0.5, calibration=BATCHES)
    with pytest.warns(UserWarning, match="the mask is drawn now"):
        Schedule(model, 10).finish()
    model.base_model.trim(0.5, calibration=BATCHES)
    assert any(layer.is_masked("default") for layer in layers_of(model).values())
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_a_trim_draws_no_random_numbers():
    model = learned()
    loader = DataLoader([{name: value[0] for name, value in batch.items()} for batch in BATCHES], 2, shuffle=True)
    before = torch.get_rng_state()
    model.base_model.trim(0.5, calibration=loader)
    assert torch.equal(before, torch.get_rng_state())


def test_a_trim_that_fails_while_layers_are_rebuilt(monkeypatch):
    model = learned(keep_base=False, budget={"params": 1.0, "trainable": 0.2})
    expected, plan = logits(model), model.base_model.plan()
    with monkeypatch.context() as patch:
        patch.setattr(wrapping, "wrap_module", interrupted(wrapping.wrap_module))
        with pytest.raises(KeyboardInterrupt):
            model.base_model.trim(0.5, calibration=BATCHES)
    assert torch.equal(logits(model), expected) and model.base_model.plan() == plan
    model.base_model.trim(0.5, calibration=BATCHES)


def test_without_the_base(tmp_path):
    kept, dropped = learned(), learned(keep_base=False)
    for model in (kept, dropped):
        model.base_model.trim(0.5, calibration=BATCHES)
        model.base_model.trim(0.3, calibration=BATCHES)
    assert kept.base_model.plan() == dropped.base_model.plan()
    assert torch.equal(logits(kept), logits(dropped))
    train(dropped)
    assert torch.equal(logits(reloaded(dropped, tmp_path)), logits(dropped))


def test_whole_sublayers_without_the_base_after_an_unmerge():
    """`unmerge` puts a base weight without values back, which says nothing about the layer's shape."""
    found = []
    for options in ({}, {"keep_base": False}):
        model = learned(min_units=0, **options)
        model.merge_adapter()
        model.unmerge_adapter()
        assert not model.trim(0.02, tiny_batches(2), refit=False).kept_params
        found.append(logits(model))
    assert torch.equal(*found)


def test_an_adapter_from_disk(tmp_path):
    model = learned()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    plans = [m.base_model.trim(0.5, calibration=BATCHES) for m in (model, again)]
    assert plans[0].states == plans[1].states
    assert torch.equal(logits(model), logits(again))
    train(again)


def test_the_base_stays_whole():
    base = tiny_model()
    expected = logits(base)
    model = wrap(base, **FULL)
    train(model)
    model.base_model.trim(0.5, calibration=BATCHES)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_another_adapter_is_left_alone():
    model = learned()
    model.add_adapter("other", SensiConfig(budget={"trainable": 0.1}, score="magnitude", task_type="SEQ_CLS"))
    model.set_adapter("other")
    expected = logits(model)
    with pytest.raises(SensiError, match="set_adapter"):
        model.base_model.trim(0.5, calibration=BATCHES, adapter_name="default")
    model.set_adapter("default")
    model.base_model.trim(0.5, calibration=BATCHES)
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(training):
    model = learned(update="low_rank", rank=2, budget=None, target_modules=["query", "value"])
    model.train(training)
    model.base_model.trim(0.5, calibration=BATCHES)  # this adds layers to the Linears that were no targets
    assert {module.training for module in model.modules()} == {training}


def test_a_stale_optimizer_is_refused():
    model = learned()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    model.base_model.trim(0.5, calibration=BATCHES)
    model.train()
    model(**BATCHES[0]).loss.backward()
    with pytest.raises(SensiError, match="new optimizer"):
        optimizer.step()
    other.step()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()


def test_an_optimizer_of_values_that_were_frozen_during_the_trim_is_refused():
    model = learned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained_values = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    model.base_model.trim(0.5, calibration=BATCHES)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained_values)
    with pytest.raises(SensiError, match="new optimizer.* new learning rate scheduler"):
        optimizer.step()


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_trim_changes_nothing(error):
    model = learned()
    before, plan, config = snapshot(model), model.base_model.plan(), copy.deepcopy(model.peft_config["default"])
    calls = []

    def loss_fn(inner, batch):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return inner(**batch).loss

    with pytest.raises(type(error)):
        model.base_model.trim(0.5, calibration=BATCHES, loss_fn=loss_fn)
    assert model.base_model.plan() == plan and model.peft_config["default"].plan == config.plan
    after = snapshot(model)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    model.base_model.trim(0.5, calibration=BATCHES)


def test_wrong_calls():
    model = learned()
    with pytest.raises(SensiError, match="no adapter"):
        model.base_model.trim(0.5, calibration=BATCHES, adapter_name="missing")
    with pytest.raises(SensiError, match="trainable"):
        model.base_model.trim({"params": 0.5, "trainable": 0.1}, calibration=BATCHES)
    with pytest.raises(BudgetError):
        model.base_model.trim(0.0, calibration=BATCHES)
    for score in ("movement", "entropy"):
        with pytest.raises(SensiError, match="score"):
            model.base_model.trim(0.5, calibration=BATCHES, score=score)
    with pytest.raises(SensiError, match="needs `calibration`"):
        model.base_model.trim(0.5, refit=True)
    with pytest.raises(SensiError, match="`refit` must be"):
        model.base_model.trim(0.5, calibration=BATCHES, refit="yes")
    with pytest.raises(CalibrationError, match="`loss_fn` must be a function"):
        model.base_model.trim(0.5, calibration=BATCHES, loss_fn=3)
    with torch.inference_mode(), pytest.raises(SensiError, match="inference_mode"):
        model.base_model.trim(0.5, calibration=BATCHES)
    with torch.no_grad():
        clone(model).base_model.trim(0.5, calibration=BATCHES)
    with pytest.raises(SensiError, match="output_biases"):
        learned(also_train=["norms"]).base_model.trim(0.5, calibration=BATCHES, refit=True)
    model.base_model.merge_adapter()
    with pytest.raises(SensiError, match="unmerge"):
        model.base_model.trim(0.5, calibration=BATCHES)
    model.base_model.unmerge_adapter()
    model.base_model.compress("int8")
    with pytest.raises(SensiError, match="compressed"):
        model.base_model.trim(0.5, calibration=BATCHES)


def test_a_model_that_has_diverged_is_named():
    model = learned()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(CalibrationError, match="loss .* is nan"):
        model.base_model.trim(0.5, calibration=BATCHES, score="fisher")


@pytest.mark.parametrize("budget", [0.5, 1.0, {"flops": 0.9, "params": 0.8}], ids=str)
def test_a_budget_that_is_met_already_changes_nothing(budget, monkeypatch):
    model = learned()
    model.base_model.trim(0.5, calibration=BATCHES)
    plan, config = model.base_model.plan(), model.peft_config["default"].to_dict()
    values, optimizer = snapshot(model), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    monkeypatch.setattr(stages, "score_units", lambda *_: pytest.fail("units were scored"))
    with pytest.warns(UserWarning, match=r"Nothing is removed.*keeps \d.*limits refer to the base"):
        assert model.base_model.trim(budget, calibration=BATCHES) == plan
    assert model.peft_config["default"].to_dict() == config
    model(**BATCHES[0]).loss.backward()
    optimizer.step()  # its parameters are still those of the model
    assert_same_tensors(snapshot(model), values)


def test_a_budget_that_no_plan_meets_is_refused_before_the_units_are_scored(monkeypatch):
    model = learned()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "score_units", lambda *_: pytest.fail("units were scored"))
        advice = r"with `min_units=0`\. Set `multiple_of` and `min_units` in .* `model.peft_config\['default'\]`"
        with pytest.raises(BudgetError, match=advice):
            model.base_model.trim(0.01, calibration=BATCHES)
        with pytest.raises(BudgetError, match="needs a latency table"):
            model.base_model.trim({"params": 0.5, "latency": 0.5}, calibration=BATCHES)
    model.peft_config["default"].min_units = 0
    assert model.base_model.trim(0.01, calibration=BATCHES).params_share <= 0.01
    assert model.peft_config["default"].budget == {"params": 0.01}


def test_nothing_to_trim_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"]))
    assert not hasattr(model.base_model, "trim")
    tuned = wrap(tiny_model(), granularity="tensor", score="magnitude", budget={"trainable": 0.5})
    with pytest.raises(SensiError, match="granularity='tensor'.*Merge it"):
        tuned.base_model.trim(0.5, calibration=BATCHES)


def test_two_processes_trim_alike(tmp_path):
    first, second = run_two("processes_trim.py", tmp_path)
    assert "another `latency table` in its trim" in first["tables"] and first["tables"] == second["tables"]
    alone = wrap(tiny_model(), budget=1.0, calibration=tiny_batches(8, seed=3))
    train(alone)
    plan = alone.base_model.trim(0.5, calibration=tiny_batches(8, seed=3))
    assert first["plan"] == second["plan"] == plan.to_dict()
    assert all(torch.equal(first["state"][name], value) for name, value in second["state"].items())
    assert torch.equal(first["gradient"], second["gradient"])
    assert first["small"].keys() == second["small"].keys()
    assert all(torch.equal(first["small"][name], value) for name, value in second["small"].items())
    assert_same_tensors(second["cut"], first["cut"])
    for process in (first, second):
        assert process["unchanged"] and process["again"] == first["plan"]
        assert "In process 1 of 2: OSError: the disk is gone" in process["errors"]["an iterator"]
        assert "In process 1 of 2: There is no adapter 'other'" in process["errors"]["a name"]
        assert "In process 1 of 2: MemoryError: full" in process["errors"]["new layers"]
        assert "DistributedDataParallel wrapper was made before" in process["stale"]
        assert "Give all processes the same" in process["failed"]


LATE = {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}


def cut_in_training(**schedule):
    """A model in which one cut was made after two steps, and its outputs before and after the cut."""
    torch.manual_seed(0)  # for dropout
    batches = tiny_batches(9, seed=5)  # of which no guard drops the refit
    model = wrap(tiny_model(), budget=0.5, score="fisher", schedule={**LATE, **schedule}, calibration=batches)
    phases = Schedule(model, 4, calibration=batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = tiny_batches(1, size=32, seed=50, labels=False)[0]
    for step in range(4):
        before = logits(model, batch)
        model.train()
        if phases.step(optimizer):
            outputs = before, logits(model, batch)
            model.train()
        model(**BATCHES[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    phases.finish()
    return model, outputs


def test_a_late_cut_is_refitted(tmp_path):
    errors = {}
    for refit in (True, False):
        model, (before, after) = cut_in_training(refit=refit)
        errors[refit] = float((after - before).square().mean())
        assert model.base_model.plan().params_share <= 0.5
        assert torch.equal(logits(reloaded(model, tmp_path / str(refit))), logits(model))
    assert errors[True] < errors[False]
    _, (before, after) = cut_in_training()
    assert float((after - before).square().mean()) == errors[True], "the refit is the default"


def cut_and_trimmed(family, budget):
    """A model before a late cut, the same model trimmed, the plan of the trim, and the batches of both."""
    batches = tiny_batches(9, seed=4)
    trimmed = learned(family, score="fisher", calibration=batches)
    cut = wrap(tiny_model(family), score="fisher", calibration=batches, budget=budget, schedule=LATE)
    trained_values = dict(trimmed.named_parameters())
    with torch.no_grad():
        for path, p in cut.named_parameters():
            if p.requires_grad:
                p.copy_(trained_values[path])
    return cut, trimmed, trimmed.base_model.trim(budget, batches), batches


def assert_same_trim(cut, trimmed, plan):
    torch.testing.assert_close(logits(cut), logits(trimmed), rtol=1e-3, atol=1e-4)
    masks = cut.base_model.plan().trimmed_units
    assert all((mask == plan.trimmed_units[group]).all() for group, mask in masks.items())


def test_a_late_cut_far_down_is_a_trim(family):
    """It chooses units in stages, and fits queries, keys, values and neurons as well."""
    cut, trimmed, plan, batches = cut_and_trimmed(family, 0.25)
    schedule = Schedule(cut, 4, calibration=batches)
    schedule.step(done_steps=2)
    torch.testing.assert_close(logits(cut), logits(trimmed), rtol=1e-3, atol=1e-4)
    schedule.finish()
    assert_same_trim(cut, trimmed, plan)


def test_a_cut_that_no_training_follows_is_a_trim():
    """Training stopped before it, so no training makes up for fewer batches."""
    cut, trimmed, plan, batches = cut_and_trimmed("bert", 0.5)
    schedule = Schedule(cut, 4, calibration=batches)
    with pytest.warns(UserWarning, match="not trained afterwards"):
        schedule.finish()
    assert_same_trim(cut, trimmed, plan)


def test_a_cut_that_fails_halfway_changes_nothing(monkeypatch):
    def refitted(root, plan, *others):
        counts = {g.output: len(g.positions(g.output, plan.of(g) != TRIMMED)) for g in plan.anatomy.trimmable}
        return {name: (torch.ones(32, count), torch.ones(32)) for name, count in counts.items()}

    model = wrap(tiny_model(), budget=0.5, schedule=LATE, also_train=["output_biases"])
    schedule = Schedule(model, 4, calibration=BATCHES)
    before = snapshot(model)
    monkeypatch.setattr(stages, "refit_changes", refitted)
    monkeypatch.setattr(cuts, "_add_change", interrupted(cuts._add_change, at=3))
    with pytest.warns(UserWarning, match="units are cut now"), pytest.raises(KeyboardInterrupt):
        schedule.finish()
    assert_same_tensors(snapshot(model), before)


def a_table(model):
    """Of times proportional to the numbers of units, beside a little that cannot be saved."""
    return table_for(model.base_model.plan().anatomy, lambda g: {0: 0.0, g.size: 0.1 * g.size}, rest=0.1)


def trims_in_stages(model, budget, **options):
    """Trims to the limits of each stage on the way to `budget`, and returns the last plan."""
    plan = model.base_model.plan()
    way = stages_to(plan, Budget.parse(budget), tables_by_limit(options["latency"]), min_units=1)
    assert len(way) == 2
    for stage in way:
        limits = {name: limit for name, limit in asdict(stage).items() if limit is not None}
        plan = model.base_model.trim(limits, BATCHES, **options)
    return plan


@pytest.mark.parametrize("limit", ["params", "flops", "latency"])
def test_a_trim_far_down_chooses_units_in_stages(limit):
    whole = learned()
    at_once, step_by_step = clone(whole), clone(whole)
    options = {"refit": False, "latency": a_table(whole)}
    plan = at_once.base_model.trim({limit: 0.25}, BATCHES, **options)
    assert plan.to_dict() == trims_in_stages(step_by_step, {limit: 0.25}, **options).to_dict()
    torch.testing.assert_close(logits(at_once), logits(step_by_step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_late_cut_keeps_a_limit_on_latency(share):
    table = a_table(wrap(tiny_model(), budget=1.0))
    config = recipes.sensi_bert(share, "latency", trim="late", latency=table, task_type="SEQ_CLS", multiple_of=1)
    model = get_peft_model(tiny_model(), config)
    schedule = Schedule(model, 4, calibration=BATCHES)
    assert model.base_model.plan().figures()["latency_share"] == 1
    train(model, BATCHES[:2])
    schedule.step(done_steps=schedule.switches[-1])
    schedule.finish()
    assert share - 0.05 < model.base_model.plan().figures()["latency_share"] <= share


def test_the_stages_of_a_latency_share_out_what_trimming_can_save():
    whole = learned()
    plan, table = whole.base_model.plan(), a_table(whole)
    tables = {"latency": table}
    for saved, count in ((0.5, 1), (0.75, 2), (0.9, 3)):
        share = 1 - saved * (1 - table.rest / table.whole)  # of the whole model's time
        way = stages_to(plan, Budget(latency=share), tables, min_units=0)
        times = [table.whole, *(allowance(stage.latency, table.whole) for stage in way)]
        assert len(way) == count and way[-1] == Budget(latency=share)
        ratios = [(b - table.rest) / (a - table.rest) for a, b in itertools.pairwise(times)]
        assert ratios == pytest.approx([(1 - saved) ** (1 / count)] * count, rel=1e-4)
    # The fewest units need most of the time here, so the little that can be saved takes several stages.
    heavy = table_for(plan.anatomy, lambda g: {0: 0.0, 1: 10.0, g.size: 11.0})
    assert len(stages_to(plan, Budget(latency=0.92), {"latency": heavy}, min_units=1)) > 1
    assert len(stages_to(plan, Budget(latency=0.92, params=0.05), {"latency": heavy}, min_units=1)) == 4


def test_the_last_stage_is_fitted_to_the_untrimmed_model(monkeypatch):
    """Not to what the stages before have left, whose errors would add up. But the second one scores what is left."""
    whole, fitted, scored = learned(), [], []
    inner = {name: getattr(stages, name) for name in ("refit_changes", "score_units")}

    def watched(name, seen, root, *others):
        seen.append(logits(root))
        return inner[name](root, *others)

    for name, seen in (("refit_changes", fitted), ("score_units", scored)):
        monkeypatch.setattr(stages, name, partial(watched, name, seen))
    small = clone(whole)
    small.base_model.trim(0.25, BATCHES)
    assert len(fitted) == 1 and len(scored) == 2
    for seen in (fitted[0], scored[0]):
        torch.testing.assert_close(seen, logits(whole), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scored[1], logits(whole), atol=1e-3)


def test_keeping_everything_needs_no_scores(monkeypatch):
    monkeypatch.setattr("peft_sensi.tuner.decision.score_units", lambda *_: pytest.fail("units were scored"))
    plan = learned().base_model.plan()
    assert plan.params_share == 1 and not plan.trims


def test_the_recipe_cuts_late():
    config = recipes.sensi_bert(0.5, trim="late")
    assert config.schedule == {"phase": "cut", "start": 0.6, "end": 0.6, "cuts": 1} and config.score == "fisher"
    with pytest.raises(SensiError, match="refit"):
        SensiConfig(budget=0.5, schedule={**LATE, "refit": "yes"})


@pytest.mark.parametrize("config", [{"update": "dense+low_rank", "rank": 2}, {}], ids=["low rank", "dense"])
def test_a_refit_is_what_least_squares_says(config):
    """What the trimmed adapter computes with is the refitted weight, also where a low-rank term is added to it."""
    model, found = learned(**config), {}
    for name in ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.attention.output.dense"):
        layer = model.base_model.model.get_submodule(name)
        if config:
            with torch.no_grad():
                layer.sensi_up["default"].normal_()
    inner = in_place.refit

    def watched(*args):
        found.update(inner(*args))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "refit", watched)
        model.base_model.trim(0.5, calibration=tiny_batches(16, seed=4))
    small = model.merge_and_unload()
    assert found
    for name, (weight, bias) in found.items():
        torch.testing.assert_close(small.get_submodule(name).weight, weight, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(small.get_submodule(name).bias, bias, atol=1e-5, rtol=1e-5)


def test_a_phase_that_is_not_a_cut_stays(tmp_path):
    """After the dense part was frozen and the adapter trimmed, memory and file agree about what is trained next."""
    model = wrap(tiny_model(), **{**FULL, "budget": None}, update="dense+low_rank", rank=2, retention=0.0,
                 schedule={"phase": "freeze_dense", "epochs": 1})  # fmt: skip
    phases = Schedule(model, 4, steps_per_epoch=2)
    for _ in range(4):
        phases.step()
    phases.finish()
    model.base_model.trim(0.5, calibration=BATCHES)
    assert model.peft_config["default"].phase == "freeze_dense"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    counts = []
    for one in (model, again):
        Schedule(one, 4, steps_per_epoch=2).step()
        counts.append(sum(p.numel() for p in one.parameters() if p.requires_grad))
    assert counts[0] == counts[1]


def test_a_trim_refits_on_more_batches_than_it_scores_unless_they_are_long():
    config = SensiConfig(budget=1.0, calibration_steps=2)  # of which a trim scores 6
    batches = tiny_batches(60)
    assert to_refit(batches, config) == batches[:18] and to_fit_jointly(batches, config) == []
    long = [{"input_ids": torch.zeros(REFIT_TOKENS // 8, 1, dtype=torch.long)}] * 60
    assert len(to_refit(long, config)) == 8 and len(to_fit_jointly(long, config)) == 16
    assert len(to_fit_jointly([{"input_ids": torch.zeros(LEAST_JOINT_TOKENS // 32, 1)}] * 60, config)) == 48
    for without_tokens in (long[0] | {"input_ids": None}, {"pixel_values": torch.zeros(1, 3, 2, 2)}):
        assert len(to_refit([without_tokens] * 9, config)) == 6
    assert len(to_refit([{"input_ids": torch.zeros(REFIT_TOKENS, 1)}] * 9, config)) == 6


def test_batches_that_no_fit_would_use_are_not_read():
    """Images are large, and all batches that are read are held."""
    config = SensiConfig(budget=1.0, calibration_steps=2)  # of which a trim scores 6
    images = [{"pixel_values": torch.zeros(1, 3, 2, 2)}] * 60
    long = [{"input_ids": torch.zeros(JOINT_TOKENS // 8, 1)}] * 60
    short = tiny_batches(60)
    for batches, count in ((images, 6), (long, 8), (short, 48)):
        remaining = iter(batches)
        assert len(read_batches(remaining, config)) == count and len(list(remaining)) == 60 - count


def test_a_checkpoint_from_before_a_trim_makes_the_model_whole_with_a_warning(tmp_path):
    """A training that resumes after a trim may find the larger checkpoint of the training before it."""
    model = learned()
    whole = get_peft_model_state_dict(model)
    kept = model.base_model.plan().kept_params
    model.base_model.trim(0.5, calibration=BATCHES)
    half = get_peft_model_state_dict(model)
    with pytest.warns(UserWarning, match="keeps 100.0% of the heads' and neurons' parameters.*Call `trim` again"):
        set_peft_model_state_dict(model, whole)
    assert model.base_model.plan().kept_params == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        set_peft_model_state_dict(model, half)  # the smaller one is what was asked for
    assert model.base_model.plan().params_share <= 0.5


def test_an_adapter_whose_cut_has_not_come_is_used_with_a_warning(tmp_path):
    wrap(tiny_model(), budget=0.5, schedule=recipes.LATE_CUT).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was saved before its schedule had removed any unit"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
