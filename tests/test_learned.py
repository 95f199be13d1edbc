"""What priming has taught the model: the share itself, the file that keeps it, and who is warned."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import LABELS, tiny_batches, tiny_model

from peft_sensi import Scores, SensiConfig, SensiLoadError, compute_scores, recipes
from peft_sensi.scoring.calibration import ScoringOptions
from peft_sensi.scoring.learned import EXAMPLES, share_learned


WARNING = "has taught the model hardly anything"


def easy_batches(count=16, task="SEQ_CLS"):
    """Batches whose labels are easy to see: most tokens of an example are its label."""
    batches = tiny_batches(count, size=12, padding=False, task=task)
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        classes = torch.randint(0, LABELS, (12,), generator=generator)
        batch["input_ids"][:, 2:] = (10 + 5 * classes)[:, None]
        batch["labels"] = classes
    return batches


def learned(batches, loss_fn=None, model=None):
    return share_learned(model or tiny_model().eval(), batches, ScoringOptions(loss_fn=loss_fn))


def squared_error(predict):
    return lambda model, batch: (predict(batch) - batch["labels"]).square().mean() + 0 * next(model.parameters()).sum()


def number_batches():
    generator = torch.Generator().manual_seed(0)
    return [b | {"labels": torch.randn(4, generator=generator)} for b in tiny_batches(8)]


def test_a_model_that_knows_all_labels_has_learned_everything():
    batches = [b | {"known": b["labels"]} for b in number_batches()]
    assert learned(batches, squared_error(lambda batch: batch["known"])) == 1.0


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_answer_has_learned_nothing(value):
    found = learned(number_batches(), squared_error(lambda batch: torch.full((4,), value)))
    assert found is None or found == pytest.approx(0, abs=1e-6)  # rounding decides whether the sums are equal


def test_a_loss_without_labels_tells_nothing():
    assert learned(tiny_batches(), lambda model, batch: model(batch["input_ids"]).logits.square().mean()) is None


def test_models_without_a_task_head_and_lone_examples_tell_nothing():
    assert learned(tiny_batches(task="MASKED_LM"), model=tiny_model(task="MASKED_LM")) is None
    assert learned(tiny_batches(size=1)) is None


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_labels_of_all_tasks_are_found(task):
    seen = []

    def spy(model, batch):
        seen.append({name: value for name, value in batch.items() if "label" in name or name.endswith("_positions")})
        return model(**batch).loss

    batches = tiny_batches(2, size=EXAMPLES + 4, task=task)
    assert learned(batches, spy, tiny_model(task=task)) is not None
    own, moved = seen[:2]
    assert own.keys() == moved.keys() and own
    for name, value in own.items():
        assert torch.equal(value, batches[0][name][4:])  # the examples that priming reads last
        assert torch.equal(moved[name], value.roll(1, 0))


@pytest.mark.parametrize(("primed_on", "used"), [(0, 16), (6, 14), (16, 4), (17, 16), (99, 16)])
def test_examples_that_priming_has_used_are_left_out_if_there_are_others(primed_on, used):
    sizes = []

    def loss_fn(model, batch):
        sizes.append(len(batch["labels"]))
        return squared_error(lambda batch: batch["labels"].roll(1))(model, batch)

    batches = [b | {"labels": torch.arange(20.0)} for b in tiny_batches(1, size=20)]
    share_learned(tiny_model(), batches, ScoringOptions(loss_fn=loss_fn), primed_on)
    assert sizes == [used, used]


def test_a_part_without_labels_is_left_out():
    batches = tiny_batches(2, size=EXAMPLES + 2, task="TOKEN_CLS")
    batches[0]["labels"][2:] = -100
    model = tiny_model(task="TOKEN_CLS")
    assert learned(batches, model=model) == learned(batches[1:], model=model)


@pytest.mark.parametrize(("known", "runs"), [(1.0, 4), (0.0, 8)])
def test_the_second_half_is_run_only_if_the_first_leaves_doubt(known, runs):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return squared_error(lambda batch: known * batch["known"])(model, batch)

    learned([b | {"known": b["labels"]} for b in number_batches()[:4]], loss_fn)
    assert len(calls) == runs


def test_a_batch_that_cannot_be_divided_is_used_whole():
    sizes = []

    def spy(model, batch):
        sizes.append(len(batch["texts"]))
        assert len(batch["texts"]) == len(batch["labels"])
        return model(batch["input_ids"], labels=batch["labels"]).loss

    assert learned([b | {"texts": ["a"] * 20} for b in tiny_batches(1, size=20)], spy) is not None
    assert sizes == [20, 20]


@pytest.mark.parametrize("steps", [1, 160])
def test_priming_learns_an_easy_task(steps):
    scores = compute_scores(tiny_model(lively=False), easy_batches(), priming_steps=steps, priming_lr=3e-3)
    assert scores.learned > 0.9 if steps > 1 else abs(scores.learned) < 0.04


def test_without_priming_nothing_is_said():
    assert compute_scores(tiny_model(), tiny_batches(), priming_steps=0).learned is None
    assert compute_scores(tiny_model(), tiny_batches(), score="magnitude").learned is None


def test_the_share_survives_a_file_and_old_files_are_read(tmp_path):
    scores = compute_scores(tiny_model(), tiny_batches(), priming_steps=1)
    scores.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").learned == scores.learned is not None
    with safe_open(tmp_path / "scores", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    del metadata["learned"]  # as earlier versions wrote it
    save_file(tensors, tmp_path / "old", metadata=metadata)
    assert Scores.load(tmp_path / "old").learned is None
    for wrong in ('"much"', "NaN", "true", "{"):
        save_file(tensors, tmp_path / "wrong", metadata=metadata | {"learned": wrong})
        with pytest.raises(SensiLoadError, match="malformed metadata"):
            Scores.load(tmp_path / "wrong")


def warned(batches, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"budget": 0.5, "calibration": batches, "priming_lr": 3e-3, "task_type": "SEQ_CLS", **options}
        get_peft_model(tiny_model(lively=False), SensiConfig(**given))
    return any(WARNING in str(warning.message) for warning in caught)


def test_who_trims_too_early_is_warned():
    assert warned(easy_batches(), priming_steps=1)
    assert not warned(easy_batches(), priming_steps=160)
    # Nothing is trimmed here, or not yet, or no ranking was learned.
    assert not warned(easy_batches(), priming_steps=1, budget={"trainable": 0.1})
    assert not warned(easy_batches(), priming_steps=1, schedule=recipes.sensi_bert(0.5, trim="late").schedule)
    assert not warned(easy_batches(), priming_steps=1, score="random")


def test_given_scores_warn_as_well():
    scores = compute_scores(tiny_model(lively=False), easy_batches(), priming_steps=1)
    assert warned(None, scores=scores)


def test_batches_of_one_class_each_tell_nothing():
    """A file that is sorted by class: another example's label is the same."""
    batches = [b | {"labels": torch.full((12,), i % LABELS)} for i, b in enumerate(easy_batches())]
    assert learned(batches) is None
    assert learned([*batches, *easy_batches()]) == pytest.approx(learned(easy_batches()))
