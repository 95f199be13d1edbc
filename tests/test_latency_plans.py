"""Plans under limits on latency: against brute force on small cases, and their promises on random ones."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_plan import anatomies, heads, neurons

from peft_sensi import Anatomy, Budget, BudgetError, LatencyTable, SensiError, make_plan
from peft_sensi.anatomy.latency import SublayerTimes, shape_of
from peft_sensi.anatomy.latency_points import kinds_of, points_of, table_from
from peft_sensi.planning.budget import allowance, nanoseconds
from peft_sensi.planning.ladders import Ladder, choose
from peft_sensi.utils.timing import Timing


DESCRIBED = ("phase", "model", "device", "runtime", "versions", "threads", "dtype", "batch_size", "sequence_length")


def table_for(anatomy: Anatomy, times, rest: float = 1.0, phase: str = "prefill") -> LatencyTable:
    """A table with these times: for each shape, milliseconds by number of kept units."""
    groups = {}
    for group in anatomy.trimmable:
        groups.setdefault(shape_of(group), []).append(group)
    sublayers = []
    for shape, same in groups.items():
        points = times(same[0])
        counts, ms = tuple(points), tuple(float(v) for v in points.values())
        sublayers.append(SublayerTimes(shape, len(same), same[0].size, counts, ms, (0.0,) * len(ms)))
    return LatencyTable(
        phase, "bert", "a board", "torch", {"torch": "2.9"}, 1, "float32", 1, 128, rest, 0.0, tuple(sublayers)
    )


@st.composite
def tables(draw, anatomy: Anatomy, phase: str = "prefill") -> LatencyTable:
    """Any never falling times, with plateaus and jumps."""

    def times(group):
        inner = draw(st.sets(st.integers(1, group.size), max_size=5))
        counts = sorted({0, group.size} | inner)
        rises = draw(st.lists(st.sampled_from([0.0, 0.001, 0.5]) | st.floats(0, 2), min_size=len(counts) - 1,
                              max_size=len(counts) - 1))  # fmt: skip
        return dict(zip(counts, [0.0, *itertools.accumulate(rises)], strict=True))

    return table_for(anatomy, times, draw(st.sampled_from([0.0, 0.3, 2.0])) + 1e-3, phase)


@st.composite
def problems(draw):
    anatomy = draw(anatomies(lone=False))
    values = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 1e3, allow_subnormal=False)
    scores = {g.name: np.array(draw(st.lists(values, min_size=g.size, max_size=g.size))) for g in anatomy.groups}
    return anatomy, scores, draw(tables(anatomy))


def plan_or_none(*args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All scores are")
        try:
            return make_plan(*args, **options)
        except BudgetError:
            return None


def counts_of(plan) -> dict[str, int]:
    return {g.name: int((plan.of(g) > 0).sum()) for g in plan.anatomy.groups}


def time_of(table, anatomy, counts) -> int:
    return table.rest + sum(int(table.times(g, np.array([counts[g.name]]))[0]) for g in anatomy.trimmable)


def value_of(scores, counts) -> float:
    return sum(float(np.sort(scores[name])[::-1][:count].sum()) for name, count in counts.items())


@given(problems(), st.floats(0.1, 1.0), st.sampled_from([1, 3, 8]), st.integers(0, 1))
@settings(max_examples=60)
def test_the_limit_holds_and_no_further_step_fits(problem, share, multiple_of, min_units):
    anatomy, scores, table = problem
    plan = plan_or_none(
        anatomy, scores, {"latency": share}, latency=table, multiple_of=multiple_of, min_units=min_units
    )
    assume(plan is not None)
    counts = counts_of(plan)
    spent, allowed = time_of(table, anatomy, counts), allowance(share, table.whole)
    assert spent <= allowed
    assert plan.latency["latency"]["predicted_ms"] == spent / 1e6
    for group in anatomy.trimmable:
        assert counts[group.name] >= min(min_units, group.size)
        step = multiple_of if group.kind == "neuron" else 1
        bigger = min(group.size, (counts[group.name] // step + 1) * step)
        if bigger > counts[group.name]:
            assert time_of(table, anatomy, {**counts, group.name: bigger}) > allowed


@st.composite
def ladders(draw, limits: int):
    """Small ladders of any shape: their costs rise, their scores too."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 4))
        gains = sorted(draw(st.lists(st.integers(0, 20), min_size=size, max_size=size)), reverse=True)
        rises = draw(st.lists(st.lists(st.integers(0, 9), min_size=size, max_size=size), min_size=limits,
                              max_size=limits))  # fmt: skip
        costs = np.array([[0, *itertools.accumulate(r)] for r in rises], dtype=np.int64)
        group = neurons(f"g{len(found)}", max(1, size))
        scores = np.array([0, *itertools.accumulate(gains)], dtype=float)
        found.append(Ladder([(group, np.arange(size))], np.arange(size + 1), scores, costs))
    return found


@pytest.mark.parametrize("limits", [1, 2, 3])
@given(data=st.data())
@settings(max_examples=75)
def test_small_problems_are_solved_as_by_brute_force(limits, data):
    given_ladders = data.draw(ladders(limits))
    left = np.array(data.draw(st.lists(st.integers(0, 40), min_size=limits, max_size=limits)), dtype=np.int64)
    best = max(
        sum(ladder.scores[i] for ladder, i in zip(given_ladders, choice, strict=True))
        for choice in itertools.product(*(range(len(ladder.counts)) for ladder in given_ladders))
        if (sum(ladder.costs[:, i] for ladder, i in zip(given_ladders, choice, strict=True)) <= left).all()
    )
    choose(given_ladders, left, proportional=False)
    assert sum(ladder.scores[ladder.taken] for ladder in given_ladders) == best
    assert (sum(ladder.costs[:, ladder.taken] for ladder in given_ladders) <= left).all()


def test_a_table_with_a_known_best_plan():
    """A step that costs nothing is taken with the expensive one before it, which alone would not pay."""
    anatomy = Anatomy((neurons("a", 4), neurons("b", 4, hidden=9)), 1000)
    scores = {"a": np.array([5.0, 4.9, 4.8, 4.7]), "b": np.array([6.0, 1.0, 1.0, 1.0])}
    stairs = {"a": {0: 0, 1: 3, 2: 3, 3: 3, 4: 3}, "b": {0: 0, 1: 2, 2: 3, 3: 4, 4: 5}}
    table = table_for(anatomy, lambda group: stairs[group.name], rest=1.0)
    assert table.whole == 9_000_000
    options = {"latency": table, "multiple_of": 1, "min_units": 0}
    plan = make_plan(anatomy, scores, {"latency": "4ms"}, **options)  # 3 ms beside the rest
    assert counts_of(plan) == {"a": 4, "b": 0}
    assert counts_of(make_plan(anatomy, scores, {"latency": "3.999ms"}, **options)) == {"a": 0, "b": 1}
    assert counts_of(make_plan(anatomy, scores, {"latency": "6ms"}, **options)) == {"a": 4, "b": 1}
    assert counts_of(make_plan(anatomy, scores, {"latency": 6 / 9}, **options)) == {"a": 4, "b": 0}  # rounded down
    assert counts_of(make_plan(anatomy, scores, {"latency": 1.0}, **options)) == {"a": 4, "b": 4}
    both = make_plan(anatomy, scores, {"latency": "6ms", "params": 0.5}, **options)
    assert both.kept_params <= anatomy.prunable_params / 2 and counts_of(both) == {"a": 3, "b": 1}
    line = "predicted latency: 6 ms of 9 (66.67%; torch on a board, 1 thread, 1 x 128 tokens)"
    assert line in " ".join(both.summary().split())  # a long line is continued on the next one
    assert both.figures()["latency_share"] == pytest.approx(2 / 3)
    with pytest.raises(BudgetError, match=r"needs a latency of 1 ms\."):
        make_plan(anatomy, scores, {"latency": "0.9ms"}, **options)


@given(problems(), st.floats(0.3, 1.0), st.floats(0.3, 1.0), st.floats(0.3, 1.0), st.data())
@settings(max_examples=30)
def test_all_limits_hold_together(problem, latency, params, decode, data):
    anatomy, scores, table = problem
    step = data.draw(tables(anatomy, "decode"))
    budget = {"latency": latency, "params": params, "flops": 0.9, "decode_latency": decode}
    plan = plan_or_none(anatomy, scores, budget, latency=[table, step], multiple_of=1)
    assume(plan is not None)
    counts = counts_of(plan)
    assert time_of(table, anatomy, counts) <= allowance(latency, table.whole)
    assert time_of(step, anatomy, counts) <= allowance(decode, step.whole)
    assert plan.kept_params <= allowance(params, anatomy.prunable_params)
    assert set(plan.latency) == {"latency", "decode_latency"}


@given(problems(), st.floats(0.2, 1.0))
@settings(max_examples=40)
def test_times_proportional_to_parameters_are_at_least_as_good_as_the_limit_on_them(problem, share):
    anatomy, scores, _ = problem
    table = table_for(anatomy, lambda g: {0: 0.0, g.size: g.size * g.unit_params / 1e6}, rest=0.0)
    assume(table.whole == anatomy.prunable_params)
    by_params = plan_or_none(anatomy, scores, {"params": share}, multiple_of=1, min_units=0)
    by_time = plan_or_none(anatomy, scores, {"latency": share}, latency=table, multiple_of=1, min_units=0)
    assert (by_params is None) == (by_time is None)
    if by_params is not None:
        assert value_of(scores, counts_of(by_time)) >= value_of(scores, counts_of(by_params)) * (1 - 1e-9)


def test_uniform_widths_and_whole_sublayers():
    anatomy = Anatomy((heads("l0.heads", 4), heads("l1.heads", 4), neurons("l0.n", 16), neurons("l1.n", 16)), 9999)
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(g.size) for g in anatomy.groups}
    table = table_for(anatomy, lambda g: {0: 0.0, g.size // 2: 1.0, g.size: 1.5})
    plan = make_plan(anatomy, scores, {"latency": 0.7}, latency=table, uniform=True, multiple_of=4)
    counts = counts_of(plan)
    assert counts["l0.heads"] == counts["l1.heads"] and counts["l0.n"] == counts["l1.n"]
    whole = Anatomy(tuple(g.as_one_unit() for g in anatomy.groups), 9999)
    totals = {name: np.array([value.sum()]) for name, value in scores.items()}
    plan = make_plan(whole, totals, {"latency": 0.6}, latency=table, min_units=0)  # 1 + 2 * 1.5 of 7 ms
    assert sum(counts_of(plan).values()) == 2


def test_equal_inputs_give_equal_plans():
    rng = np.random.default_rng(1)
    layers = [(heads(f"l{i}.heads", 12, 64, 768), neurons(f"l{i}.n", 3072, 768)) for i in range(6)]
    anatomy = Anatomy(tuple(itertools.chain(*layers)), 10**8)
    scores = {g.name: rng.random(g.size) ** 4 * (10 if g.kind == "head" else 1) for g in anatomy.groups}
    table = table_for(anatomy, lambda g: {n: math.sqrt(n) for n in np.linspace(0, g.size, 9).astype(int).tolist()})
    plans = [make_plan(anatomy, scores, {"latency": 0.5}, latency=table, min_units=0) for _ in range(2)]
    assert plans[0] == plans[1]
    spent = time_of(table, anatomy, counts_of(plans[0]))
    assert 0.499 * table.whole < spent <= 0.5 * table.whole


def test_a_plan_without_more_units_predicts_nothing_until_it_is_asked():
    anatomy = Anatomy((neurons("a", 4), neurons("b", 4, hidden=9)), 1000)
    table = table_for(anatomy, lambda group: {0: 0, 4: 3})
    plan = make_plan(anatomy, {g.name: np.ones(g.size) for g in anatomy.groups}, {"latency": 1.0}, latency=table)
    assert plan.figures()["latency_ms"] == 7
    smaller = plan.without({"a": np.ones(4, dtype=bool)})
    assert "latency_ms" not in smaller.figures() and " ms" not in smaller.line() + smaller.summary()
    assert smaller.predicted({"latency": table}).figures()["latency_ms"] == 4


def test_a_missing_table_and_one_for_another_model():
    anatomy, other = Anatomy((neurons("a", 16),), 100), Anatomy((neurons("a", 24),), 100)
    scores = {"a": np.ones(16)}
    table = table_for(other, lambda g: {0: 0, g.size: 1})
    with pytest.raises(BudgetError, match="needs a latency table"):
        make_plan(anatomy, scores, {"latency": 0.5})
    with pytest.raises(BudgetError, match="`decode_latency` needs"):
        good = table_for(anatomy, lambda g: {0: 0, g.size: 1})
        make_plan(anatomy, scores, {"decode_latency": 0.5}, latency=good)
    with pytest.raises(SensiError, match="measured for another model"):
        make_plan(anatomy, scores, {"latency": 0.5}, latency=table)
    edited = replace(good, sublayers=(replace(good.sublayers[0], units=32, counts=(0, 32)),))
    with pytest.raises(SensiError, match="32 units, and those of this model have another number"):
        make_plan(anatomy, scores, {"latency": 0.9}, latency=edited)
    with pytest.warns(UserWarning, match="of the type 'vit', and this one is a 'bert'"):
        make_plan(replace(anatomy, model_type="bert"), scores, {"latency": 0.9}, latency=replace(good, model="vit"))
    with pytest.raises(SensiError, match="two tables of the phase 'prefill'"):
        make_plan(other, {"a": np.ones(24)}, 0.5, latency=[table, table])
    for wrong in (5, [None], object()):
        with pytest.raises(SensiError, match="must be a LatencyTable"):
            make_plan(other, {"a": np.ones(24)}, 0.5, latency=wrong)
    with pytest.raises(SensiError, match="no latency table 'no.json'"):
        make_plan(other, {"a": np.ones(24)}, 0.5, latency="no.json")


@pytest.mark.parametrize(
    "changes",
    [{"rest_ms": math.nan}, {"rest_ms": -1.0}, {"threads": np.int64(1)}, {"ms": (1.0, 0.0)},
     {"ms": (0.0, math.inf)}, {"counts": (0, 8)}, {"ms": (1.0,)}],
)  # fmt: skip
def test_a_table_that_was_changed_in_code_is_checked_like_a_file(changes):
    anatomy = Anatomy((neurons("a", 16),), 100)
    table = table_for(anatomy, lambda g: {0: 0, g.size: 1})
    make_plan(anatomy, {"a": np.ones(16)}, {"latency": 0.9}, latency=table)
    of_table = {name: value for name, value in changes.items() if hasattr(table, name)}
    [kind] = table.sublayers
    kind = replace(kind, **{name: value for name, value in changes.items() if name not in of_table})
    with pytest.raises(SensiError, match="latency table"):
        make_plan(anatomy, {"a": np.ones(16)}, {"latency": 0.9}, latency=replace(table, sublayers=(kind,), **of_table))


@pytest.mark.parametrize("text, expected", [("12ms", 12_000_000), (" 0.5 s", 500_000_000), ("7us", 7000), ("3 ns", 3),
                                            ("1.5ms ", 1_500_000)])  # fmt: skip
def test_times_of_a_budget(text, expected):
    assert nanoseconds(text) == expected == allowance(text, 10**15)
    assert Budget.parse({"latency": text}).trims


@pytest.mark.parametrize(
    "value",
    ["12", "0ms", "-1ms", "1e3ms", "ms", "1 m", "", 2, 0, 1.5, True, "1" * 40 + "ms", "0.1ns", "\u0661ms"],
)
@pytest.mark.parametrize("name", ["latency", "decode_latency"])
def test_wrong_times_are_refused(name, value):
    with pytest.raises(BudgetError, match=r"must be a share in \(0, 1\] or a time such as '12ms'"):
        Budget.parse({name: value})


@pytest.mark.parametrize("share", [0.5, 0.35])
def test_noise_does_not_make_plans_that_are_too_slow(share):
    """A plan takes the counts that look cheap. In a noisy table these would be those that were measured too short."""
    groups = [neurons(f"n{i}", 512) for i in range(6)] + [heads(f"h{i}", 12) for i in range(6)]
    anatomy = Anatomy(tuple(groups), sum(group.size * group.unit_params for group in groups))
    kinds = kinds_of(anatomy)
    unit = {kind.shape: 57 / (kind.groups * kind.units) for kind in kinds}  # ms; one of twenty is the rest

    def ms(counts) -> float:
        return 6 + sum(kind.groups * unit[kind.shape] * counts.get(kind.shape, kind.units) for kind in kinds)

    described = {name: getattr(table_for(anatomy, lambda g: {0: 0, g.size: 1}), name) for name in DESCRIBED}
    over = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        points = {}
        for name, counts in points_of(kinds).items():
            seconds = ms(counts) / 1e3
            points[name] = Timing(seconds * random.normal(1, 0.015), 0.0, 0.015 * seconds)
        table = table_from(kinds, Timing(ms({}) / 1e3, 0.0), points, described)
        scores = {group.name: random.random(group.size) for group in groups}
        counts = counts_of(make_plan(anatomy, scores, {"latency": share}, latency=table, min_units=0))
        spent = 6 + sum(unit[shape_of(group)] * counts[group.name] for group in groups)
        over.append(spent / ms({}) / share - 1)
    assert abs(np.mean(over)) < 0.02 and max(over) < 0.05
