"""Budgets: what is read, what is refused, and how a share becomes a whole number."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_sensi import Budget, BudgetError, SensiConfig
from peft_sensi.planning.budget import LIMITS, allowance


shares = st.floats(min_value=1e-9, max_value=1.0, exclude_min=True)
counts = st.integers(min_value=1, max_value=10**12)
limits = shares | counts

WRONG = [
    0, 0.0, -0.0, -1, -0.5, 1.5, 2.0, math.nan, math.inf, -math.inf, True, False, None, "half", "0.5", b"1", [], [0.5],
    (0.5,), {}, {0.5}, 1j, {"param": 0.5}, {"params": 0.5, "flop": 0.5}, {"params": None}, {"params": True},
    {"flops": 1.5}, {"trainable": 0}, {"trainable": "all"}, {"params": math.nan}, {"params": {}}, {1: 0.5}, {None: 1},
    {"params": None, "flops": None}, {"param": None}, {"params": 0.5, "flop": None},
]  # fmt: skip


@pytest.mark.parametrize("budget", WRONG, ids=repr)
def test_wrong_budgets_are_refused(budget):
    with pytest.raises(BudgetError) as error:
        Budget.parse(budget)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("budget", [b for b in WRONG if b is not None], ids=repr)
def test_wrong_budgets_are_refused_by_the_config(budget):
    with pytest.raises(BudgetError):
        SensiConfig(budget=budget)


@pytest.mark.parametrize("value", [-1, 1.5, math.nan, True, "half"], ids=repr)
@pytest.mark.parametrize("name", LIMITS)
def test_a_budget_made_by_hand_is_checked_too(name, value):
    with pytest.raises(BudgetError, match=name):
        Budget(**{name: value})


def test_the_message_names_the_limit_the_value_and_the_way_out():
    with pytest.raises(BudgetError, match=r"`flops`.*2\.0.*write 2 for a count"):
        Budget.parse({"flops": 2.0})
    with pytest.raises(BudgetError, match=r"'param'.*params, flops, trainable"):
        Budget.parse({"param": 0.5})


@given(limits)
def test_a_number_limits_the_parameters(value):
    assert Budget.parse(value) == Budget(params=value)
    assert Budget.parse(value).trims


@given(st.dictionaries(st.sampled_from(LIMITS), limits, min_size=1))
def test_all_limits_of_a_mapping_are_read(values):
    budget = Budget.parse(values)
    assert {name: getattr(budget, name) for name in values} == values
    assert all(getattr(budget, name) is None for name in set(LIMITS) - set(values))
    assert budget.trims == bool({"params", "flops"} & set(values))
    assert Budget.parse(budget) == budget


def test_none_in_a_mapping_is_no_limit():
    assert Budget.parse({"params": 0.5, "flops": None, "latency": None}) == Budget(params=0.5)
    assert SensiConfig(budget={"flops": None, "trainable": 0.1}).limits == Budget(trainable=0.1)
    with pytest.raises(BudgetError, match="The budget is empty"):
        Budget.parse({"params": None})


@given(st.floats() | st.integers(), st.sampled_from(LIMITS))
def test_a_number_is_read_or_refused_and_nothing_between(value, name):
    good = 0 < value <= 1 or (isinstance(value, int) and value > 1)
    if good:
        assert getattr(Budget.parse({name: value}), name) == value
    else:
        with pytest.raises(BudgetError):
            Budget.parse({name: value})


@given(st.integers(1, 10**6), st.integers(0, 10**9))
@example(290_000, 100)
def test_a_share_allows_what_its_decimal_says(millionths, whole):
    share = millionths / 10**6
    allowed = allowance(share, whole)
    assert allowed == math.floor(Fraction(millionths, 10**6) * whole)


@given(shares, st.integers(0, 10**12))
def test_a_share_never_allows_more_than_it_says(share, whole):
    exact = Fraction(repr(share)) * whole
    assert exact - 1 < allowance(share, whole) <= exact


def test_one_is_the_full_share_and_two_is_a_count():
    assert allowance(1, 1000) == allowance(1.0, 1000) == 1000
    assert allowance(2, 1000) == 2
