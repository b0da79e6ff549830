"""Scores from one weight and one gradient, against values computed by hand."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.candidates import Candidates, EntryScore, Site
from apportion.entrywise import D3, GradientMagnitude, Magnitude, RandomEntries, Snip, Taylor, stream, wagle
from apportion.types import Unit

WEIGHT = torch.tensor([0.5, -0.1, 0.0, 2.0])
GRAD = torch.tensor([0.1, -0.2, 0.05, -0.4])
ALL: list[EntryScore] = [
    Magnitude(),
    Magnitude(reverse=True),
    GradientMagnitude(),
    D3(),
    D3(exp=-1.0, eps=0.0),
    Snip(),
    Taylor(),
    RandomEntries(),
    RandomEntries(redraw=True),
]


def site(weight: Tensor = WEIGHT, grad: Tensor | None = GRAD, **options: Any) -> Site:
    return Site("layer.weight", options.pop("index", 0), weight, grad, **options)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (Magnitude(), [0.5, 0.1, 0.0, 2.0]),
        (Magnitude(reverse=True), [-0.5, -0.1, 0.0, -2.0]),
        (GradientMagnitude(), [0.1, 0.2, 0.05, 0.4]),
        (Snip(), [0.05, 0.02, 0.0, 0.8]),
        (Taylor(), [0.05, 0.02, 0.0, -0.8]),
        (D3(exp=0.0, eps=0.1), [0.1, 0.2, 0.05, 0.4]),
        (D3(exp=1.0, eps=0.1), [0.1 / 0.6, 1.0, 0.5, 0.4 / 2.1]),
        (D3(exp=2.0, eps=0.1), [0.1 / 0.36, 5.0, 5.0, 0.4 / 4.41]),
        (D3(exp=-1.0, eps=0.1), [0.06, 0.04, 0.005, 0.84]),
        (D3(exp=-1.0, eps=0.0), [0.05, 0.02, 0.0, 0.8]),
    ],
    ids=repr,
)
def test_scores_are_what_the_formulas_say(score: EntryScore, expected: list[float]) -> None:
    assert score.entries(site()).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("score", ALL, ids=repr)
def test_scores_keep_the_promises_of_the_protocol(score: EntryScore) -> None:
    assert isinstance(score, EntryScore)
    assert getattr(score, "grain", None) == "entry"
    assert score.needs <= {"weight", "grad"}
    assert pickle.loads(pickle.dumps(score)) == score
    for shape in ((), (3,), (2, 3), (2, 3, 1, 2)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            before = weight.clone(), grad.clone()
            scores = score.entries(site(weight, grad))
            assert scores.dtype == torch.float32
            assert scores.shape == weight.shape
            assert torch.equal(weight, before[0])  # scoring changes nothing
            assert torch.equal(grad, before[1])
            wide = score.entries(site(weight.float(), grad.float()))
            assert torch.equal(scores, wide)  # computed in full precision, not rounded on the way


@pytest.mark.parametrize("score", ALL, ids=repr)
def test_scores_belong_to_places_and_not_to_the_order_in_memory(score: EntryScore) -> None:
    weight, grad = torch.randn(4, 6), torch.randn(4, 6)
    turned = score.entries(site(weight.T.contiguous().T, grad))
    assert torch.equal(turned.reshape(-1), score.entries(site(weight, grad)).reshape(-1))


@pytest.mark.parametrize("score", [s for s in ALL if "grad" in s.needs], ids=repr)
def test_a_score_without_its_gradient_says_which_tensor_has_none(score: EntryScore) -> None:
    with pytest.raises(ValueError, match=r"`(GradientMagnitude|D3|Snip|Taylor)\(.*\)`.*`layer\.weight` has none"):
        score.entries(site(grad=None))


@pytest.mark.parametrize("score", [s for s in ALL if "grad" not in s.needs], ids=repr)
def test_other_scores_need_no_gradient(score: EntryScore) -> None:
    assert score.entries(site(grad=None)).shape == WEIGHT.shape


def test_nonfinite_gradients_give_nonfinite_scores_and_leave_the_others_alone() -> None:
    grad = torch.tensor([math.nan, math.inf, 1.0, 1.0])
    for score in (GradientMagnitude(), D3(), Snip()):
        scores = score.entries(site(torch.ones(4), grad))
        assert scores.isfinite().tolist() == [False, False, True, True]


def test_exponents_and_offsets_that_fp32_cannot_hold_are_refused() -> None:
    for exp in (9.0, -9.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`D3\(exp=.*\)` must lie in \[-8, 8\]"):
            D3(exp=exp)
    for eps in (-1e-3, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"`D3\(eps=.*\)` must be at least 0 and finite"):
            D3(eps=eps)
    for exp, eps in ((1.0, 0.0), (1e-9, 0.0), (4.0, 1e-8)):
        with pytest.raises(ValueError, match=rf"`D3\(exp={exp!r}, eps={eps!r}\)`.*raise `eps`"):
            D3(exp=exp, eps=eps)
    for exp, eps in ((2.0, 1e-8), (8.0, 1e-3), (0.0, 0.0), (-8.0, 0.0)):
        assert D3(exp=exp, eps=eps).entries(site(torch.zeros(1), torch.ones(1))).isfinite().all()


def test_row_sums_of_the_signed_score_are_the_effects_of_output_channels() -> None:
    linear = nn.Linear(5, 3)
    x = torch.randn(7, 5)
    outputs = linear(x)
    outputs.retain_grad()
    outputs.square().sin().sum().backward()
    assert outputs.grad is not None
    effects = ((outputs - linear.bias) * outputs.grad).sum(0).abs()
    unit = Unit("linear", {"linear.weight": nn.Parameter(linear.weight.detach())}, linear)
    scores = Taylor().entries(site(linear.weight.detach(), linear.weight.grad))
    assert torch.allclose(Candidates((unit,), pool="abs_sum").pooled(0, scores), effects, rtol=1e-4)
    assert not torch.allclose(scores.abs().sum(1), effects, rtol=0.1)  # the sign matters


def test_random_scores_follow_from_seed_and_place_alone() -> None:
    score, weight = RandomEntries(), torch.zeros(20, 30)
    first = score.entries(site(weight, index=3, seed=7))
    torch.manual_seed(99)
    score.entries(site(torch.zeros(11), index=0, seed=7))  # neither the global generator nor other tensors matter
    again = score.entries(site(torch.ones(20, 30), index=3, seed=7, step=50))
    assert torch.equal(first, again)
    assert not torch.equal(first, score.entries(site(weight, index=4, seed=7)))
    assert not torch.equal(first, score.entries(site(weight, index=3, seed=8)))
    # Neither sum nor concatenation of seed and place decides: (1, 11) and (11, 1), (0, 1) and (1, 0) differ.
    keys = [(1, 11), (11, 1), (0, 1), (1, 0), (2, 10), (111, 0)]
    draws = {float(score.entries(site(weight, index=i, seed=s))[0, 0]) for s, i in keys}
    assert len(draws) == len(keys)


def test_a_redraw_is_new_at_every_step_and_repeatable() -> None:
    score, weight = RandomEntries(redraw=True), torch.zeros(20)
    draws = [score.entries(site(weight, step=step)) for step in (0, 1, 0)]
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_random_scores_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    RandomEntries().entries(site())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_scores_are_uniform() -> None:
    scores = RandomEntries().entries(site(torch.zeros(100_000)))
    assert 0.0 <= float(scores.min()) <= float(scores.max()) < 1.0
    counts = torch.histc(scores, bins=10, min=0, max=1)
    assert float((counts - 10_000).square().sum() / 10_000) < 33.7  # chi-squared, 9 degrees, 1e-4
    assert scores.unique().numel() > 99_000  # few ties


def test_streams_differ_by_seed_place_and_keys() -> None:
    sites = [site(seed=s, index=i) for s in range(4) for i in range(4)]
    seeds = [stream(s, *keys).initial_seed() for s in sites for keys in ((), (0,), (1,), (0, 1))]
    assert len(set(seeds)) == len(seeds)
    assert stream(sites[3], 5).initial_seed() == stream(sites[3], 5).initial_seed()


def test_the_two_sets_attribution_is_what_its_formula_says() -> None:
    weight, forget, retain = torch.tensor([[2.0, -1.0, 0.5], [1.0, 2.0, -4.0], [0.5, 0.0, 1.0]])
    assert wagle(weight, forget, retain, 1.0).tolist() == [1.5, 2.0, 2.0]
    assert wagle(weight, forget, retain, 1e-6).tolist() == pytest.approx([5e5, 2.0, 4e6], rel=1e-5)


def test_the_two_sets_attribution_at_its_limits() -> None:
    weight, forget, retain = torch.randn(3, 50)
    forget[:5] = 0.0
    assert wagle(weight, forget, retain, 0.5)[:5].tolist() == [0.0] * 5
    assert torch.equal(wagle(weight, forget, torch.zeros(50), 0.5), Snip().entries(site(weight, forget)))
    assert not torch.allclose(wagle(weight, forget, retain, 0.5), wagle(weight, retain, forget, 0.5))
    for mu in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"`wagle\(mu="):
            wagle(weight, forget, retain, mu)
