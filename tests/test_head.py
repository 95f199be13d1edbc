"""A fresh task head starts as priming left it, and at the prior of the labels if that explains most of them."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same_tensors, snapshot, tiny_batches, tiny_model, wrap
from torch import nn

from peft_sensi import compute_scores
from peft_sensi.scoring.calibration import ScoringOptions
from peft_sensi.scoring.priming import primed


def fresh(**changes) -> nn.Module:
    """A model with a fresh head as Transformers makes it: the bias of the last Linear is exactly zero."""
    model = tiny_model(**changes)
    nn.init.zeros_(model.classifier.bias)
    return model


def head(model) -> nn.Module:
    return model.base_model.model.classifier.modules_to_save["default"]


def log_prior(batches) -> torch.Tensor:
    labels = torch.cat([b["labels"] for b in batches])
    counts = torch.bincount(labels, minlength=3) + 1.0
    return (counts / counts.sum()).log()


def skewed(count: int = 3, labels=(0, 0, 0, 0)) -> list[dict[str, torch.Tensor]]:
    return [{**batch, "labels": torch.tensor(labels)} for batch in tiny_batches(count)]


EVEN = (0, 0, 0, 2)  # more than half of the largest entropy


OPTIONS = [
    {"score": "magnitude", "priming_steps": 0},
    {"score": "random", "priming_steps": 0},
    {"score": "fisher", "priming_steps": 0},
    {"score": "magnitude", "priming_steps": 0, "budget": {"trainable": 0.1}},
    {"update": "low_rank", "rank": 2, "budget": None},  # nothing is scored, so nothing is primed
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_priming_a_fresh_head_starts_at_the_log_prior(options):
    batches = skewed()
    model = wrap(fresh(), **{"budget": 0.5, "calibration": batches, **options})
    torch.testing.assert_close(head(model).bias.detach(), log_prior(batches))
    assert torch.equal(head(model).weight, fresh().classifier.weight)
    assert_same_tensors(snapshot(model.base_model.model.classifier.original_module), snapshot(fresh().classifier))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_head_starts_without_the_prior_of_classes_that_all_occur(options):
    model = wrap(fresh(), **{"budget": 0.5, "calibration": skewed(labels=EVEN), **options})
    assert not head(model).bias.any()


@pytest.mark.parametrize(("labels", "starts_at_prior"), [((0, 0, 0, 0), True), (EVEN, False)], ids=["uneven", "even"])
def test_priming_itself_starts_at_the_prior(labels, starts_at_prior):
    batches = skewed(labels=labels)
    scores = compute_scores(fresh(), batches, priming_steps=4, priming_lr=1e-6, progress=False)
    expected = log_prior(batches) if starts_at_prior else torch.zeros(3)
    torch.testing.assert_close(scores.head["classifier.bias"], expected, atol=1e-4, rtol=0)


def test_what_priming_adds_to_the_prior_stays():
    batches = skewed(labels=EVEN)
    model = fresh()
    options = ScoringOptions(priming_steps=4, priming_lr=1e-2, progress=False)
    torch.manual_seed(options.seed)
    with primed(model, batches, options):
        learned = model.classifier.bias.detach() - log_prior(batches)
    scores = compute_scores(fresh(), batches, priming_steps=4, priming_lr=1e-2, progress=False)
    assert learned.abs().min() > 1e-3
    torch.testing.assert_close(scores.head["classifier.bias"], learned)


def test_without_priming_the_head_of_a_regression_starts_at_the_mean():
    batches = [{**b, "labels": b["labels"] + 2.5} for b in tiny_batches(3)]
    model = wrap(fresh(num_labels=1), budget=0.5, calibration=batches, score="random", priming_steps=0)
    mean = torch.cat([b["labels"] for b in batches]).mean()
    torch.testing.assert_close(head(model).bias.detach(), mean[None])


def test_a_head_keeps_what_priming_taught_it():
    scores = compute_scores(fresh(), skewed(), priming_steps=4, progress=False)
    model = wrap(fresh(), budget=0.5, scores=scores)
    for name, value in scores.head.items():
        assert torch.equal(head(model).get_parameter(name.partition(".")[2]), value)
    assert not torch.equal(head(model).weight, fresh().classifier.weight)
    assert_same_tensors(snapshot(model.base_model.model.classifier.original_module), snapshot(fresh().classifier))


def test_the_head_starts_the_same_under_every_score():
    heads = [
        wrap(fresh(), budget=0.5, calibration=skewed(), score=score, priming_steps=4)
        for score in ("fisher", "taylor", "movement", "magnitude", "random")
    ]
    assert not torch.equal(head(heads[0]).weight, fresh().classifier.weight)
    for other in heads[1:]:
        assert_same_tensors(snapshot(head(other)), snapshot(head(heads[0])))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trained_head_is_left_alone(options):
    model = wrap(tiny_model(), **{"budget": 0.5, "calibration": skewed(), **options})
    assert torch.equal(head(model).bias, tiny_model().classifier.bias)


def test_without_data_nothing_is_known_about_the_labels():
    model = wrap(fresh(), budget=0.5)
    assert not head(model).bias.any()
