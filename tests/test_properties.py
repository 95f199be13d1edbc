"""Exactness for random plans of all families: what the plan says is what the modules have."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tiny import FAMILIES, LABELS, logits, tiny_model, train, wrap

from peft_sensi import BudgetError, Plan, build_anatomy
from peft_sensi.utils.states import FROZEN, TRIMMED, TUNED


MODELS = {family: tiny_model(family) for family in FAMILIES}
ANATOMIES = {family: build_anatomy(model) for family, model in MODELS.items()}
HEAD = {
    family: sum(p.numel() for n, p in model.named_parameters() if n.startswith(("classifier", "pre_classifier")))
    for family, model in MODELS.items()
}


@st.composite
def plans(draw, states=(TRIMMED, FROZEN, TUNED)) -> tuple[str, Plan]:
    """Any state for any unit, with groups that are all of one state among them."""
    family = draw(st.sampled_from(FAMILIES))
    anatomy = ANATOMIES[family]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = []
    for group in anatomy.groups:
        one = draw(st.sampled_from((None, None, None, *states)))
        values = rng.choice(states, group.size) if one is None else np.full(group.size, one)
        chosen.append(values.astype(np.uint8).tobytes())
    modules = sorted(m for g in anatomy.groups for m in g.modules)
    targets = modules if draw(st.booleans()) else sorted(draw(st.sets(st.sampled_from(modules), min_size=1)))
    return family, Plan(anatomy, tuple(chosen), frozenset(targets), draw(st.integers(1, 64)))


def wrapped(family: str, plan: Plan, **options) -> PeftModel:
    return wrap(tiny_model(family), plan=plan, target_modules=sorted(plan.targets), **options)


def trainable(model: PeftModel, family: str) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - HEAD[family]


def something_to_do(plan: Plan) -> bool:
    """PEFT refuses an adapter that touches no module."""
    return plan.trims or plan.trainable_params > 0


@given(plans())
@settings(max_examples=25)
def test_costs_are_those_of_the_merged_model(case):
    family, plan = case
    if not something_to_do(plan):
        return
    model = wrapped(family, plan)
    assert model.base_model.plan() == plan
    assert trainable(model, family) == plan.trainable_params
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    whole = sum(p.numel() for p in MODELS[family].parameters())
    assert whole - sum(p.numel() for p in merged.parameters()) == plan.anatomy.prunable_params - plan.kept_params
    kept = sum(
        merged.get_submodule(side.module).weight.numel()
        + (merged.get_submodule(side.module).bias.numel() if side.dim == 0 else 0)
        for group in plan.anatomy.groups
        for side in group.sides
    )
    assert kept == plan.kept_params
    share = plan.model_params_share * plan.anatomy.total_params
    assert round(share) == sum(p.numel() for p in merged.parameters()) - HEAD[family]


@given(plans(), st.booleans())
@settings(max_examples=15)
def test_a_trained_adapter_is_reloaded_and_merged(case, keep_base):
    family, plan = case
    if not something_to_do(plan):
        return
    model = wrapped(family, plan, keep_base=keep_base)
    train(model)
    expected = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny_model(family), folder)
    assert torch.equal(logits(again), expected)
    assert again.base_model.plan() == plan
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)
    if keep_base:
        with again.disable_adapter():
            assert torch.equal(logits(again), logits(MODELS[family]))


budgets = st.fixed_dictionaries(
    {},
    optional={
        "params": st.floats(0.2, 1.0) | st.integers(6_000, 20_000),
        "flops": st.floats(0.2, 1.0) | st.integers(200_000, 800_000),
        "trainable": st.floats(0.02, 0.5) | st.integers(500, 10_000),
    },
).filter(bool)


@given(
    st.sampled_from(FAMILIES),
    budgets,
    st.sampled_from([1, 8]),
    st.sets(st.sampled_from(["biases", "norms", "pooler"])),
    st.integers(0, 5),
)
@settings(max_examples=25)
def test_limits_hold_in_the_modules_themselves(family, budget, multiple_of, also, seed):
    """Not in the plan's arithmetic: in the tensors that are trained and in those that are left after the merge."""
    options = {"multiple_of": multiple_of, "seed": seed, "sequence_length": 16, "also_train": sorted(also)}
    try:
        model = wrap(tiny_model(family), budget=budget, score="random", **options)
    except BudgetError as error:
        assert "limit on trained values allows" in str(error) or "too small" in str(error)
        return
    plan, anatomy = model.base_model.plan(), ANATOMIES[family]
    assert trainable(model, family) == plan.trainable_params
    if "trainable" in budget:
        limit = budget["trainable"]
        assert trainable(model, family) <= (limit if isinstance(limit, int) else limit * anatomy.total_params)
    removed = sum(p.numel() for p in MODELS[family].parameters())
    merged = model.merge_and_unload()
    removed -= sum(p.numel() for p in merged.parameters())
    if "params" in budget:
        limit = budget["params"]
        whole = anatomy.prunable_params
        assert whole - removed <= (limit if isinstance(limit, int) else limit * whole)
    assert merged.num_labels == LABELS and logits(merged).isfinite().all()
