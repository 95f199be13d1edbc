"""Tables and pictures: what they say is what the plan says, and it can be told apart without color."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tiny import tiny_batches, tiny_config, tiny_model, wrap
from transformers import AutoModel, AutoModelForCausalLM

from peft_sensi import Scores, SensiError, SensiLoadError, build_anatomy, compute_scores, make_plan
from peft_sensi.planning.packing import unpack_states
from peft_sensi.planning.rows import drawn_rows, rows_of
from peft_sensi.plotting.canvas import STYLES
from peft_sensi.plotting.plots import plot_plan
from peft_sensi.reporting.facts import group_counts, plan_figures
from peft_sensi.reporting.tables import Bar, facts_table, legend, plan_table
from peft_sensi.utils.errors import how_to_install
from peft_sensi.utils.formatting import human, short_names, shortened
from peft_sensi.utils.states import FROZEN, TRIMMED, TUNED, Row


@pytest.fixture(scope="module")
def scored():
    model = tiny_model()
    scores = compute_scores(model, score="magnitude")
    return build_anatomy(model), scores


@pytest.fixture(scope="module")
def plan(scored):
    anatomy, scores = scored
    values = {name: v.numpy() for name, v in scores.values.items()}
    return make_plan(anatomy, values, {"params": 0.6, "trainable": 0.05}, multiple_of=8)


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def share_of(image: np.ndarray, color: str) -> float:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(image - wanted).max(-1) <= 1).mean())


def printed(*what, width: int = 80, **options) -> str:
    console = Console(width=width, force_terminal=False, **options)
    with console.capture() as capture:
        for item in what:
            console.print(item)
    return capture.get()


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_plan_and_of_its_dict_are_the_same(plan):
    for row, like in zip(rows_of(plan), rows_of(plan.to_dict()), strict=True):
        assert (row.name, row.block, row.kind) == (like.name, like.block, like.kind)
        assert np.array_equal(row.states, like.states)


def test_a_dict_cannot_make_us_allocate_what_it_likes(plan):
    broken = plan.to_dict()
    next(iter(broken["groups"].values()))["size"] = 2**40
    with pytest.raises(SensiLoadError, match="claims"):
        unpack_states(broken)
    many = plan.to_dict()
    many["groups"] |= {f"other {i}": {"size": 2**24, "kept": "all", "tuned": "none"} for i in range(17)}
    with pytest.raises(SensiLoadError, match="in all groups"):
        unpack_states(many)


@pytest.mark.parametrize("size", [2**25, 2**47])
def test_an_adapter_cannot_make_us_allocate_what_it_likes(size, tmp_path):
    """The vocabulary of a base may have been resized, so the number of tokens need not be equal."""
    wrap(tiny_model(), budget=0.5, calibration=tiny_batches()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tokens,) = (name for name in config["plan"]["groups"] if name.endswith(".tokens"))
    config["plan"]["groups"][tokens] |= {"size": size, "kept": "all"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SensiLoadError, match="claims"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_short_names_keep_what_tells_blocks_apart():
    assert short_names(["bert.encoder.layer.0", "bert.encoder.layer.11"]) == {
        "bert.encoder.layer.0": "0",
        "bert.encoder.layer.11": "11",
    }
    assert short_names(["encoder.block.0", "decoder.block.0"])["decoder.block.0"] == "decoder"
    assert short_names(["encoder.block.0", "decoder.block.0", "decoder.block.1"])["decoder.block.1"] == "decoder 1"
    assert short_names(["model.layers.3"]) == {"model.layers.3": "3"}
    assert short_names(["a.b.c", "a.b"]) == {"a.b.c": "c", "a.b": "b"}


def test_long_names_keep_their_block_and_their_end():
    assert shortened("0 attention output dense", 20) == "0 …tion output dense"
    assert len(shortened("0 attention output dense", 20)) <= 20 and shortened("0 output", 20) == "0 output"


def test_counts_for_humans():
    assert [human(n) for n in (0, 7, 999, 1000, 41451572, 999_960, 84_999_168, 1.5e12)] == [
        "0", "7", "999", "1.00 k", "41.5 M", "1.00 M", "85.0 M", "1.50 T"]  # fmt: skip


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_count_and_fits_80_columns(plan):
    text = printed(plan_table(plan), legend(plan), facts_table(plan.facts(human)))
    assert max(map(len, text.splitlines())) <= 80
    for row in rows_of(plan):
        assert f"{row.count(TUNED, FROZEN):,}/{row.size:,}" in text
    assert "tuned" in text and "frozen" in text and "trimmed" in text
    assert f"{plan.params_share:.2%}" in text and "\x1b" not in text


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("neurons", [8, 512, 3072])
def test_nothing_is_cut_off_at_80_columns(family, neurons):
    with torch.device("meta"):
        config = tiny_config(family, intermediate_size=neurons, num_hidden_layers=12)
        anatomy = build_anatomy((AutoModel if family == "bert" else AutoModelForCausalLM).from_config(config))
    values = {g.name: np.arange(1.0, g.size + 1) for g in anatomy.groups}
    for budget in (0.7, {"params": 0.7, "trainable": 0.2}):
        text = printed(plan_table(make_plan(anatomy, values, budget)))
        assert "…" not in text and max(map(len, text.splitlines())) <= 80 and text.count(f"/{neurons:,} ") == 12


def test_states_can_be_told_apart_without_color_and_without_unicode(plan):
    plain = printed(plan_table(plan, ascii_only=True))
    for row in rows_of(plan):
        assert all(("#=."[[TUNED, FROZEN, TRIMMED].index(state)] in plain) for state in np.unique(row.states))


def test_bars_are_of_one_length_and_show_the_smallest_part(scored):
    anatomy, scores = scored
    values = {name: v.numpy() for name, v in scores.values.items()}
    plan = make_plan(anatomy, values, {"trainable": 0.02})
    lines = [line for line in printed(plan_table(plan)).splitlines() if "/64" in line]
    assert len(lines) == 2
    for line, row in zip(lines, [r for r in rows_of(plan) if r.kind == "neuron"], strict=True):
        bar = line.rstrip().rpartition(" ")[2]
        cells = row.count(TUNED) * len(bar) / 64
        assert len(bar) >= 10 and abs(bar.count("█") - cells) < 1 and (bar.count("█") > 0) == (cells > 0)


def test_figures_are_json_and_add_up(plan):
    figures = json.loads(json.dumps(plan_figures(plan)))
    assert figures["params_kept"] == plan.kept_params and figures["trainable_params"] == plan.trainable_params
    for group in figures["groups"]:
        assert group["tuned"] + group["frozen"] + group["trimmed"] == group["size"]
    assert figures["groups"] == group_counts(plan.to_dict())


def test_a_decoder_with_grouped_heads_and_several_attentions_a_block_has_a_table(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    anatomy = build_anatomy(model)
    plan = make_plan(anatomy, {g.name: np.arange(1.0, g.size + 1) for g in anatomy.groups}, 0.6)
    text = printed(plan_table(plan))
    assert all(f"{row.count(TUNED, FROZEN)}/{row.size}" in text for row in rows_of(plan))
    plan.plot(tmp_path / "llama.png")
    names = [
        "decoder.block.0.heads",
        "decoder.block.0.cross_heads",
        "decoder.block.0.neurons",
        "encoder.block.0.heads",
    ]
    size = {"size": 2, "kept": "gA==", "tuned": "none"}
    values = {"sequence_length": 8, "always_trained": 0, "groups": dict.fromkeys(names, size)}
    assert [row.kind for row in rows_of(values)] == ["head", "head", "neuron", "head"]
    text = printed(plan_table(values))
    assert "decoder cross" in text and text.count("1/2") == 4 and max(map(len, text.splitlines())) <= 80
    plot_plan(drawn_rows(values), tmp_path / "t5.png")


@pytest.mark.parametrize("counts", [(4, 36, 1496), (1, 1, 1), (1536, 0, 0), (0, 1, 1535), (500, 500, 536), (0, 0, 3)])
@pytest.mark.parametrize("width", [3, 10, 16])
def test_a_bar_leaves_nothing_out(counts, width):
    states = np.repeat(np.array([TUNED, FROZEN, TRIMMED], dtype=np.uint8), counts)
    bar = Bar(Row("n", "n", "neuron", states), ascii_only=True).text(width).plain
    assert len(bar) == width
    for glyph, count in zip("#=.", counts, strict=True):
        cells = bar.count(glyph)
        assert (cells > 0) == (count > 0) and (width < 10 or abs(cells - count * width / sum(counts)) <= 2)


def test_narrow_terminals_lose_bars_and_no_numbers(plan):
    text = printed(plan_table(plan), width=50)
    assert max(map(len, text.splitlines())) <= 50 and not set("█▒·") & set(text)
    for row in rows_of(plan):
        assert f"{row.count(TUNED, FROZEN):,}/{row.size:,}" in text


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_the_map_paints_each_state_in_proportion(plan, scored, tmp_path, style):
    plan.plot(tmp_path / "plan.png", style=style)
    image, colors = pixels(tmp_path / "plan.png"), STYLES[style]["states"]
    assert share_of(image, STYLES[style]["background"]) > 0.3
    rows = [row for row in rows_of(plan) if row.kind == "neuron"]
    half = image[:, image.shape[1] * 2 // 5 :]  # the bars of the neurons
    painted = {state: share_of(half, colors[state]) for state in colors}
    whole = sum(painted.values())
    for state in colors:
        expected = sum(row.count(state) for row in rows) / sum(row.size for row in rows)
        assert painted[state] / whole == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("style", STYLES)
def test_states_differ_in_lightness_so_that_grey_prints_and_color_blind_eyes_can_tell_them(style):
    def lightness(color: str) -> float:  # CIE L*, from the relative luminance of sRGB
        channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminance = float(linear @ [0.2126, 0.7152, 0.0722])
        return 116 * luminance ** (1 / 3) - 16

    values = sorted(lightness(c) for c in STYLES[style]["states"].values())
    assert min(np.diff(values)) > 15


def test_the_ranking_marks_both_cuts(plan, scored, tmp_path):
    plan.plot(tmp_path / "plan.svg", scores=scored[1])
    text = (tmp_path / "plan.svg").read_text()
    values = rows_of(plan)
    groups = plan.anatomy.groups
    prunable = plan.anatomy.prunable_params
    tuned = sum(row.count(TUNED) * g.unit_params for row, g in zip(values, groups, strict=True)) / prunable
    assert f"{plan.params_share:.1%} kept" in text and f"{tuned:.1%} tuned" in text


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_formats_and_that_nothing_is_left_behind(plan, tmp_path, kind):
    plot_plan(drawn_rows(plan.to_dict()), tmp_path / "new" / f"map.{kind}")
    assert [p.name for p in (tmp_path / "new").iterdir()] == [f"map.{kind}"]


def test_scores_of_blocks_and_of_lone_linears(scored, tmp_path):
    scored[1].plot(tmp_path / "scores.png")
    assert pixels(tmp_path / "scores.png").std() > 20
    lone = {"a.lin": torch.rand(7), "b.lin": torch.zeros(3)}
    Scores(lone, "magnitude", protected={"a.lin": torch.ones(7) > 0}).plot(tmp_path / "lone.png", style="dark")
    Scores({"a": torch.zeros(4)}, "random").plot(tmp_path / "zero.png")
    with pytest.raises(SensiError, match="no scores"):
        Scores({}, "random").plot(tmp_path / "none.png")


def test_marks_are_on_the_groups_with_an_outlier_unit(scored, tmp_path):
    outlier = {"bert.encoder.layer.1.neurons": torch.arange(64) == 5}
    none = {"bert.encoder.layer.0.neurons": torch.zeros(64, dtype=torch.bool)}
    Scores(scored[1].values, "fisher", protected=outlier | none).plot(tmp_path / "marked.svg")
    assert (tmp_path / "marked.svg").read_text().count("<!-- ▸ -->") == 1
    Scores(scored[1].values, "fisher", protected=none).plot(tmp_path / "plain.svg")
    assert "▸" not in (tmp_path / "plain.svg").read_text()


def test_rows_tensors_and_sublayers_have_maps(tmp_path):
    model = tiny_model()
    name = "bert.encoder.layer.0.attention.self.query"
    for picture, anatomy in {
        "tensors.png": build_anatomy(model, [name, "bert.pooler.dense"], None, "tensors"),
        "rows.png": build_anatomy(model, ["bert.pooler.dense"]),
        "sublayers.png": build_anatomy(model, (), None, "sublayers"),
    }.items():
        values = {g.name: np.arange(1.0, g.size + 1) for g in anatomy.groups}
        plan = make_plan(anatomy, values, {"trainable": 0.2})
        scores = Scores({n: torch.tensor(v) for n, v in values.items()}, "magnitude")
        plan.plot(tmp_path / picture, scores=scores, cost="params")
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        text = printed(plan_table(plan), facts_table(plan.facts(human)))
        assert f"{plan.trainable_params:,}" in text or human(plan.trainable_params) in text


def test_mistakes_are_named(plan, scored, tmp_path):
    with pytest.raises(SensiError, match="style"):
        plan.plot(tmp_path / "a.png", style="pink")
    with pytest.raises(SensiError, match="written as .*png"):
        plan.plot(tmp_path / "a.bmpx")
    with pytest.raises(SensiError, match="cost"):
        plan.plot(tmp_path / "a.png", scores=scored[1], cost="bytes")
    other = Scores({name: v[:-1] for name, v in scored[1].values.items()}, "magnitude")
    with pytest.raises(SensiError, match="do not belong to this plan's model"):
        plan.plot(tmp_path / "a.png", scores=other)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(plan, tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(SensiError, match=r"a\.png could not be written"):
        plan.plot(tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    (tmp_path / "file").touch()
    with pytest.raises(SensiError, match=r"b\.png could not be written"):
        plan.plot(tmp_path / "file" / "b.png")


def test_without_matplotlib_one_line_says_what_to_install(plan, tmp_path, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SensiError, match=re.escape(how_to_install("plots"))):
        plan.plot(tmp_path / "a.png")


# -- accuracy over budget (examples/benchmarks) -----------------------------------------------------------------------


@pytest.fixture
def plots(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "benchmarks")
    return importlib.import_module("plots")


def test_budgets_from_a_file_with_nested_names(plots, tmp_path):
    records = [
        {"method": m, "plan": {"share": b}, "validation": {"accuracy": 0.5 + b / 4 + s / 100}}
        for m in ("sensi", "random")
        for b in (0.2, 0.5)
        for s in range(2)
    ]
    records.append({"method": "full", "plan": None, "validation": {"accuracy": 0.8}})
    (tmp_path / "results.json").write_text(json.dumps(records))
    names = {"x": "plan.share", "y": "validation.accuracy", "reference": "full"}
    plots.plot_budgets(tmp_path / "results.json", tmp_path / "b.svg", **names)
    text = (tmp_path / "b.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("sensi", "random", "full"))


def test_methods_of_one_color_have_other_dashes_and_markers(plots):
    styles = [plots.line_style(index) for index in range(18)]
    for first in range(6):
        dashes, markers = zip(*styles[first::6], strict=True)
        assert len(set(dashes)) == len(set(markers)) == 3


def test_budgets_without_what_they_need(plots, tmp_path):
    with pytest.raises(SensiError, match="accuracy"):
        plots.plot_budgets([{"method": "a", "budget": 0.5}], tmp_path / "b.png")
    with pytest.raises(SensiError, match="no method 'full'"):
        plots.plot_budgets([{"method": "a", "budget": 0.5, "accuracy": 1.0}], tmp_path / "b.png", reference="full")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SensiError, match="not JSON"):
        plots.plot_budgets(tmp_path / "x.json", tmp_path / "b.png")
