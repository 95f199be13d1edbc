"""A cut during training: where the optimizer can follow, the steps after it run on smaller matrices."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from test_undo import Interrupt, state
from tiny import assert_same_tensors, interrupted, logits, snapshot, some_slow, tiny_batches, tiny_model, wrap
from torch import nn, optim
from torch.utils.flop_counter import FlopCounterMode

from peft_sensi import Schedule, SensiError
from peft_sensi.layers.layer import layers_of
from peft_sensi.tuner import carry, schedule, stale, wrapping
from peft_sensi.tuner.latencies import exceeds
from peft_sensi.utils.states import TRIMMED


CUT = {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}
STEPS = 4
CALIBRATION = tiny_batches(3, seed=4)
OPTIMIZERS = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "foreach": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2),
    "sgd": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "plain sgd": lambda p: optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p, lr=1e-3),
    "asgd": lambda p: optim.ASGD(p, lr=1e-2, t0=1),
    "nadam": lambda p: optim.NAdam(p, lr=1e-3),
    "radam": lambda p: optim.RAdam(p, lr=1e-3),
    "rprop": lambda p: optim.Rprop(p, lr=1e-3),
}
UPDATES = {
    "dense": {},
    "low rank": {"update": "low_rank", "rank": 2},
    "dense and low rank": {"update": "dense+low_rank", "rank": 2},
    "a share of the neurons": {"retention": 0.5},
    "all biases": {"also_train": ["biases", "norms"]},
    "tokens": {"also_train": ["tokens", "output_biases"]},
    "whole sublayers": {"granularity": "tensor"},
    "hardly anything left": {"min_units": 0, "budget": 0.05},
    "several cuts": {"schedule": {"phase": "cut", "start": 0.2, "end": 0.5, "cuts": 2}},
    "limit on FLOPs": {"budget": {"flops": 0.4}},
}


def prepared(schedule=CUT, dtype=torch.float64, **config):
    """A model without dropout of attention weights, whose random draws depend on the number of heads."""
    model = tiny_model(dtype=dtype, attention_probs_dropout_prob=0.0)
    return wrap(
        model, **{"budget": 0.5, "score": "fisher", "calibration": CALIBRATION, "schedule": schedule, **config}
    )


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def run(model, optimizer, physical=True, clip=None, accumulate=1, batches=None):
    """Trains with a cut, and returns losses, gradient norms, and what `finish` leaves. The last loss is kept alive."""
    torch.manual_seed(0)  # dropout
    phases = Schedule(model, STEPS, calibration=CALIBRATION)
    losses, norms = [], []
    batches = batches or tiny_batches(STEPS * accumulate, seed=7)
    for step in range(STEPS):
        model.train()
        phases.step(optimizer if physical else None)
        model.train()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(clip, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(p.numel() for p in trained(model))
    phases.finish()
    return losses, norms, numbers


def compare(config, make, groups=trained, clip=None, accumulate=1):
    """Trains once with smaller matrices and once with masks. The results must be the same."""
    # Low-rank terms are float32; everything else is float64 in this file.
    close = partial(torch.testing.assert_close, **dict.fromkeys(("atol", "rtol"), 1e-4 if "rank" in config else 1e-9))
    results, models = [], []
    for physical in (True, False):
        torch.manual_seed(1)  # low-rank terms
        model = prepared(**config)
        optimizer = make(groups(model))
        results.append(run(model, optimizer, physical, clip and clip(model), accumulate))
        models.append(model)
        if physical:
            optimizer.step()
        else:
            with pytest.raises(SensiError, match="new optimizer"):  # `finish` has replaced its parameters
                optimizer.step()
    (losses, norms, small), (masked_losses, masked_norms, large) = results
    close(losses, masked_losses)
    close(norms, masked_norms)
    assert small < large
    small_model, masked = models
    assert small_model.base_model.plan() == masked.base_model.plan()
    assert small_model.peft_config["default"].to_dict() == masked.peft_config["default"].to_dict()
    close(logits(small_model), logits(masked))
    flags = [{n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} for model in models]
    assert flags[0] == flags[1]
    both = [copy.deepcopy(model).merge_and_unload() for model in models]
    close(logits(both[0]), logits(both[1]))


@pytest.mark.parametrize(
    "name", some_slow(OPTIMIZERS, "adagrad", "adadelta", "adamax", "asgd", "nadam", "radam", "rprop")
)
def test_every_elementwise_optimizer_goes_on_as_with_masks(name):
    compare({}, OPTIMIZERS[name], clip=trained)


def test_all_optimizers_that_are_followed_are_tested():
    assert carry.ELEMENTWISE == {type(make([nn.Parameter(torch.zeros(1))])) for make in OPTIMIZERS.values()}


@pytest.mark.parametrize("name", some_slow(UPDATES, "low rank", "all biases", "limit on FLOPs"))
def test_every_update_goes_on_as_with_masks(name):
    compare(UPDATES[name], OPTIMIZERS["adamw"], clip=trained)


def test_groups_of_the_optimizer_keep_their_settings():
    def groups(model):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        weights = [pair for pair in named if "bias" not in pair[0]]
        return [
            {"params": weights, "weight_decay": 0.3, "lr": 3e-3},
            {"params": [pair for pair in named if "bias" in pair[0]], "weight_decay": 0.0},
        ]

    compare(UPDATES["hardly anything left"], OPTIMIZERS["adamw"], groups)


def test_gradients_are_accumulated_over_batches():
    compare({}, OPTIMIZERS["adamw"], clip=trained, accumulate=3)


def cut(model, optimizer, done=True, **options):
    """Trains for one step, then makes the cut, unless it is not to be `done` yet."""
    phases = Schedule(model, 2, calibration=CALIBRATION, **options)
    model.train()
    phases.step(optimizer)
    model(**tiny_batches(1)[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if done:
        phases.step(optimizer)
    return phases


def masked(model) -> bool:
    return any(layer.part("gate", "default") is not None for layer in layers_of(model).values())


def test_a_gradient_from_before_the_cut_is_sliced():
    models = []
    for physical in (True, False):
        model = prepared()
        optimizer = optim.SGD(trained(model), lr=1e-2, momentum=0.9)
        phases = Schedule(model, 2, calibration=CALIBRATION)
        model.eval()
        phases.step(optimizer)
        for _ in range(2):
            model(**tiny_batches(1)[0]).loss.backward()
            phases.step(optimizer if physical else None)  # in the first round not the first step, but the cut
            assert masked(model) != physical
        optimizer.step()
        phases.finish()
        models.append(model)
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=1e-9, rtol=1e-9)


def test_steps_after_the_cut_need_fewer_operations():
    operations = []
    for physical in (True, False):
        model = prepared(dtype=torch.float32)
        optimizer = optim.AdamW(trained(model), lr=1e-3)
        phases = Schedule(model, 2, calibration=CALIBRATION)
        for _ in range(2):
            phases.step(optimizer if physical else None)
            model.train()
            with FlopCounterMode(display=False) as counter:
                model(**tiny_batches(1)[0]).loss.backward()
            operations.append(counter.get_total_flops())
    before, after, masked_before, masked_after = operations
    assert before == masked_before == masked_after
    assert after < 0.62 * before  # half of the blocks; the head and the norms stay


def test_everything_that_holds_parameters_holds_those_of_the_model():
    model = prepared()
    optimizer = optim.AdamW(trained(model), lr=1e-2)
    scheduler = optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
    shapes = {id(p): p.shape for p in trained(model)}
    calls = []
    hooked = layers_of(model)["base_model.model.bert.encoder.layer.0.intermediate.dense"].part("weight", "default")
    hooked.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    cut(model, optimizer)
    after = {id(p): p.shape for p in trained(model)}
    assert shapes.keys() == after.keys() and shapes != after
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == after.keys()
    for p in trained(model):
        assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == p.shape
        assert optimizer.state[p]["step"] == 1
    model(**tiny_batches(1)[0]).loss.backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] > 5e-3
    assert calls[-1] == hooked.shape != calls[0]


def test_removed_parameters_have_no_gradient_that_nothing_clears():
    model = prepared(min_units=0, budget=0.05)
    before = trained(model)
    optimizer = optim.SGD(before, lr=1e-2)
    phases = Schedule(model, 2, calibration=CALIBRATION)
    phases.step(optimizer)
    model(**tiny_batches(1)[0]).loss.backward()
    phases.step(optimizer)
    now = {id(p) for p in trained(model)}
    removed = [p for p in before if id(p) not in now]
    assert removed and all(p.grad is None for p in removed)


def test_removed_parameters_leave_the_optimizer():
    """What is saved with a checkpoint is what an optimizer that is made for the smaller model can load."""
    model = prepared(min_units=0, budget=0.05)
    optimizer = optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    count = len(optimizer.param_groups[0]["params"])
    cut(model, optimizer)
    plan, group = model.base_model.plan(), optimizer.param_groups[0]
    assert any((plan.of(g) == TRIMMED).all() for g in plan.anatomy.trimmable)
    assert count > len(group["params"]) == len(group["param_names"]) == len(optimizer.state) == len(trained(model))
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in group["params"]] == group["param_names"]
    fresh = optim.AdamW(trained(model), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    assert all(fresh.state[p]["exp_avg"].shape == p.shape for p in trained(model))


def test_the_wrapper_of_accelerate_is_looked_into():
    model = prepared()
    optimizer = Accelerator(cpu=True).prepare(optim.AdamW(trained(model), lr=1e-2))
    cut(model, optimizer)
    assert not masked(model)
    model(**tiny_batches(1)[0]).loss.backward()
    optimizer.step()


# -- where masks stay -------------------------------------------------------------------------------------------------


class Own(optim.AdamW):
    """Nobody knows what a subclass does."""


def other_half(model):
    return [p for n, p in model.named_parameters() if p.requires_grad and "layer.0" not in n]


OBSTACLES = {
    "subclass": (lambda m: Own(trained(m), lr=1e-2), {}, "the state of Own"),
    "factored": (lambda m: optim.Adafactor(trained(m), lr=1e-2), {}, "the state of Adafactor"),
    "capturable": (lambda m: optim.Adamax(trained(m), lr=1e-2, capturable=True), {}, "CUDA graph"),
    "two optimizers": (lambda m: optim.AdamW(other_half(m), lr=1e-2), {}, "does not hold all trained parameters"),
    "single values": (
        lambda m: optim.AdamW(trained(m), lr=1e-2),
        {"update": "low_rank+sparse", "rank": 2, "sparse": 20},
        "single values",
    ),
    "new biases": (
        lambda m: optim.AdamW(trained(m), lr=1e-2),
        {"retention": 0.5, "also_train": ["output_biases"], "min_units": 0, "budget": 0.02},
        "biases of removed sublayers",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_masks_stay_where_the_optimizer_cannot_follow(name, caplog, monkeypatch):
    make, config, reason = OBSTACLES[name]
    model = prepared(dtype=torch.float32, **config)
    optimizer = make(model)
    if name == "capturable":  # on a CPU it cannot step
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with caplog.at_level(logging.INFO, logger="peft_sensi"):
        phases = cut(model, optimizer)
    assert [reason in record.getMessage() for record in caplog.records if "stay masked" in record.message] == [True]
    assert masked(model)
    model(**tiny_batches(1)[0]).loss.backward()
    optimizer.step()
    phases.finish()
    assert not masked(model) and not exceeds(model.base_model.plan(), model.peft_config["default"])


class KeepsCopies(optim.SGD):
    """Keeps a copy of each value, and computes the next values from it."""

    @torch.no_grad()
    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        for p in held:
            self.state[p].setdefault("copy", p.clone())
            self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.1)
        super().step(closure)
        for p in held:
            self.write_back(p, self.state[p]["copy"])


class Lookahead(KeepsCopies):
    def write_back(self, p, copy):
        p.copy_(copy.lerp_(p, 0.5))


class ScheduleFree(KeepsCopies):
    def write_back(self, p, copy):
        p.lerp_(copy, 0.3)


class Masters(KeepsCopies):
    def write_back(self, p, copy):
        p.copy_(copy)


@pytest.mark.parametrize("make", [Lookahead, ScheduleFree, Masters])
def test_an_optimizer_with_copies_of_the_values_does_not_undo_a_cut(make):
    model = prepared({**CUT, "start": 0.25, "cuts": 2})
    optimizer = make(trained(model), lr=0.0)  # so that only the cuts change values
    phases = Schedule(model, STEPS, calibration=CALIBRATION)
    changed = []
    for batch in tiny_batches(STEPS):
        before, averages = snapshot(model), [state["average"].clone() for state in optimizer.state.values()]
        phases.step(optimizer)
        after = snapshot(model)
        changed.append(any(not torch.equal(before[n], after[n]) for n in before if "sensi_weight" in n))
        assert all(map(torch.equal, averages, (state["average"] for state in optimizer.state.values())))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(snapshot(model), after, atol=1e-12, rtol=0)
    assert changed[1] and not changed[0]  # a cut refits


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_masks_stay_in_a_compiled_model():
    model = prepared()
    phases = Schedule(torch.compile(model), 2, calibration=CALIBRATION)
    phases.step(optim.AdamW(trained(model)), done_steps=1)
    assert masked(model)
    assert not Schedule(model, 2, calibration=CALIBRATION).keeps_shapes
    model.base_model.model.bert.encoder.layer[0].compile()  # a part of it; this wraps no module
    assert Schedule(model, 2, calibration=CALIBRATION).keeps_shapes


def test_masks_stay_where_several_processes_may_train(group):
    model = prepared()
    Schedule(model, 2, calibration=CALIBRATION).step(optim.AdamW(trained(model)), done_steps=1)
    assert masked(model)


# -- failures ---------------------------------------------------------------------------------------------------------


def settings(model):
    config = model.peft_config["default"]
    return {**config.to_dict(), "past_cuts": config.past_cuts}


def states_of(optimizer):
    return {
        (i, key): value.clone()
        for i, p in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[p].items()
    }


@pytest.mark.parametrize("where", ["wrap_module", "kept_parts", "_assign"])
def test_a_cut_that_fails_while_parameters_shrink_leaves_the_masks(where, monkeypatch):
    model = prepared(min_units=0, budget=0.05)
    optimizer = optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    parameters, groups = trained(model), copy.copy(optimizer.param_groups[0])
    seen = {}
    shrink = schedule.shrink

    def watched(*args, **kwargs):
        seen.update(snapshot(model), states=states_of(optimizer), config=settings(model))
        shrink(*args, **kwargs)

    module = wrapping if where == "wrap_module" else carry
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "shrink", watched)
        patch.setattr(module, where, interrupted(getattr(module, where)))
        with pytest.raises(KeyboardInterrupt):
            cut(model, optimizer)
    states, config = seen.pop("states"), seen.pop("config")
    assert_same_tensors(snapshot(model), seen)
    assert settings(model) == config
    found = states_of(optimizer)
    assert found.keys() == states.keys() and all(torch.equal(found[key], states[key]) for key in states)
    assert [id(p) for p in trained(model)] == [id(p) for p in parameters]
    assert {k: len(v) for k, v in optimizer.param_groups[0].items() if k.startswith("param")} == {
        k: len(v) for k, v in groups.items() if k.startswith("param")
    }
    model(**tiny_batches(1)[0]).loss.backward()
    optimizer.step()
    Schedule(model, 2, calibration=CALIBRATION).finish()
    assert not exceeds(model.base_model.plan(), model.peft_config["default"])


def interrupt_removal(points: int, follows: bool, **config) -> int:
    """Interrupts the removal of closed units at evenly spread lines, and at the last ones. Returns how often."""
    model = prepared(**config)
    optimizer = optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    phases = cut(model, optimizer, done=False)
    phases.step()  # closes the units
    root = model.base_model.model
    plan = schedule.open_units(root, model.peft_config["default"], "default")

    def remove(model, optimizer):
        stale._stale.clear()  # each call goes through all of them
        wrapping.shrink(model, model.peft_config["default"], "default", plan, optimizer=optimizer if follows else None)

    for _ in range(2):  # the first call runs lines that no later call runs
        other, other_optimizer = copy.deepcopy((model, optimizer))
        with Interrupt() as whole:
            remove(other, other_optimizer)
    for p in trained(model):
        p.grad = torch.ones_like(p)
    before, tensors, states, fields = state(model), snapshot(model), states_of(optimizer), settings(model)
    interrupts = 0
    for at in sorted({*range(1, whole.lines, whole.lines // points), *range(whole.lines - 40, whole.lines)}):
        with suppress(KeyboardInterrupt), Interrupt(at) as run_:
            remove(model, optimizer)
        if run_.lines < at or state(model) != before:
            assert at > whole.lines - 4, f"line {at} of {whole.lines}"
            break
        interrupts += 1
        assert settings(model) == fields and all(p.grad.shape == p.shape for p in trained(model))
        found = states_of(optimizer)
        assert found.keys() == states.keys() and all(torch.equal(found[key], states[key]) for key in states)
    else:
        assert_same_tensors(snapshot(model), tensors)
        optimizer.step()  # it is not refused
    return interrupts


@pytest.mark.parametrize("follows", [True, False])
def test_an_interrupt_leaves_the_masks_and_the_optimizer(follows):
    assert interrupt_removal(10, follows, min_units=0, budget=0.05) > 40


@pytest.mark.slow
@pytest.mark.parametrize("follows", [True, False])
def test_many_interrupts_leave_the_masks_and_the_optimizer(follows):
    print(interrupt_removal(300, follows, min_units=0, budget=0.05), "interrupts")


def test_a_failed_finish_leaves_the_config(monkeypatch):
    model = prepared(min_units=0, budget=0.05)
    phases = Schedule(model, 2, calibration=CALIBRATION)
    phases.step(done_steps=1)
    before = settings(model)

    def failing(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(wrapping, "wrap_module", failing)
        with pytest.raises(MemoryError):
            phases.finish()
    assert settings(model) == before and "removed_biases" not in before["also_train"]
    phases.finish()
    assert "removed_biases" in model.peft_config["default"].also_train
