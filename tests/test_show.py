"""What terminals, notebooks and pictures show of plans, scores, tables and configs."""

from __future__ import annotations

import builtins
import html
import json
import re

import numpy as np
import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from tiny import tiny_batches, tiny_config, tiny_model, trained
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from peft_sensi import LatencyTable, Scores, SensiConfig, SensiError, build_anatomy, compute_scores, make_plan, recipes
from peft_sensi.anatomy.latency import SublayerTimes
from peft_sensi.plotting.canvas import log_ticks
from peft_sensi.reporting.facts import group_counts, unit_facts
from peft_sensi.reporting.saved import open_adapter
from peft_sensi.reporting.tables import legend, plan_table
from peft_sensi.utils.formatting import shortened, text_table
from peft_sensi.utils.states import TRIMMED


PLAIN = {"task_type": "SEQ_CLS", "score": "magnitude"}


def printed(*what, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        for item in what:
            console.print(item)
    return capture.get()


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.fixture(scope="module")
def large():
    """The anatomy, the scores and a plan of a model of the size of BERT-base."""
    with torch.device("meta"):
        sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}
        anatomy = build_anatomy(AutoModel.from_config(tiny_config("bert", vocab_size=30_000, **sizes)))
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(group.size) for group in anatomy.groups}
    return anatomy, scores, make_plan(anatomy, scores, {"params": 0.5, "trainable": 0.1})


@pytest.fixture(scope="module")
def adapter():
    return trained(budget=0.5, score="magnitude")


def t5():
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64))


# -- short representations --------------------------------------------------------------------------------------------


def test_representations_are_short(large, adapter, tmp_path):
    anatomy, _, plan = large
    adapter.save_pretrained(tmp_path)
    scores = compute_scores(tiny_model(), score="magnitude")
    sublayer = SublayerTimes("neuron: 3072x768", 12, 3072, (0, 3072), (0.0, 1.0), (0.0, 0.1))
    table = LatencyTable("prefill", "bert", "a board", "torch", {}, 1, "float32", 1, 128, 2.0, 0.1, (sublayer,))
    config = adapter.peft_config["default"]
    for value in (plan, anatomy, anatomy.groups[0], scores, table, config, open_adapter(tmp_path)):
        text = repr(value)
        assert type(value).__name__ in text and "\n" not in text and len(text) < 1200, f"{len(text)}: {text:.2000}"
    assert plan.line() in repr(plan) and len(repr(plan)) < 250
    assert "budget=0.5" in repr(config) and "priming_lr" not in repr(config)  # only what differs from the defaults
    assert "by magnitude of 136 units in 4 groups" in repr(scores) and str(scores) == repr(scores)
    assert len(repr(SensiConfig(plan=plan))) < 1000


def test_notebooks_get_tables(large, adapter):
    _, _, plan = large
    scores = compute_scores(tiny_model(), score="magnitude")
    for value, rows in ((plan, 24), (scores, 4)):
        text = value._repr_html_()
        assert text.count("<tr>") == rows + 1 and html.escape(value.line() if value is plan else repr(value)) in text
        assert "<Scores" not in text


def test_groups_by_name(large):
    anatomy, _, plan = large
    assert (plan["encoder.layer.3.heads"] == plan.of(anatomy.by_name["encoder.layer.3.heads"])).all()
    assert (plan["3.heads"] == plan["encoder.layer.3.heads"]).all()
    with pytest.raises(SensiError, match="has no group 'encoder.layer.12.heads'.*encoder.layer"):
        plan["encoder.layer.12.heads"]
    with pytest.raises(SensiError, match="several groups 'heads'"):
        plan["heads"]
    scores = compute_scores(tiny_model(), score="magnitude")
    assert scores["layer.1.neurons"] is scores.values["bert.encoder.layer.1.neurons"]
    with pytest.raises(SensiError, match="no group"):
        scores[0]


def test_frames(large):
    pytest.importorskip("pandas")
    anatomy, _, plan = large
    frame = plan.to_frame()
    assert list(frame["group"]) == list(anatomy.by_name) and frame["kept_params"].sum() == plan.kept_params
    assert frame["kept_flops"].sum() == plan.kept_flops
    assert frame["kept"].sum() == sum(int((plan.of(g) != TRIMMED).sum()) for g in anatomy.groups)
    scores = compute_scores(tiny_model(), score="magnitude")
    units = scores.to_frame()
    assert units["score"].sum() == pytest.approx(float(sum(v.sum() for v in scores.values.values())))
    assert not units["protected"].any() and len(units) == 136


def test_frames_without_pandas(large, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SensiError, match="pip install pandas"):
        large[2].to_frame()


# -- narrow terminals -------------------------------------------------------------------------------------------------


def test_summary_and_explanation_are_narrow(large):
    _, scores, plan = large
    assert widest(str(plan)) <= 80
    table = plan.summary().splitlines()[:25]
    for lines in (table, plan.explain(scores).splitlines()):
        assert max(map(len, lines)) <= 60 and len({len(line) for line in lines}) == 1
        assert sum(line.startswith("11 ") for line in lines) == 2


def test_blocks_of_an_encoder_and_a_decoder_have_their_numbers():
    model = get_peft_model(t5(), SensiConfig(budget=0.5, score="magnitude", task_type="SEQ_2_SEQ_LM"))
    names = [f"{part} {i} {kind}" for part in ("encoder", "decoder") for i in (0, 1) for kind in ("heads", "neurons")]
    for text in (model.plan().summary(), model.explain()):
        assert all(f"\n{name} " in text for name in [*names, "decoder 1 cross_heads"]), text
    for width in (60, 80):
        table = printed(plan_table(model.plan()), width=width)
        lines = [line for line in table.splitlines() if "/" in line]
        labels = ["encoder 0", "encoder 1", "decoder 0", "decoder 1", "decoder 0 cross", "decoder 1 cross"]
        assert [line[: line.index("  ")].strip() for line in lines] == labels and widest(table) <= width


def test_labels_keep_their_number():
    assert shortened("decoder 11 attention output dense", 24) == "decoder 11 …output dense"
    lines = text_table(["name", "count"], [["decoder 11 attention output dense", "1"], ["x", "1,000"]], width=31)
    assert lines == [
        "name                      count",
        "decoder 11 …output dense      1",
        "x                         1,000",
    ]


# -- calls on the PeftModel -------------------------------------------------------------------------------------------


def test_a_peft_model_passes_the_calls_on():
    model = trained(budget=0.8, score="magnitude")
    assert model.plan() == model.base_model.plan() and model.explain() == model.base_model.explain()
    plan = model.trim(0.5, tiny_batches(2), refit=False)
    assert plan == model.plan() == model.base_model.plan() and plan.trims
    model.compress("bfloat16")
    assert model.peft_config["default"].compressed == "bfloat16"


# -- updates ----------------------------------------------------------------------------------------------------------


# For each update its words, and the numbers of units that are tuned, updated and frozen.
UPDATES = {
    "low_rank": (SensiConfig(update="low_rank", rank=3, **PLAIN), "low-rank, rank 3, on 12 matrices", (0, 136, 0)),
    "dsee": (
        recipes.dsee(rank=2, sparse=8, **PLAIN),
        "low-rank + sparse, rank 2, 8 values each, on 4 matrices",
        (0, 8, 128),
    ),
    "binary_mask": (
        recipes.binary_mask(0.1, **PLAIN),
        "binary mask, 10% of the weights removed, on 12 matrices",
        (0, 136, 0),
    ),
    "learners": (recipes.learners(rank=2, **PLAIN), "low-rank, rank 2, on 12 matrices", (8, 128, 0)),
}


@pytest.mark.parametrize(("config", "words", "units"), UPDATES.values(), ids=UPDATES)
def test_updates_are_shown(config, words, units, tmp_path):
    plan = get_peft_model(tiny_model(), config).plan()
    assert plan.update_words == words and words in plan.line() and f"matrices trained: {words}" in plan.summary()
    counts = group_counts(plan)
    assert tuple(sum(c[state] for c in counts) for state in ("tuned", "updated", "frozen")) == units
    tuned, _, frozen = units
    name = words.partition(",")[0]
    shown = printed(plan_table(plan), legend(plan), width=80)
    assert f"▓▓ {name}" in shown and ("tuned" in shown) == bool(tuned) and ("▒▒ frozen" in shown) == bool(frozen)
    assert any("tuned" in text for text in unit_facts(plan).values()) == bool(tuned)
    plan.plot(tmp_path / "plan.svg", scores=compute_scores(tiny_model(), score="magnitude"))
    text = (tmp_path / "plan.svg").read_text()
    assert f" {name} -->" in text and " 0 tuned" not in text and ("all frozen" in text) == bool(frozen)


def test_a_dense_plan_has_no_update(adapter):
    assert adapter.plan().update_words == "" and "matrices" not in adapter.plan().summary()
    assert not any(row["updated"] for row in group_counts(adapter.plan()))


def test_an_adapter_that_ranks_matrices_trims_nothing(tmp_path):
    """Its plan has no heads and neurons, but this does not mean that none of their parameters are left."""
    model = get_peft_model(tiny_model(), recipes.l0_close(**PLAIN))
    plan = model.plan()
    assert plan.params_share == plan.flops_share == 1.0 and "0.0%" not in plan.line()
    assert json.loads(json.dumps(plan.figures()))["params_share"] == 1.0
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "5,216 values were trained" in card
    assert not re.search(r"\b0(\.0)?%|nothing can be trimmed|prunable parameters kept", card)


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.44, 0.59), (0.001, 0.004), (0.9, 31.0), (3e-9, 2.0), (4.4e4, 5.9e4), (1e-12, 1e12), (1.0, 1.1)],
)
def test_ticks_of_logarithmic_axes_are_few_and_differ(low, high):
    ticks, labels = log_ticks(low, high)
    assert 2 <= len(ticks) == len(set(labels)) <= 5, labels
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks) and max(map(len, labels)) <= 6
    assert [float(label) for label in labels] == pytest.approx(ticks, rel=0.05)


def test_axes_within_a_decade_have_no_other_labels(large, tmp_path):
    """Matplotlib would label the multiples of a power of ten, one over the other."""
    anatomy, _, plan = large
    rng = np.random.default_rng(0)
    values = {g.name: torch.from_numpy(rng.uniform(0.8, 1.3, g.size)).float() * g.unit_params for g in anatomy.groups}
    plan.plot(tmp_path / "plan.svg", scores=Scores(values, "random"))
    text = (tmp_path / "plan.svg").read_text()
    _, labels = log_ticks(0.4, 3.9)
    assert all(f"<!-- {label} -->" in text for label in labels) and "mathdefault" not in text and "times" not in text


def test_titles_count_what_is_drawn(large, tmp_path):
    anatomy, _, plan = large
    values = {g.name: torch.ones(g.size) for g in anatomy.groups}
    scores = Scores({**values, "classifier": torch.ones(7)}, "random")
    plan.plot(tmp_path / "plan.svg", scores=scores)
    assert "The ranking of 37,008 prunable units" in (tmp_path / "plan.svg").read_text()
    scores.plot(tmp_path / "scores.svg")
    text = (tmp_path / "scores.svg").read_text()
    assert "144 heads, each" in text and "36,864 neurons, each" in text and "7 units outside of blocks" in text


def test_tuned_tokens_are_mentioned(tmp_path):
    model = trained(budget=0.5, calibration=tiny_batches(2), priming_steps=1)
    tokens = sum(row["tuned"] for row in group_counts(model.plan()) if row["kind"] == "token")
    model.plan().plot(tmp_path / "plan.svg")
    assert tokens and f"{tokens} tokens are tuned, too" in (tmp_path / "plan.svg").read_text()
