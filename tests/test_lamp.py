"""Shares of what is at least as important in the same tensor."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.calibrated import Fisher
from apportion.candidates import Calibration, EntryScore, Site
from apportion.entrywise import D3, GradientMagnitude, Magnitude, Taylor
from apportion.lamp import Lamp, lamp
from apportion.scores import WeightNorm

SCORES = st.lists(st.floats(0, 100, width=32).filter(lambda x: x == 0 or x > 1e-3), min_size=1, max_size=30)


def by_definition(scores: list[float], power: float = 2.0) -> list[float]:
    shares = []
    for u in scores:
        total = math.fsum(v**power for v in scores if v >= u)
        shares.append(u**power / total if u > 0 else 0.0)
    return shares


def test_the_shares_of_hand_computed_examples() -> None:
    assert lamp(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([1 / 14, 4 / 13, 1.0])
    assert lamp(torch.tensor([0.1, 0.2])).tolist() == pytest.approx([0.2, 1.0])
    assert lamp(torch.tensor([1.0, 2.0, 3.0]), power=1.0).tolist() == pytest.approx([1 / 6, 2 / 5, 1.0])


@given(scores=SCORES, power=st.sampled_from([1.0, 2.0]))
def test_shares_follow_the_definition_with_ties_included(scores: list[float], power: float) -> None:
    scores = torch.tensor(scores).tolist()
    assert lamp(torch.tensor(scores), power).tolist() == pytest.approx(by_definition(scores, power), rel=1e-6)


@given(scores=SCORES)
def test_the_order_inside_a_tensor_stays(scores: list[float]) -> None:
    before = torch.tensor(scores)
    after = lamp(before)
    assert torch.equal(torch.argsort(-before, stable=True), torch.argsort(-after, stable=True))


def test_neighbours_in_fp32_keep_their_order() -> None:
    scores = [torch.tensor(1.9)]
    for _ in range(200):
        scores.append(torch.nextafter(scores[-1], torch.tensor(3.0)))
    shares = lamp(torch.stack(scores))
    assert bool((shares.diff() > 0).all())


def test_the_largest_entry_scores_exactly_one_unless_another_equals_it() -> None:
    for n in (1, 2, 7, 1000):
        assert float(lamp(torch.rand(n).unique()).max()) == 1.0
    assert lamp(torch.tensor([3.0, 3.0, 3.0])).tolist() == pytest.approx([1 / 3] * 3)
    assert lamp(torch.tensor([3.0, 1.0, 3.0])).tolist() == pytest.approx([0.5, 1 / 19, 0.5])


def test_the_scale_of_a_tensor_plays_no_part() -> None:
    scores = torch.rand(6, 50)
    for scale in (2.0**-70, 2.0**100):  # squares of these are beyond fp32
        assert torch.equal(lamp(scores * scale), lamp(scores))
    assert torch.allclose(lamp(scores * 0.37), lamp(scores), rtol=1e-6)


def test_zeros_nonfinite_values_shapes_and_precisions() -> None:
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp(torch.tensor(2.0)).shape == ()
    assert lamp(torch.empty(0)).shape == (0,)
    mixed = lamp(torch.tensor([[1.0, math.nan, 2.0], [math.inf, 3.0, 0.0]]))
    expected = [[1 / 14, math.nan, 4 / 13], [math.nan, 1.0, 0.0]]
    assert torch.allclose(mixed, torch.tensor(expected), equal_nan=True)
    half = torch.rand(4, 5).bfloat16()
    assert lamp(half).dtype == torch.float32
    assert torch.equal(lamp(half), lamp(half.float()))
    assert torch.equal(lamp(half.T), lamp(half.T.contiguous()))


def test_sums_over_many_entries_keep_their_digits() -> None:
    scores = torch.full((2_000_000,), 1e-3)
    scores[0] = 100.0
    assert float(lamp(scores)[1]) == pytest.approx(1e-6 / (1e4 + 1.999999), rel=1e-6)


@pytest.mark.parametrize("score", [Taylor(), Magnitude(reverse=True)], ids=repr)
def test_signed_scores_are_refused_where_squares_would_turn_them_round(score: EntryScore) -> None:
    site = Site("w", 0, torch.tensor([1.0, -2.0]), torch.ones(2))
    with pytest.raises(ValueError, match=r"`lamp` met a score of -[12]"):
        Lamp(of=score).entries(site)


def test_it_needs_what_the_score_needs_that_it_normalises() -> None:
    plain: EntryScore = Lamp()
    assert isinstance(plain, EntryScore)
    assert plain.needs == Magnitude.needs
    assert Lamp(of=D3()).needs == {"weight", "grad"}
    assert replace(Lamp(of=D3()), of=GradientMagnitude()).needs == {"grad"}
    assert Lamp.needs == {"weight"}  # one instance changes nothing for another
    assert pickle.loads(pickle.dumps(Lamp(of=D3()))) == Lamp(of=D3())
    assert pickle.loads(pickle.dumps(Lamp(of=D3()))).needs == {"weight", "grad"}
    assert not hasattr(Lamp(), "calibration")
    site = Site("w", 0, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    assert torch.equal(Lamp(of=GradientMagnitude()).entries(site), lamp(torch.tensor([3.0, 1.0])))


def test_a_calibrated_score_stays_calibrated() -> None:
    score = Lamp(of=Fisher(batches=3, per="sample"), power=1.0)
    assert score.needs == {"calibration"}
    assert score.calibration == Calibration(batches=3, per="sample")
    grad = torch.tensor([1.0, -2.0])
    assert torch.equal(score.term(grad, grad), torch.tensor([1.0, 4.0]))
    assert score.entries(Site("w", 0, grad, torch.tensor([1.0, 4.0]))).tolist() == pytest.approx([0.2, 1.0])


def test_arguments_out_of_range_are_refused() -> None:
    layers: Any = WeightNorm()
    with pytest.raises(ValueError, match=r"`Lamp\(of=WeightNorm\(.*\)` must be a score of entries"):
        Lamp(of=layers)
    for power in (0.0, -1.0, 5.0, math.nan):
        with pytest.raises(ValueError, match=r"`Lamp\(power="):
            Lamp(power=power)
