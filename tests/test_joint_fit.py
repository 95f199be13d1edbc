"""The fit of all layers together: it comes nearer to the untrimmed model than that of each layer, and does no harm."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_layer_fit import error_of, halved, states_of
from test_refit import UNSEEN, data, fit, half_plan, hidden_error, tiny_model
from tiny import assert_same_tensors, only_slow, snapshot, tiny_batches

import peft_sensi.planning.joint_fit as joint_fit
from peft_sensi.anatomy.linears import matrix
from peft_sensi.planning.trimmed import assign, trimmed


ROUNDS = 4


def both_fits(model, plan, batches, more, **options):
    """The values after the fit of each layer, and those after the fit of all layers to more batches."""
    return [fit(model, plan, batches, rounds=ROUNDS, joint=joint, **options) for joint in ((), more)]


@pytest.mark.parametrize("family", ["bert", *only_slow("distilbert", "roberta", "electra")])
def test_it_comes_nearer_than_the_fit_of_each_layer(family):
    model = tiny_model(family)
    plan, batches = half_plan(model, 0.25), data(model, 48)
    before = snapshot(model)
    each, together = both_fits(model, plan, batches[:24], batches)
    assert each.keys() == together.keys()
    assert error_of(model, plan, together) < 0.98 * error_of(model, plan, each)
    assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize("name", ["vit", "gpt2", *only_slow("t5", "deberta-v3", "bart", "llama", "opt")])
def test_layers_of_other_families_are_fitted(name, monkeypatch):
    case, model, plan, batches = halved(name)
    anatomy, before = plan.anatomy, snapshot(model)
    monkeypatch.setattr("peft_sensi.planning.refit._trimmed_loss", lambda *args: 0.0)  # of random weights
    distances = []
    with torch.no_grad():
        goal = states_of(model, case, batches)
        for fitted in both_fits(model, plan, batches, batches):
            with trimmed(model, plan, anatomy.trimmable):
                for path, (weight, bias) in fitted.items():
                    linear = model.get_submodule(path)
                    assert weight.shape == matrix(linear).shape and weight.dtype == torch.float32
                    assign(linear, weight, bias)
                distances.append(float((states_of(model, case, batches) - goal).norm()))
    assert distances[1] < distances[0]
    assert_same_tensors(snapshot(model), before)


def test_two_fits_are_equal_and_draw_no_random_numbers():
    model = tiny_model()
    plan, batches = half_plan(model), data(model)
    state = torch.get_rng_state()
    first, second = (fit(model, plan, batches, rounds=2, joint=batches) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and first.keys() == second.keys()
    for name, values in first.items():
        assert all(torch.equal(a, b) for a, b in zip(values, second[name], strict=True))


@pytest.mark.parametrize("tokens", [200, *only_slow(1, 10**9)])
def test_held_hidden_states_are_those_that_are_computed_again(tokens, monkeypatch):
    """Batches have 96 tokens, so a part has one, two, or all nine batches. Three others are held out."""
    model = tiny_model()
    plan, batches = half_plan(model), data(model)
    monkeypatch.setattr(joint_fit, "HELD_TOKENS", tokens)
    inner, runs, results = joint_fit.run_forward, [0, 0], []

    def counted(*args):
        runs[len(results)] += 1
        return inner(*args)

    monkeypatch.setattr(joint_fit, "run_forward", counted)
    results.append(fit(model, plan, batches, rounds=ROUNDS, joint=batches))
    computed_again = torch.no_grad()(lambda self, runner: runner(self.batch))
    monkeypatch.setattr(joint_fit._Compared, "targets", computed_again)
    results.append(fit(model, plan, batches, rounds=ROUNDS, joint=batches))
    trimmed_runs = 9 * ROUNDS + 3 * 2  # the held-out batches are compared before and after
    assert runs == [trimmed_runs + 12, 2 * trimmed_runs]
    for name, values in results[0].items():
        assert all(torch.equal(a, b) for a, b in zip(values, results[1][name], strict=True))


def test_a_fit_that_is_no_better_is_dropped(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(joint_fit, "RATE", 100.0)
    each, together = both_fits(model, half_plan(model), data(model), data(model))
    assert all(torch.equal(each[name][0], together[name][0]) for name in each)


def test_a_loss_without_gradients_fits_each_layer_only():
    """Some scores need no gradients of the loss."""

    @torch.no_grad()
    def loss_fn(model, batch):
        return model(**batch).loss

    model = tiny_model()
    each, together = both_fits(model, half_plan(model), data(model), data(model), loss_fn=loss_fn)
    assert all(torch.equal(each[name][0], together[name][0]) for name in each)


def test_the_error_is_that_of_the_hidden_states_of_all_layers():
    """The terms of the formula, computed from the outputs of the two models."""
    model = tiny_model()
    plan = half_plan(model)
    layers = list(dict.fromkeys(g.layer for g in plan.anatomy.trimmable))
    (batch,) = tiny_batches(1, size=4, labels=False)
    values = fit(model, plan, data(model), rounds=1)
    found = []

    def capture(module, linears, start, order, held_out, error_of, *others):
        found.append(error_of({}, order[0]))
        return {}

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(joint_fit, "fit_linears", capture)
        joint_fit.fit_layers(model, plan, layers, values, [batch], [batch], None, 1, False)
        whole = model(**batch, output_hidden_states=True).hidden_states[1:]
        with trimmed(model, plan, plan.anatomy.trimmable, values):
            small = model(**batch, output_hidden_states=True).hidden_states[1:]
    error = weight = 0.0
    for own, goal in zip(small, whole, strict=True):
        for row, token in batch["attention_mask"].nonzero().tolist():
            variance = goal[row, token].var()
            error += float((own[row, token] - goal[row, token]).square().sum() / variance)
            weight += float(1 / variance)
    assert found[0][1] == pytest.approx(weight, rel=1e-4) and float(found[0][0]) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("budget", "fits"), [(0.5, 0), (0.25, 1)])
def test_a_trim_in_stages_fits_all_layers_together(budget, fits, monkeypatch):
    """To more batches than each layer; the trimmed adapter holds the values and is nearer to the untrimmed one."""
    whole = tiny.trained("bert", budget=1.0, calibration=tiny_batches(6, seed=3))
    monkeypatch.setattr("peft_sensi.tuner.rescoring.LEAST_JOINT_TOKENS", 1)
    batches, counts = tiny_batches(60, seed=4), []
    inner = joint_fit.fit_layers

    def counted(*args):
        counts.append([len(args[i]) for i in (4, 5)])
        return inner(*args)

    distances = []
    for fit_layers in (counted, lambda *args: {}):
        monkeypatch.setattr("peft_sensi.planning.refit.fit_layers", fit_layers)
        small = tiny.clone(whole)
        small.base_model.trim(budget, calibration=batches)
        distances.append(hidden_error(whole.eval(), small.eval(), UNSEEN))
    assert counts == [[52, 8]] * fits
    assert distances[0] < distances[1] if fits else distances[0] == distances[1]
