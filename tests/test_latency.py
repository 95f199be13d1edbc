"""Latency tables: measuring them, their files, and adapters that were planned with them.

No test depends on the machine's speed: the clock counts the multiplications of Linears, so times are known exactly.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import errno
import json
import os
import platform
import random
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from processes import PATIENCE, run_code
from tiny import logits, tiny_batches, tiny_config, tiny_model, train, wrap
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    T5Config,
    ViTConfig,
)
from typer.testing import CliRunner

from peft_sensi import (
    BlockLayout,
    BudgetError,
    LatencyTable,
    Schedule,
    SensiConfig,
    SensiError,
    SensiLoadError,
    build_anatomy,
    export_graphs,
    measure_latency,
)
from peft_sensi.anatomy.latency import FORMAT, LIMIT_OF, check_records
from peft_sensi.anatomy.latency_points import Kind, kinds_of, monotone, points_of, smooth, table_from
from peft_sensi.cli.commands import app
from peft_sensi.cli.measure import length_for
from peft_sensi.merging import latency as merging_latency
from peft_sensi.merging import latency_graphs
from peft_sensi.planning import latency_torch
from peft_sensi.reporting.card import write_card
from peft_sensi.reporting.saved import open_adapter
from peft_sensi.tuner.latencies import measure_missing
from peft_sensi.utils import timing
from peft_sensi.utils.timing import Timing, time_variants


@pytest.fixture
def counting(monkeypatch):
    """A clock that advances by a microsecond a call, and by a nanosecond for each multiplication of a Linear."""
    now = [0.0]

    def count(module, args, output):
        if isinstance(module, nn.Linear):
            now[0] += 1e-9 * output.numel() * module.weight.shape[1]

    def clock() -> float:
        now[0] += 1e-6
        return now[0]

    handle = register_module_forward_hook(count)
    for module in (latency_torch, merging_latency, latency_graphs):
        monkeypatch.setattr(module, "clock_for", lambda *args: clock)
    monkeypatch.setattr(timing, "_MOST", 2)  # the clock is exact: more runs in a round would all take the same time
    yield
    handle.remove()


@pytest.fixture
def table(counting, bert) -> LatencyTable:
    return measure_latency(bert, batch_size=2, sequence_length=10, threads=1, rounds=1)


def test_the_table_has_the_time_of_each_unit(table, bert):
    anatomy = build_anatomy(bert)
    assert table.phase == "prefill" and table.runtime == "torch" and table.versions["torch"] == torch.__version__
    assert (table.batch_size, table.sequence_length, table.threads, table.model) == (2, 10, 1, "bert")
    for kind, times in zip(kinds_of(anatomy), table.sublayers, strict=True):
        group = next(g for g in anatomy.groups if times.shape.startswith(g.kind))
        weights = sum(side.width * side.fan for side in group.sides)
        assert (times.counts, times.groups, times.units) == (kind.counts, 2, group.size)
        assert times.counts[0] == 0 and times.counts[-1] == group.size
        expected = [20 * weights * count / 1e6 for count in times.counts]  # 20 tokens, a nanosecond each
        np.testing.assert_allclose(times.ms, expected, atol=1e-5)
        assert max(times.spread_ms) < 1e-5
    whole = 20 * anatomy.prunable_macs(1) - 20 * 2 * 4 * 2 * 8  # without the products with the attention matrix
    head = 2 * (32 * 32 + 32 * 3)  # pooler and classifier, for one token of each sequence
    assert table.whole == pytest.approx(whole + head + 1000, abs=50)


@pytest.mark.parametrize("alone, together", [((60, 30), 0.5), ((60, 30), 1.0), ((60, 30), 1.1), ((70, 60), 0.7)])
def test_savings_agree_with_models_that_are_trimmed_all_over(alone, together, table):
    """The whole model takes 100 ms. Without one kind it takes `alone` less; both together save another amount."""
    kinds = [Kind("head", 2, 8, tuple(range(9))), Kind("neuron", 2, 64, tuple(range(0, 65, 8)))]

    def ms(counts: dict[str, int]) -> float:
        removed = [1 - counts.get(kind.shape, kind.units) / kind.units for kind in kinds]
        saved = sum(share * most for share, most in zip(removed, alone, strict=True))
        return 100 - saved * (together if all(removed) else 1.0)

    points = {name: Timing(ms(counts) / 1e3, 0.0) for name, counts in points_of(kinds).items()}
    names = ("phase", "model", "device", "runtime", "versions", "threads", "dtype", "batch_size", "sequence_length")
    made = table_from(kinds, Timing(0.1, 0.0), points, {name: getattr(table, name) for name in names})
    for share in (0, 0.25, 0.5, 0.75, 1):
        counts = {kind.shape: int(share * kind.units) for kind in kinds}
        predicted = made.rest_ms + sum(
            times.groups * times.ms[times.counts.index(counts[times.shape])] for times in made.sublayers
        )
        assert predicted == pytest.approx(ms(counts), abs=1e-3)


def test_measuring_leaves_the_model_as_it_is(counting, bert):
    before, flags = {n: t.clone() for n, t in bert.state_dict().items()}, bert.train().training
    shapes = vars(bert.bert.encoder.layer[0].attention.self).copy()
    measure_latency(bert, sequence_length=10, rounds=1)
    assert bert.training == flags and all(torch.equal(t, before[n]) for n, t in bert.state_dict().items())
    assert vars(bert.bert.encoder.layer[0].attention.self).keys() == shapes.keys()


def test_a_decoding_step(counting):
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    prefill = measure_latency(model, sequence_length=12, rounds=1)
    step = measure_latency(model, sequence_length=12, rounds=1, decode=True)
    assert (prefill.limit, step.limit) == ("latency", "decode_latency")
    for first, second in zip(prefill.sublayers, step.sublayers, strict=True):
        assert first.counts == second.counts
        np.testing.assert_allclose(np.array(first.ms), 12 * np.array(second.ms), atol=2e-5)
    # The first layer tells the cache its length, so it keeps a head and is a kind of its own.
    kept = [kind for kind in step.sublayers if "never empty" in kind.shape]
    assert [kind.counts[0] for kind in kept] == [1] and kept[0].groups == 1


def test_a_step_with_a_full_sliding_window(counting):
    sizes = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 6, "layer_types": ["sliding_attention"] * 2}
    base = Gemma3TextConfig(**tiny_config("llama").to_diff_dict() | {"model_type": "gemma3_text", **sizes})
    step = measure_latency(AutoModelForCausalLM.from_config(base).eval(), sequence_length=12, rounds=1, decode=True)
    assert step.limit == "decode_latency" and step.whole_ms > step.rest_ms > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runtime": "tflite"}, "`runtime` must be"),
        ({"batch_size": 0}, "`batch_size` must be a positive whole number"),
        ({"threads": 1.0}, "`threads` must be"),
        ({"threads": 10**9}, "`threads` must be a whole number from 1 to 1024"),  # a runtime would end the process
        ({"batch_size": 2**30, "sequence_length": 2**30}, "A batch of .* cannot be made"),
        ({"sequence_length": 10_000}, "cannot run a batch of 1 x 10000.*Give a batch .* as `inputs=`"),
        ({"runtime": "onnxruntime", "decode": True}, "leave out `decode`"),
        ({"decode": True, "sequence_length": 8}, "cannot run a step after 8 cached tokens"),
    ],
)
def test_mistakes_in_arguments(options, message, bert):
    with pytest.raises(SensiError, match=message):
        measure_latency(bert, **options)


@pytest.mark.parametrize("options, message", [({"decode": True}, "leave out `decode`"), ({"rounds": 0}, "`rounds`")])
def test_a_comparison_refuses_what_a_measurement_does(options, message, bert):
    with pytest.raises(SensiError, match=message):
        merging_latency.compare_latency(bert, bert, runtime="onnxruntime", **options)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"input_ids": [[1, 2]]}, "must be a mapping from names to tensors"),
        ([1], "must be a mapping from names to tensors"),
        ({"x": torch.ones(1, 4)}, "cannot run|must be one batch"),
        ({"input_ids": torch.full((1, 4), 10**6)}, "cannot run a batch"),
    ],
)
def test_inputs_that_the_model_does_not_take(inputs, message, runtime, bert):
    with pytest.raises(SensiError, match=message):
        measure_latency(bert, inputs=inputs, runtime=runtime, rounds=1)


def test_models_that_cannot_be_measured(bert):
    with pytest.raises(SensiError, match="has an adapter"):
        measure_latency(wrap(bert))
    with pytest.raises(SensiError, match="no heads or neurons"):
        measure_latency(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SensiError, match="it returns no cache"):
        measure_latency(tiny_model(task="FEATURE_EXTRACTION"), sequence_length=8, decode=True)
    with pytest.raises(SensiError, match="it returns no cache"):
        measure_latency(tiny_model(), sequence_length=8, decode=True)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    with pytest.raises(SensiError, match="has an encoder, too"):
        measure_latency(AutoModelForSeq2SeqLM.from_config(BartConfig(**sizes)), sequence_length=8, decode=True)


@pytest.mark.parametrize("family", [BartConfig, T5Config])
def test_a_classifier_that_reads_the_end_of_a_text_can_be_measured(family):
    """It refuses examples without a token for the end, and examples with more of them than others."""
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_layers": 1,
        "vocab_size": 9,
        "num_labels": 2,
    }
    model = AutoModelForSequenceClassification.from_config(family(decoder_start_token_id=0, **sizes)).eval()
    batch = latency_torch.example_inputs(model, 3, 40)
    with torch.no_grad():
        assert model(**batch).logits.shape == (3, 2)
    assert (batch["input_ids"][:, -1] == model.config.eos_token_id).all()
    assert ((batch["input_ids"] == model.config.eos_token_id).sum(1) == 1).all()


class Own(nn.Module):
    """A model that is none of Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 16), "down": nn.Linear(16, 4)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return x


def test_a_model_of_the_users_own_needs_a_batch(counting):
    model, blocks = Own(), [BlockLayout(layer="blocks.*", up="up", down="down")]
    with pytest.raises(SensiError, match="Own has no config of Transformers.*give a batch as `inputs`"):
        measure_latency(model, blocks=blocks)
    with pytest.raises(SensiError, match="give a batch as `inputs`"):
        wrap(model, budget={"latency": 0.5}, blocks=blocks, task_type=None)
    assert measure_latency(model, blocks=blocks, inputs={"x": torch.ones(1, 4)}, rounds=1).model == "Own"


def test_inputs_are_where_the_model_is(bert):
    given = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert latency_torch.example_inputs(copy.deepcopy(bert).to("meta"), 1, 4, given)["input_ids"].is_meta
    expected = latency_torch.example_inputs(bert, 2, 5)
    with torch.device("meta"):  # as `set_default_device("cuda")` would, where there is none
        found = latency_torch.example_inputs(bert, 2, 5)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# -- timing -----------------------------------------------------------------------------------------------------------


def fake_times(durations, noise=0.0, places=0.0, seed=0):
    """A clock and a function that prepares runs, which take these seconds.

    `noise` is how much longer a run takes on average on a busy machine, and `places` by how much the time of a run
    differs when it is prepared again.
    """
    now, drawn = [0.0], random.Random(seed)

    @contextmanager
    def prepared(name):
        place = 1 + drawn.choice((-places, places))

        def run():
            now[0] += durations[name] * place * (1 + drawn.expovariate(1.0) * noise)

        yield run

    return (lambda: now[0]), lambda name: partial(prepared, name)


def test_medians_of_noisy_runs():
    clock, prepared = fake_times({"whole": 0.01, "half": 0.005, "none": 0.001}, noise=0.2)
    whole, found = time_variants(prepared("whole"), {name: prepared(name) for name in ("half", "none")}, clock)
    assert found["half"].seconds / whole.seconds == pytest.approx(0.5, rel=0.05)
    assert found["none"].seconds / whole.seconds == pytest.approx(0.1, rel=0.05)
    assert 0 < found["half"].error < timing.LARGEST_ERROR * whole.seconds and found["half"].spread > 0


@pytest.mark.parametrize("duration", [0.001, 0.1])
def test_a_model_that_is_prepared_again_has_another_time(duration):
    """Many runs of one preparation say no more than a few. A median of two kinds of turns would be at one of them."""
    clock, prepared = fake_times({"whole": duration, "half": duration / 2}, places=0.1)
    whole, found = time_variants(prepared("whole"), {"half": prepared("half")}, clock, rounds=200)
    assert found["half"].seconds / whole.seconds == pytest.approx(0.5, rel=0.04)
    assert whole.seconds == pytest.approx(duration, rel=0.04)
    assert 0.003 < found["half"].error / whole.seconds < 0.02


@pytest.mark.parametrize("count", [1, 2, 3, 7, 21, 100])
def test_extremes_do_not_count(count):
    values = [1.0] * count
    assert timing._summary(values, 2.0) == Timing(2.0, 0.0, 0.0)
    if count > 2:
        assert timing._summary([1000.0, *values[1:]], 1.0).seconds == 1.0


def test_the_error_is_that_of_the_mean():
    random = np.random.default_rng(0)
    means, errors = zip(*((t.seconds, t.error) for t in (timing._summary(list(random.normal(1, 0.1, 21)), 1.0)
                                                          for _ in range(2000))), strict=True)  # fmt: skip
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


@pytest.mark.parametrize(("duration", "places", "turns"), [(1.0, 0.0, 4), (0.01, 0.0, 7), (1.0, 0.05, 7)])
def test_long_runs_that_are_precise_need_fewer_rounds(duration, places, turns):
    clock, prepared = fake_times({"whole": duration, "half": duration / 2}, noise=0.001, places=places)
    started = []

    def counted(name):
        started.append(name)
        return prepared("half")()

    time_variants(prepared("whole"), {name: partial(counted, name) for name in "abcd"}, clock)
    assert collections.Counter(started) == dict.fromkeys("abcd", turns)


def test_the_error_of_one_variant_is_known_later():
    assert [next(n for n in range(1, 99) if timing._is_known(n, count)) for count in (1, 2, 4, 20)] == [7, 5, 4, 4]


def test_too_much_noise_is_an_error():
    clock, prepared = fake_times({"whole": 0.1, "half": 0.05}, noise=5.0)
    with pytest.raises(SensiError, match="too noisy: after 6 rounds"):
        time_variants(prepared("whole"), {"half": prepared("half")}, clock, rounds=2)


FAULTS = """
import resource
from peft_sensi.utils.timing import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 40_000_000  # glibc returns as much to the system at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = [faults() for _ in range(4)]
with kept_memory():
    inside = [faults() for _ in range(4)]
print(outside[-1], inside[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_is_kept_for_the_next_run(tmp_path):
    outside, inside = map(int, run_code(FAULTS, tmp_path).split())
    assert inside < outside / 10


def test_one_thread_is_timed_by_the_processor():
    assert timing.clock_for(2) is timing.clock_for(1, "cuda")
    assert timing.clock_for(1) is not timing.clock_for(2)
    assert timing.processor_name().isprintable()


@pytest.mark.parametrize(
    "values, expected",
    [([1, 2, 3], [1, 2, 3]), ([3, 1, 2], [2, 2, 2]), ([1, 3, 2, 4], [1, 2.5, 2.5, 4]), ([2, 2], [2, 2]), ([5], [5])],
)
def test_monotone(values, expected):
    assert monotone(np.array(values, dtype=float), np.ones(len(values))).tolist() == expected


def test_smooth_curves_keep_what_is_larger_than_the_errors():
    places, random = np.linspace(0, 1, 9), np.random.default_rng(0)
    noisy = places + random.normal(0, 0.02, 9)
    smoothed = smooth(places, noisy, np.full(9, 0.02))
    assert np.abs(np.diff(smoothed, 2)).max() < np.abs(np.diff(noisy, 2)).max() / 5
    assert np.sqrt(np.mean((smoothed - noisy) ** 2)) <= 0.0201
    steps = np.repeat([0.0, 1.0, 2.0], 3)
    np.testing.assert_allclose(smooth(places, steps, np.full(9, 0.01)), steps, atol=0.03)
    np.testing.assert_array_equal(smooth(places, noisy, np.zeros(9)), noisy)
    for spread in (3, 6, 12):  # on a busy machine, the time of a small sublayer may come out as nearly nothing
        errors = np.geomspace(1, 10.0**-spread, 9)
        smoothed = smooth(places, noisy, errors)
        assert np.mean(((smoothed - noisy) / np.maximum(errors, 1e-3)) ** 2) <= 1.001
    np.testing.assert_array_equal(smooth(places[:2], noisy[:2], np.full(2, 1.0)), noisy[:2])


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_table_survives_its_file(table, tmp_path):
    table.save(tmp_path / "pi.json")
    again = LatencyTable.load(tmp_path / "pi.json")
    assert again == table and again.fingerprint == table.fingerprint and str(again) == str(table)
    assert (tmp_path / "pi.json").stat().st_size < 5000
    with pytest.raises(FileNotFoundError):
        LatencyTable.load(tmp_path / "no.json")


def mutations(values):
    """Copies of a JSON value in which one place has another value or is gone."""
    others = (
        None,
        -1,
        0,
        1.5,
        10**400,
        float("nan"),
        float("inf"),
        True,
        "",
        "x" * 2000,
        "a\nb",
        [],
        [1],
        {},
        {"a": 1},
    )

    def places(value, path=()):
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield (*path, key)
            yield from places(value[key], (*path, key))

    for path in list(places(values)):
        for other in (*others, "gone"):
            copied = copy.deepcopy(values)
            inner = copied
            for key in path[:-1]:
                inner = inner[key]
            if other == "gone":
                del inner[path[-1]]
            elif type(other) is type(inner[path[-1]]) and other == inner[path[-1]]:
                continue
            else:
                inner[path[-1]] = other
            yield path, other, copied


def test_damaged_tables_are_refused_or_make_sense(table, tmp_path):
    accepted = 0
    for path, other, values in mutations(table.to_dict()):
        try:
            found = LatencyTable.from_dict(values)
        except SensiLoadError:
            continue
        accepted += 1
        # Other figures of the same kind are what a user may write by hand.
        assert found.whole > 0 and LatencyTable.from_dict(found.to_dict()) == found, (path, other)
        for kind in found.sublayers:
            assert list(kind.ms) == sorted(kind.ms) and kind.counts[-1] == kind.units
        record = {LIMIT_OF[found.phase]: found.record(found.whole)}
        check_records(record)  # what an adapter of it saves can be loaded
    assert accepted < 250
    huge = {**table.to_dict(), "rest_ms": 9e8}
    huge["sublayers"] = [{**kind, "ms": [1e9] * len(kind["ms"])} for kind in huge["sublayers"]]
    with pytest.raises(SensiLoadError, match="too much"):
        LatencyTable.from_dict(huge)
    older = [json.dumps({**table.to_dict(), "format": "peft_sensi.latency.0"}), json.dumps({"format": FORMAT})]
    for text in ("[]", "{}", "1", *older, "[" * 10**5):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(SensiLoadError, match=r"x\.json.*" + "Measure the model again" * (text in older)):
            LatencyTable.load(tmp_path / "x.json")


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_remembers_the_figures_and_not_the_table(table, tmp_path):
    table.save(tmp_path / "pi.json")
    model = wrap(tiny_model(), budget={"latency": 0.6}, latency=tmp_path / "pi.json")
    plan = model.base_model.plan()
    predicted = plan.latency["latency"]["predicted_ms"]
    assert 0.55 * table.whole_ms < predicted <= 0.6 * table.whole_ms and plan.trims
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    record = json.loads(text)["latency"]["latency"]
    assert record == table.record(round(predicted * 1e6)) and "sublayers" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert again.base_model.plan() == plan and again.base_model.plan().latency == plan.latency
    assert "predicted latency" in again.base_model.plan().summary()
    # Trimmed further, the old figures are wrong: they go with a warning, or a table gives new ones.
    with pytest.raises(BudgetError, match="needs a latency table"):
        again.base_model.trim({"latency": 0.5}, tiny_batches())
    assert again.base_model.plan() == plan and again.base_model.plan().latency == plan.latency
    trimmed = again.base_model.trim({"latency": 0.5}, tiny_batches(), latency=table)
    assert trimmed.latency["latency"]["predicted_ms"] <= 0.5 * table.whole_ms
    assert again.peft_config["default"].budget == {"latency": 0.5}
    other = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    with pytest.warns(UserWarning, match="latency table is not known"):
        assert not other.base_model.trim(0.3, tiny_batches()).latency
    assert other.peft_config["default"].latency is None


def test_a_trim_with_a_table_for_one_limit_keeps_that_for_another(table, tmp_path):
    step = dataclasses.replace(table, phase="decode")
    model = wrap(tiny_model(), budget={"latency": 0.8}, latency=[table, step])
    plan = model.base_model.trim({"decode_latency": 0.6}, tiny_batches(), latency=step)
    assert plan.latency.keys() == {"latency", "decode_latency"}
    assert model.base_model.trim({"latency": 0.4}, tiny_batches()).latency.keys() == plan.latency.keys()
    # A file holds no tables. What the missing one would predict is left out, with a warning.
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    with pytest.warns(UserWarning, match=r"not known here \(latency\)"):
        left = again.base_model.trim({"decode_latency": 0.2}, tiny_batches(), latency=step).latency
    assert left.keys() == {"decode_latency"}
    # The user may set it in the config.
    other = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    other.peft_config["default"].latency = table
    both = other.base_model.trim({"decode_latency": 0.2}, tiny_batches(), latency=step).latency
    assert both.keys() == {"latency", "decode_latency"}


def test_a_table_without_a_limit_only_predicts(table):
    plain = wrap(tiny_model(), budget=0.5).base_model.plan()
    told = wrap(tiny_model(), budget=0.5, latency=table).base_model.plan()
    assert told == plain and not plain.latency and told.latency["latency"]["predicted_ms"] < table.whole_ms


def test_without_a_table_this_machine_is_measured(counting):
    model = wrap(tiny_model(), budget={"latency": 0.5}, sequence_length=9)
    record = model.base_model.plan().latency["latency"]
    assert (record["sequence_length"], record["batch_size"], record["runtime"]) == (9, 1, "torch")
    assert record["predicted_ms"] <= 0.5 * record["whole_ms"]


def test_the_measured_length_is_one_that_the_model_takes(counting):
    """RoBERTa does not use the first rows of its table of positions."""
    model = tiny_model("roberta")
    table = model.roberta.embeddings.position_embeddings
    config = SensiConfig(budget={"latency": 0.5}, task_type="SEQ_CLS")
    measure_missing(model, config)
    assert config.tables["latency"].sequence_length == table.weight.shape[0] - table.padding_idx - 1


def test_a_decoding_step_needs_a_position_of_its_own(counting):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 24, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    config = SensiConfig(budget={"latency": 0.5, "decode_latency": 0.5}, task_type="CAUSAL_LM")
    measure_missing(model, config)
    assert {name: table.sequence_length for name, table in config.tables.items()} == {
        "latency": 24,
        "decode_latency": 23,
    }
    assert (length_for(model, None), length_for(model, None, decode=True), length_for(model, 24)) == (24, 23, 24)
    with pytest.raises(SensiError, match="at most 23 cached tokens"):
        length_for(model, 24, decode=True)


def test_the_length_of_an_image_is_its_patches(counting):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    model = AutoModelForImageClassification.from_config(ViTConfig(image_size=8, patch_size=4, **sizes))
    config = SensiConfig(budget={"latency": 0.5})
    measure_missing(model, config)
    assert config.tables["latency"].sequence_length == 5


def test_cuts_during_training_meet_the_limit(table):
    config = {"budget": {"latency": 0.6}, "latency": table, "multiple_of": 8, "keep_base": True}
    model = wrap(tiny_model(), schedule={"phase": "cut", "start": 0.0, "end": 0.5, "cuts": 2}, **config)
    schedule = Schedule(model, 4)
    for step in range(4):
        schedule.step(None, step)
        train(model, steps=1)
    schedule.finish()
    plan = model.base_model.plan()
    assert plan.trims and plan.latency["latency"]["predicted_ms"] <= 0.6 * table.whole_ms


@pytest.mark.parametrize(
    "latency",
    ["/etc/passwd", ["a.json"], {"flops": {}}, {"latency": {}}, {"latency": 3}, {}, 5, {"latency": {"table": "x"}}],
    ids=repr,
)
def test_a_config_file_names_no_other_file(latency, tmp_path):
    wrap(tiny_model()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latency": latency}))
    with pytest.raises(SensiLoadError, match="latency"):
        SensiConfig.from_pretrained(tmp_path)


def test_a_record_in_a_file_is_checked(table, tmp_path):
    record = {"latency": table.record(10)}
    for path, other, values in mutations(record):
        if len(path) > 1 and (other == "gone" or other in (None, "a\nb") or isinstance(other, (list, dict))):
            with pytest.raises(SensiError):
                SensiConfig(latency=values)
    assert SensiConfig(latency=record).latency == record
    with pytest.raises(SensiError, match="not possible"):
        SensiConfig(latency={"latency": {**record["latency"], "predicted_ms": table.whole_ms + 1}})
    with pytest.raises(SensiError, match="predicted latency is zero"):
        merging_latency.check_prediction(nn.Linear(1, 1), nn.Linear(1, 1), {"predicted_ms": 0.0})


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments) -> dict:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], prog_name="peft-sensi")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_command_measures_plans_and_checks(counting, bert, tmp_path):
    bert.save_pretrained(tmp_path / "base")
    shape = ("--batch-size", 2, "--sequence-length", 10, "--threads", 1, "--rounds", 1)
    found = command("measure", tmp_path / "base", *shape, "--out", tmp_path / "pi.json")
    table = LatencyTable.load(tmp_path / "pi.json")
    assert table.to_dict() == found
    limits = ("--latency", "0.6", "--latency-table", tmp_path / "pi.json", "--score", "random")
    plan = command("plan", tmp_path / "base", *limits)
    assert plan["budget"] == {"latency": 0.6} and plan["plan"]["latency_share"] <= 0.6
    model = wrap(tiny_model(), budget={"latency": 0.6}, latency=table)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert command("inspect", tmp_path / "adapter")["latency"]["latency"]["table"] == table.fingerprint
    checked = command("measure", tmp_path / "adapter", "--against", tmp_path / "base", "--rounds", 1)["latency"]
    assert abs(checked["off"]) < 0.001 and checked["measured_share"] <= 0.6 * 1.001
    card = write_card(open_adapter(tmp_path / "adapter"), folder=tmp_path)[0].read_text()
    assert "| predicted latency | 0.6 | " in card
    done = CliRunner().invoke(
        app, ["measure", str(tmp_path / "base"), "--sequence-length", "9", "--export", str(tmp_path)]
    )
    assert done.exit_code == 1 and "not an empty folder" in " ".join(done.output.split())


# -- devices without PyTorch ------------------------------------------------------------------------------------------

LIGHT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
import peft_sensi
from peft_sensi.merging import latency_graphs

ticks = iter(range(10**9))
latency_graphs.clock_for = lambda *args: lambda: next(ticks)  # each run takes one second
try:
    peft_sensi.SensiConfig
except ImportError as error:
    assert "needs" in str(error), error
else:
    raise AssertionError("SensiConfig without PEFT?")
from peft_sensi.cli import main

main({arguments!r})
"""
HEAVY = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "scipy", "onnx", "typer",
         "rich", "sklearn", "tqdm")  # fmt: skip


def light(*arguments, blocked=HEAVY) -> subprocess.CompletedProcess:
    code = LIGHT.format(blocked=blocked, arguments=list(map(str, arguments)))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)


def test_an_export_of_graphs_that_fails_leaves_nothing_in_the_way(bert, tmp_path, monkeypatch):
    written = []

    def write_bytes(path, content):
        written.append(path.name)
        Path(path).open("wb").write(content[:9])
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(SensiError, match=r"graphs could not be written \(.*No space left"):
            export_graphs(bert, tmp_path / "graphs", sequence_length=10)
    assert len(written) == 2 and not (tmp_path / "graphs").exists()


def test_a_device_with_onnxruntime_only(bert, tmp_path):
    export_graphs(bert, tmp_path / "graphs", batch_size=2, sequence_length=10)
    assert sum(file.stat().st_size for file in (tmp_path / "graphs").iterdir()) < 3_000_000
    done = light("measure", tmp_path / "graphs", "--threads", 1, "--rounds", 1, "--out", tmp_path / "pi.json")
    assert done.returncode == 0, done.stderr
    table = LatencyTable.load(tmp_path / "pi.json")
    assert table.runtime == "onnxruntime" and table.rest_ms == table.whole_ms == 1000
    table.check_fits(build_anatomy(bert))
    assert not (tmp_path / "graphs" / latency_graphs.GRAPH_WEIGHTS).exists()
    for arguments, message in (
        (("plan", "x"), "the command needs"),
        (("measure", tmp_path), "holds no graphs.json"),
        (("measure", tmp_path / "graphs", "--threads", "0"), "must be at least 1"),
        (("measure", tmp_path / "graphs", "--threads", "1000000000"), "must be at most 1024"),
    ):
        done = light(*arguments)
        assert done.returncode and message in done.stderr and "Traceback" not in done.stderr
    values = json.loads((tmp_path / "graphs" / "graphs.json").read_text())
    for path, other, changed in mutations(values):
        (tmp_path / "graphs" / "graphs.json").write_text(json.dumps(changed))
        try:
            latency_graphs.read_graphs(tmp_path / "graphs")
        except SensiLoadError:
            continue
        assert path[0] in ("model", "dtype", "versions", "batch_size", "sequence_length", "weight_bytes", "kinds",
                           "inputs"), (path, other)  # fmt: skip
    (tmp_path / "graphs" / "graphs.json").write_text(json.dumps({**values, "format": "peft_sensi.graphs.1"}))
    with pytest.raises(SensiLoadError, match="got 'peft_sensi.graphs.1'. Export the graphs again"):
        latency_graphs.read_graphs(tmp_path / "graphs")
