"""Units of a model: their costs, their places, and that removing one is the same as multiplying it by zero."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import FAMILIES, logits, tiny_batches, tiny_config, tiny_model, units_at_zero, wrap
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, BertForSequenceClassification

from peft_sensi import AnatomyError, BlockLayout, SensiConfig, build_anatomy, make_plan


LLAMA = BlockLayout(
    layer="layers.*",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    up="mlp.up_proj",
    gate="mlp.gate_proj",
    down="mlp.down_proj",
    head_size="self_attn.head_dim",
)


class Mlp(nn.Module):
    """A model of no known family, with Linears only."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.out = nn.Linear(6, 10), nn.Linear(10, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class Stack(nn.Module):
    """Blocks of an unknown family that have an FFN and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Ffn(), Ffn()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


FFN = BlockLayout(layer="blocks.*", up="first", down="second")


def random_plan(anatomy, share=0.5, seed=0, **options):
    rng = np.random.default_rng(seed)
    return make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, share, **options)


def test_costs_of_bert_base():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    anatomy = build_anatomy(model)
    assert {g.kind: (g.unit_params, g.size) for g in anatomy.groups} == {
        "head": (196_800, 12),
        "neuron": (1_537, 3072),
    }
    assert len(anatomy.groups) == 24
    assert anatomy.prunable_params == 84_999_168
    assert anatomy.total_params == sum(p.numel() for p in model.parameters()) - 2 * 768 - 2
    assert sum(p.numel() for p in model.parameters()) == 109_483_778


@pytest.mark.parametrize("tokens", [1, 128, 384])
def test_macs_are_those_of_the_paper(tokens):
    with torch.device("meta"):
        anatomy = build_anatomy(BertForSequenceClassification(BertConfig()))
    h, d = 768, 64
    heads, neurons = anatomy.groups[:2]
    assert heads.unit_macs(tokens) == 3 * tokens * h * d + 2 * tokens**2 * d + tokens * d * h
    assert neurons.unit_macs(tokens) == 2 * tokens * h
    assert anatomy.prunable_macs(tokens) == 12 * (12 * heads.unit_macs(tokens) + 3072 * neurons.unit_macs(tokens))


def flops(model, batch) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(family):
    length = 12
    batch = tiny_batches(1, size=1, length=length, padding=False)[0]
    # The counter does not see into the fused attention of the CPU.
    base, other = (tiny_model(family, attn_implementation="eager") for _ in range(2))
    anatomy = build_anatomy(base)
    plan = random_plan(anatomy, 0.6, sequence_length=length)
    small = wrap(other, plan=plan).merge_and_unload()
    assert 0 < plan.kept_flops < 2 * anatomy.prunable_macs(length)
    assert flops(base, batch) - flops(small, batch) == 2 * anatomy.prunable_macs(length) - plan.kept_flops


def test_params_are_those_of_the_modules(family):
    model = tiny_model(family)
    anatomy = build_anatomy(model)
    for group in anatomy.groups:
        # All units share the bias of the output projection. In the other Linears, each unit has its own entries.
        whole = [model.get_submodule(name) for name in group.modules]
        owned = sum(m.weight.numel() for m in whole) + sum(m.bias.numel() for m in whole[:-1])
        assert group.size * group.unit_params == owned
    head = sum(p.numel() for n, p in model.named_parameters() if n.split(".")[0] in ("classifier", "pre_classifier"))
    assert anatomy.total_params == sum(p.numel() for p in model.parameters()) - head


def check_gates_equal_removal(model, small, plan, run):
    with units_at_zero(model, plan):
        gated = run(model)
    assert (run(model) - gated).abs().max() > 1e-2  # the removed units did something
    torch.testing.assert_close(run(small), gated, atol=1e-5, rtol=1e-5)


def test_gates_at_zero_equal_physical_removal(family):
    model, other = tiny_model(family), tiny_model(family)
    plan = random_plan(build_anatomy(model))
    check_gates_equal_removal(model, wrap(other, plan=plan).merge_and_unload(), plan, logits)


def test_gates_at_zero_equal_removal_with_grouped_queries():
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("llama")).eval()
    torch.manual_seed(0)
    other = AutoModel.from_config(tiny_config("llama")).eval()
    with torch.no_grad():
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            if parameter.dim() == 2:
                parameter.mul_(8)
                same.mul_(8)
    anatomy = build_anatomy(model, blocks=[LLAMA])
    assert [g.size for g in anatomy.groups] == [2, 64, 2, 64]  # key/value heads, each with its query heads
    plan = random_plan(anatomy, multiple_of=4)
    small = get_peft_model(other, SensiConfig(plan=plan, blocks=[LLAMA])).merge_and_unload()
    batch = tiny_batches(1, labels=False)[0]

    @torch.no_grad()
    def run(m):
        return m(**batch).last_hidden_state[batch["attention_mask"].bool()]

    assert small.layers[0].self_attn.k_proj.out_features < model.layers[0].self_attn.k_proj.out_features
    check_gates_equal_removal(model, small, plan, run)


def test_layers_without_heads_or_neurons_run():
    model = tiny_model()
    anatomy = build_anatomy(model)
    scores = {g.name: np.full(g.size, float(g.layer.endswith("0"))) for g in anatomy.groups}
    plan = make_plan(anatomy, scores, 0.5, min_units=0)
    assert [int((plan.of(g) > 0).sum()) for g in anatomy.groups] == [4, 64, 0, 0]
    small = wrap(tiny_model(), plan=plan).merge_and_unload()
    check_gates_equal_removal(model, small, plan, logits)


def test_lone_linears_have_rows_that_are_never_trimmed():
    anatomy = build_anatomy(Mlp(), targets=["lin0", "lin1"])
    assert [(g.name, g.kind, g.size, g.unit_params) for g in anatomy.groups] == [
        ("lin0", "row", 10, 7),
        ("lin1", "row", 8, 10),
    ]
    assert anatomy.prunable_params == 0 and anatomy.trimmable == ()
    model = get_peft_model(
        Mlp(), SensiConfig(budget={"trainable": 0.3}, target_modules=["lin0", "lin1"], score="magnitude")
    )
    plan = model.base_model.plan()
    assert not plan.trims and 0 < plan.trainable_params <= 0.3 * 168
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable_params
    assert model(torch.randn(3, 6)).shape == (3, 2)


def test_rows_beside_known_blocks():
    model = tiny_model("bert")
    anatomy = build_anatomy(model, targets=["bert.pooler.dense", "bert.encoder.layer.0.output.dense"])
    assert [g.kind for g in anatomy.groups] == ["head", "neuron", "head", "neuron", "row"]
    assert anatomy.prunable_params == build_anatomy(model).prunable_params


@pytest.mark.parametrize("budget", [0.5, {"flops": 0.5}, {"params": 0.5, "trainable": 0.1}])
def test_trimming_a_model_with_nothing_to_trim(budget):
    model = Mlp()
    with pytest.raises(AnatomyError) as error:
        get_peft_model(model, SensiConfig(budget=budget, target_modules=["lin0"], score="magnitude"))
    for hint in ("Mlp", "BlockLayout", "trainable", "bert", "roberta", "electra", "distilbert"):
        assert hint in str(error.value)
    assert isinstance(error.value, ValueError)
    assert type(model.lin0) is nn.Linear


def test_without_a_budget_such_a_model_is_tuned_whole_with_a_warning():
    with pytest.warns(UserWarning, match="nothing to trim"):
        model = get_peft_model(Mlp(), SensiConfig(target_modules=["lin0", "lin1"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 70 + 80


@pytest.mark.parametrize("as_dict", [False, True])
def test_an_own_layout_makes_an_unknown_model_trimmable(as_dict, tmp_path):
    layout = FFN.to_dict() if as_dict else FFN
    config = SensiConfig(budget=0.5, blocks=[layout], score="magnitude", multiple_of=1)
    base = Stack()
    model = get_peft_model(copy.deepcopy(base), config)
    plan = model.base_model.plan()
    assert plan.params_share == 0.5 and [g.name for g in plan.anatomy.groups] == [
        "blocks.0.neurons",
        "blocks.1.neurons",
    ]
    x = torch.randn(3, 6)
    before = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), before)
    small = model.merge_and_unload()
    assert small.blocks[0].first.weight.shape[0] + small.blocks[1].first.weight.shape[0] == 16
    torch.testing.assert_close(small(x), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (BlockLayout(layer="nowhere.*", up="first", down="second"), "None of the layouts"),
        (BlockLayout(layer="blocks.*", up="third", down="second"), "blocks.0.third"),
        (BlockLayout(layer="blocks.*", up="first", down="second", o="second", k="first", head_size=5), "head size"),
    ],
)
def test_layouts_that_do_not_fit(layout, message):
    with pytest.raises(AnatomyError, match=message):
        build_anatomy(Stack(), blocks=[layout])


@pytest.mark.parametrize("values", [{"layer": "blocks.*", "upp": "first"}, {"up": "first"}, {"layer": ""}])
def test_malformed_layouts(values):
    with pytest.raises(AnatomyError):
        BlockLayout.from_dict(values)


def test_a_target_that_is_no_linear():
    with pytest.raises(AnatomyError, match="'bert.embeddings.LayerNorm'.*only `torch.nn.Linear`"):
        build_anatomy(tiny_model(), targets=["bert.embeddings.LayerNorm"])


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_tensors_have_the_same_anatomy(family):
    with torch.device("meta"):
        model = type(tiny_model(family))(tiny_config(family))
    assert all(p.is_meta for p in model.parameters())
    assert build_anatomy(model) == build_anatomy(tiny_model(family))
