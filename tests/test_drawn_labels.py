"""Labels drawn from a model's predictions: they follow the predicted distribution, and other labels stay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import LABELS, tiny_batches, tiny_model, trained
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_sensi import CalibrationError
from peft_sensi.scoring.drawn_labels import draw_labels


SEVERAL = "multi_label_classification"


class Fixed(torch.nn.Module):
    """A model with the same logits for every example. Its config says what its floating labels are."""

    def __init__(self, logits: torch.Tensor, problem_type: str | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem_type)
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **others: object) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.logits.expand(len(input_ids), *self.logits.shape))


def many(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(len(labels), 3, dtype=torch.long), "labels": labels}


def test_classes_follow_the_predicted_distribution():
    chances = torch.tensor([0.1, 0.7, 0.2])
    [batch] = draw_labels(Fixed(chances.log()), [many(torch.zeros(4000, dtype=torch.long))], seed=0)
    shares = torch.bincount(batch["labels"], minlength=3) / 4000
    assert batch["labels"].dtype == torch.long and torch.allclose(shares, chances, atol=0.03)


def test_several_classes_at_once_follow_their_own_chances():
    chances = torch.tensor([0.1, 0.8])
    [batch] = draw_labels(Fixed(chances.logit(), SEVERAL), [many(torch.zeros(4000, 2))], seed=0)
    assert set(batch["labels"].unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(batch["labels"].mean(0), chances, atol=0.03)


def test_numbers_are_the_prediction_with_noise():
    [batch] = draw_labels(Fixed(torch.tensor([5.0]), "regression"), [many(torch.zeros(4000))], seed=0)
    assert batch["labels"].shape == (4000,)
    assert abs(batch["labels"].mean() - 5.0) < 0.1 and abs(batch["labels"].std() - 1.0) < 0.1


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3)])
def test_floating_labels_stay_where_no_config_says_what_they_are(shape):
    """A module of the user's own may take them for one class of two, for shares of classes, or for numbers."""
    labels, model = torch.rand(shape), Fixed(torch.zeros(shape[1:]))
    assert draw_labels(model, [many(labels)], seed=0)[0]["labels"] is labels
    del model.config
    assert draw_labels(model, [many(labels)], seed=0)[0]["labels"] is labels


def test_a_head_of_transformers_says_what_its_labels_are():
    """It sets the problem type when it computes the first loss."""
    [batch] = draw_labels(tiny_model(num_labels=1), [many(torch.full((64,), 5.0))], seed=0)
    assert 0.5 < batch["labels"].std() < 1.5
    [batch] = draw_labels(tiny_model(num_labels=3), [many(torch.full((64, 3), 0.0))], seed=0)
    assert set(batch["labels"].unique().tolist()) == {0.0, 1.0}


def test_the_config_says_whether_labels_are_numbers_or_classes():
    numbers = tiny_model(num_labels=3, problem_type="regression")
    [batch] = draw_labels(numbers, [many(torch.full((64, 3), 7.0))], seed=0)
    expected = numbers(many(torch.zeros(64, 3))["input_ids"]).logits
    assert abs((batch["labels"] - expected).std() - 1.0) < 0.2
    one_class = tiny_model(num_labels=1, problem_type="multi_label_classification")
    [batch] = draw_labels(one_class, [many(torch.zeros(64, 1))], seed=0)
    assert set(batch["labels"].unique().tolist()) <= {0.0, 1.0}


def test_numbers_may_be_integers():
    [batch] = draw_labels(tiny_model(num_labels=1), [many(torch.full((64,), 5))], seed=0)
    assert batch["labels"].is_floating_point() and abs(batch["labels"].std() - 1.0) < 0.3


def test_labels_that_are_ignored_stay():
    [batch] = tiny_batches(1, task="TOKEN_CLS")
    [drawn] = draw_labels(tiny_model(task="TOKEN_CLS"), [batch], seed=0, per_token=True)
    assert torch.equal(drawn["labels"] < 0, batch["labels"] < 0)
    assert drawn["labels"].max() < LABELS and not torch.equal(drawn["labels"], batch["labels"])


@pytest.mark.parametrize("task", ["MASKED_LM", "TOKEN_CLS", "QUESTION_ANS"])
def test_labels_of_tokens_stay_unless_they_are_classes(task):
    batches = tiny_batches(2, task=task)
    for batch, drawn in zip(batches, draw_labels(tiny_model(task=task), batches, seed=0), strict=True):
        assert drawn.keys() == batch.keys() and all(torch.equal(drawn[name], batch[name]) for name in batch)


def test_one_class_and_batches_that_the_model_refuses_stay():
    labels = torch.zeros(5, dtype=torch.long)
    assert torch.equal(draw_labels(Fixed(torch.tensor([3.0])), [many(labels)], seed=0)[0]["labels"], labels)
    refused = {"text": ["a"], "labels": labels}
    assert draw_labels(tiny_model(), [refused], seed=0) == [refused]


def test_a_batch_that_the_model_refuses_is_named_by_the_trim():
    model, batches = trained(budget=1.0), tiny_batches(3)
    batches[1]["labels"][0] = 99  # beyond the classes
    assert torch.equal(draw_labels(model, batches, seed=0)[1]["labels"], batches[1]["labels"])
    with pytest.raises(CalibrationError, match="failed for calibration batch 1 "):
        model.base_model.trim(0.5, batches)


def test_a_default_device_changes_no_draws():
    batch = many(torch.zeros(8))
    model = Fixed(torch.tensor([5.0]), "regression")
    [expected] = draw_labels(model, [batch], seed=0)
    assert expected["labels"].any()
    with torch.device("meta"):  # as `set_default_device("cuda")` would, where there is none
        [found] = draw_labels(model, [batch], seed=0)
    assert torch.equal(found["labels"], expected["labels"])


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(torch.zeros(4, dtype=torch.long), None), (torch.zeros(4, 2), SEVERAL), (torch.zeros(4), "regression")],
)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_without_finite_chances_labels_stay(labels, problem, broken):
    model = Fixed(torch.full((1,) if problem == "regression" else (2,), broken), problem)
    assert torch.equal(draw_labels(model, [many(labels)], seed=0)[0]["labels"], labels)


def test_draws_depend_on_the_seed_and_the_position_and_leave_the_random_state():
    model, batches = tiny_model(), tiny_batches(1, size=64) * 2
    state = torch.get_rng_state()
    first, second = (b["labels"] for b in draw_labels(model, batches, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_labels(model, batches, seed=3)[0]["labels"])
    assert not torch.equal(first, draw_labels(model, batches, seed=4)[0]["labels"])
