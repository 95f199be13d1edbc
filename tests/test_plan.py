"""Plans: what is kept and tuned under a budget, for random models of random sizes."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import math
import pickle
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import TRIM, tiny_batches, tiny_model, wrap

from peft_sensi import (
    Anatomy,
    Budget,
    BudgetError,
    Plan,
    Scores,
    SensiConfig,
    SensiError,
    SensiLoadError,
    build_anatomy,
    compute_scores,
    make_plan,
)
from peft_sensi.anatomy.units import Group, Side
from peft_sensi.planning.allocate import check_fits
from peft_sensi.planning.budget import allowance
from peft_sensi.planning.rows import units_by_kind


def heads(name: str, size: int, width: int = 2, hidden: int = 8) -> Group:
    sides = tuple(Side(f"{name}.{part}", 0, width, hidden, bias=True) for part in "qkv")
    return Group(name, "head", size, (*sides, Side(f"{name}.o", 1, width, hidden)), f"{name}.o", attention_width=width)


def neurons(name: str, size: int, hidden: int = 8) -> Group:
    sides = (Side(f"{name}.up", 0, 1, hidden, bias=True), Side(f"{name}.down", 1, 1, hidden))
    return Group(name, "neuron", size, sides, f"{name}.down")


def rows(name: str, size: int, fan: int = 8) -> Group:
    return Group(name, "row", size, (Side(name, 0, 1, fan, bias=True),), name)


@st.composite
def anatomies(draw, lone: bool = True) -> Anatomy:
    groups = []
    for i in range(draw(st.integers(1, 3))):
        hidden = draw(st.integers(1, 9))
        groups.append(heads(f"l{i}.heads", draw(st.integers(1, 6)), draw(st.integers(1, 4)), hidden))
        groups.append(neurons(f"l{i}.neurons", draw(st.integers(1, 40)), hidden))
    if lone and draw(st.booleans()):
        groups.append(rows("lone", draw(st.integers(1, 12))))
    owned = sum(g.size * g.unit_params for g in groups)
    return Anatomy(tuple(groups), owned + draw(st.integers(0, 500)))


@st.composite
def problems(draw, **options):
    """An anatomy and scores for it, with many ties and zeros."""
    anatomy = draw(anatomies(**options))
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 1e6, allow_subnormal=False)
    scores = {g.name: np.array(draw(st.lists(values, min_size=g.size, max_size=g.size))) for g in anatomy.groups}
    return anatomy, scores


shares = st.floats(0.05, 1.0)
limits = shares | st.integers(2, 5000)
trimming = st.dictionaries(st.sampled_from(["params", "flops"]), limits, min_size=1)
steps = st.sampled_from([1, 3, 8])


def plan_or_none(anatomy, scores, budget, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All scores are")
        try:
            return make_plan(anatomy, scores, budget, **options)
        except BudgetError:
            return None


def costs(plan: Plan) -> dict[str, int]:
    return {"params": plan.kept_params, "flops": plan.kept_flops, "trainable": plan.trainable_params}


def allowed(plan: Plan, budget: Budget, name: str) -> int:
    whole = {
        "params": plan.anatomy.prunable_params,
        "flops": 2 * plan.anatomy.prunable_macs(plan.sequence_length),
        "trainable": plan.anatomy.total_params,
    }
    return allowance(getattr(budget, name), whole[name])


def kept_counts(plan: Plan) -> dict[str, int]:
    return {g.name: int((plan.of(g) > 0).sum()) for g in plan.anatomy.groups}


@given(problems(), trimming, steps, st.integers(0, 2), st.integers(1, 64))
@settings(max_examples=60)
def test_no_limit_is_exceeded_and_no_further_step_fits(problem, budget, multiple_of, min_units, length):
    anatomy, scores = problem
    plan = plan_or_none(anatomy, scores, budget, multiple_of=multiple_of, min_units=min_units, sequence_length=length)
    assume(plan is not None)
    budget = Budget.parse(budget)
    left = {
        n: allowed(plan, budget, n) - costs(plan)[n] for n in ("params", "flops") if getattr(budget, n) is not None
    }
    assert all(rest >= 0 for rest in left.values())
    for group in anatomy.trimmable:
        count = kept_counts(plan)[group.name]
        step = multiple_of if group.kind == "neuron" else 1
        bigger = min(group.size, (count // step + 1) * step) - count
        if bigger:
            price = {"params": group.unit_params, "flops": 2 * group.unit_macs(length)}
            assert any(bigger * price[name] > rest for name, rest in left.items()), group.name


@given(problems(), shares | st.integers(2, 500), st.integers(0, 20))
@settings(max_examples=50)
def test_the_limit_on_trained_values_holds_and_is_used_up(problem, limit, always):
    anatomy, scores = problem
    plan = plan_or_none(anatomy, scores, {"trainable": limit}, always_trained=always)
    assume(plan is not None)
    assert not plan.trims
    left = allowed(plan, Budget(trainable=limit), "trainable") - plan.trainable_params
    assert left >= 0
    cheapest = [g.unit_params for g in anatomy.groups if (plan.of(g) == 1).any()]
    assert all(cost > left for cost in cheapest)


@given(problems(), trimming, shares, steps)
@settings(max_examples=50)
def test_three_limits_hold_together(problem, budget, trainable, multiple_of):
    anatomy, scores = problem
    budget = Budget.parse({**budget, "trainable": trainable})
    plan = plan_or_none(anatomy, scores, budget, multiple_of=multiple_of)
    assume(plan is not None)
    for name in ("params", "flops", "trainable"):
        if getattr(budget, name) is not None:
            assert costs(plan)[name] <= allowed(plan, budget, name)
    for group in anatomy.groups:
        states = plan.of(group)
        # Both cuts follow the ranking: what is trained is at least as good as what is frozen, and that as what is cut.
        values = scores[group.name]
        for better, worse in ((states == 2, states == 1), (states > 0, states == 0)):
            if better.any() and worse.any():
                assert values[better].min() >= values[worse].max()


@given(problems(), trimming, steps)
@settings(max_examples=25)
def test_the_same_scores_give_the_same_plan(problem, budget, multiple_of):
    anatomy, scores = problem
    plans = [plan_or_none(anatomy, copy.deepcopy(scores), budget, multiple_of=multiple_of) for _ in range(2)]
    assert plans[0] == plans[1]


def test_ties_break_by_index():
    anatomy = Anatomy((heads("h", 6), neurons("n", 32)), 10_000)
    ones = {g.name: np.ones(g.size) for g in anatomy.groups}
    plan = make_plan(anatomy, ones, {"params": 0.5, "trainable": 0.02}, multiple_of=1)
    for group in anatomy.groups:
        states = plan.of(group).tolist()
        assert states == sorted(states, reverse=True)
        assert 0 in states or 1 in states


@given(problems(lone=False), shares, steps, st.integers(0, 3))
@settings(max_examples=40)
def test_as_many_units_stay_as_was_asked(problem, share, multiple_of, min_units):
    anatomy, scores = problem
    plan = plan_or_none(anatomy, scores, share, multiple_of=multiple_of, min_units=min_units)
    assume(plan is not None)
    for group in anatomy.groups:
        count = kept_counts(plan)[group.name]
        assert count >= min(min_units, group.size)
        assert group.kind == "head" or count % multiple_of == 0 or count == group.size


def test_whole_sublayers_go_only_when_allowed():
    anatomy = Anatomy((neurons("a", 16), neurons("b", 16)), 1000)
    scores = {"a": np.ones(16), "b": np.zeros(16)}
    assert kept_counts(make_plan(anatomy, scores, 0.5, multiple_of=4)) == {"a": 12, "b": 4}
    assert kept_counts(make_plan(anatomy, scores, 0.5, multiple_of=4, min_units=0)) == {"a": 16, "b": 0}
    with pytest.raises(
        BudgetError, match="Raise the budget, or lower `multiple_of`, or let whole sublayers go with `min_units=0`"
    ):
        make_plan(anatomy, scores, 0.2, multiple_of=4)
    with pytest.raises(BudgetError, match="1 head.* and 1 neurons in each block.* Raise the budget, or let whole"):
        make_plan(anatomy, scores, 0.05, multiple_of=1)


def test_protected_units_are_kept_as_long_as_the_limit_allows():
    anatomy = Anatomy((neurons("a", 16),), 1000)
    scores = {"a": np.arange(16.0)}
    protected = {"a": np.arange(16) == 0}  # the worst one
    kept = make_plan(anatomy, scores, 0.25, protected=protected, multiple_of=1).of(anatomy.groups[0])
    assert np.flatnonzero(kept).tolist() == [0, 13, 14, 15]
    every = {"a": np.ones(16, dtype=bool)}
    with pytest.warns(UserWarning, match="too small for all protected units: 12 of 16 are cut"):
        kept = make_plan(anatomy, scores, 0.25, protected=every, multiple_of=1).of(anatomy.groups[0])
    assert np.flatnonzero(kept).tolist() == [12, 13, 14, 15]  # the limit is a promise, protection is advice


def marked_in_every_layer(first: int) -> tuple[Anatomy, dict, dict]:
    """Four layers, each with a protected neuron of the lowest score; in the first layer there are `first` of them."""
    anatomy = Anatomy(tuple(neurons(f"l{i}", 64) for i in range(4)), 10_000)
    rng = np.random.default_rng(0)
    scores = {g.name: 1 + rng.random(g.size) for g in anatomy.groups}
    protected = {g.name: np.arange(g.size) < (first if g.name == "l0" else 1) for g in anatomy.groups}
    return anatomy, {name: np.where(protected[name], 0.0, values) for name, values in scores.items()}, protected


@pytest.mark.parametrize("budget", [0.125, 0.25, {"params": 0.25, "flops": 0.3}], ids=str)
def test_protection_that_costs_nothing_stays_where_another_layer_has_too_much(budget):
    for first, lost in ((1, 0), (64, 56)):
        anatomy, scores, protected = marked_in_every_layer(first)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = make_plan(anatomy, scores, budget, protected=protected)
        assert all(plan[f"l{i}"][0] for i in (1, 2, 3))
        assert kept_counts(plan)["l0"] == 8 or not lost  # its units have no score, so that no more than must stay
        assert plan.params_share <= 0.25
        assert [str(w.message).partition(" are cut")[0] for w in caught] == (
            [f"The budget is too small for all protected units: {lost} of 67"] if lost else []
        )


@given(problems(), trimming, steps, st.integers(0, 2), st.data())
@settings(max_examples=60)
def test_limits_hold_and_are_used_up_whatever_is_protected(problem, budget, multiple_of, min_units, data):
    anatomy, scores = problem
    marks = st.sampled_from([0.0, 0.1, 0.9]).flatmap(lambda share: st.floats(0, 1).map(lambda x: x < share))
    protected = {
        g.name: np.array(data.draw(st.lists(marks, min_size=g.size, max_size=g.size))) for g in anatomy.trimmable
    }
    options = {"multiple_of": multiple_of, "min_units": min_units}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plan = make_plan(anatomy, scores, budget, protected=protected, **options)
        except BudgetError:
            assert plan_or_none(anatomy, scores, budget, **options) is None  # protection makes no plan impossible
            return
    lost = sum(int((mask & plan.trimmed_units[name]).sum()) for name, mask in protected.items())
    assert any(f": {lost:,} of" in str(w.message) for w in caught) == bool(lost)
    for g in anatomy.trimmable:  # protection stays where it costs nothing
        least = min(g.size, -(-max(min_units, g.least) // (step := multiple_of if g.kind == "neuron" else 1)) * step)
        assert protected[g.name].sum() > least or (~plan.trimmed_units[g.name])[protected[g.name]].all()
    budget = Budget.parse(budget)
    names = [n for n in ("params", "flops") if getattr(budget, n) is not None]
    left = {n: allowed(plan, budget, n) - costs(plan)[n] for n in names}
    assert all(rest >= 0 for rest in left.values())
    for group in anatomy.trimmable:
        count = kept_counts(plan)[group.name]
        step = multiple_of if group.kind == "neuron" else 1
        bigger = min(group.size, (count // step + 1) * step) - count
        price = {"params": group.unit_params, "flops": 2 * group.unit_macs(plan.sequence_length)}
        assert not bigger or any(bigger * price[name] > rest for name, rest in left.items())


def test_a_layer_keeps_the_units_that_it_cannot_run_without():
    anatomy = Anatomy((replace(heads("h", 4), least=1), neurons("n", 16)), 1000)
    scores = {g.name: np.ones(g.size) + np.arange(g.size) for g in anatomy.groups}
    none, one = np.zeros(4, dtype=bool), np.arange(4) == 2
    message = "`available` would leave 0 units of 'h', which cannot run with fewer than 1"
    with pytest.raises(SensiError, match=message):
        make_plan(anatomy, scores, 0.5, available={"h": none})
    with pytest.raises(SensiError, match=message):
        check_fits(anatomy, Budget(params=0.5), 8, available={"h": none})
    # Where fewer units than `min_units` are available, all of these stay.
    plan = make_plan(anatomy, scores, 0.5, available={"h": one}, min_units=3, multiple_of=1)
    assert plan["h"].astype(bool).tolist() == one.tolist()
    with pytest.raises(SensiError, match="`units` would leave 0 units of 'h'"):
        plan.without({"h": one})
    assert kept_counts(plan.without({"n": np.ones(16, dtype=bool)})) == {"h": 1, "n": 0}


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(0.2, 1.0),
    st.integers(0, 1),
)
@settings(max_examples=50)
def test_one_limit_and_equal_costs_give_the_best_plan_there_is(lists, share, min_units):
    anatomy = Anatomy(tuple(neurons(f"g{i}", len(v)) for i, v in enumerate(lists)), 10_000)
    scores = {f"g{i}": np.array(v, dtype=float) for i, v in enumerate(lists)}
    plan = plan_or_none(anatomy, scores, share, multiple_of=1, min_units=min_units)
    total = sum(map(len, lists))
    number = math.floor(allowance(share, anatomy.prunable_params) / anatomy.groups[0].unit_params)
    everything = [(i, j) for i, v in enumerate(lists) for j in range(len(v))]
    feasible = [
        choice
        for choice in itertools.combinations(everything, min(number, total))
        if all(sum(i == g for i, _ in choice) >= min_units for g in range(len(lists)))
    ]
    if not feasible:
        assert plan is None
        return
    best = max(sum(lists[i][j] for i, j in choice) for choice in feasible)
    assert sum(scores[g.name][plan.of(g) > 0].sum() for g in anatomy.groups) == best


@given(problems(lone=False), st.floats(0.3, 0.9), st.floats(0.3, 0.9))
@settings(max_examples=20)
def test_a_second_limit_that_does_not_bind_loses_little(problem, share, other):
    """Two limits are solved by a relaxation, which may cost a step of each, but not more."""
    anatomy, scores = problem
    one = plan_or_none(anatomy, scores, {"params": share}, multiple_of=1)
    two = plan_or_none(anatomy, scores, {"params": share, "flops": 1.0}, multiple_of=1)
    assume(one is not None)
    assert two is not None

    def value(plan):
        return sum(scores[g.name][plan.of(g) > 0].sum() for g in anatomy.groups)

    assert value(two) >= value(one) - 2 * max(v.max() for v in scores.values()) - 1e-6


def test_a_count_and_the_share_it_is_give_the_same_plan():
    anatomy = build_anatomy(tiny_model())
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(g.size) for g in anatomy.groups}
    flops = 2 * anatomy.prunable_macs(16)
    for name, whole in (("params", anatomy.prunable_params), ("flops", flops), ("trainable", anatomy.total_params)):
        by_share = make_plan(anatomy, scores, {name: 0.5}, sequence_length=16)
        by_count = make_plan(anatomy, scores, {name: whole // 2}, sequence_length=16)
        assert by_share == by_count


@pytest.mark.parametrize("count", [10**9, 2**63, 10**30])
@pytest.mark.parametrize("name", ["params", "flops", "trainable"])
def test_counts_beyond_the_model_keep_everything(name, count):
    anatomy = Anatomy((heads("h", 2), neurons("n", 8), rows("r", 3)), 10_000)
    plan = make_plan(anatomy, {g.name: np.ones(g.size) for g in anatomy.groups}, {name: count})
    assert all((plan.of(g) == 2).all() for g in anatomy.groups)


def test_full_shares_keep_and_tune_everything():
    anatomy = build_anatomy(tiny_model())
    scores = {g.name: np.ones(g.size) for g in anatomy.groups}
    for budget in (1.0, 1, {"params": 1, "flops": 1.0}, None):
        plan = make_plan(anatomy, scores, budget)
        assert plan.params_share == plan.flops_share == plan.model_params_share == 1.0
        assert not plan.trims and all((plan.of(g) == 2).all() for g in anatomy.groups)


def test_only_targets_are_trained():
    anatomy = Anatomy((heads("h", 2), neurons("n", 8)), 10_000)
    scores = {g.name: np.ones(g.size) for g in anatomy.groups}
    plan = make_plan(anatomy, scores, None, targets=frozenset({"h.q", "n.down"}))
    assert plan.trainable_params == 2 * 2 * 9 + 8 * 8
    plan = make_plan(anatomy, scores, None, targets=["n.down"])
    assert (plan.of(anatomy.groups[0]) == 1).all()


@pytest.mark.parametrize(
    ("budget", "message", "limits"),
    [(2, r"needs [0-9,]+ parameters\. Raise the budget", ("params",)),
     ({"params": 0.5, "flops": 2}, r"needs [0-9,]+ parameters, [0-9,]+ FLOPs\. Raise the budget", ("params", "flops")),
     ({"trainable": 2}, "allows 2, but .* Raise `trainable`", ("trainable",)),
     ({"trainable": 30}, "beside the 25", ("trainable",))],
)  # fmt: skip
def test_a_budget_too_small_says_what_is_needed(budget, message, limits):
    anatomy = Anatomy((heads("h", 2), neurons("n", 16)), 10_000)
    with pytest.raises(BudgetError, match=message) as found:
        make_plan(anatomy, {"h": np.ones(2), "n": np.ones(16)}, budget, always_trained=25 if "25" in message else 0)
    error = pickle.loads(pickle.dumps(found.value))  # as between processes
    assert error.limits == limits and str(error) == f"{error.problem} {error.advice}" == str(found.value)


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"n": None},
        {"n": "fisher"},
        {"n": np.ones(7)},
        {"n": torch.ones(7)},
        {"n": np.ones((8, 1))},
        {"n": np.full(8, np.nan)},
        {"n": np.array([np.inf] + [1.0] * 7)},
    ],
    ids=repr,
)
def test_bad_scores_are_refused(scores):
    with pytest.raises(BudgetError, match="'n'"):
        make_plan(Anatomy((neurons("n", 8),), 1000), scores, 0.5)


def test_scores_are_taken_from_an_object_or_from_arrays_or_tensors():
    anatomy = Anatomy((heads("h", 4), neurons("n", 16)), 10_000)
    tensors = {g.name: torch.arange(1.0, g.size + 1) for g in anatomy.groups}
    protected = {"n": torch.arange(16) == 0}
    arrays = {name: value.numpy() for name, value in tensors.items()}
    expected = make_plan(anatomy, arrays, 0.5, protected={"n": np.arange(16) == 0}, sequence_length=32)
    assert expected.of(anatomy.groups[1])[0] == 2  # protected, in spite of its score
    scores = Scores(tensors, "fisher", sequence_length=32, protected=protected)
    assert make_plan(anatomy, scores, 0.5) == expected
    for values in (
        tensors,
        {name: value.bfloat16() for name, value in tensors.items()},
        {name: value.requires_grad_() for name, value in tensors.items()},
        {name: value.tolist() for name, value in arrays.items()},
    ):
        assert make_plan(anatomy, values, 0.5, protected=protected, sequence_length=32) == expected
    # What is given beside the scores wins.
    assert make_plan(anatomy, scores, 0.5, protected={}, sequence_length=64) == make_plan(
        anatomy, arrays, 0.5, sequence_length=64
    )
    assert make_plan(anatomy, Scores(tensors, "fisher"), 0.5).sequence_length == 128


def test_the_scores_of_a_model_make_its_plan():
    model = tiny_model()
    scores = compute_scores(model, tiny_batches(2), calibration_steps=2, priming_steps=0, progress=False)
    plan = make_plan(build_anatomy(model), scores, 0.5)
    assert plan.sequence_length == scores.sequence_length == 12 and plan.params_share <= 0.5


@pytest.mark.parametrize("scores", [None, 1.0, [np.ones(8)], np.ones(8), "fisher"], ids=repr)
def test_scores_of_a_wrong_type_are_refused(scores):
    with pytest.raises(SensiError, match=f"`scores` must be a `Scores` or a mapping.*got {type(scores).__name__}"):
        make_plan(Anatomy((neurons("n", 8),), 1000), scores, 0.5)


def test_zero_scores_warn():
    anatomy = Anatomy((neurons("n", 16),), 1000)
    with pytest.warns(UserWarning, match="scores are zero"):
        plan = make_plan(anatomy, {"n": np.zeros(16)}, 0.5)
    assert plan.of(anatomy.groups[0]).tolist() == [2] * 8 + [0] * 8


@given(problems(), st.none() | trimming | st.builds(lambda t: {"trainable": t}, shares), steps, st.integers(0, 9))
@settings(max_examples=60)
def test_a_plan_survives_json(problem, budget, multiple_of, always):
    anatomy, scores = problem
    plan = plan_or_none(anatomy, scores, budget, multiple_of=multiple_of, always_trained=always)
    assume(plan is not None)
    text = json.dumps(plan.to_dict())
    again = Plan.from_dict(json.loads(text), anatomy, plan.targets)
    assert again == plan and again.to_dict() == plan.to_dict()
    assert hash(again) == hash(plan)


def test_a_plan_is_compact():
    anatomy = Anatomy((neurons("n", 100_000),), 10**7)
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {"n": rng.random(100_000)}, {"params": 0.5, "trainable": 0.01})
    assert len(json.dumps(plan.to_dict())) < 2 * 100_000 / 8 * 4 / 3 + 300  # two bits a unit, in base64


def a_plan_dict() -> tuple[Anatomy, dict]:
    anatomy = Anatomy((neurons("n", 12), rows("r", 5)), 1000)
    scores = {"n": np.arange(12.0), "r": np.arange(5.0)}
    return anatomy, make_plan(anatomy, scores, {"params": 0.5, "trainable": 0.05}, multiple_of=1).to_dict()


def packed(bits: list[int]) -> str:
    return base64.b64encode(np.packbits(np.array(bits, dtype=bool)).tobytes()).decode()


def edit(path: list, value) -> dict:
    _, plan = a_plan_dict()
    place = plan
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return plan


@pytest.mark.parametrize(
    "plan",
    [
        None, [], {}, "plan",
        edit(["groups"], ...), edit(["groups"], []), edit(["groups"], {}), edit(["surplus"], 1),
        edit(["sequence_length"], "128"), edit(["sequence_length"], 0), edit(["sequence_length"], True),
        edit(["sequence_length"], 1.5), edit(["sequence_length"], 2**60), edit(["always_trained"], None),
        edit(["always_trained"], -1), edit(["sequence_length"], -1),
        edit(["groups", "n"], ...), edit(["groups", "n"], None),
        edit(["groups", "other"], edit(["x"], 0)["groups"]["n"]),
        edit(["groups", "n", "size"], 13), edit(["groups", "n", "size"], "12"), edit(["groups", "n", "size"], True),
        edit(["groups", "n", "size"], -12), edit(["groups", "n", "kept"], ...), edit(["groups", "n", "kept"], None),
        edit(["groups", "n", "kept"], [1] * 12), edit(["groups", "n", "kept"], "?!"),
        edit(["groups", "n", "kept"], ""),
        edit(["groups", "n", "kept"], packed([1] * 8)), edit(["groups", "n", "kept"], packed([1] * 24)),
        edit(["groups", "n", "kept"], packed([1] * 16)), edit(["groups", "n", "tuned"], "all"),
        edit(["groups", "n", "surplus"], 1), edit(["groups", "r", "kept"], "none"),
        edit(["groups", "r", "kept"], packed([1, 1, 1, 1, 0, 0, 0, 0])), edit(["groups", "n", "kept"], "é"),
    ],
)  # fmt: skip
def test_broken_plans_are_refused(plan):
    anatomy, good = a_plan_dict()
    Plan.from_dict(good, anatomy, frozenset())
    with pytest.raises(SensiLoadError):
        Plan.from_dict(plan, anatomy, frozenset())


def test_more_units_leave_a_plan_by_masks_that_fit_it():
    anatomy = build_anatomy(tiny_model(), targets=["bert.embeddings.word_embeddings"])
    whole = make_plan(anatomy, {g.name: np.ones(g.size) for g in anatomy.groups}, 1.0)
    first = anatomy.trimmable[0]
    mask = np.arange(first.size) == 0
    smaller = whole.without({first.name.removeprefix("bert."): mask})
    assert (smaller.trimmed_units[first.name] == mask).all()
    assert smaller.kept_params == whole.kept_params - first.unit_params
    tokens = next(group for group in anatomy.groups if group.kind == "token")
    assert whole.without({tokens.name: np.zeros(tokens.size, bool)}) == whole  # no token is removed
    cases = {"no group 'nowhere'": {"nowhere": mask}, "units that can be": {tokens.name: np.ones(tokens.size, bool)}}
    cases["a mask of"] = {first.name: mask[1:]}
    for message, masks in cases.items():
        with pytest.raises(SensiError, match=message):
            whole.without(masks)


def test_a_plan_does_not_fit_another_model():
    small, large = (build_anatomy(tiny_model(num_hidden_layers=n)) for n in (1, 2))
    plans = [make_plan(a, {g.name: np.ones(g.size) for g in a.groups}, None).to_dict() for a in (small, large)]
    with pytest.raises(SensiLoadError, match="says nothing about"):
        Plan.from_dict(plans[0], large, frozenset())
    with pytest.raises(SensiLoadError, match="does not have"):
        Plan.from_dict(plans[1], small, frozenset())


def test_the_summary_has_a_line_a_group_and_the_figures():
    anatomy = build_anatomy(tiny_model())
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, {"params": 0.5, "trainable": 0.05})
    text = plan.summary()
    assert text == str(plan)
    lines = text.splitlines()
    for line, group in zip(lines[1:], anatomy.groups, strict=False):
        states = plan.of(group)
        counts = [str(group.size), str((states > 0).sum()), str((states == 2).sum())]
        assert line.split()[:5] == [*group.name.split(".")[-2:], *counts]
    for figure in (plan.kept_params, plan.kept_flops, plan.trainable_params):
        assert f"{figure:,}" in "\n".join(lines[1 + len(anatomy.groups) :])
    for share in (plan.params_share, plan.model_params_share, plan.flops_share, plan.trainable_share):
        assert f"{share:.2%}" in "\n".join(lines[1 + len(anatomy.groups) :])
    assert "\n" not in plan.line()


def test_the_figures_are_what_every_text_says():
    groups = (heads("l0.heads", 4), neurons("l0.neurons", 40), rows("lone", 5))
    anatomy = Anatomy(groups, 10_000)
    scores = {g.name: np.arange(1.0, g.size + 1) for g in groups}
    plan = make_plan(anatomy, scores, {"params": 0.5, "trainable": 0.05}, sequence_length=16)
    figures = json.loads(json.dumps(plan.figures()))
    assert figures["params_share"] == figures["params_kept"] / figures["params_prunable"] == plan.params_share
    assert figures["flops_share"] == figures["flops_kept"] / figures["flops_prunable"] == plan.flops_share
    assert figures["trainable_share"] == figures["trainable_params"] / figures["base_params"] == plan.trainable_share
    facts = plan.facts()
    assert facts["prunable parameters kept"] == (
        f"{plan.kept_params:,} of {anatomy.prunable_params:,} ({plan.params_share:.2%})"
    )
    assert all(f"{name}: {value}" in plan.summary() for name, value in facts.items())
    assert plan.facts(lambda count: f"<{count}>")["trained values"].startswith(f"<{plan.trainable_params}> (")
    counts = {g.kind: {"size": g.size, "kept": int((plan.of(g) > 0).sum()), "tuned": int((plan.of(g) == 2).sum())}
              for g in groups}  # fmt: skip
    assert units_by_kind(plan) == counts
    assert f"kept {counts['head']['kept']} of 4 heads, {counts['neuron']['kept']} of 40 neurons; " in plan.line()
    only_rows = Anatomy((rows("lone", 5),), 100)
    assert "prunable" not in " ".join(make_plan(only_rows, {"lone": np.ones(5)}, None).facts())


def test_a_limit_on_the_size_needs_something_to_trim():
    anatomy = Anatomy((rows("r", 5),), 1000)
    for budget in (0.5, {"params": 0.5, "flops": 0.5}):
        with pytest.raises(BudgetError, match="no heads or neurons that can be trimmed"):
            make_plan(anatomy, {"r": np.arange(5.0)}, budget)
    assert make_plan(anatomy, {"r": np.arange(5.0)}, {"trainable": 0.5}).trainable_params


def test_plans_are_immutable():
    anatomy, plan = a_plan_dict()
    plan = Plan.from_dict(plan, anatomy, frozenset())
    with pytest.raises(AttributeError):
        plan.sequence_length = 1
    with pytest.raises(ValueError):
        plan.of(anatomy.groups[0])[0] = 2


@pytest.mark.parametrize(
    "budget",
    [0.5, {"params": 0.5, "flops": 0.5, "trainable": 0.01}, {"trainable": 0.01}],
    ids=str,
)
def test_a_model_of_seven_billion_is_planned_in_time(budget):
    groups = []
    for i in range(32):
        side = [Side(f"{i}.{part}", 0, 128, 4096) for part in "qkv"] + [Side(f"{i}.o", 1, 128, 4096)]
        groups.append(Group(f"{i}.heads", "head", 32, tuple(side), f"{i}.o", attention_width=128))
        side = [Side(f"{i}.up", 0, 1, 4096), Side(f"{i}.gate", 0, 1, 4096), Side(f"{i}.down", 1, 1, 4096)]
        groups.append(Group(f"{i}.neurons", "neuron", 11008, tuple(side), f"{i}.down"))
    anatomy = Anatomy(tuple(groups), 6_738_415_616)
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(g.size) ** 4 for g in groups}
    start = time.process_time()
    plan = make_plan(anatomy, scores, budget)
    assert time.process_time() - start < 20
    limits = Budget.parse(budget)
    used = {n: costs(plan)[n] / allowed(plan, limits, n) for n in costs(plan) if getattr(limits, n) is not None}
    assert all(share <= 1 for share in used.values())
    assert used.pop("trainable", 1) > 0.999
    assert max(used.values(), default=1) > 0.999  # one of the two limits on size binds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multiple_of": 0}, "`multiple_of` must be a whole number of at least 1"),
        ({"min_units": -1}, "`min_units` must be"),
        ({"sequence_length": "long"}, "`sequence_length` must be"),
        ({"tuned_layers": 0}, "`tuned_layers` must be"),
        ({"retention": 2.0}, "`retention` must be a share"),
        ({"always_trained": 0.5}, "`always_trained` must be"),
        ({"targets": "query"}, "`targets` must be a list of names"),
        ({"targets": ["query"]}, "`targets` has 'query', but the anatomy has no such name.*'bert.encoder.layer.0.att"),
        ({"protected": {"layer.0.heads": [True] * 4}}, "`protected` has 'layer.0.heads'.*'bert.encoder.layer.0"),
        ({"available": {"layer.0.heads": [True] * 4}}, "`available` has 'layer.0.heads'"),
        ({"protected": [True]}, "`protected` and `available` must be mappings"),
        ({"protected": {"bert.encoder.layer.0.heads": [True]}}, r"4 units.*shape \(1,\): give masks"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments, message):
    anatomy = build_anatomy(tiny_model())
    with pytest.raises(SensiError, match=message):
        make_plan(anatomy, {g.name: np.ones(g.size) for g in anatomy.groups}, 0.5, **arguments)


def test_a_plan_needs_an_anatomy():
    with pytest.raises(SensiError, match=r"`anatomy` must be what `build_anatomy\(model\)` returns, got Bert"):
        make_plan(tiny_model(), {}, 0.5)


def test_the_name_of_a_file_is_no_plan():
    with pytest.raises(SensiError, match="must be a `Plan` or its dict .*, got 'plan.json'"):
        SensiConfig(plan="plan.json")


def test_states_of_what_is_no_group_are_refused():
    plan = wrap(tiny_model(), **TRIM).plan()
    assert (plan.of(plan.anatomy.groups[0]) == plan[plan.anatomy.groups[0].name]).all()
    for other in ("0.heads", 0, None):
        with pytest.raises(SensiError, match="is no group of this plan"):
            plan.of(other)


def test_units_that_are_whole_sublayers_are_called_so():
    """They were called heads and neurons, as if a model had two neurons."""
    line = wrap(tiny_model(), budget=0.8, granularity="tensor", score="magnitude").base_model.plan().line()
    assert line.startswith("kept ") and "attentions, " in line and "FFNs; " in line
    assert "2 of 2 heads" not in line and "neurons" not in line
