"""Cuts during training see the trained model; the guard of schedules, their callback, and wrappers around models."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoHaConfig, LoraConfig, get_peft_model
from test_recipes import CONFIGS, DATA, PLAIN, logits
from tiny import TRIM, TUNE, assert_same_tensors, clone, snapshot, tiny_batches, tiny_model, train, trained, wrap
from torch import nn
from transformers import TrainingArguments

from peft_sensi import BudgetError, Schedule, Scores, SensiCallback, SensiConfig, SensiError
from peft_sensi.anatomy.modules import linear_of
from peft_sensi.layers.layer import SensiLayer
from peft_sensi.scoring.calibration import preserved
from peft_sensi.scoring.gates import gate_gradients
from peft_sensi.tuner import cuts, stages
from peft_sensi.tuner.in_place import merged_in_place
from peft_sensi.tuner.schedule import unwrapped


CUT = {"phase": "cut", "start": 0.25, "end": 0.75, "cuts": 2}


def scheduled(**config):
    config = {"task_type": "SEQ_CLS", "calibration_steps": 2, "multiple_of": 1, "budget": {"params": 0.5}, **config}
    model = get_peft_model(tiny_model(), SensiConfig(schedule=CUT, **config))
    return model, Schedule(model, 8, calibration=DATA["calibration"])


def opened(model) -> dict[str, np.ndarray]:
    return {name: gate.numpy() > 0 for name, gate in cuts.gates_of(model.base_model.model, "default").items()}


def layers_of(model, adapter_name: str = "default") -> dict[str, SensiLayer]:
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SensiLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.sensi_slices}


def test_limits_that_no_plan_meets_are_refused_before_the_training():
    """The cut comes after more than half of the training, which would be lost."""
    with pytest.raises(BudgetError, match="too small for .* lower `multiple_of`"):
        wrap(tiny_model(), budget=0.01, schedule=CUT)
    with pytest.raises(BudgetError, match="too small for"):
        wrap(tiny_model(), budget={"params": 0.5, "flops": 100}, schedule=CUT, score="fisher")
    model = wrap(tiny_model(), budget=0.01, schedule=CUT, min_units=0)
    model.peft_config["default"].budget = {"latency": 0.5}  # as in an adapter from a file, which holds no tables
    with pytest.raises(BudgetError, match="needs a latency table"):
        Schedule(model, 8, calibration=DATA["calibration"])


def test_a_budget_that_keeps_the_whole_model_is_noticed():
    with pytest.warns(UserWarning, match="meets the budget 1.0, so the cuts of the schedule remove nothing"):
        model = wrap(tiny_model(), budget=1.0, schedule=CUT)
    schedule = Schedule(model, 8)
    schedule.step(done_steps=6)
    schedule.finish()
    assert model.base_model.plan().params_share == 1


@pytest.mark.parametrize(("budget", "scored", "refitted"), [(0.5, 4, 8), (0.2, 6, 18)])
def test_a_cut_in_one_stage_reads_twice_as_many_batches_as_a_wrap(budget, scored, refitted, monkeypatch):
    """Training follows it. A cut in several stages reads as many as a trim."""
    read = []
    score, fit = stages.score_units, stages.refit_changes

    def counted_scores(root, anatomy, batches, options):
        read.append(len(batches[: options.calibration_steps]))
        return score(root, anatomy, batches, options)

    def counted_fit(root, plan, batches, *rest):
        read.append(len(batches))
        return fit(root, plan, batches, *rest)

    monkeypatch.setattr(stages, "score_units", counted_scores)
    monkeypatch.setattr(stages, "refit_changes", counted_fit)
    config = {"calibration_steps": 2, "multiple_of": 1, "score": "fisher"}
    model = wrap(tiny_model(), budget=budget, schedule={**CUT, "cuts": 1}, **config)
    Schedule(model, 8, calibration=tiny_batches(60)).step(done_steps=2)
    assert (read[0], read[-1]) == (scored, refitted)


def test_a_cut_that_fails_is_made_when_it_is_called_again(monkeypatch):
    model, schedule = scheduled(score="fisher")
    schedule.step()
    schedule.step()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "score_units", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            schedule.step()
    assert all(gate.all() for gate in opened(model).values())
    assert schedule.step() and not all(gate.all() for gate in opened(model).values())
    assert not schedule.step()


# -- what a cut ranks -------------------------------------------------------------------------------------------------


def test_a_second_cut_by_movement_ranks_what_is_open():
    """The update reaches queries and values only; neurons are ranked by the size of their weights at every cut."""
    model, schedule = scheduled(score="movement", update="low_rank", rank=2, target_modules=["query", "value"])
    anatomy = model.base_model.plan().anatomy
    train(model, steps=2)
    schedule.step(done_steps=2)
    first = opened(model)
    assert 0 < sum(int(gate.sum()) for gate in first.values()) < sum(map(len, first.values()))
    train(model, steps=2)
    schedule.step(done_steps=6)
    second = opened(model)
    for group in anatomy.trimmable:
        before, after = first[group.output], second[group.output]
        assert not (after & ~before).any(), "a closed unit was opened again"
        if group.kind == "neuron":
            size = sum(
                side.per_unit(linear_of(tiny_model(), side.module).weight.detach(), group.size).abs().sum(1)
                for side in group.sides
            ).numpy()
            assert size[after].min() > size[before & ~after].max(initial=0)
            assert after.sum() > 8
    schedule.finish()
    assert 0.49 < model.base_model.plan().params_share <= 0.5


@pytest.mark.parametrize("score", ["movement", "magnitude", "fisher", "random"])
def test_closed_units_stay_closed_where_open_ones_tie(score, monkeypatch):
    """All scores are zero, so nothing but the index is left to rank by."""
    model, schedule = scheduled(score=score)
    schedule.step(done_steps=2)
    first = opened(model)

    def zeros(root, anatomy, *_, **__):
        return {g.name: g.zeros() for g in anatomy.groups}

    monkeypatch.setattr(cuts, "trained_movement", zeros)
    monkeypatch.setattr(stages, "score_units", lambda *a, **k: Scores(zeros(*a), "random"))
    schedule.step(done_steps=6)
    for name, after in opened(model).items():
        # Only what is left of the budget may open units again, in a group that has lost none.
        assert not (after & ~first[name]).any() or (after >= first[name]).all(), name


@pytest.mark.parametrize("config", [{"update": "low_rank", "rank": 2}, {"budget": {"trainable": 0.1}}], ids=str)
def test_a_mask_that_is_drawn_again_does_not_depend_on_the_old_one(config):
    model = wrap(tiny_model(), **config, sparsity=0.3, schedule={"phase": "draw_mask", "at": 0.5})
    schedule = Schedule(model, 4)
    train(model)
    masks = []
    for _ in range(2):
        assert schedule.step(done_steps=2)
        masks.append({name: layer.part("bits", "default").clone() for name, layer in layers_of(model).items()})
    assert_same_tensors(*masks)


@pytest.mark.parametrize("config", [{"sparsity": 1e-4}, {"sparsity": 0.3, "budget": 0.28, "min_units": 0}])
def test_a_mask_that_removes_nothing_of_a_layer_is_drawn_once(config, recwarn):
    model = wrap(tiny_model(), update="low_rank", rank=2, schedule={"phase": "draw_mask", "at": 0.5}, **config)
    schedule = Schedule(model, 4)
    assert schedule.step(done_steps=2)
    train(model)
    before = snapshot(model)
    recwarn.clear()
    schedule.finish()
    assert not recwarn.list
    assert_same_tensors(snapshot(model), before)
    model.base_model.trim(0.25)


def test_cuts_by_magnitude_see_trained_weights():
    model, schedule = scheduled(score="magnitude")
    layers = layers_of(model)
    shrunk = np.arange(0, 64, 2)
    with torch.no_grad():
        for index in (0, 1):
            path = f"bert.encoder.layer.{index}"
            for name in (f"{path}.intermediate.dense", f"{path}.output.dense"):
                weight = layers[name].part("weight", "default")
                weight.index_fill_(layers[name].sensi_slices["default"].dim, torch.from_numpy(shrunk), 1e-3)
    schedule.step(done_steps=6)
    for name, gate in opened(model).items():
        if len(gate) == 64:
            assert not gate[shrunk].any() and gate[1::2].any(), name


def test_cuts_look_for_outliers_in_the_trained_weights(monkeypatch):
    model, schedule = scheduled(score="fisher")
    layer = layers_of(model)["bert.encoder.layer.0.output.dense"]
    with torch.no_grad():
        layer.part("weight", "default")[:, 5] *= 1e4
    found = []
    make_plan = stages.make_plan
    monkeypatch.setattr(stages, "make_plan", lambda *a, **k: found.append(a[1].protected) or make_plan(*a, **k))
    schedule.step(done_steps=2)
    assert found[0]["bert.encoder.layer.0.neurons"].nonzero()[0].tolist() == [5]


# -- an adapter merged in place for a while ---------------------------------------------------------------------------


IN_PLACE = {
    "trim": TRIM,
    "tune": TUNE,
    "low rank": {"update": "low_rank", "rank": 2, "budget": 1.0},
    "low rank and sparse": {"update": "low_rank+sparse", "rank": 2, "sparse": 9, "budget": 0.6},
    "learned mask": {"update": "mask", "sparsity": 0.3, "granularity": "weight"},
    "drawn mask": {"sparsity": 0.3, "budget": {"trainable": 0.1}},
    "without the base": {"keep_base": False, **TRIM},
    "without all of the base": {"keep_base": False, "budget": 1.0},
    "embeddings": {"also_train": ["embeddings", "norms"], **TRIM},
    "tokens": {"also_train": ["tokens"], "calibration": tiny_batches(), **TRIM},
    "tokens of all": {"also_train": ["tokens"], "calibration": tiny_batches(), "budget": 1.0},
    "gates": {"schedule": CUT, **TRIM},
}


def prepared(name: str):
    model = wrap(tiny_model(), **IN_PLACE[name])
    if name == "gates":
        schedule = Schedule(model, 8)
        train(model)
        schedule.step(done_steps=2)
        assert not all(gate.all() for gate in opened(model).values())
    else:
        train(model)
    return model


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_base_layers_hold_the_trained_weights_in_the_block_and_their_own_after_it(name, error):
    model = prepared(name)
    root = model.base_model.model
    expected, before = logits(model), snapshot(model)
    tensors = {
        name: (id(m.get_base_layer().weight), m.base_layer.weight.shape) for name, m in layers_of(model).items()
    }
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapted = {name: layer.get_adapted_weight("default")[0] for name, layer in layers_of(model).items()}
    try:
        with preserved(root), merged_in_place(root, "default"):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
            for layer_name, weight in adapted.items():
                assert torch.equal(linear_of(root, layer_name).weight, weight)
            if error:
                raise RuntimeError("boom")
    except RuntimeError:
        assert error
    assert_same_tensors(snapshot(model), before)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    for layer_name, layer in layers_of(model).items():
        assert not layer.merged and (id(layer.base_layer.weight), layer.base_layer.weight.shape) == tensors[layer_name]
    assert torch.equal(logits(model), expected)
    if "base" not in name:
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_model()))


def test_an_error_while_merging_is_undone(monkeypatch):
    model = trained(**TRIM)
    expected, before = logits(model), snapshot(model)
    merge, calls = SensiLayer.merge, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError("no room")
        return merge(self, *args, **kwargs)

    monkeypatch.setattr(SensiLayer, "merge", failing)
    with pytest.raises(MemoryError), merged_in_place(model.base_model.model, "default"):
        pass
    assert not any(layer.merged for layer in layers_of(model).values())
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), expected)


def test_other_adapters_stay_out_and_what_was_merged_stays_merged():
    model = trained(**TRIM)
    model.add_adapter("second", SensiConfig(score="random", task_type="SEQ_CLS", **TUNE))
    expected, root = logits(model), model.base_model.model
    with merged_in_place(root, "default"):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(SensiError, match="set_adapter"), merged_in_place(root, "second"):
        pass
    model.merge_adapter()
    with merged_in_place(root, "default"):
        pass
    assert all(layer.merged_adapters == ["default"] for layer in layers_of(model).values())
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with (
        model.disable_adapter(),
        pytest.raises(SensiError, match="enable_adapter_l"),
        merged_in_place(root, "default"),
    ):
        pass


@pytest.mark.parametrize("name", ["tune", "low rank", "tokens of all", "gates"])
def test_gradients_of_gates_are_those_of_the_adapter(name):
    model = prepared(name)
    root, batch = model.base_model.model, tiny_batches(1, seed=4)[0]
    anatomy = model.base_model.plan().anatomy
    with preserved(root):
        expected = gate_gradients(root, anatomy, batch)
        with merged_in_place(root, "default"):
            found = gate_gradients(root, anatomy, batch)
    layers = layers_of(model)
    for group in anatomy.groups:
        gradient = expected[group.name]
        if group.in_block and group.output in layers:  # the adapter computes tuned units before frozen ones
            width = group.sides[-1].width
            order = layers[group.output].sensi_slices["default"].kept[::width] // width
            gradient = gradient[:, order.argsort()]
        torch.testing.assert_close(found[group.name], gradient, atol=1e-6, rtol=1e-4)


# -- the guard --------------------------------------------------------------------------------------------------------


def step_in_training(model) -> None:
    model.train()(**tiny_batches(1)[0])
    model.eval()


def test_every_adapter_needs_a_schedule_of_its_own():
    model = get_peft_model(tiny_model(), CONFIGS["dsee_unstructured"]())
    model.add_adapter("second", CONFIGS["dsee_unstructured"]())
    Schedule(model, 4)
    step_in_training(model)
    model.set_adapter("second")
    with pytest.raises(SensiError, match="'second' has a schedule"):
        step_in_training(model)
    Schedule(model, 4)
    step_in_training(model)
    model.set_adapter("default")
    model.delete_adapter("second")
    model.add_adapter("second", CONFIGS["dsee_unstructured"]())  # another adapter of the same name
    model.set_adapter("second")
    with pytest.raises(SensiError, match="'second' has a schedule"):
        step_in_training(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_nobody_steps_the_schedule_of_a_copy(copied):
    model = get_peft_model(tiny_model(), CONFIGS["dsee_unstructured"]())
    Schedule(model, 4)
    twin = copied(model)
    with pytest.raises(SensiError, match="has a schedule"):
        step_in_training(twin)
    step_in_training(model)
    Schedule(twin, 4)
    step_in_training(twin)


def test_a_shallow_copy_shares_the_schedule():
    model = get_peft_model(tiny_model(), CONFIGS["dsee_unstructured"]())
    twin = copy.copy(model)
    Schedule(model, 4)
    step_in_training(twin)


# -- the callback and wrappers ----------------------------------------------------------------------------------------


def mixed():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"]), mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["value"]))
    model.set_adapter(["default", "other"])
    return model


def beside_lora():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"]))
    model.add_adapter("second", LoraConfig(target_modules=["value"]))
    model.base_model.set_adapter(["default", "second"])
    return model


WITHOUT_SCHEDULE = {
    "plain": tiny_model,
    "module": lambda: nn.Linear(2, 2),
    "lora": lambda: get_peft_model(tiny_model(), LoraConfig(target_modules=["query"])),
    "two lora": beside_lora,
    "mixed": mixed,
    "sensi": lambda: wrap(tiny_model(), **TRIM),
    "inactive": lambda: inactive(),
}


def inactive():
    model = wrap(tiny_model(), **TRIM)
    model.add_adapter("second", CONFIGS["dsee_unstructured"]())
    return model


def begin(model, tmp_path) -> SensiCallback:
    callback, arguments = SensiCallback(), TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    state = SimpleNamespace(max_steps=4, global_step=0)
    callback.on_train_begin(arguments, state, None, model=model, train_dataloader=[1, 2])
    callback.on_step_begin(arguments, state, None, model=model)
    return callback


@pytest.mark.parametrize("name", WITHOUT_SCHEDULE)
def test_the_callback_does_nothing_without_a_schedule(name, tmp_path):
    callback = begin(WITHOUT_SCHEDULE[name](), tmp_path)
    assert callback.schedule is None
    callback.on_train_end(None, None, None)


@pytest.mark.parametrize("how", ["peft", "peft, second", "transformers"])
def test_the_callback_finds_the_schedule_of_the_active_adapter(how, tmp_path):
    model = tiny_model()
    if how == "transformers":
        model.add_adapter(CONFIGS["dsee_unstructured"](), adapter_name="mine")
    else:
        model = get_peft_model(model, CONFIGS["dsee_unstructured"](), adapter_name="mine")
        if how == "peft, second":
            model.add_adapter("second", SensiConfig(score="random", task_type="SEQ_CLS", **TUNE))
    assert begin(model, tmp_path).schedule.adapter_name == "mine"


def test_a_schedule_of_a_model_without_one_is_an_error():
    for name in ("lora", "sensi"):
        with pytest.raises(SensiError, match="none has one"):
            Schedule(WITHOUT_SCHEDULE[name](), 4)


@pytest.mark.parametrize("steps", [None, "3", -1, float("nan"), True])
def test_numbers_of_steps_are_checked(steps):
    model = wrap(tiny_model(), budget=0.5, schedule={"phase": "cut", "start": 0.4, "end": 0.4, "cuts": 1})
    with pytest.raises(SensiError, match="`total_steps` must be a number of optimizer steps"):
        Schedule(model, steps)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", [("ddp",), ("compile",), ("compile", "ddp"), ("ddp", "compile"),
                                   ("compile", "ddp", "compile")])  # fmt: skip
def test_wrappers_are_removed_in_any_order(order, group):
    model = outer = wrap(tiny_model(), **TUNE)
    for wrapper in order:  # the innermost first
        outer = torch.compile(outer) if wrapper == "compile" else nn.parallel.DistributedDataParallel(outer)
    assert unwrapped(outer) is model


def test_a_child_called_module_is_not_a_wrapper():
    model = get_peft_model(tiny_model(), CONFIGS["dsee_unstructured"]())
    model.module = nn.Linear(2, 2)
    assert Schedule(model, 4).model is model


def test_a_plan_that_changes_nothing_is_an_error():
    base = tiny_model()
    with pytest.raises(SensiError, match="nothing to adapt"):
        wrap(base, target_modules=["intermediate.dense"], retention=0.0, also_train=[], **PLAIN, budget=1.0)
    assert_same_tensors(snapshot(base), snapshot(clone(tiny_model())))


def test_cuts_need_a_model_with_all_units():
    """The first step failed, because the gates have the units of the base."""
    plan = wrap(tiny_model(), **TRIM).base_model.plan()
    before = snapshot(model := tiny_model())
    with pytest.raises(SensiError, match="this `plan` trims already"):
        get_peft_model(model, SensiConfig(plan=plan, budget=0.25, schedule=CUT, task_type="SEQ_CLS"))
    assert_same_tensors(before, snapshot(model))


def test_a_schedule_of_cuts_cannot_be_set_after_the_wrap():
    """It changed nothing, without a word."""
    model = wrap(tiny_model(), budget=1.0)
    model.peft_config["default"].schedule, model.peft_config["default"].budget = dict(CUT), 0.5
    with pytest.raises(SensiError, match="was made without the phase 'cut'"):
        Schedule(model, 10, calibration=tiny_batches(2))
