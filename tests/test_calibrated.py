"""Scores from calibrated gradients, against values computed by hand."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from apportion.calibrated import Discrepancy, Fisher, MeanGradient, TaylorChannel
from apportion.candidates import Calibration, Candidates, EntryScore, Site
from apportion.discrepancy import blend_mask, discrepancy, relative_importance
from apportion.types import Unit

W, A = torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([4.0, -3.0, 2.0, -1.0])
ALL: list[Any] = [Fisher(), Fisher(per="sample"), MeanGradient(), MeanGradient(times_weight=True), Discrepancy()]
ALL.append(TaylorChannel())


def calibrated(score: Any, weight: Tensor, grads: list[Tensor]) -> Tensor:
    """What a calibration over ``grads`` makes of ``score``."""
    mean = torch.stack([score.term(grad, weight) for grad in grads]).mean(0)
    scores: Tensor = score.entries(Site("layer.weight", 0, weight, mean))
    return scores


@pytest.mark.parametrize("score", ALL, ids=repr)
def test_scores_keep_the_promises_of_the_protocol(score: Any) -> None:
    assert isinstance(score, EntryScore)
    assert score.grain == "entry"
    assert "calibration" in score.needs
    assert pickle.loads(pickle.dumps(score)) == score
    for shape in ((), (3,), (2, 3), (2, 3, 1, 2)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            before = weight.clone(), grad.clone()
            term = score.term(grad, weight)
            assert (term.dtype, term.shape) == (torch.float32, weight.shape)
            assert torch.equal(term, score.term(grad.float(), weight.float()))  # rounded nowhere on the way
            term = term.clone().add_(term)  # a buffer that terms can be added to
            scores = score.entries(Site("w", 0, weight, term))
            assert (scores.dtype, scores.shape) == (torch.float32, weight.shape)
            assert torch.equal(weight, before[0])
            assert torch.equal(grad, before[1])


def test_terms_can_be_added_to_in_place() -> None:
    term = TaylorChannel().term(torch.ones(2, 3), torch.ones(2, 3))
    assert term.add_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("score", ALL, ids=repr)
def test_a_score_that_was_not_calibrated_says_so(score: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{type(score).__name__}\(.*`layer\.weight` has none: calibrate first"):
        score.entries(Site("layer.weight", 0, torch.zeros(2)))


@pytest.mark.parametrize("kind", [Fisher, MeanGradient, Discrepancy, TaylorChannel])
def test_calibrations_are_what_was_asked_for_and_errors_quote_the_call(kind: Any) -> None:
    assert kind().calibration == Calibration(batches=16, per="batch", mode="eval")
    assert kind(batches=3, mode="train").calibration == Calibration(batches=3, per="batch", mode="train")
    with pytest.raises(ValueError, match=rf"`{kind.__name__}\(batches=0\)`"):
        kind(batches=0)
    with pytest.raises(ValueError, match=rf"`{kind.__name__}\(mode='test'\)`"):
        kind(mode="test")


def test_fisher_by_sample_is_not_fisher_by_batch() -> None:
    weight, ones = torch.zeros(1), torch.ones(1)
    assert Fisher(per="sample").calibration.per == "sample"
    assert calibrated(Fisher(per="sample"), weight, [ones, 3 * ones]).item() == 5.0
    assert calibrated(Fisher(per="batch"), weight, [2 * ones]).item() == 4.0
    with pytest.raises(ValueError, match=r"`Fisher\(per='token'\)`"):
        Fisher(per="token")


def test_fisher_ignores_the_sign_of_the_loss_and_squares_its_scale() -> None:
    weight, grads = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(5)]
    plain = calibrated(Fisher(), weight, grads)
    assert torch.equal(calibrated(Fisher(), weight, [-g for g in grads]), plain)
    assert torch.allclose(calibrated(Fisher(), weight, [3 * g for g in grads]), 9 * plain)
    assert torch.allclose(plain, torch.stack(grads).square().mean(0))


def test_mean_gradients_cancel_before_their_size_is_taken() -> None:
    weight, grads = torch.tensor([2.0, -3.0]), [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -3.0])]
    assert calibrated(MeanGradient(), weight, grads).tolist() == [0.0, 1.0]
    assert calibrated(MeanGradient(times_weight=True), weight, grads).tolist() == [0.0, 3.0]


def test_channels_sum_over_tokens_before_and_over_batches_after_the_absolute_value() -> None:
    identity = torch.eye(2)
    x, outer = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    candidates = Candidates((Unit("w", {"w": nn.Parameter(identity)}, nn.Identity()),), pool="sum")
    once = calibrated(TaylorChannel(), identity, [outer.T @ x])
    assert candidates.pooled(0, once).tolist() == [4.0, 2.0]
    twice = calibrated(TaylorChannel(), identity, [outer.T @ x, -outer.T @ x])
    assert candidates.pooled(0, twice).tolist() == [4.0, 2.0]  # the sign of a batch does not cancel another's
    assert once[0, 0] == once[0, 1]


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(3, 4, 2), nn.LayerNorm(6)], ids=repr)
def test_channel_scores_pool_to_the_effect_of_each_row_in_every_shape(layer: nn.Module) -> None:
    weight: Any = layer.weight
    grads = [torch.randn_like(weight) for _ in range(3)]
    rows = weight.shape[0]
    effects = torch.stack([(g * weight).detach().reshape(rows, -1).sum(1).abs() for g in grads]).mean(0)
    candidates = Candidates((Unit("w", {"w": weight}, layer),), pool="sum")
    pooled = candidates.pooled(0, calibrated(TaylorChannel(), weight.detach(), grads))
    assert torch.allclose(pooled, effects, rtol=1e-5)


def test_relative_importance_of_a_hand_computed_example() -> None:
    assert relative_importance(W).tolist() == pytest.approx([0.2383, 0.4044, 0.5956, 0.7617], abs=5e-5)
    assert relative_importance(W.reshape(2, 2)).reshape(-1).tolist() == relative_importance(W).tolist()


@given(values=st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=20))
def test_relative_importance_is_finite_ordered_and_blind_to_sign(values: list[float]) -> None:
    x = torch.tensor(values)
    r = relative_importance(x)
    assert bool(((r >= 0) & (r <= 1)).all())
    assert torch.equal(r, relative_importance(-x))
    order = torch.argsort(x.abs(), stable=True)
    assert bool((r[order].diff() >= 0).all())


def test_relative_importance_where_nothing_stands_out() -> None:
    assert relative_importance(torch.zeros(3)).tolist() == [0.0] * 3
    for flat in (torch.ones(5), torch.full((7,), 0.1), torch.tensor([1.0, -1.0]), torch.tensor([-3.0])):
        assert relative_importance(flat).tolist() == [0.5] * len(flat)
    assert relative_importance(torch.tensor(3.0)).shape == ()
    assert relative_importance(torch.empty(0)).shape == (0,)
    assert relative_importance(torch.tensor([1.0, math.nan])).isnan().all()
    assert relative_importance(torch.tensor([1.0, math.inf])).isnan().all()
    assert relative_importance(torch.tensor([math.inf, -math.inf])).isnan().all()


def test_the_scale_of_small_and_large_tensors_plays_no_part() -> None:
    x = torch.randn(1000)
    for scale in (1e-30, 1e-12, 1e12, 1e30):  # squares of these are beyond fp32
        assert torch.allclose(relative_importance(x * scale), relative_importance(x), atol=1e-5)


def test_discrepancy_and_blend_of_a_hand_computed_example() -> None:
    assert discrepancy(W, A).tolist() == pytest.approx([0.7617, 0.5956, 0.0, 0.0], abs=5e-5)
    assert blend_mask(W, A).tolist() == pytest.approx([1.0, 0.8776, 0.0, 0.0], abs=1.1e-4)
    assert blend_mask(W, A)[0] == 1.0  # exactly: the optimizer's result stays as it is
    assert torch.allclose(blend_mask(W, 7.3 * A), blend_mask(W, A), rtol=1e-5)
    assert torch.equal(blend_mask(W, -4 * A), blend_mask(W, A))


def test_nothing_is_blended_in_where_the_task_asks_for_nothing() -> None:
    assert blend_mask(W, torch.zeros(4)).tolist() == [0.0] * 4
    assert discrepancy(W, W).tolist() == [0.0] * 4
    assert blend_mask(torch.zeros(4), torch.zeros(4)).tolist() == [0.0] * 4
    assert discrepancy(torch.zeros(1), torch.ones(1)).tolist() == [1.0]  # not relied on, asked for
    assert discrepancy(torch.ones(1), torch.ones(1)).tolist() == [0.0]
    norm = discrepancy(torch.ones(4), A)  # a fresh norm relies on all of its entries alike
    assert [v > 0 for v in norm.tolist()] == [True, True, False, False]


def test_discrepancies_that_are_not_zero_lie_above_one_half() -> None:
    raw = discrepancy(torch.randn(100_000), torch.randn(100_000))
    assert float(raw[raw > 0].min()) > 0.5
    assert float(raw.max()) <= 1.0
    assert float((raw > 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    mask = blend_mask(torch.randn(100_000), torch.randn(100_000))
    assert float((mask == 1).float().mean()) == pytest.approx(0.229, abs=0.01)
    assert float(mask[mask > 0].min()) == pytest.approx(0.81, abs=0.01)


def test_discrepancy_of_broken_tensors_is_not_a_number() -> None:
    assert discrepancy(W, torch.tensor([1.0, math.nan, 1.0, 2.0])).isnan().all()
    assert discrepancy(torch.tensor([1.0, math.inf, 1.0, 2.0]), A).isnan().all()


def test_the_slot_scores_the_mean_of_signed_gradients() -> None:
    grads = [A + 1, A - 1]
    assert torch.allclose(calibrated(Discrepancy(), W, grads), discrepancy(W, A))
    assert calibrated(Discrepancy(), W, [A, -A]).tolist() == [0.0] * 4
