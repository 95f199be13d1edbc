"""The table of an adapter's tensors, and units that leave: the units that stay keep exactly their trained values."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from tiny import logits, some_slow, tiny_batches, tiny_model
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification

from peft_sensi import Schedule, SensiConfig
from peft_sensi.layers.functional import compose
from peft_sensi.layers.layer import SensiLayer
from peft_sensi.layers.slices import Slice, first_parts, kept_parts, tensor_specs


ACROSS = 4  # length of the side without units
TUNED, FROZEN, LEAVES = 2, 1, 0


@st.composite
def problems(draw):
    """A Linear of integers, its slice, trained values of integers, and the slice after some units have left."""
    sides, width, dim = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    states = draw(st.lists(st.sampled_from([TUNED, FROZEN]), min_size=1, max_size=6))
    stays = draw(st.lists(st.booleans(), min_size=len(states), max_size=len(states)))
    has_bias = draw(st.booleans())
    options = {
        "train_bias": has_bias and draw(st.booleans()),
        "rank": draw(st.integers(0, 2)),
        "sparse": draw(st.sampled_from([0, 1, 7, 1000])),
    }
    size = sides * width * len(states)
    shape = (size, ACROSS) if dim == 0 else (ACROSS, size)

    def slice_of(states: list[int], in_order: bool) -> Slice:
        units = np.array([i for s in (TUNED, FROZEN) for i, state in enumerate(states) if state == s], dtype=int)
        units = np.sort(units) if in_order else units
        kept = [
            side * width * len(states) + u * width + w for side in range(sides) for u in units for w in range(width)
        ]
        is_tuned = [states[u] == TUNED for _ in range(sides) for u in units for _ in range(width)]
        count = sum(is_tuned)
        tuned = count if all(is_tuned[:count]) else torch.tensor(is_tuned).nonzero().flatten()
        return Slice(shape, has_bias, dim, torch.tensor(kept, dtype=torch.int64), tuned, len(units), **options)

    old = slice_of(states, draw(st.booleans()))
    new = slice_of([s if stay else LEAVES for s, stay in zip(states, stays, strict=True)], draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    base = torch.nn.Linear(*reversed(shape), bias=has_bias)
    parts = first_parts(base, dataclasses.replace(old, support="random"), None)
    for tensor in [*base.parameters(), *(t for name, t in parts.items() if name != "places")]:
        tensor.data = torch.randint(-9, 10, tensor.shape, generator=generator).float()
    return base, parts, old, new


def dense(base: torch.nn.Linear, parts: dict[str, torch.Tensor], slice_: Slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow form: weight and bias in the base's positions, value by value."""
    weight = base.weight.detach().clone()
    bias = torch.zeros(len(weight)) if base.bias is None else base.bias.detach().clone()
    kept, tuned = slice_.kept.tolist(), slice_.tuned_positions.tolist()
    rows, columns = (kept, range(ACROSS)) if slice_.dim == 0 else (range(ACROSS), kept)
    for i, position in enumerate(tuned):
        weight.select(slice_.dim, position).copy_(parts["weight"].select(slice_.dim, i))
    if "bias" in parts:
        for value, row in zip(parts["bias"], rows if slice_.train_bias else tuned, strict=True):
            bias[row] = value
    if "down" in parts:
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                weight[row, column] += parts["up"][i] @ parts["down"][:, j]
    for place, value in zip(parts.get("places", []), parts.get("values", []), strict=True):
        weight[rows[place // len(columns)], columns[place % len(columns)]] += value
    return weight, bias


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@given(problems())
def test_units_that_stay_keep_their_values(problem):
    base, parts, old, new = problem
    left = kept_parts(parts, old, new)
    assert specs_of(left) == {name: (spec.shape, spec.dtype) for name, spec in tensor_specs(new).items()}
    positions = new.kept
    before, after = dense(base, parts, old), dense(base, left, new)
    assert torch.equal(after[0].index_select(new.dim, positions), before[0].index_select(new.dim, positions))
    if new.dim == 1:
        assert torch.equal(after[1], before[1])
    else:
        assert torch.equal(after[1][positions], before[1][positions])


@given(problems())
def test_the_table_is_what_is_initialized(problem):
    base, parts, _, new = problem
    for slice_ in (
        new,
        dataclasses.replace(new, gated=True, sparsity=0.5),
        dataclasses.replace(new, compressed="int8"),
    ):
        expected = {name: (spec.shape, spec.dtype) for name, spec in tensor_specs(slice_).items()}
        assert specs_of(first_parts(base, slice_, None)) == expected


# -- cuts during training ---------------------------------------------------------------------------------------------


def gpt2() -> GPT2ForSequenceClassification:
    """A model with one Linear for queries, keys and values: each head has rows at three places."""
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 40}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(**sizes, vocab_size=64, num_labels=3, pad_token_id=0, initializer_range=0.3)
        return GPT2ForSequenceClassification(config).eval()


PARTIAL = {
    "all tuned": {},
    "retention": {"retention": 0.25},
    "nothing tuned": {"retention": 0.0, "target_modules": ["intermediate.dense", "output.dense"]},
    "retention and biases": {"retention": 0.25, "also_train": ["biases"]},
    "retention without biases": {"retention": 0.4, "also_train": []},
    "one layer": {"tuned_layers": 1},
    "one layer and biases": {"tuned_layers": 1, "also_train": ["biases", "norms"]},
    "some targets": {"target_modules": ["query", "intermediate.dense"], "also_train": []},
    "low rank": {"update": "low_rank", "rank": 2},
    "low rank and biases": {"update": "low_rank", "rank": 2, "also_train": ["biases"]},
    "sparse": {"update": "sparse", "sparse": 40},
    "more values than stay": {"update": "sparse", "sparse": 1500},
    "low rank and sparse": {
        "update": "low_rank+sparse", "rank": 2, "sparse": 40, "target_modules": ["query", "value"],
    },
    "dense and low rank": {"update": "dense+low_rank", "rank": 2, "retention": 0.25},
    "dense, low rank and biases": {
        "update": "dense+low_rank", "rank": 2, "retention": 0.25, "also_train": ["biases"],
    },
    "whole sublayers": {"retention": 0.25, "min_units": 0, "budget": 0.15},
}  # fmt: skip


def train_with_cuts(model: PeftModel) -> Schedule:
    """Six steps with two cuts, all before `finish`."""
    schedule = Schedule(model, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for batch in tiny_batches(6, seed=7):
        schedule.step()  # without the optimizer, so that units stay masked until `finish`
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return schedule


def layers(model: PeftModel) -> dict[str, SensiLayer]:
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SensiLayer)}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "name", some_slow(PARTIAL, "retention without biases", "one layer", "low rank", "sparse", "some targets")
)
def test_the_end_of_cuts_changes_no_value_of_a_unit_that_stays(name, family, tmp_path):
    options = {"budget": 0.5, **PARTIAL[name]}
    if family == "gpt2":
        options["target_modules"] = {
            "nothing tuned": ["mlp.c_fc", "mlp.c_proj"],
            "some targets": ["attn.c_attn", "mlp.c_fc"],
            "low rank and sparse": ["attn.c_attn"],
        }.get(name)
    make = tiny_model if family == "bert" else gpt2
    phase = {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2}
    config = SensiConfig(score="magnitude", multiple_of=1, task_type="SEQ_CLS", schedule=phase, **options)
    model = get_peft_model(make(), config)
    schedule = train_with_cuts(model)
    masked = logits(model)
    with torch.no_grad():
        before = {n: (*m.get_adapted_weight("default"), m.part("gate", "default")) for n, m in layers(model).items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    schedule.finish()
    plan = model.base_model.plan()
    assert plan.trims and plan.params_share <= options["budget"]
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=1e-5)
    for path, layer in layers(model).items():
        if "default" not in layer.sensi_slices:
            continue
        slice_ = layer.sensi_slices["default"]
        positions = slice_.kept.sort().values
        weight, bias = layer.get_adapted_weight("default")
        if path not in before:  # a frozen Linear, of which only trimmed units make an adapter layer
            assert torch.equal(weight, layer.get_original_weight("default")) and not slice_.tuned_count
            continue
        old_weight, old_bias, gate = before[path]
        if gate is not None:  # in the base's order of units
            assert torch.equal(gate.repeat_interleave(layer.in_features // len(gate)).nonzero().flatten(), positions)
        # A low-rank term of fewer columns may be summed in another order. Everything else has the same bits.
        tolerance = 1e-6 if "low rank" in name else 0.0
        kept = old_weight.index_select(slice_.dim, positions)
        torch.testing.assert_close(weight, kept, atol=tolerance, rtol=tolerance)
        if bias is not None:
            assert torch.equal(bias, old_bias[positions] if slice_.dim == 0 else old_bias)
    found = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(found[n] == flag for n, flag in flags.items() if n in found)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) >= plan.trainable_params
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))


def test_open_gates_are_not_multiplied_and_closed_ones_count(monkeypatch):
    """As before a late cut. Whatever writes into a gate (a cut, a checkpoint) is noticed at the next forward pass."""
    phase = {"phase": "cut", "start": 0.6, "end": 0.6, "cuts": 1}
    config = SensiConfig(budget=0.5, score="magnitude", task_type="SEQ_CLS", schedule=phase)
    model = get_peft_model(tiny_model(), config).eval()
    (path, layer), *_ = [(n, m) for n, m in layers(model).items() if m.part("gate", "default") is not None]
    calls = []
    monkeypatch.setattr("peft_sensi.layers.linear.compose", lambda *args: calls.append(args) or compose(*args))
    x = torch.randn(3, 5, layer.in_features)
    for closed in ([], [0], [0, 1], []):
        with torch.no_grad():
            layer.part("gate", "default").fill_(1)[closed] = 0
        calls.clear()
        torch.testing.assert_close(layer(x), F.linear(x, *layer.get_adapted_weight("default")))
        assert bool(calls) is bool(closed), path
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == layer(x).shape
