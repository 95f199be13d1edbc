"""`Trainer` with a cut during training: matrices become smaller at the cut, and old checkpoints can be loaded."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from test_trainer import state, trainer, wrapped
from tiny import assert_same_tensors, logits, tiny_batches, tiny_model
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_sensi import Schedule, SensiCallback, SensiError, SensiLoadError
from peft_sensi.layers.layer import layers_of
from peft_sensi.tuner.latencies import exceeds
from peft_sensi.utils.states import TRIMMED


ONE = {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}  # at step 4 of 8
TWO = {"phase": "cut", "start": 0.25, "end": 0.5, "cuts": 2}  # at steps 2 and 4
LEFT = {"half": {"budget": 0.5}, "whole sublayers": {"budget": 0.05, "min_units": 0}}


def cutting(rows, schedule=ONE, **config):
    torch.manual_seed(0)
    return wrapped(rows, **{"budget": 0.5, "schedule": schedule, "multiple_of": 1, **config})


def run(model, rows, folder, *callbacks, **changes):
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    cuts = SensiCallback(loader)
    one = trainer(
        model, rows, folder, callbacks=[cuts, *callbacks], **{"save_strategy": "steps", "save_steps": 1, **changes}
    )
    return one, cuts


def masked(model) -> bool:
    return any(layer.part("gate", "default") is not None for layer in layers_of(model).values())


class Holder(torch.nn.Module):
    """A module of the user's own around the `PeftModel`."""

    def __init__(self, held) -> None:
        super().__init__()
        self.held = held

    def forward(self, **batch):
        return self.held(**batch)


class Sizes(TrainerCallback):
    """The number of trained values and of values in the optimizer's state at the end of each step."""

    def __init__(self) -> None:
        self.trained, self.held = [], []

    def on_step_end(self, args, state_, control, model, optimizer, **kwargs):
        self.trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        self.held.append(sum(s["exp_avg"].numel() for s in optimizer.state.values()))


def test_the_model_may_be_inside_of_another_module(rows, tmp_path):
    models = [cutting(rows), cutting(rows)]
    sizes = Sizes()
    for whole in (models[0], Holder(models[1])):
        run(whole, rows, tmp_path, sizes, save_strategy="no", remove_unused_columns=False)[0].train()
    assert models[0].base_model.plan() == models[1].base_model.plan()
    assert_same_tensors(state(models[0]), state(models[1]))
    assert sizes.trained[:8] == sizes.trained[8:] and sizes.trained[4] < sizes.trained[3]
    own = cutting(rows)
    assert Schedule(Holder(own), 8, calibration=tiny_batches()).model is own


@pytest.mark.parametrize(("schedule", "left"), [(ONE, "whole sublayers"), (TWO, "half")], ids=["one cut", "two cuts"])
def test_a_resumed_training_equals_the_uninterrupted_one(schedule, left, rows, tmp_path):
    sizes = Sizes()
    whole = cutting(rows, schedule, **LEFT[left])
    run(whole, rows, tmp_path / "whole", sizes)[0].train()
    assert sizes.trained == sizes.held
    assert len(set(sizes.trained[:4])) == len(set(sizes.trained[4:])) == 1 and sizes.trained[4] < sizes.trained[3]
    for saved_after in (3, 4, 5):
        checkpoint = f"checkpoint-{saved_after}"
        shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / str(saved_after) / checkpoint)
        again = cutting(rows, schedule, **LEFT[left])
        run(again, rows, tmp_path / str(saved_after))[0].train(resume_from_checkpoint=True)
        assert again.base_model.plan() == whole.base_model.plan()
        assert_same_tensors(state(again), state(whole))
        configs = [m.peft_config["default"].to_dict() for m in (again, whole)]
        assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "whole" / "checkpoint-8")
    assert torch.equal(logits(loaded), logits(whole)) and loaded.base_model.plan() == whole.base_model.plan()


class TwoSets(torch.optim.SGD):
    """Trains values that are twice those in which it results, and exchanges them as schedule-free optimizers do."""

    trains = True

    def exchange(self, trains: bool) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data.mul_(1 if trains == self.trains else 2 if trains else 0.5)
        self.trains = trains

    def train(self) -> None:
        self.exchange(True)

    def eval(self) -> None:
        self.exchange(False)


@pytest.mark.parametrize("schedule", [ONE, None], ids=["with a cut", "without a schedule"])
def test_an_optimizer_with_two_sets_of_values_ends_with_its_results(schedule, rows, tmp_path):
    model = cutting(rows, schedule, refit=False)
    start = state(model)
    optimizer = TwoSets([p for p in model.parameters() if p.requires_grad], lr=0.0)
    one, _ = run(model, rows, tmp_path, save_strategy="no")
    one.optimizer = optimizer
    one.train()
    one.evaluate(rows)
    name = next(name for name in start if "layer.0.output.dense" in name and "bias" in name)
    torch.testing.assert_close(state(model)[name], start[name] / 2)
    assert not masked(model)


class Stream(torch.utils.data.IterableDataset):
    """Rows without a known number."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_of_rows(rows, tmp_path):
    model = cutting(rows)
    one, _ = run(model, Stream(rows), tmp_path, max_steps=8)
    one.train()
    assert model.plan().params_share <= 0.5 and not masked(model)
    counting = cutting(rows, {"phase": "freeze_dense", "epochs": 1}, update="dense+low_rank", rank=2)
    one, _ = run(counting, Stream(rows), tmp_path / "other", max_steps=8)
    with pytest.raises(SensiError, match="counts epochs.*data without a length"):
        one.train()
    one.remove_callback(SensiCallback)
    one.add_callback(callback := SensiCallback(steps_per_epoch=3))
    one.train()
    assert callback.schedule.switches == [3]


@pytest.mark.parametrize("resumed_from", [3, 5])
def test_a_plan_is_explained_by_the_scores_of_its_cut(resumed_from, rows, tmp_path):
    whole, again = cutting(rows), cutting(rows)
    run(whole, rows, tmp_path)[0].train()
    scores = whole.base_model.scores_of("default")
    for group in whole.plan().anatomy.trimmable:
        kept = whole.plan().of(group) != TRIMMED
        assert kept.all() or scores.values[group.name][kept].min() >= scores.values[group.name][~kept].max()
    for step in range(resumed_from + 1, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    run(again, rows, tmp_path)[0].train(resume_from_checkpoint=True)
    assert again.plan() == whole.plan()
    if resumed_from == 3:
        assert again.explain() == whole.explain()
    else:  # the cut was made by another process
        with pytest.raises(SensiError, match="not stored with an adapter or a checkpoint"):
            again.explain()


def test_a_checkpoint_from_after_the_cut_is_followed_also_under_other_limits(rows, tmp_path):
    """As when a latency is limited and the machine was measured again: the same plan then takes another time."""
    whole = cutting(rows)
    run(whole, rows, tmp_path)[0].train()
    for step in (6, 7, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = cutting(rows, budget=0.4)
    with pytest.warns(UserWarning, match="keeps more units than the budget"):
        run(again, rows, tmp_path)[0].train(resume_from_checkpoint=True)
    assert again.base_model.plan() == whole.base_model.plan()
    assert_same_tensors(state(again), state(whole))


def test_checkpoints_with_and_without_a_schedule_do_not_mix(rows, tmp_path):
    for ours, theirs, words in ((ONE, None, "without one. Wrap"), (None, ONE, "has no schedule with a cut")):
        folder = tmp_path / str(theirs is None)
        run(cutting(rows, theirs, budget=1.0 if theirs is None else 0.5), rows, folder, max_steps=2)[0].train()
        shutil.rmtree(folder / "checkpoint-2")  # with a schedule, it is from after the cut
        with pytest.raises(SensiLoadError, match=words):
            run(cutting(rows, ours), rows, folder)[0].train(resume_from_checkpoint=True)


class Best(TrainerCallback):
    """Makes one step the best."""

    def __init__(self, step) -> None:
        self.step = step

    def on_evaluate(self, args, state_, control, metrics, **kwargs):
        metrics["eval_own"] = float(state_.global_step == self.step)


def best(step):
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_own",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }, Best(step)


@pytest.mark.parametrize(
    ("step", "resumed"),
    [
        *((3, True), (5, False)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, False), (5, True)]),
    ],
)
def test_the_best_model_may_be_from_before_or_after_the_cut(step, resumed, rows, tmp_path):
    settings, callback = best(step)
    model = cutting(rows, **LEFT["whole sublayers"])
    one, _ = run(model, rows, tmp_path, callback, **settings)
    if resumed:  # after the cut; the best model of the training before is from before it or from its first step
        one.train()
        shutil.rmtree(tmp_path / "checkpoint-7")
        shutil.rmtree(tmp_path / "checkpoint-8")
        model = cutting(rows, **LEFT["whole sublayers"])
        one, _ = run(model, rows, tmp_path, callback, **settings)
    if step == 3:
        with pytest.warns(UserWarning, match="units are cut now"):
            one.train(resume_from_checkpoint=resumed)
    else:
        one.train(resume_from_checkpoint=resumed)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-5")
        assert torch.equal(logits(loaded), logits(model))
    assert one.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    config = model.peft_config["default"]
    assert not masked(model) and config.schedule is None and config.past_cuts is None
    assert not exceeds(model.base_model.plan(), config)
    model.save_pretrained(tmp_path / "final")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "final")), logits(model))


def test_early_stopping_before_the_cut(rows, tmp_path):
    settings, callback = best(1)
    model = cutting(rows)
    one, _ = run(model, rows, tmp_path, callback, EarlyStoppingCallback(1), **settings)
    with pytest.warns(UserWarning, match="units are cut now"):
        one.train()
    assert one.state.global_step == 2 and not exceeds(model.base_model.plan(), model.peft_config["default"])


def test_a_second_training_goes_on_with_the_same_optimizer(rows, tmp_path):
    model = cutting(rows)
    one, cuts = run(model, rows, tmp_path, save_strategy="no")
    one.train()
    before, plan = state(model), model.base_model.plan()
    one.train()
    assert cuts.schedule is None and model.base_model.plan() == plan
    after = state(model)
    assert after.keys() == before.keys() and not any(torch.equal(after[n], before[n]) for n in after if "weight" in n)


@pytest.mark.parametrize("settings", [{"torch_compile": True}, {"optim": "adafactor"}], ids=str)
def test_masks_stay_where_shapes_must(settings, rows, tmp_path, monkeypatch):
    if "torch_compile" in settings:  # only what the library sees of it
        monkeypatch.setattr(torch, "compile", lambda model, *args, **kwargs: model)
    sizes = Sizes()
    sizes.on_step_end = lambda args, state_, control, model, **kwargs: sizes.trained.append(masked(model))
    model = cutting(rows)
    run(model, rows, tmp_path, sizes, save_strategy="no", **settings)[0].train()
    assert sizes.trained == [True] * 8 and not masked(model)


def test_an_optimizer_from_before_another_plan_was_loaded_is_refused(rows, tmp_path):
    run(cutting(rows), rows, tmp_path)[0].train()
    shutil.rmtree(tmp_path / "checkpoint-7")
    shutil.rmtree(tmp_path / "checkpoint-8")
    model = cutting(rows)
    one, _ = run(model, rows, tmp_path)
    one.create_optimizer()
    with pytest.raises(SensiError, match="new optimizer"):
        one.train(resume_from_checkpoint=True)


def test_gradient_accumulation_and_clipping_equal_those_with_masks(rows, tmp_path):
    states = []
    for keeps in (False, True):
        model = cutting(rows)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        one, cuts = run(model, rows, tmp_path, save_strategy="no", per_device_train_batch_size=4,
                        gradient_accumulation_steps=2, max_grad_norm=0.1, weight_decay=0.1, optim="sgd")  # fmt: skip
        if keeps:
            begin = cuts.on_train_begin

            def with_masks(*args, begin=begin, cuts=cuts, **kwargs):
                begin(*args, **kwargs)
                cuts.schedule.keeps_shapes = True

            cuts.on_train_begin = with_masks
        one.train()
        states.append(state(model))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)
