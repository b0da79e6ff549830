"""Whole numbers from shares: totals are exact, parts get their share rounded down or up."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.shares import largest_remainder, simplest, systematic


@given(n=st.integers(1, 200), data=st.data())
def test_the_simplest_fraction_truncates_to_k_and_no_simpler_one_does(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    share = simplest(k, n)
    assert math.floor(share * n) == k
    for denominator in range(1, share.denominator):
        for numerator in range(denominator + 1):
            assert math.floor(Fraction(numerator, denominator) * n) != k


def test_a_truncated_half_is_recognised_for_every_number_of_units() -> None:
    for n in range(2, 400):
        assert simplest(n // 2, n) == Fraction(1, 2) or n == 2


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=10), data=st.data())
def test_systematic_counts_add_up_and_round_every_run_of_parts_down_or_up(
    sizes: list[int], data: st.DataObject
) -> None:
    n = sum(sizes)
    k = data.draw(st.integers(0, n))
    counts = systematic(sizes, k, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert sum(counts) == k
    share = simplest(k, max(1, n))
    for i in range(len(sizes)):
        for j in range(i + 1, len(sizes) + 1):
            target = share * sum(sizes[i:j])
            assert math.floor(target) <= sum(counts[i:j]) <= math.ceil(target)
            assert sum(counts[i:j]) <= sum(sizes[i:j])


def test_systematic_rounding_is_fair_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    totals = torch.zeros(3)
    for _ in range(3000):
        totals += torch.tensor(systematic([3, 5, 4], 3, generator))
    assert torch.allclose(totals / 3000, torch.tensor([0.75, 1.25, 1.0]), atol=0.04)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=10), data=st.data())
def test_largest_remainders_add_up_and_stay_within_the_parts(sizes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(sizes)))
    counts = largest_remainder(sizes, k)
    assert sum(counts) == k
    for size, count in zip(sizes, counts, strict=True):
        exact = Fraction(k * size, max(1, sum(sizes)))
        assert math.floor(exact) <= count <= min(size, math.ceil(exact))
