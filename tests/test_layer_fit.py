"""The fit of whole layers: it comes nearer to the untrimmed model than the closed form, and does no harm."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_families import CASES
from test_families_decoders import CASES as DECODERS
from test_refit import UNSEEN, data, fit, half_plan, hidden_error, only_neurons, tiny_model
from tiny import assert_same_tensors, only_slow, snapshot, tiny_batches

import peft_sensi.planning.layer_fit as layer_fit
from peft_sensi import CalibrationError, make_plan
from peft_sensi.anatomy.linears import matrix
from peft_sensi.layers.layer import layers_of
from peft_sensi.planning.trimmed import assign, trimmed


ROUNDS = 8


def error_of(model, plan, fitted, batches=UNSEEN) -> float:
    """How far the trimmed model with these values is from the untrimmed one (see `hidden_error`)."""
    small = tiny.clone(model)
    with trimmed(small, plan, plan.anatomy.trimmable):
        for name, values in fitted.items():
            assign(small.get_submodule(name), *values)
        return hidden_error(model, small, batches)


def test_it_comes_nearer_than_the_closed_form(family):
    model = tiny_model(family)
    plan = half_plan(model, 0.25)
    closed, whole = (fit(model, plan, data(model, 24), rounds=rounds) for rounds in (0, ROUNDS))
    assert set(closed) < set(whole) <= {name for group in plan.anatomy.groups for name in group.modules}
    assert error_of(model, plan, whole) < 0.95 * error_of(model, plan, closed)


def halved(name):
    """A model of another family, in which random units are trimmed, and batches to fit it to."""
    (case,) = [case for case in (*CASES, *DECODERS) if case.name == name]
    model = case.model().eval()
    anatomy = case.anatomy(model)
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, 0.5, multiple_of=1)
    return case, model, plan, [case.batch(16, seed=seed, padded=False) for seed in range(24)]


@pytest.mark.parametrize("name", ["t5", *only_slow("gpt_neox", "deberta-v3", "vit", "gpt2", "bart", "llama", "opt")])
def test_layers_of_other_families_are_fitted(name):
    """Fused projections, transposed weights, encoders with decoders: shapes are right and the error gets smaller."""
    case, model, plan, batches = halved(name)
    anatomy, before = plan.anatomy, snapshot(model)
    losses = []
    for rounds in (0, ROUNDS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("peft_sensi.planning.refit._trimmed_loss", lambda *args: 0.0)  # of random weights
            fitted = fit(model, plan, batches, rounds=rounds)
        with torch.no_grad(), trimmed(model, plan, anatomy.trimmable):
            for path, (weight, bias) in fitted.items():
                linear = model.get_submodule(path)
                assert weight.shape == matrix(linear).shape and weight.dtype == torch.float32
                assert bias is None or bias.shape == linear.bias.shape
                assign(linear, weight, bias)
            losses.append(states_of(model, case, batches))
    with torch.no_grad():
        goal = states_of(model, case, batches)
    assert (losses[1] - goal).norm() < (losses[0] - goal).norm()
    assert_same_tensors(snapshot(model), before)


def states_of(model, case, batches):
    outputs = [model(**batch, output_hidden_states=True) for batch in batches]
    names = ("decoder_hidden_states", "hidden_states", "encoder_hidden_states")
    return torch.stack([next(o[name] for name in names if o.get(name) is not None)[-1].float() for o in outputs])


@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_a_fit_may_have_any_number_of_steps(steps):
    model = tiny_model()
    assert fit(model, half_plan(model), data(model, 1), rounds=steps)


def test_two_fits_are_equal_and_draw_no_random_numbers():
    model = tiny_model()
    plan, batches = half_plan(model), data(model)
    state = torch.get_rng_state()
    first, second = (fit(model, plan, batches, rounds=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and first.keys() == second.keys()
    for name, values in first.items():
        assert all(torch.equal(a, b) for a, b in zip(values, second[name], strict=True))


def test_layers_below_the_first_trimmed_one_stay():
    model = tiny_model()
    names = set(fit(model, only_neurons(model, layers=(1,)), data(model), rounds=2))
    assert names and not any(".0." in name and "output" not in name for name in names)


def test_only_targeted_linears_of_tuned_units_change():
    model = tiny_model()
    anatomy = half_plan(model).anatomy
    targets = frozenset(name for group in anatomy.groups for name in group.modules if "key" not in name)
    plan = half_plan(model, targets=targets)
    names = set(fit(model, plan, data(model), rounds=2))
    assert names and names <= targets and any("query" in name for name in names)


def test_a_linear_that_does_not_run_stays(monkeypatch):
    """Such as a cross-attention without the states of an encoder."""
    model = tiny_model()
    for layer in model.bert.encoder.layer:
        layer.spare = torch.nn.Linear(3, 4)

    def with_spare(model, layer, names, *others):
        return layer_fit.fit_layer(model, layer, [*names, f"{layer}.spare"], *others)

    monkeypatch.setattr("peft_sensi.planning.refit.fit_layer", with_spare)
    fitted = fit(model, half_plan(model), data(model), rounds=2)
    spare = [name for name in fitted if "spare" in name]
    assert spare and any("query" in name for name in fitted)
    for name in spare:
        assert torch.equal(fitted[name][0], model.get_submodule(name).weight)


def test_a_fit_that_is_no_better_is_dropped(monkeypatch):
    model = tiny_model()
    plan, batches = half_plan(model), data(model)
    monkeypatch.setattr(layer_fit, "RATE", 100.0)
    assert fit(model, plan, batches, rounds=2).keys() == fit(model, plan, batches).keys()


def test_a_gradient_that_is_not_finite_ends_the_fit(monkeypatch):
    model = tiny_model()
    inner = layer_fit.distance

    def broken(*args):
        error, weight = inner(*args)
        return error * float("nan"), weight

    monkeypatch.setattr(layer_fit, "distance", broken)
    plan, batches = half_plan(model), data(model)
    assert fit(model, plan, batches, rounds=2).keys() == fit(model, plan, batches).keys()


@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)], ids=["row", "batch"])
def test_examples_without_tokens_do_not_end_the_fit(rows):
    model = tiny_model()
    batches = data(model)
    batches[0]["attention_mask"][rows] = 0
    fitted = fit(model, half_plan(model), batches, rounds=2)
    assert {"query", "dense"} <= {name.rpartition(".")[2] for name in fitted}


def test_a_16_bit_model_is_fitted_in_float32():
    model = tiny_model().bfloat16()
    fitted = fit(model, half_plan(model), data(model), rounds=2)
    assert any("query" in name for name in fitted)
    for weight, bias in fitted.values():
        assert weight.dtype == bias.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(
    "config", [{"update": "dense+low_rank", "rank": 2}, {"also_train": ["biases"]}, *only_slow({})]
)
def test_a_trimmed_adapter_holds_the_fitted_values(config, monkeypatch):
    """Queries, keys, values and neurons of the adapter differ from the trained ones, and the fit brings it nearer."""
    whole, changes = tiny.trained("bert", budget=1.0, calibration=tiny_batches(6, seed=3), **config), {}
    logits = []
    for rounds in (0, ROUNDS):
        monkeypatch.setattr("peft_sensi.tuner.stages.FIT_ROUNDS", rounds)
        small = tiny.clone(whole)
        small.base_model.trim(0.25, calibration=tiny_batches(24, seed=4))
        logits.append(torch.cat([tiny.logits(small, batch) for batch in UNSEEN]))
        layers = layers_of(small, "default")
        changes[rounds] = {n: layer.get_adapted_weight("default")[0] for n, layer in layers.items() if ".layer." in n}
    moved = {name for name, weight in changes[0].items() if not torch.equal(weight, changes[ROUNDS][name])}
    assert {name.rpartition(".")[2] for name in moved} == {"query", "key", "value", "dense"}
    goal = torch.cat([tiny.logits(whole, batch) for batch in UNSEEN])
    assert (logits[1] - goal).norm() < (logits[0] - goal).norm()


def test_a_loss_without_gradients_says_what_to_do():
    """Some scores need no gradients of the loss, so nothing else would fail."""

    def loss_fn(model, batch):
        with torch.inference_mode():
            return model(**batch).loss

    model = tiny_model()
    with pytest.raises(CalibrationError, match=r"`loss_fn` runs the model under.*use `torch.no_grad\(\)`"):
        fit(model, half_plan(model), data(model, 4), loss_fn=loss_fn, rounds=2)
