"""Scores: their definitions, their inputs and files, and that scoring leaves model and random states unchanged."""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from family_checks import make_lively, token_batch
from peft import LoraConfig, get_peft_model
from tiny import assert_same_tensors, clone, snapshot, tiny_batches, tiny_config, tiny_model, trained, wrap
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    BertForMultipleChoice,
    GPT2Config,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from peft_sensi import (
    AnatomyError,
    CalibrationError,
    Scores,
    SensiConfig,
    SensiError,
    SensiLoadError,
    build_anatomy,
    compute_scores,
    export_onnx,
    make_plan,
    measure_latency,
    save_merged,
)
from peft_sensi.cli.arguments import CALIBRATION_STEPS, PRIMING_STEPS
from peft_sensi.scoring import learned, priming
from peft_sensi.scoring.calibration import ScoringOptions, materialize, preserved
from peft_sensi.scoring.compute import score_units
from peft_sensi.scoring.criteria import CRITERIA
from peft_sensi.scoring.examples import RowsOfExamples, examples_in
from peft_sensi.scoring.gates import (
    find_weighting,
    gate_gradients,
    mean_over_examples,
    mean_over_labels,
    mean_over_next_labels,
)
from peft_sensi.scoring.gates_reference import gate_gradients_reference
from peft_sensi.scoring.head import start_head_at_prior
from peft_sensi.scoring.methods import METHODS
from peft_sensi.scoring.outliers import OutlierFinder
from peft_sensi.scoring.priming import _some_examples, primed


QUICK = {"priming_steps": 2, "calibration_steps": 3, "progress": False}


def quick(steps: int, lr: float = 1e-4, optimizer: str = "adamw") -> ScoringOptions:
    return ScoringOptions(priming_steps=steps, priming_lr=lr, priming_optimizer=optimizer, progress=False)


@pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS"])
def test_fast_gradients_equal_the_reference(family, task):
    model = tiny_model(family, task)
    anatomy = build_anatomy(model)
    batch = tiny_batches(1, size=5, task=task)[0]
    assert not batch["attention_mask"].all()
    fast, slow = gate_gradients(model, anatomy, batch), gate_gradients_reference(model, anatomy, batch)
    assert fast.keys() == slow.keys() == {g.name for g in anatomy.groups}
    for name in slow:
        assert fast[name].dtype == torch.float32 and slow[name].abs().max() > 1e-4
        torch.testing.assert_close(fast[name], slow[name], atol=1e-6, rtol=1e-4)


def token_model(task: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model whose loss is a mean over labeled tokens, and a batch whose examples have 2, 12, 5, 9 and 3 labels."""
    if task == "CAUSAL_LM":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(4)
    elif task == "SEQ_2_SEQ_LM":
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).eval()
    else:
        model = tiny_model(task=task)
    batch = tiny_batches(1, size=5, task="TOKEN_CLS")[0]
    batch["attention_mask"] = (torch.arange(12)[None] < torch.tensor([2, 12, 5, 9, 3])[:, None]).long()
    labels = batch["input_ids"] % (3 if task == "TOKEN_CLS" else 64)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), labels, -100)
    return model.to(dtype), batch


def check_equal_to_reference(model, batch, loss_fn=None, examples=range(5), **tolerance) -> None:
    anatomy = build_anatomy(model)
    batch_without = {k: v[list(examples)] for k, v in batch.items()}
    fast = gate_gradients(model, anatomy, batch, loss_fn)
    slow = gate_gradients_reference(model, anatomy, batch_without, loss_fn)
    for name in slow:
        assert slow[name].abs().max() > 1e-5
        torch.testing.assert_close(fast[name][list(examples)], slow[name], **{"atol": 1e-6, "rtol": 1e-3, **tolerance})


TOKEN_TASKS = ["TOKEN_CLS", "MASKED_LM", "CAUSAL_LM", "SEQ_2_SEQ_LM"]


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_fast_gradients_equal_the_reference_for_token_losses(task):
    model, batch = token_model(task)
    check_equal_to_reference(model, batch)
    counted = mean_over_next_labels if task == "CAUSAL_LM" else mean_over_labels
    assert find_weighting(model, build_anatomy(model), [batch]) is counted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_the_weighting_of_a_loss_is_found_in_half_precision(task, dtype):
    model, batch = token_model(task, dtype)
    counted = mean_over_next_labels if task == "CAUSAL_LM" else mean_over_labels
    assert find_weighting(model, build_anatomy(model), [batch]) is counted


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_an_example_without_labels_has_no_gradient(task):
    model, batch = token_model(task)
    batch["labels"][3] = -100
    if task == "CAUSAL_LM":
        batch["labels"][0, 1:] = -100  # a label at the first position is never predicted
    unlabeled = [0, 3] if task == "CAUSAL_LM" else [3]
    check_equal_to_reference(model, batch, examples=[i for i in range(5) if i not in unlabeled])
    for gradient in gate_gradients(model, build_anatomy(model), batch).values():
        assert not gradient[unlabeled].any()


def token_logits(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits.transpose(1, 2)


def example_mean(model, batch):
    """Each example counts the same: the mean of the means over their tokens."""
    losses = nn.functional.cross_entropy(token_logits(model, batch), batch["labels"], reduction="none")
    return (losses.sum(1) / (batch["labels"] >= 0).sum(1)).mean()


def token_mean(model, batch):
    return nn.functional.cross_entropy(token_logits(model, batch), batch["labels"])


@pytest.mark.parametrize(
    ("loss_fn", "weighting"), [(example_mean, mean_over_examples), (token_mean, mean_over_labels)]
)
def test_the_weighting_of_an_own_loss_is_measured(loss_fn, weighting):
    model, batch = token_model("TOKEN_CLS")
    assert find_weighting(model, build_anatomy(model), [batch], loss_fn) is weighting
    check_equal_to_reference(model, batch, loss_fn)


def test_a_loss_that_no_weighting_explains_counts_examples():
    def contrast(model, batch):
        means = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.mean(1)
        return (means @ means.T).square().mean()

    model, batch = token_model("TOKEN_CLS")
    assert find_weighting(model, build_anatomy(model), [batch], contrast) is mean_over_examples


@pytest.mark.parametrize("labels", ["none", "one per example", "equally many", "float"])
def test_without_unequal_labels_nothing_is_measured(labels):
    model, batch = token_model("TOKEN_CLS")
    batch = {
        "none": {k: v for k, v in batch.items() if k != "labels"},
        "one per example": {**batch, "labels": torch.arange(5)},
        "equally many": {**batch, "labels": batch["input_ids"] % 3},
        "float": {**batch, "labels": torch.rand(5, 3)},
    }[labels]

    def loss_fn(model, batch):
        raise AssertionError("the loss was computed")

    assert find_weighting(model, build_anatomy(model), [batch], loss_fn) is mean_over_examples


def test_batches_with_and_without_token_labels():
    """The second batch has no token labels, so each of its examples has the same weight."""

    def loss_fn(model, batch):
        labels = batch.get("labels", batch["input_ids"] % 3)
        return nn.functional.cross_entropy(token_logits(model, batch), labels)

    model, batch = token_model("TOKEN_CLS")
    other = {k: v for k, v in batch.items() if k != "labels"}
    anatomy = build_anatomy(model)
    weighting = find_weighting(model, anatomy, [other, batch], loss_fn)
    assert weighting is mean_over_labels
    found = gate_gradients(model, anatomy, other, loss_fn, weighting=weighting)
    for name, expected in gate_gradients_reference(model, anatomy, other, loss_fn).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_scores_do_not_weigh_examples_by_their_length(score):
    """The mean over examples, however they are batched: one by one, or long and short ones together."""
    model, batch = token_model("TOKEN_CLS")
    single = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(5)]
    options = {"score": score, "priming_steps": 0, "progress": False}
    together, apart = compute_scores(model, [batch], **options), compute_scores(model, single, **options)
    for name, values in apart.values.items():
        torch.testing.assert_close(together.values[name], values, atol=1e-9, rtol=1e-3)


def test_fast_gradients_equal_the_reference_for_lone_linears():
    model = tiny_model("bert")
    anatomy = build_anatomy(model, ["bert.pooler.dense"])
    batch = tiny_batches(1)[0]
    fast, slow = gate_gradients(model, anatomy, batch), gate_gradients_reference(model, anatomy, batch)
    torch.testing.assert_close(fast["bert.pooler.dense"], slow["bert.pooler.dense"], atol=1e-6, rtol=1e-4)


def test_fast_gradients_equal_the_reference_for_multiple_choice():
    """All choices of an example have the same gates. The encoder gets them as rows of their own."""
    torch.manual_seed(0)
    model = BertForMultipleChoice(tiny_config("bert")).eval()
    make_lively(model)
    ids = torch.randint(2, 64, (4, 3, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2, 1, 0])}
    batch["attention_mask"][1, :, 6:] = 0
    anatomy = build_anatomy(model, ["bert.embeddings.word_embeddings", "bert.pooler.dense"])
    fast, slow = gate_gradients(model, anatomy, batch), gate_gradients_reference(model, anatomy, batch)
    for name in slow:
        assert slow[name].abs().max() > 1e-4
        torch.testing.assert_close(fast[name], slow[name], atol=1e-6, rtol=1e-4)


class Windows(nn.Module):
    """Its Linear gets three windows of each example `[tokens, features]`: first the first window of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        windows = values.unflatten(1, (3, -1)).transpose(0, 1).flatten(0, 1)
        return self.out(self.linear(windows)).unflatten(0, (3, -1)).mean((0, 2))


def test_rows_of_unknown_examples_are_scored_with_a_warning():
    torch.manual_seed(0)
    model = Windows()
    batch = {"values": torch.randn(5, 6, 8), "labels": torch.randn(5, 1)}

    def loss_fn(model, batch):
        return (model(batch["values"]) - batch["labels"]).square().mean()

    anatomy = build_anatomy(model, ["linear"])
    with pytest.warns(UserWarning, match="'linear' gets 15 rows for 5 examples.*not known which rows belong"):
        rows = gate_gradients(model, anatomy, batch, loss_fn)["linear"]
    expected = gate_gradients_reference(model, anatomy, batch, loss_fn)["linear"]
    torch.testing.assert_close(rows.unflatten(0, (3, 5)).sum(0), expected, atol=1e-6, rtol=1e-4)
    options = {"targets": ["linear"], "loss_fn": loss_fn, "priming_steps": 0, "progress": False}
    with pytest.warns(UserWarning, match="not known"):
        scores = compute_scores(model, [batch], **options)
    torch.testing.assert_close(scores.values["linear"], rows.square().sum(0) / 5)


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ({"input_ids": (4, 9), "pixel_values": (36, 48), "image_grid_thw": (4, 3), "labels": (4, 9)}, 4),
        ({"input_ids": (4, 9), "pixel_values": (6, 3, 12, 12)}, 4),
        ({"input_ids": (1, 40), "cu_seq_lens": (5,), "labels": (1, 40)}, 1),
        ({"input_ids": (4, 3, 9), "labels": (4,)}, 4),
        ({"input_ids": (4, 9), "start_positions": (4,), "class_weights": (7,)}, 4),
        ({"inputs_embeds": (4, 9, 8), "class_weights": (7,)}, 4),
        ({"pixel_values": (4, 3, 12, 12), "labels": (4,), "class_weights": (7,)}, 4),
        ({"input_features": (4, 80, 30), "decoder_input_ids": (4, 9)}, 4),
        ({"input_values": (4, 400)}, 4),
        ({"anything": (4, 2), "more": ()}, 4),
        ({}, 1),
    ],
    ids=str,
)
def test_the_number_of_examples(shapes, size):
    assert examples_in({name: torch.zeros(shape) for name, shape in shapes.items()}) == size


def test_rows_of_images_and_videos():
    """The model gets the images (token 4) and the videos (token 5) of a batch one after the other."""
    model = nn.Module()
    model.config = PretrainedConfig(image_token_id=4, video_token_id=5)
    ids = torch.tensor([[4, 4, 9, 9, 9], [4, 5, 5, 5, 9]])
    batch = {"input_ids": ids, "pixel_values": torch.zeros(12, 8), "pixel_values_videos": torch.zeros(16, 8)}
    rows = RowsOfExamples(model, batch)
    assert rows.of(torch.Size([2, 5, 8])) == [1, 1]
    assert rows.of(torch.Size([12, 8])) == [8, 4] and rows.of(torch.Size([16, 8])) == [0, 16]
    assert rows.of(torch.Size([7, 8])) is None
    batch["pixel_values_videos"] = torch.zeros(12, 8)
    assert RowsOfExamples(model, batch).of(torch.Size([12, 8])) is None, "it may be the one or the other"
    batch |= {"pixel_values_videos": None, "input_ids": ids.where(ids != 5, 9)}
    assert RowsOfExamples(model, batch).of(torch.Size([12, 8])) == [8, 4]


def tokens_first_model():
    """An XLNet, whose layers get `[tokens, batch, features]`."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64, "num_labels": 3}
    model = XLNetForSequenceClassification(XLNetConfig(**sizes, pad_token_id=1)).eval()
    make_lively(model)
    return model


@pytest.mark.parametrize("length", [9, 6])
def test_fast_gradients_equal_the_reference_if_tokens_come_first(length):
    """Also with as many examples as tokens, where shapes do not tell them apart."""
    model, batch = tokens_first_model(), token_batch(6, length)
    anatomy = build_anatomy(model, ["transformer.word_embedding"])
    fast, slow = gate_gradients(model, anatomy, batch), gate_gradients_reference(model, anatomy, batch)
    for name in slow:
        assert slow[name].abs().max() > 1e-4
        torch.testing.assert_close(fast[name], slow[name], atol=1e-6, rtol=1e-4)
    options = {"priming_steps": 0, "progress": False, "score": "fisher"}
    single = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(6)]
    together, apart = compute_scores(model, [batch], **options), compute_scores(model, single, **options)
    for name, values in apart.values.items():
        torch.testing.assert_close(together.values[name], values, atol=1e-9, rtol=1e-3)


@pytest.mark.parametrize("length", [9, 6])
def test_padding_has_no_influence_on_outliers_if_tokens_come_first(length):
    model, batch = tokens_first_model(), token_batch(6, length)
    anatomy = build_anatomy(model)
    group = anatomy.trimmable[0]
    shares = []
    for token in (1, 5):
        ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], token)
        finder = OutlierFinder(model, anatomy)
        with torch.no_grad(), finder.watching({**batch, "input_ids": ids}):
            model(**{**batch, "input_ids": ids})
        shares.append(finder.share[group.name])
    torch.testing.assert_close(*shares)


def test_padding_has_no_influence():
    model = tiny_model()
    anatomy = build_anatomy(model)
    batch = tiny_batches(1)[0]
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
    first, second = gate_gradients(model, anatomy, batch), gate_gradients(model, anatomy, other)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-7, rtol=1e-4)


def test_gradients_are_the_change_of_the_loss():
    """Compares with finite differences of the loss in float64, without autograd."""
    model = tiny_model(dtype=torch.float64)
    anatomy = build_anatomy(model)
    batch = {k: v[:1] for k, v in tiny_batches(1)[0].items()}
    gradients = gate_gradients(model, anatomy, batch)
    for group in anatomy.groups:
        width, module = group.sides[-1].width, model.get_submodule(group.output)
        for unit in (0, group.size - 1):
            losses = []
            for step in (-1e-4, 1e-4):
                gate = torch.ones(group.size * width, dtype=torch.float64)
                gate[unit * width : (unit + 1) * width] += step
                handle = module.register_forward_pre_hook(lambda m, a, gate=gate: (a[0] * gate,))
                with torch.no_grad():
                    # Not by `calibration_loss`, which returns float32.
                    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                    losses.append(nn.functional.cross_entropy(logits, batch["labels"]).item())
                handle.remove()
            change = (losses[1] - losses[0]) / 2e-4
            assert gradients[group.name][0, unit].item() == pytest.approx(change, rel=1e-3, abs=1e-6)


def test_taylor_and_fisher_are_what_they_say():
    model = tiny_model()
    anatomy, batches = build_anatomy(model), tiny_batches(3)
    gradients = [gate_gradients_reference(model, anatomy, b) for b in batches]
    every = {g.name: torch.cat([g_[g.name] for g_ in gradients]) for g in anatomy.groups}
    options = {**QUICK, "priming_steps": 0}
    taylor = compute_scores(model, batches, score="taylor", **options)
    fisher = compute_scores(model, batches, score="fisher", **options)
    for name, gradient in every.items():
        torch.testing.assert_close(taylor.values[name], gradient.abs().mean(0), atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(fisher.values[name], gradient.square().mean(0), atol=1e-9, rtol=1e-4)


def test_only_so_many_batches_are_scored():
    model, batches = tiny_model(), tiny_batches(4)
    options = {**QUICK, "priming_steps": 0}
    few = compute_scores(model, batches, **{**options, "calibration_steps": 2})
    same = compute_scores(model, batches[:2], **{**options, "calibration_steps": 4})
    assert_same_tensors(few.values, same.values)
    every = compute_scores(model, batches, **{**options, "calibration_steps": 4})
    assert not torch.equal(next(iter(few.values.values())), next(iter(every.values.values())))


def test_magnitude_is_the_squared_norm_of_all_weights_of_a_unit():
    model = tiny_model()
    scores = compute_scores(model, score="magnitude")
    layer = model.bert.encoder.layer[1]
    unit = 2
    neuron = torch.cat([layer.intermediate.dense.weight[unit], layer.output.dense.weight[:, unit]]).norm().square()
    attention, rows = layer.attention, slice(unit * 8, unit * 8 + 8)
    parts = [getattr(attention.self, n).weight[rows] for n in ("query", "key", "value")]
    parts.append(attention.output.dense.weight[:, rows])
    head = torch.cat([p.reshape(-1) for p in parts]).norm().square()
    assert scores.values["bert.encoder.layer.1.neurons"][unit].item() == pytest.approx(neuron.item(), rel=1e-5)
    assert scores.values["bert.encoder.layer.1.heads"][unit].item() == pytest.approx(head.item(), rel=1e-5)


def test_scores_read_the_weights_that_the_base_layers_have_now():
    """While an adapter is merged into the base layers, scores and outliers are those of the trained weights."""
    model, batches = trained(budget={"trainable": 0.1}), tiny_batches(1)
    root = model.base_model.model
    plain = copy.deepcopy(model).merge_and_unload()
    for score in ("magnitude", "fisher"):
        options = {"score": score, "priming_steps": 0, "progress": False}
        before = compute_scores(root, batches, **options)
        model.merge_adapter()
        merged = compute_scores(root, batches, **options)
        model.unmerge_adapter()
        expected = compute_scores(plain, batches, **options)
        assert merged.values.keys() == expected.values.keys()
        for name, values in expected.values.items():
            torch.testing.assert_close(merged.values[name], values, atol=1e-7, rtol=1e-4)
        for name, mask in expected.protected.items():
            assert torch.equal(merged.protected[name], mask)
        if score == "magnitude":
            assert any(not torch.equal(before.values[name], merged.values[name]) for name in before.values)


def test_random_scores_follow_the_seed_only():
    model = tiny_model()
    first, same = (compute_scores(model, score="random", seed=3) for _ in range(2))
    other = compute_scores(tiny_model(seed=1), score="random", seed=4)
    assert_same_tensors(first.values, same.values)
    assert not torch.equal(first.values["bert.encoder.layer.0.neurons"], other.values["bert.encoder.layer.0.neurons"])


def test_random_scores_prefer_no_kind_of_unit():
    """Scores are divided by costs. Without a correction, random scores would drop all heads before any neuron."""
    shares = {"head": [], "neuron": []}
    for seed in range(8):
        model = tiny_model(num_hidden_layers=4)
        anatomy = build_anatomy(model)
        scores = compute_scores(model, score="random", seed=seed)
        plan = make_plan(anatomy, {k: v.numpy() for k, v in scores.values.items()}, 0.5, multiple_of=1)
        for kind, values in shares.items():
            values.append(np.concatenate([plan.of(g) > 0 for g in anatomy.groups if g.kind == kind]).mean())
    assert abs(np.mean(shares["head"]) - np.mean(shares["neuron"])) < 0.15


class Buffered(nn.Module):
    """A model with a buffer that every forward pass changes. It uses the random states of Python and NumPy, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()
        self.config = self.inner.config
        self.norm = nn.BatchNorm1d(3)

    def forward(self, labels=None, **inputs):
        logits = self.norm(self.inner(**inputs).logits) * (1 + 0.01 * random.random() * np.random.rand())
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("score", ["fisher", "taylor", "magnitude", "random"])
def test_nothing_is_changed_not_one_bit(score):
    model = Buffered()
    model.train()
    model.inner.bert.encoder.layer[0].eval()  # a mixture of modes
    model.inner.bert.embeddings.requires_grad_(False)
    loader = DataLoader(
        torch.arange(12).tolist(), batch_size=4, shuffle=True, collate_fn=lambda i: tiny_batches(1, seed=i[0])[0]
    )
    # The user may be in the middle of a step, and have gradients.
    model(**tiny_batches(1)[0])["loss"].backward()
    tensors, modes = snapshot(model), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    ids, versions = [id(p) for p in model.parameters()], [id(p.grad) for p in model.parameters()]
    before = states()
    scores = compute_scores(model, loader, score=score, **QUICK)
    assert states() == before
    assert set(scores.values) == {g.name for g in build_anatomy(model).groups}
    assert_same_tensors(snapshot(model), tensors)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [id(p) for p in model.parameters()] == ids and [id(p.grad) for p in model.parameters()] == versions
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_left_by_the_user_do_not_change_the_scores():
    batches = tiny_batches()
    clean = compute_scores(tiny_model(), batches, **QUICK)
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert_same_tensors(compute_scores(model, batches, **QUICK).values, clean.values)


@pytest.mark.parametrize("where", ["priming", "scoring"])
def test_nothing_is_changed_when_something_goes_wrong(where):
    model = tiny_model().train()
    tensors, before = snapshot(model), states()
    calls = iter(range(100))

    def loss_fn(model, batch):
        if next(calls) == (1 if where == "priming" else 3):
            raise RuntimeError("boom")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="boom"):
        compute_scores(model, tiny_batches(), loss_fn=loss_fn, **QUICK)
    assert_same_tensors(snapshot(model), tensors)
    assert states() == before and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scores_do_not_depend_on_the_random_state_or_mode_without_priming():
    options = {**QUICK, "priming_steps": 0}
    first = compute_scores(tiny_model(), tiny_batches(), **options)
    torch.manual_seed(123)
    second = compute_scores(tiny_model().train(), tiny_batches(), **options)
    assert_same_tensors(first.values, second.values)


def test_priming_moves_the_weights_and_changes_the_scores():
    model = tiny_model()
    without = compute_scores(model, tiny_batches(), **{**QUICK, "priming_steps": 0})
    with_ = compute_scores(model, tiny_batches(), **QUICK)
    name = "bert.encoder.layer.0.neurons"
    assert not torch.allclose(without.values[name], with_.values[name])
    assert not without.head and with_.head.keys() == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(with_.head["classifier.weight"], model.classifier.weight)


def test_inside_priming_the_loss_is_lower_and_embeddings_are_as_before():
    model, batches = tiny_model(), tiny_batches(2)
    embeddings = snapshot(model.bert.embeddings.word_embeddings)

    def loss():
        with torch.no_grad():
            return sum(model(**b).loss.item() for b in batches)

    before = loss()
    with preserved(model), primed(model, batches, quick(30, 1e-3)):
        assert not model.training
        assert loss() < before - 0.1
        assert_same_tensors(snapshot(model.bert.embeddings.word_embeddings), embeddings)
    assert loss() == before


@pytest.mark.parametrize(
    ("labels", "outputs", "expected"),
    [
        (torch.tensor([0, 0, 1, 1, 1, 2]), 3, [math.log(3 / 9), math.log(4 / 9), math.log(2 / 9)]),
        (torch.tensor([0, -100, 1, -100]), 3, [math.log(2 / 5), math.log(2 / 5), math.log(1 / 5)]),
        (torch.tensor([1.0, 4.0]), 1, [2.5]),
        (torch.tensor([0, 7]), 3, [0, 0, 0]),  # no classes of this head
        (torch.tensor([0.0, 1.0]), 3, [0, 0, 0]),
    ],
)
def test_a_fresh_head_starts_at_the_prior(labels, outputs, expected):
    model = tiny_model(num_labels=outputs)
    nn.init.zeros_(model.classifier.bias)
    start_head_at_prior(model, [{"labels": labels}])
    torch.testing.assert_close(model.classifier.bias.detach(), torch.tensor(expected, dtype=torch.float32))


def test_a_trained_head_is_left_alone():
    model = tiny_model()
    before = model.classifier.bias.clone()
    start_head_at_prior(model, tiny_batches())
    assert torch.equal(model.classifier.bias, before)


def test_a_generator_is_used_once_and_only_as_far_as_needed():
    taken = []

    def generator():
        for batch in tiny_batches(50):
            taken.append(1)
            yield batch

    from_generator = compute_scores(tiny_model(), generator(), **QUICK)
    assert len(taken) == 3
    assert_same_tensors(from_generator.values, compute_scores(tiny_model(), tiny_batches(50), **QUICK).values)


NO_LABELS = tiny_batches(2, labels=False)
NAN = [*tiny_batches(2), {**tiny_batches(1, labels=False)[0], "labels": torch.full((4,), float("nan"))}]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        (NO_LABELS, "no loss for calibration batch 0.*input_ids.*labels"),
        (5, "int"),
        ("train.csv", "str"),
        ({"input_ids": torch.ones(1, 2)}, "dict"),
        ([torch.ones(1, 2)], "batch 0 is a Tensor"),
        ([*tiny_batches(1), ("a", "b")], "batch 1 is a tuple"),
        ([None], "batch 0 is a NoneType"),
    ],
)
def test_bad_calibration_data_is_refused(calibration, message):
    with pytest.raises(CalibrationError, match=message) as error:
        compute_scores(tiny_model(), calibration, **QUICK)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("priming_steps", [0, 5])
def test_a_loss_that_is_not_finite_names_the_batch(priming_steps):
    model = tiny_model(num_labels=1)  # a regression
    batches = [{**b, "labels": b["labels"].float()} for b in tiny_batches(2)] + NAN[2:]
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="calibration batch 2.* is nan"):
        compute_scores(model, batches, **{**QUICK, "priming_steps": priming_steps})
    assert_same_tensors(snapshot(model), before)


def test_a_gradient_that_is_not_finite_names_the_batch_and_the_units():
    def loss_fn(model, batch):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return (logits.sum() * 0).sqrt()  # the loss is 0, its derivative is not a number

    with pytest.raises(CalibrationError, match=r"heads.*not finite.*batch 0|batch 0.*not finite"):
        compute_scores(tiny_model(), tiny_batches(), loss_fn=loss_fn, **{**QUICK, "priming_steps": 0})


def test_without_data_gradient_scores_fall_back_with_a_warning():
    with pytest.warns(UserWarning, match="falls back to 'magnitude'.*calibration="):
        scores = compute_scores(tiny_model(), score="fisher")
    assert scores.method == "magnitude"
    assert_same_tensors(scores.values, compute_scores(tiny_model(), score="magnitude").values)
    with pytest.warns(UserWarning, match="falls back"):
        wrap(tiny_model(), budget=0.5, score="taylor")


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_scores_that_need_no_data_do_not_warn(score):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compute_scores(tiny_model(), score=score)


class Unknown(nn.Module):
    """A model of no known family, with or without a table of input tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 6) if tokens else nn.Identity()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.tokens = tokens

    def get_input_embeddings(self):
        return self.embed

    def forward(self, labels, input_ids=None, inputs=None, **ignored):
        x = self.embed(input_ids).mean(1) if self.tokens else inputs
        return {"loss": nn.functional.cross_entropy(self.out(torch.relu(self.inner(x))), labels)}

    def batches(self):
        return tiny_batches(2) if self.tokens else [{"inputs": torch.rand(4, 6), "labels": torch.tensor([0, 1, 2, 0])}]


@pytest.mark.parametrize("score", METHODS)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.filterwarnings("ignore:No calibration data")
def test_a_model_without_known_units_is_refused(score, tokens, data):
    model = Unknown(tokens)
    batches = model.batches() if data else None
    with pytest.raises(AnatomyError, match=r"Unknown has no known units.*blocks=.*targets=") as error:
        compute_scores(model, batches, score=score, **QUICK)
    assert isinstance(error.value, ValueError)
    found = compute_scores(model, batches, score=score, targets=["inner"], **QUICK)
    assert found.values["inner"].shape == (6,)


@pytest.mark.parametrize("score", METHODS)
def test_an_anatomy_without_groups_is_refused(score):
    model = Unknown(tokens=False)
    with preserved(model), pytest.raises(AnatomyError, match="no known units"):
        score_units(model, build_anatomy(model), model.batches(), ScoringOptions(score, progress=False))


def test_a_target_that_is_not_in_the_model_is_refused():
    with pytest.raises(AnatomyError, match="target 'nowhere' is not in the model"):
        compute_scores(tiny_model(), score="magnitude", targets=["nowhere"])


@pytest.mark.parametrize("score", ["fischer", "", None, "FISHER"])
def test_an_unknown_score_is_refused(score):
    with pytest.raises(ValueError, match="score"):
        compute_scores(tiny_model(), tiny_batches(), score=score, **QUICK)
    with pytest.raises(ValueError, match="score"):
        SensiConfig(score=score)


def test_scores_survive_a_file(tmp_path):
    scores = compute_scores(tiny_model(), tiny_batches(), **QUICK)
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(str(tmp_path / "scores.safetensors"))
    assert (again.method, again.sequence_length) == (scores.method, scores.sequence_length) == ("fisher", 12)
    for part in ("values", "protected", "head"):
        assert getattr(scores, part)
        assert_same_tensors(getattr(again, part), getattr(scores, part))
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]  # no temporary file stays
    with (tmp_path / "scores.safetensors").open("r+b") as file:  # as `cp` writes over a file
        file.write(bytes((tmp_path / "scores.safetensors").stat().st_size))
    assert_same_tensors(again.values, scores.values)


def test_one_scoring_serves_many_budgets(tmp_path):
    scores = compute_scores(tiny_model(), tiny_batches(), **QUICK)
    scores.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    for budget in (0.3, 0.7, {"trainable": 0.1}):
        torch.manual_seed(0)  # priming drops out
        direct = wrap(
            tiny_model(), budget=budget, score="fisher", update="dense", calibration=tiny_batches(), refit=False
        )
        shared = wrap(tiny_model(), budget=budget, update="dense", scores=loaded)
        assert shared.base_model.plan() == direct.base_model.plan()


def test_files_that_hold_no_scores_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(SensiLoadError, match="not a file of scores"):
        Scores.load(tmp_path / "other")
    metadata = {"format": "peft_sensi.scores.1", "method": "fisher", "length": "null"}
    save_file({"x:y": torch.ones(1)}, tmp_path / "surplus", metadata=metadata)
    with pytest.raises(SensiLoadError, match="x:y"):
        Scores.load(tmp_path / "surplus")
    for broken in ({"length": "{"}, {"length": json.dumps("long")}, {"method": "fischer"}):
        save_file({"values:a": torch.ones(1)}, tmp_path / "broken", metadata={**metadata, **broken})
        with pytest.raises(SensiLoadError):
            Scores.load(tmp_path / "broken")
    (tmp_path / "noise").write_bytes(b"\x07" * 64)
    with pytest.raises(SensiLoadError, match="noise"):
        Scores.load(tmp_path / "noise")


def test_scores_of_another_model_are_refused():
    scores = compute_scores(tiny_model(num_hidden_layers=1), score="magnitude")
    with pytest.raises(ValueError, match="no scores for"):
        wrap(tiny_model(), budget=0.5, scores=scores)
    with pytest.raises(ValueError, match="units"):
        wrap(tiny_model(), budget=0.5, scores=compute_scores(tiny_model(num_attention_heads=8), score="magnitude"))
    with pytest.raises(ValueError, match="`Scores`"):
        SensiConfig(scores=scores.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_half_precision(dtype):
    model = tiny_model(dtype=dtype)
    before = snapshot(model)
    scores = compute_scores(model, tiny_batches(), **QUICK)
    assert_same_tensors(snapshot(model), before)
    exact = compute_scores(tiny_model(), tiny_batches(), **QUICK)
    for name, values in scores.values.items():
        assert values.dtype == torch.float32 and torch.isfinite(values).all()
        assert np.corrcoef(values, exact.values[name])[0, 1] > 0.9


def test_autocast_around_the_scoring():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = compute_scores(tiny_model(), tiny_batches(), **QUICK)
    exact = compute_scores(tiny_model(), tiny_batches(), **QUICK)
    for name, values in scores.values.items():
        assert values.dtype == torch.float32
        assert not torch.equal(values, exact.values[name])
        assert np.corrcoef(values, exact.values[name])[0, 1] > 0.9


def test_a_model_whose_output_has_no_loss_takes_a_function():
    model = tiny_model()
    unlabeled = [{k: v for k, v in b.items() if k != "labels"} for b in tiny_batches()]
    labels = iter([b["labels"] for b in tiny_batches()])

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(**batch).logits, next(labels))

    options = {**QUICK, "priming_steps": 0}
    scores = compute_scores(model, unlabeled, loss_fn=loss_fn, **options)
    assert_same_tensors(scores.values, compute_scores(model, tiny_batches(), **options).values)


def with_an_outlier(model, unit: int = 5):
    """Makes neuron `unit` of the first layer the largest part of the first token's residual sum, and of no other."""
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        batch = tiny_batches(1)[0]
        seen = []
        handle = layer.intermediate.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        model(**batch)
        handle.remove()
        first = seen[0][:, 0].mean(0)
        others = seen[0][:, 1:].reshape(-1, first.shape[0])
        direction = first - others.mean(0)
        reach = (others @ direction).max()
        layer.intermediate.dense.weight[unit] = direction
        layer.intermediate.dense.bias[unit] = -reach
        layer.output.dense.weight[:, unit] = 50 * torch.randn(layer.output.dense.weight.shape[0])
    return model


def test_outliers_are_found_and_kept_whatever_their_score():
    name = "bert.encoder.layer.0.neurons"
    batches = [tiny_batches(1)[0]]
    assert not compute_scores(tiny_model(lively=False), batches, **QUICK).protected[name].any()
    model = with_an_outlier(tiny_model())
    # Below, the outlier gets the score zero. It must be kept all the same.
    scores = compute_scores(model, batches, **{**QUICK, "priming_steps": 0})
    assert scores.protected[name][5] and scores.protected[name].sum() <= 3
    values = {g: v.clone() for g, v in scores.values.items()}
    values[name][5] = 0.0
    blind = Scores(values, "fisher", 12, scores.protected)
    plan = wrap(with_an_outlier(tiny_model()), budget=0.3, scores=blind, multiple_of=1).base_model.plan()
    assert plan.of(plan.anatomy.by_name[name])[5] == 2
    unprotected = Scores(values, "fisher", 12)
    plan = wrap(with_an_outlier(tiny_model()), budget=0.3, scores=unprotected, multiple_of=1).base_model.plan()
    assert plan.of(plan.anatomy.by_name[name])[5] == 0


@pytest.mark.parametrize("score", sorted(CRITERIA))
def test_every_score_looks_for_outliers(score):
    """A control without their protection would lose more than the ranking."""
    batch = tiny_batches(1)[0]
    scores = compute_scores(with_an_outlier(tiny_model()), [batch], score=score, priming_steps=1)
    assert scores.protected["bert.encoder.layer.0.neurons"].nonzero().tolist() == [[5]]
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    finder = OutlierFinder(model := tiny_model(), anatomy := build_anatomy(model))
    assert anatomy.trimmable
    with finder.watching(empty), torch.no_grad():
        model(**empty)
    assert not any(marks.any() for marks in finder.found().values())


def test_batches_of_arrays_in_any_order():
    batches = [{name: value.numpy()[::-1] for name, value in batch.items()} for batch in tiny_batches()]
    turned = [{name: value.flip(0) for name, value in batch.items()} for batch in tiny_batches()]
    found, expected = (compute_scores(tiny_model(), given, **QUICK).values for given in (batches, turned))
    assert_same_tensors(found, expected)


def test_batches_of_a_tokenizer():
    encodings = [BatchEncoding(b) for b in tiny_batches()]
    found = compute_scores(tiny_model(), encodings, **QUICK)
    torch.manual_seed(0)
    assert found.sequence_length == 12
    assert_same_tensors(found.values, compute_scores(tiny_model(), tiny_batches(), **QUICK).values)


def test_targets_outside_the_blocks_are_scored_when_named():
    scores = compute_scores(tiny_model(), tiny_batches(), targets=["bert.pooler.dense"], **QUICK)
    assert scores.values["bert.pooler.dense"].shape == (32,)
    assert "bert.pooler.dense" not in compute_scores(tiny_model(), tiny_batches(), **QUICK).values


def test_priming_under_an_outer_autocast_block_runs_on_the_weights_it_has_moved():
    model, batches = tiny_model(), tiny_batches(3)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**batches[0]).logits  # the block now holds 16-bit copies of the weights
        with primed(model, batches, quick(3, 0.05)):
            inside = model(**batches[0]).logits
            torch.clear_autocast_cache()
            assert torch.equal(inside, model(**batches[0]).logits)
        assert torch.equal(before, model(**batches[0]).logits)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_constant_scores_warn_and_give_the_same_plan_every_time(bert, value):
    anatomy = build_anatomy(bert)
    scores = Scores({g.name: torch.full((g.size,), value) for g in anatomy.groups}, "fisher")
    plans = []
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"All scores are {f'{value:g}' if value else 'zero'}, so nothing"):
            model = wrap(tiny_model(), budget=0.5, score="fisher", scores=scores)
        plans.append(model.base_model.plan())
    assert plans[0] == plans[1] and 0.45 < plans[0].params_share <= 0.5


def test_scores_that_overflow_name_the_batch(bert, batches):
    def steep(model, batch):
        return model(**batch).loss * (1e25 if torch.equal(batch["input_ids"], batches[1]["input_ids"]) else 1)

    with pytest.raises(CalibrationError, match="not finite for calibration batch 1"):
        compute_scores(bert, batches, priming_steps=0, loss_fn=steep, progress=False)


def test_learned_masks_compare_heads_and_neurons_by_their_gates():
    model = tiny_model()
    scores = compute_scores(model, tiny_batches(4), score="mask", priming_steps=6)
    anatomy = build_anatomy(model)
    gates = {g.name: scores.values[g.name] / g.unit_params for g in anatomy.groups}
    # A gate starts at 1 and moves by about 0.01 (its learning rate) per step. The cost of the unit has no influence.
    assert all(0.5 < float(gate.min()) and float(gate.max()) < 1.5 for gate in gates.values())
    assert any(float(gate.std()) > 1e-4 for gate in gates.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_priming_by_sign_needs_no_state_and_leaves_no_trace(dtype):
    """Each weight moves by the learning rate (16-bit weights on average), and is restored afterwards."""
    model = tiny_model(dtype=dtype)
    before = snapshot(model)
    rate, batches = 1e-3, tiny_batches(2)
    with primed(model, batches, quick(1, rate, "sign")) as originals:
        assert not [p for p in model.parameters() if p.grad is not None]
        changes = torch.cat(
            [
                (p.detach().float() - originals[id(p)].float()).abs().flatten()
                for n, p in model.named_parameters()
                if id(p) in originals and "classifier" not in n and "key.bias" not in n
            ]
        )
        assert changes.mean() == pytest.approx(rate, rel=0.05)
        if dtype == torch.float32:
            assert changes.max() <= rate * 1.01
    assert_same_tensors(snapshot(model), before)


def test_priming_by_sign_learns_and_scores():
    model, batches = tiny_model(), tiny_batches(4)
    with primed(model, batches, quick(30, 3e-3, "sign")), torch.no_grad():
        after = sum(float(model(**batch).loss) for batch in batches)
    assert after < sum(float(model(**batch).loss) for batch in batches)
    one, two = (
        compute_scores(tiny_model(), batches, priming_steps=4, priming_optimizer=name, progress=False)
        for name in ("adamw", "sign")
    )
    assert one.values.keys() == two.values.keys()
    assert any(not torch.equal(one.values[name], two.values[name]) for name in one.values)


def test_without_priming_only_the_heads_bias_waits_on_the_cpu():
    model = tiny_model()
    with primed(model, tiny_batches(1), quick(0)) as originals:
        assert set(originals) == {id(model.classifier.bias)}


def test_scoring_under_no_grad():
    with torch.no_grad():
        scores = compute_scores(tiny_model(), tiny_batches(2), priming_steps=2)
    assert_same_tensors(scores.values, compute_scores(tiny_model(), tiny_batches(2), priming_steps=2).values)


@pytest.mark.parametrize("row", [[2, 3, 4], torch.tensor([2, 3, 4])])
def test_single_examples_are_told_from_batches(row):
    rows = [{"input_ids": row, "attention_mask": [1, 1, 1], "labels": 1}] * 4
    with pytest.raises(CalibrationError, match="single example.*DataLoader"):
        compute_scores(tiny_model(), rows)


@pytest.mark.parametrize(
    "value",
    [
        [torch.zeros(2, dtype=torch.bfloat16)],
        [torch.zeros(2, requires_grad=True)],
        ((torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 3), torch.zeros(2, 3))),  # the cache of a decoder
    ],
)
def test_lists_of_tensors_stay_as_they_are(value):
    [batch] = materialize([{**tiny_batches(1)[0], "more": value}], 1)
    assert batch["more"] is value


def test_losses_that_are_none_say_why():
    model, batches = tiny_model(), tiny_batches(1)
    with pytest.raises(CalibrationError, match="`loss_fn` must return a tensor.*got float"):
        compute_scores(model, batches, loss_fn=lambda model, batch: 0.5)
    model = tiny_model(task="TOKEN_CLS")
    batch = tiny_batches(1, task="TOKEN_CLS")[0]
    with pytest.raises(CalibrationError, match="All labels of .* are -100"):
        compute_scores(model, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])


def test_single_tokens_give_a_language_model_nothing_to_predict():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    ids = torch.ones(3, 1, dtype=torch.long)
    with pytest.raises(CalibrationError, match="only first tokens have others.* or give longer sequences"):
        compute_scores(model, [{"input_ids": ids, "labels": ids}], priming_steps=0)
    # One label for each example is none of a token, and the loss of a broken model is not finite for another reason.
    model, batch = tiny_model(), tiny_batches(1)[0]
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="the model is broken"):
        compute_scores(model, [{**batch, "labels": batch["labels"][:, None]}], priming_steps=0)


def test_models_that_return_tuples():
    model = tiny_model()
    model.config.return_dict = False
    expected = compute_scores(tiny_model(), tiny_batches(2), priming_steps=2)
    assert_same_tensors(compute_scores(model, tiny_batches(2), priming_steps=2).values, expected.values)
    with pytest.raises(CalibrationError, match="need labels"):
        compute_scores(model, tiny_batches(1, labels=False))


@pytest.mark.parametrize("score", ["fisher", "magnitude", "random", "movement"])
def test_torch_defaults_change_nothing(score):
    settings = {"score": score, "priming_steps": 2, "calibration": tiny_batches(2), "budget": 0.5}
    expected = wrap(tiny_model(), **settings).peft_config["default"]
    model = tiny_model()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = wrap(model, **settings).peft_config["default"]
    finally:
        torch.set_default_dtype(before)
    assert found.plan == expected.plan and found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_change_a_trim(dtype):
    def trim(model):
        return model.trim(0.5, tiny_batches(2)).to_dict(), snapshot(model)

    model = wrap(tiny_model(), budget=1.0)
    expected = trim(clone(model))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = trim(model)
    finally:
        torch.set_default_dtype(before)
    assert found[0] == expected[0]
    assert_same_tensors(found[1], expected[1])


def test_a_default_device_does_not_reach_what_lives_on_the_host():
    model = tiny_model()
    with torch.device("meta"):  # as `set_default_device("cuda")` would, where there is none
        plan = wrap(model, budget=0.5).peft_config["default"].plan
    assert plan == wrap(tiny_model(), budget=0.5).peft_config["default"].plan


def test_a_priming_step_has_a_few_examples_and_others_in_each_turn():
    batch = {"input_ids": torch.arange(60).view(20, 3), "labels": torch.arange(20), "return_dict": True}
    rows = [_some_examples(batch, turn)["labels"].tolist() for turn in range(3)]
    assert rows == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    assert _some_examples(batch, 3)["labels"].tolist() == [18, 19, 0, 1, 2, 3]
    assert _some_examples(batch, 1)["input_ids"][:, 0].tolist() == [3 * row for row in rows[1]]
    small = {"input_ids": torch.ones(6, 3), "labels": torch.ones(6)}
    assert _some_examples(small, 1) is small


@pytest.mark.parametrize(
    "other",
    [
        {"labels": torch.tensor([-100] * 8 + [1] * 8)},
        {"labels": torch.tensor([[1, -100, -100]] * 8 + [[-100, 1, 1]] * 8)},  # no label after the first token
        {"positions": torch.zeros(3, 16, 4)},
        {"texts": ["a"] * 16},
        {"scale": torch.tensor(1.0)},
    ],
)
def test_a_batch_that_cannot_be_divided_is_primed_whole(other):
    batch = {"input_ids": torch.ones(16, 3), "labels": torch.ones(16, dtype=torch.long), **other}
    assert _some_examples(batch, 0) is batch


@pytest.mark.parametrize("score", ["fisher", "movement", "magnitude"])
@pytest.mark.parametrize("share", [0.0, 0.2, None])
def test_priming_runs_on_these_examples(score, share, monkeypatch):
    model, sizes, rates = tiny_model(), [], []
    monkeypatch.setattr(learned, "share_learned", lambda *args: sizes.append("learned?") or share)
    steps = priming.AdamSteps
    monkeypatch.setitem(priming._STEPPERS, "adamw", lambda moving, lr: rates.append(lr) or steps(moving, lr))
    hook = model.register_forward_pre_hook(
        lambda m, a, kw: sizes.append((m.training, len(kw["labels"]))), with_kwargs=True
    )
    compute_scores(model, tiny_batches(2, size=32), score=score, priming_steps=3, calibration_steps=2, progress=False)
    hook.remove()
    # If hardly anything was learned, as many steps follow at a higher rate. All examples are searched for outliers.
    turns = 2 if share == 0.0 else 1
    assert sizes == [*[(True, 6)] * 3, "learned?"] * turns + [(False, 32)] * 2
    assert rates == [1e-4, pytest.approx(3e-4)][:turns]


def test_what_was_learned_is_measured_on_these_examples():
    model, sizes = tiny_model(), []
    hook = model.register_forward_pre_hook(lambda m, a, kw: sizes.append(len(kw["labels"])), with_kwargs=True)
    batches = tiny_batches(2, size=32)
    learned.share_learned(model, batches, ScoringOptions(priming_steps=3, calibration_steps=2))
    hook.remove()
    assert sizes == [16] * 4  # of each batch, with its own labels and with others


def test_all_places_have_the_same_defaults():
    """The config, the function and the command each show theirs as numbers, for those who read them."""
    for name, of_command in (("calibration_steps", CALIBRATION_STEPS), ("priming_steps", PRIMING_STEPS)):
        of_function = inspect.signature(compute_scores).parameters[name].default
        assert of_function == getattr(SensiConfig(), name) == getattr(ScoringOptions(), name) == of_command


def test_tokens_that_were_read_but_not_scored_count_as_seen():
    batches = tiny_batches(4, size=2, length=4)
    scores = compute_scores(tiny_model(), batches, priming_steps=4, calibration_steps=1, progress=False)
    (values,) = [value for name, value in scores.values.items() if name.endswith(".tokens")]
    positive = set(values.nonzero()[:, 0].tolist())
    first, all_of_them = (
        {int(i) for b in part for i in b["input_ids"][b["attention_mask"].bool()]} for part in (batches[:1], batches)
    )
    assert positive == all_of_them - {0} and first < all_of_them
    rest = torch.tensor(sorted(positive - first))
    assert (values[rest] == values[values > 0].min()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_steps": 0}, "`calibration_steps` must be a whole number of at least 1"),
        ({"priming_steps": 1.5}, "`priming_steps` must be"),
        ({"priming_lr": -1}, "`priming_lr` must be a finite number above 0"),
        ({"priming_optimizer": "sgd"}, "`priming_optimizer` must be one of adamw, sign"),
        ({"seed": 2**70}, "`seed` must be"),
        ({"targets": "query"}, "`targets` must be a list of names"),
        ({"blocks": ["layer.*"]}, "`blocks` must be a list of `BlockLayout` objects"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments, message, bert, batches):
    with pytest.raises(SensiError, match=message):
        compute_scores(bert, batches, **{"progress": False, **arguments})


@pytest.mark.parametrize(
    "call",
    [
        compute_scores,
        build_anatomy,
        measure_latency,
        partial(save_merged, folder="merged"),
        partial(export_onnx, path="model.onnx"),
    ],
    ids=["scores", "anatomy", "latency", "merged", "onnx"],
)
def test_a_name_is_no_model(call):
    with pytest.raises(SensiError, match="must be a `torch.nn.Module`, got 'bert-base': load it"):
        call("bert-base")


@pytest.mark.parametrize("config", [SensiConfig(budget=0.5, task_type="SEQ_CLS"), LoraConfig(task_type="SEQ_CLS")])
def test_a_model_with_an_adapter_has_no_scores(config, bert, batches):
    model = get_peft_model(bert, config)
    with pytest.raises(SensiError, match="has an adapter: score the base model"):
        compute_scores(model, batches)


@pytest.mark.parametrize("priming_steps", [0, 1])
@pytest.mark.parametrize("cut", [torch.no_grad, torch.enable_grad])
def test_a_loss_without_a_gradient_says_what_to_do(cut, priming_steps, bert, batches):
    def loss_fn(model, batch):
        with cut():
            return model(**batch).loss.detach()

    before = snapshot(bert)
    with pytest.raises(CalibrationError, match="batch 0.* has no gradient. `loss_fn` must compute it from the model"):
        compute_scores(bert, batches, loss_fn=loss_fn, priming_steps=priming_steps, progress=False)
    assert_same_tensors(snapshot(bert), before)


def test_a_loss_that_does_not_run_the_model_says_what_to_do(bert, batches):
    with pytest.raises(CalibrationError, match="runs none of the modules.*must call the model that it gets"):
        loss = torch.ones((), requires_grad=True)
        compute_scores(bert, batches, loss_fn=lambda model, batch: loss, priming_steps=0, progress=False)


def test_a_loss_fn_may_take_the_labels_out():
    """As the `compute_loss` of `Trainer` does. The batches are used again, by the refit."""

    def loss_fn(model, batch):
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(model(**batch).logits, labels)

    batches = tiny_batches(4)
    model = wrap(tiny_model(), budget=0.5, calibration=batches, loss_fn=loss_fn, priming_steps=2)
    model.base_model.trim(0.25, batches, loss_fn=loss_fn)
    assert all("labels" in batch for batch in batches)


def test_the_seed_also_holds_for_numpy_and_python():
    """Models of speech draw the parts that they mask from NumPy's generator."""

    def scores(outer: int):
        np.random.seed(outer)
        random.seed(outer)
        model = tiny_model()
        model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"input_ids": kwargs["input_ids"].roll(drawn(), 1)}),
            with_kwargs=True,
        )
        return compute_scores(model, tiny_batches(4), priming_steps=2).values

    def drawn() -> int:
        return int(np.random.randint(5)) + random.randrange(5)

    assert_same_tensors(scores(1), scores(2))


def test_lists_beside_labels_of_other_numbers_are_not_divided():
    batches = tiny_batches(2, task="TOKEN_CLS")
    for batch in batches:
        batch["labels"][0, 3:] = -100
        batch["domain"] = ["news"] * len(batch["labels"])

    def loss_fn(model, batch):
        assert len(batch["domain"]) == len(batch["labels"])
        return model(**{name: value for name, value in batch.items() if name != "domain"}).loss

    compute_scores(tiny_model(task="TOKEN_CLS"), batches, loss_fn=loss_fn, priming_steps=2)


def test_priming_leaves_buffers_as_they_were():
    """The refit after it needs the statistics of batch norms that the base has."""
    model = tiny_model()
    model.bert.embeddings.register_module("extra", nn.BatchNorm1d(32))
    model.bert.embeddings.register_forward_hook(lambda m, args, out: m.extra(out.mT).mT)
    before = clone(dict(model.named_buffers()))
    with primed(model, tiny_batches(2), ScoringOptions(priming_steps=2)):
        assert not torch.equal(model.bert.embeddings.extra.running_mean, before["bert.embeddings.extra.running_mean"])
    assert_same_tensors(dict(model.named_buffers()), before)
