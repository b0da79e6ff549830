"""Budgets: amounts at every step, truncation, refusals."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.budgets import Constant, Increment, Polynomial, RankEquivalent
from apportion.types import Budget, resolve


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


# Increment
# ------------------------------------------------------------------------------------------------------------------


def added(budget: Increment, steps: int, total: int | None = None) -> list[int]:
    counts = [0, *(budget.at(step, total) for step in range(steps))]
    return [b - a for a, b in itertools.pairwise(counts)]


def test_increments_have_the_values_worked_by_hand() -> None:
    assert added(Increment(10, "front", 4), 4) == [3, 3, 2, 2]
    assert added(Increment(10, "even", 4), 4) == [2, 3, 2, 3]
    assert added(Increment(3, "even", 5), 5) == [0, 1, 0, 1, 1]
    assert added(Increment(3, "front", 5), 5) == [1, 1, 1, 0, 0]
    assert sum(Increment(10, "front", 4).at(step, None) for step in range(4)) == 27


@given(amount=st.integers(1, 200), steps=st.integers(1, 60), form=st.sampled_from(["even", "front"]))
def test_an_increment_never_falls_differs_by_one_at_most_and_ends_at_its_amount(
    amount: int, steps: int, form: str
) -> None:
    budget = Increment(amount, form)
    units = added(budget, steps + 5, total=steps)
    assert sum(units) == amount
    assert units[steps:] == [0] * 5
    assert set(units[:steps]) <= {amount // steps, -(-amount // steps)}
    assert all(type(budget.at(step, steps)) is int for step in range(steps + 5))
    if form == "front":
        assert units[:steps] == sorted(units[:steps], reverse=True)
    else:  # nowhere behind, nor a unit ahead of, the straight line
        assert all(0 <= amount * (t + 1) - budget.at(t, steps) * steps < steps for t in range(steps))


def test_a_finish_of_its_own_comes_before_the_end_of_the_run() -> None:
    assert [Increment(6, finish=3).at(step, 100) for step in range(5)] == [2, 4, 6, 6, 6]
    assert [Increment(6).at(step, 3) for step in range(5)] == [2, 4, 6, 6, 6]


def test_a_fraction_grows_once_it_is_counted() -> None:
    budget = Increment(0.29, "front", 4)
    assert budget.counted(100) == Increment(29, "front", 4)
    assert budget.counted(2) == Increment(1, "front", 4)
    assert Increment(7).counted(9) == Increment(7)
    with pytest.raises(ValueError, match=r"`Increment\(amount=0.29, .*take `counted\(n\)`"):
        budget.at(0, 10)
    with pytest.raises(ValueError, match=r"`Increment\(amount=7, .*over 6 units must lie in \[1, 6\]"):
        Increment(7).counted(6)


def test_nonsense_increments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Increment\(amount=0\)"):
        Increment(0)
    with pytest.raises(ValueError, match=r"`Increment\(form='late'\)` must be 'even' or 'front'"):
        Increment(3, "late")
    with pytest.raises(ValueError, match=r"`Increment\(finish=0\)` must be at least 1"):
        Increment(3, finish=0)
    for total in (None, 0, -1):
        with pytest.raises(ValueError, match="unknown: give `finish`"):
            Increment(3).at(0, total)


# RankEquivalent
# ------------------------------------------------------------------------------------------------------------------


def test_a_rank_asks_for_as_many_entries_as_an_adapter_has() -> None:
    assert RankEquivalent(128).quotas([(4096, 4096), (11008, 4096)]) == (1_048_576, 1_933_312)
    assert RankEquivalent(2).quotas([(8, 4, 3, 3)]) == (2 * (8 + 36),)


def test_no_tensor_is_asked_for_more_than_it_has() -> None:
    # a 3 x 5 matrix has 15 entries, a rank 2 adapter 16; vectors and single numbers train as a whole
    assert RankEquivalent(2).quotas([(3, 5), (7,), (), (0, 4)]) == (15, 7, 1, 0)


def test_llama_2_7b_at_rank_128_has_the_known_number_of_entries() -> None:
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert sum(RankEquivalent(128).quotas(layer * 32)) == 319_815_680


def test_counts_per_tensor_are_not_asked_for_as_one_amount() -> None:
    budget: Budget = RankEquivalent(4)
    with pytest.raises(RuntimeError, match=r"`RankEquivalent\(rank=4\)` fixes a count for each tensor.*quotas"):
        budget.at(0, 10)
    with pytest.raises(ValueError, match=r"`RankEquivalent\(rank=0\)` must be at least 1"):
        RankEquivalent(0)
