"""Block layouts that a user writes: the example of docs/families.md, shared layers, and fixed heads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import units_at_zero
from torch import nn

from peft_sensi import AnatomyError, BlockLayout, SensiConfig, SensiError, SensiLoadError, build_anatomy, make_plan


DOCS = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """The names that the example in the docs defines, after it has run."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S):
        if "AutoModel" not in block:  # the other example loads a model from the Hub
            exec(block, names)
    return names


def test_the_example_of_the_docs(example):
    assert (example["small"].stack[0].wide.out_features + example["small"].stack[1].wide.out_features) % 8 == 0
    kept = sum(p.numel() for n, p in example["small"].named_parameters() if "norm" not in n)
    assert kept < 0.55 * sum(p.numel() for n, p in example["Model"]().named_parameters() if "norm" not in n)


def test_gates_equal_removal(example):
    torch.manual_seed(1)
    model, layout, x = example["Model"](), example["layout"], example["x"]
    anatomy = build_anatomy(model, blocks=[layout])
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, 0.6, multiple_of=1)
    with units_at_zero(model, plan):
        gated = model(x)
    assert (model(x) - gated).abs().max() > 1e-2
    small = get_peft_model(model, SensiConfig(plan=plan, blocks=[layout])).merge_and_unload()
    torch.testing.assert_close(small(x), gated, atol=1e-5, rtol=1e-5)


def test_fixed_heads_are_tuned_in_their_own_order(example, tmp_path):
    """The layer has a bias with one entry per head, so no head may be removed or change its place."""

    class Biased(example["Layer"]):
        def forward(self, x):
            n = self.norm(x)
            q, k, v = (f(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
            bias = torch.tensor([0.0, 2.0, -3.0]).view(1, 3, 1, 1) * torch.arange(x.shape[1])
            attended = nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
            return x + self.to_out(attended) + self.narrow(torch.relu(self.wide(self.norm_ffn(x))))

    torch.manual_seed(0)
    model, x = nn.Sequential(Biased()), example["x"]
    before = model(x)
    layout = BlockLayout.from_dict({**example["layout"].to_dict(), "layer": "*", "fixed_heads": True})
    anatomy = build_anatomy(model, blocks=[layout])
    heads, neurons = anatomy.groups
    assert not heads.trimmable and anatomy.prunable_params == neurons.size * neurons.unit_params
    states = (np.array([1, 1, 2], dtype=np.uint8).tobytes(), np.full(40, 1, dtype=np.uint8).tobytes())
    like = make_plan(anatomy, {g.name: np.ones(g.size) for g in anatomy.groups}, None)
    plan = type(like)(anatomy, states, like.targets, 128)
    wrapped = get_peft_model(model, SensiConfig(plan=plan, blocks=[layout]))
    torch.testing.assert_close(wrapped(x), before, atol=1e-6, rtol=1e-6)
    trimmed = {**plan.to_dict(), "groups": {**plan.to_dict()["groups"]}}
    trimmed["groups"][heads.name] = {"size": 3, "kept": "none", "tuned": "none"}
    with pytest.raises(SensiLoadError, match="cannot be trimmed"):
        get_peft_model(nn.Sequential(Biased()), SensiConfig(plan=trimmed, blocks=[layout]))


@pytest.mark.parametrize(
    "field",
    [
        {"fixed_heads": True},
        {"min_heads": 1},
        {"cached": True},
        {"cross": True},
        {"repeats": 2},
        {"tokens_first": True},
    ],
    ids=str,
)
def test_numbers_and_flags_of_a_layout_are_saved_with_the_adapter(example, field, tmp_path):
    torch.manual_seed(0)
    base, x = example["Model"](), example["x"]
    layout = BlockLayout.from_dict({**example["layout"].to_dict(), **field})
    model = get_peft_model(base, SensiConfig(budget=0.5, score="magnitude", blocks=[layout]))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(example["Model"](), tmp_path)
    assert torch.equal(again(x), model(x))
    assert str(again.plan()) == str(model.plan())


def test_a_layout_that_no_file_may_hold_is_refused_before_the_training(example):
    private = BlockLayout.from_dict({**example["layout"].to_dict(), "head_counts": ["_heads"]})
    with pytest.raises(SensiError, match="paths of public attributes, got '_heads'"):
        SensiConfig(budget=0.5, blocks=[private])


def test_modules_may_have_any_plain_name(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.ModuleDict({"_up": nn.Linear(6, 16), "down-0": nn.Linear(16, 6)})
            self.layers = nn.ModuleDict({"first-block": layer})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.layers["first-block"]
            return x + layer["down-0"](torch.relu(layer["_up"](x)))

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Model()

    x = torch.randn(3, 6)
    layout = BlockLayout(layer="layers.first-block", up="_up", down="down-0")
    model = get_peft_model(make(), SensiConfig(budget=0.5, score="random", blocks=[layout]))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))


@pytest.mark.parametrize("field", [{"repeats": -1}, {"min_heads": 10**9}, {"q": 3}, {"head_counts": [1]}], ids=str)
def test_numbers_of_a_layout_in_a_file_are_checked(example, field, tmp_path):
    base = example["Model"]()
    get_peft_model(base, SensiConfig(budget=0.5, score="magnitude", blocks=[example["layout"]])).save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["blocks"][0] |= field
    path.write_text(json.dumps(config))
    with pytest.raises(SensiLoadError, match=next(iter(field))):
        PeftModel.from_pretrained(example["Model"](), tmp_path)


def test_a_layer_that_runs_three_times_costs_its_flops_three_times():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)})])

        def forward(self, x):
            for _ in range(3):
                x = x + self.blocks[0]["down"](torch.relu(self.blocks[0]["up"](x)))
            return x

    once = build_anatomy(Shared(), blocks=[BlockLayout(layer="blocks.*", up="up", down="down")])
    layout = BlockLayout(layer="blocks.*", up="up", down="down", repeats=3)
    assert BlockLayout.from_dict(layout.to_dict()) == layout
    often = build_anatomy(Shared(), blocks=[layout])
    assert often.prunable_params == once.prunable_params
    assert often.prunable_macs(7) == 3 * once.prunable_macs(7)
    torch.manual_seed(0)
    base, x = Shared(), torch.randn(2, 6)
    model = get_peft_model(base, SensiConfig(budget={"flops": 0.5}, blocks=[layout], score="random", multiple_of=1))
    assert model.base_model.plan().flops_share == 0.5
    before = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"head_size": ""}, "needs `head_size`"),
        ({"head_size": "sizes"}, "names the attribute 'sizes', which 'stack.0' does not have"),
        ({"head_size": "norm"}, "names stack.0.norm as a number"),
        ({"head_size": 4.0}, "'head_size' of a block layout cannot be 4.0"),
        ({"head_counts": ("attention.nope",)}, "names the attribute 'attention.nope'"),
        ({"head_counts": "heads"}, "'head_counts' of a block layout cannot be 'heads'"),
        ({"head_widths": ("norm.eps",)}, "names 'stack.0.norm.eps' as a number of units"),
        ({"repeats": ("heads",)}, "a number or two paths"),
        ({"repeats": ("heads", "nope")}, "names the attribute 'nope'"),
        ({"attention_factor": "nope"}, "names the attribute 'nope'"),
        ({"attention_factor": 0.5}, "'attention_factor' of a block layout cannot be 0.5"),
        ({"ffn_factor": "norm"}, "names stack.0.norm as a factor"),
        ({"ffn_factor": "wide.bias"}, "one for each of the 24 features"),
        ({"layer": ""}, "needs `layer`"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_named_before_anything_changes(example, field, words):
    model = example["Model"]()
    before = set(dict(model.named_modules())), set(vars(model.stack[0]))
    with pytest.raises(SensiError, match=re.escape(words)):
        get_peft_model(model, SensiConfig(budget=0.5, score="random", blocks=[replace(example["layout"], **field)]))
    assert (set(dict(model.named_modules())), set(vars(model.stack[0]))) == before


def test_two_layouts_of_one_sublayer_are_refused(example):
    layout = example["layout"]
    for other in (layout, replace(layout, layer="*")):
        with pytest.raises(AnatomyError, match="Several layouts of `blocks` fit the sublayer with 'stack.0"):
            build_anatomy(example["Model"](), blocks=[layout, other])


def test_linears_that_share_a_weight_are_named(example):
    model = example["Model"]()
    model.stack[1].wide.weight = model.stack[0].wide.weight
    with pytest.warns(UserWarning, match="'stack.0.wide' and 'stack.1.wide' are one parameter in the base"):
        get_peft_model(model, SensiConfig(budget=0.5, score="random", blocks=[example["layout"]]))


def test_what_is_not_described_is_refused_or_tuned(example):
    model = example["Model"]()
    with pytest.raises(AnatomyError, match="BlockLayout"):
        get_peft_model(model, SensiConfig(budget=0.5, score="random"))
    tuned = get_peft_model(model, SensiConfig(budget={"trainable": 0.1}, score="random"))
    assert isinstance(tuned, PeftModel) and not tuned.base_model.plan().trims


class Encoder(nn.Module):
    """PyTorch's own encoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x, padding):
        return self.out(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.parametrize("budget", [0.5, {"trainable": 0.2}], ids=str)
def test_the_kernel_of_pytorchs_encoder_does_not_bypass_the_layers(budget, tmp_path):
    """In evaluation mode, it would take the base's weights."""
    torch.manual_seed(0)
    base = Encoder().eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None]
    layout = BlockLayout(layer="encoder.layers.*", up="linear1", down="linear2")
    with torch.no_grad():
        before = base(x, padding)
    config = SensiConfig(budget=budget, blocks=[layout], score="magnitude", multiple_of=1, modules_to_save=["out"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model.train()(x, padding).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(x, padding).detach()  # in training mode, every Linear is called
    assert (expected - before).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, padding), expected, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(x, padding), before, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Encoder().eval(), tmp_path)
        torch.testing.assert_close(again(x, padding), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.merge_and_unload()(x, padding), expected, atol=1e-5, rtol=1e-5)
        unloaded = model.unload()
        assert torch.equal(unloaded(x, padding), before)
