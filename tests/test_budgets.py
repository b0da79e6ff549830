"""Budgets: amounts at every step, truncation, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.budgets import Constant, Polynomial
from apportion.types import resolve


def test_a_constant_budget_is_the_same_at_every_step_and_keeps_its_kind() -> None:
    assert [Constant(2).at(step, None) for step in (0, 7, 10**6)] == [2, 2, 2]
    assert type(Constant(2).at(0, 10)) is int
    assert type(Constant(1.0).at(0, 10)) is float


@pytest.mark.parametrize(("n", "quarter", "half"), [(32, 8, 16), (40, 10, 20), (28, 7, 14), (3, 1, 1), (1, 1, 1)])
def test_fractions_are_truncated_to_whole_units_but_never_to_none(n: int, quarter: int, half: int) -> None:
    assert resolve(Constant(0.25).at(0, None), n) == quarter
    assert resolve(Constant(0.5).at(0, None), n) == half


def test_a_cubic_budget_has_the_values_computed_by_hand() -> None:
    budget = Polynomial(start=24, end=8, power=3, begin=4, finish=12)
    # (12 - t) / 8 cubed times 16, plus 8: t = 6 gives 0.421875 * 16 + 8 = 14.75
    assert [budget.at(t, None) for t in (0, 4, 6, 8, 10, 12, 13)] == [24, 24, 14, 10, 8, 8, 8]


def test_a_linear_fraction_runs_to_the_end_of_training_where_no_finish_is_given() -> None:
    budget = Polynomial(start=1.0, end=0.5)
    assert [budget.at(t, 4) for t in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_counts_that_are_whole_are_not_truncated_by_rounding_errors() -> None:
    budget = Polynomial(start=100, end=0 + 1, power=1, begin=0, finish=99)
    assert [budget.at(t, None) for t in range(100)] == list(range(100, 0, -1))


@given(
    start=st.integers(1, 50),
    end=st.integers(1, 50),
    power=st.floats(0.1, 8.0),
    begin=st.integers(0, 20),
    length=st.integers(1, 40),
)
def test_a_polynomial_moves_one_way_between_its_ends(
    start: int, end: int, power: float, begin: int, length: int
) -> None:
    budget = Polynomial(start, end, power, begin, begin + length)
    amounts = [budget.at(step, None) for step in range(begin + length + 3)]
    assert all(isinstance(amount, int) for amount in amounts)
    assert amounts[: begin + 1] == [start] * (begin + 1)
    assert amounts[begin + length :] == [end] * 3
    assert amounts == sorted(amounts, reverse=start > end)


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5, float("nan")])
def test_amounts_out_of_range_are_refused_with_the_call_and_the_way_out(amount: float) -> None:
    with pytest.raises(ValueError, match=r"`Constant\(amount=.*\)` must (be at least 1|lie in \(0, 1\]).*; give"):
        Constant(amount)


@pytest.mark.parametrize("amount", [True, "2", None])
def test_amounts_that_are_no_numbers_are_refused(amount: object) -> None:
    with pytest.raises(TypeError, match="neither a count"):
        Constant(amount)  # type: ignore[arg-type]


def test_nonsense_polynomials_are_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="mixes a count"):
        Polynomial(4, 0.5)
    with pytest.raises(ValueError, match="power"):
        Polynomial(4, 2, power=0.0)
    with pytest.raises(ValueError, match="begin"):
        Polynomial(4, 2, begin=-1)
    with pytest.raises(ValueError, match="`finish` above `begin`"):
        Polynomial(4, 2, begin=5, finish=5)
    with pytest.raises(ValueError, match=r"Polynomial\(end=0\)"):
        Polynomial(4, 0)


def test_a_polynomial_that_ends_with_the_run_needs_its_length() -> None:
    with pytest.raises(ValueError, match="unknown: give `finish`"):
        Polynomial(4, 2).at(0, None)
    with pytest.raises(ValueError, match="lower `begin`"):
        Polynomial(4, 2, begin=10).at(0, 10)
