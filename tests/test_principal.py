"""Principal weights, against matrices whose low-rank part is known and against exact SVDs."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.candidates import EntryScore, Site
from apportion.entrywise import Magnitude
from apportion.principal import Principal, principal, subspace, tiles

HAND = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])


def score(weight: Tensor, memory: dict[str, Tensor] | None = None, seed: int = 0, index: int = 0, **kw: Any) -> Tensor:
    site = Site("w", index, weight, seed=seed, memory={} if memory is None else memory)
    return Principal(**{"rank": 32, **kw}).entries(site)


def top(scores: Tensor, k: int | None = None) -> Tensor:
    """The k largest, ties to the lower index; by default one in 16."""
    flat = scores.reshape(-1)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.argsort(flat, descending=True, stable=True)[: len(flat) // 16 if k is None else k]] = True
    return mask.reshape(scores.shape)


def overlap(a: Tensor, b: Tensor) -> float:
    return float((top(a) & top(b)).sum() / top(a).sum())


def spectral(m: int, n: int, seed: int, power: float = -0.35) -> Tensor:
    """A matrix with random singular vectors and singular values j^power."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return (left * torch.arange(1, k + 1).float() ** power) @ right.T


def test_the_largest_entry_of_a_matrix_need_not_be_a_principal_one() -> None:
    scores = score(HAND, rank=1, exact=True)
    assert torch.allclose(scores, torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), atol=1e-5)
    assert top(scores, 4).tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    assert top(HAND, 1).nonzero().tolist() == [[2, 2]]
    reverse = score(HAND, rank=1, exact=True, reverse=True)
    assert torch.equal(reverse, -scores)
    assert bool(top(reverse, 1)[:2, :2].any()) is False


@pytest.mark.parametrize("exact", [True, False])
def test_it_keeps_the_promises_of_the_protocol(exact: bool) -> None:
    slot = Principal(rank=2, exact=exact)
    assert isinstance(slot, EntryScore)
    assert (slot.needs, slot.grain) == ({"weight"}, "entry")
    assert pickle.loads(pickle.dumps(slot)) == slot
    for shape in ((), (9,), (9, 7), (7, 9), (8, 3, 3, 3), (1, 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            weight = torch.randn(shape).to(dtype)
            before = weight.clone()
            scores = slot.entries(Site("w", 0, weight))
            assert (scores.dtype, scores.shape) == (torch.float32, weight.shape)
            assert torch.equal(scores, slot.entries(Site("w", 0, weight.float())))
            assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(), (9,), (6, 4), (4, 6), (4, 3, 2), (1, 9)])
def test_where_there_is_nothing_to_approximate_it_is_the_magnitude(shape: tuple[int, ...]) -> None:
    site = Site("w", 0, torch.randn(shape))
    for rank in (4, 99):
        assert torch.equal(Principal(rank=rank).entries(site), Magnitude().entries(site))
    assert torch.equal(Principal(rank=4, reverse=True).entries(site), Magnitude(reverse=True).entries(site))
    assert site.memory == {}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_the_pure_function_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = spectral(*shape, seed=9, power=-1.0)
    left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (1, 5, 23):
        best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        assert torch.allclose(principal(weight, rank).double(), best, atol=1e-5)
        everything = torch.linalg.qr(torch.randn(min(shape), min(shape))).Q
        assert torch.allclose(principal(weight, rank, everything).double(), best, atol=1e-5)
        basis = subspace(weight, torch.randn(min(shape), min(2 * rank, 23)), 60)
        assert basis.shape == (min(shape), min(2 * rank, 23))
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
        if rank < 12:
            assert torch.allclose(principal(weight, rank, basis).double(), best, atol=1e-4)


def test_a_convolution_is_a_matrix_with_one_row_for_each_output() -> None:
    weight = torch.randn(40, 5, 3, 3)
    for options in ({"exact": True}, {"exact": False}):
        flat = score(weight.reshape(40, 45), rank=4, **options)
        assert torch.equal(score(weight, rank=4, **options), flat.reshape(weight.shape))
        last = weight.contiguous(memory_format=torch.channels_last)
        assert torch.equal(score(last, rank=4, **options), flat.reshape(weight.shape))


@pytest.mark.parametrize("exact", [True, False])
def test_a_transposed_matrix_has_the_transposed_mask(exact: bool) -> None:
    weight = spectral(96, 64, seed=0)
    a, b = score(weight, rank=8, exact=exact), score(weight.T, rank=8, exact=exact)
    assert torch.allclose(a.T, b, atol=1e-6)
    assert overlap(a.T.contiguous(), b.contiguous()) == 1.0


@given(seed=st.integers(0, 20), exponent=st.integers(-40, 40))
def test_masks_follow_permutations_and_forget_the_scale(seed: int, exponent: int) -> None:
    weight = spectral(32, 24, seed)
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    columns = torch.randperm(24, generator=torch.Generator().manual_seed(seed + 1))
    plain = score(weight, rank=4, exact=True)
    permuted = score(weight[rows][:, columns], rank=4, exact=True)
    assert torch.allclose(permuted, plain[rows][:, columns], atol=1e-5)
    for exact in (True, False):
        here = score(weight, rank=4, exact=exact)
        assert torch.equal(top(here), top(score(weight * 2.0**exponent, rank=4, exact=exact)))


@pytest.mark.parametrize(
    ("shape", "noise", "two", "six"),
    [
        ((512, 512), False, 0.97, 0.999),
        ((384, 1024), False, 0.97, 0.999),
        ((512, 512), True, 0.70, 0.99),
        ((1024, 384), True, 0.65, 0.99),
    ],
)
def test_the_defaults_find_the_masks_of_an_exact_svd(
    shape: tuple[int, int], noise: bool, two: float, six: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if noise else spectral(*shape, seed=1)
    best = score(weight, exact=True)
    assert overlap(score(weight), best) >= six
    assert two <= overlap(score(weight, iterations=2), best) < 0.99  # so that the bar above can be missed
    assert overlap(weight.abs(), best) < 0.7  # and so that magnitudes would not do


def test_a_refresh_goes_on_from_the_basis_of_the_last_one() -> None:
    memory: dict[str, Tensor] = {}
    weight = spectral(512, 512, seed=2)
    before = score(weight, memory)
    assert memory["basis"].shape == (512, 64)
    moved = weight + 0.05 * weight.std() * torch.randn(512, 512) * top(before)
    best = score(moved, exact=True)
    assert overlap(before, best) < 0.99  # there is something to refresh
    assert overlap(score(moved, dict(memory)), best) >= 0.999
    assert overlap(score(moved, dict(memory), warm_iterations=2), best) >= 0.999
    assert overlap(score(moved, dict(memory), warm=False, iterations=1), best) < 0.9
    cold: dict[str, Tensor] = {}
    score(weight, cold, warm=False)
    assert cold == {}


def test_a_refresh_after_a_resume_is_the_same_bit_for_bit() -> None:
    first = spectral(48, 80, seed=3)
    later = first + 0.01 * torch.randn(48, 80)
    memory: dict[str, Tensor] = {}
    score(first, memory, rank=6)
    assert memory["basis"].is_contiguous()  # so that no copy changes the order in memory, and with it the last bits
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    loaded = {name: x.clone(memory_format=torch.contiguous_format) for name, x in torch.load(file).items()}
    assert torch.equal(score(later, memory, rank=6), score(later, loaded, rank=6))
    assert torch.equal(memory["basis"], loaded["basis"])
    assert not torch.equal(score(later, rank=6), score(later, {"basis": loaded["basis"]}, rank=6))


def test_a_basis_of_other_settings_is_not_used() -> None:
    weight = spectral(48, 80, seed=3)
    memory: dict[str, Tensor] = {}
    score(weight, memory, rank=6)
    assert torch.equal(score(weight, memory, rank=5), score(weight, rank=5))
    assert memory["basis"].shape == (48, 10)


def test_the_start_follows_from_seed_and_place_alone() -> None:
    weight = spectral(64, 64, seed=4)
    options = {"rank": 8, "iterations": 1}
    first = score(weight, seed=1, index=2, **options)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(first, score(weight, seed=1, index=2, **options))
    torch.set_rng_state(state)
    assert not torch.equal(first, score(weight, seed=1, index=3, **options))
    assert not torch.equal(first, score(weight, seed=2, index=2, **options))
    score(weight, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_matrices_of_low_rank_and_of_steep_spectra_are_approximated_too() -> None:
    for rank in (3, 8, 12):  # below, at and above the rank asked for, all within the basis
        low = torch.randn(60, rank) @ torch.randn(rank, 50)
        assert torch.allclose(score(low, rank=8), score(low, rank=8, exact=True), atol=1e-3)
    assert score(torch.zeros(60, 50), rank=8).abs().max() == 0.0
    for first in (30.0, 3e3, 3e6):
        steep = spectral(128, 128, seed=5, power=0.0)
        left, _, right = torch.linalg.svd(steep)
        sizes = torch.arange(1, 129).float() ** -0.5
        sizes[:3] = first
        steep = (left * sizes) @ right
        assert overlap(score(steep, rank=16), score(steep, rank=16, exact=True)) > 0.99
        assert score(steep, rank=16).isfinite().all()


def test_filtering_keeps_small_leading_values_beside_large_ones() -> None:
    """Where eigenvalues span six decades, the largest must not drown those that are wanted as well."""
    left, sizes, right = torch.linalg.svd(spectral(512, 512, seed=6))
    sizes[:5] = 300.0 / torch.arange(1, 6)
    weight = (left * sizes) @ right
    wanted = right[:32].T
    basis = subspace(weight, torch.randn(512, 64), 4)
    missed = (wanted - basis @ (basis.T @ wanted)).square().sum() / 32
    assert float(missed) < 1e-5


def test_weights_that_are_not_finite_score_not_a_number_and_leave_no_basis() -> None:
    for bad in (math.nan, math.inf):
        weight = torch.randn(20, 30)
        weight[3, 4] = bad
        memory: dict[str, Tensor] = {}
        assert score(weight, memory, rank=4).isnan().all()
        assert memory == {}


def test_mixed_precision_around_it_changes_nothing() -> None:
    weight = spectral(64, 48, seed=7)
    for exact in (True, False):
        plain = score(weight, rank=4, exact=exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(score(weight, rank=4, exact=exact), plain)


def test_weights_that_require_a_gradient_build_no_graph() -> None:
    memory: dict[str, Tensor] = {}
    scores = score(torch.randn(30, 20, requires_grad=True), memory, rank=4)
    assert not scores.requires_grad
    assert not memory["basis"].requires_grad


def test_blocks_score_the_mean_of_their_tile_and_are_chosen_together() -> None:
    weight = spectral(32, 48, seed=8)
    plain, blocked = score(weight, rank=4, exact=True), score(weight, rank=4, exact=True, block=4)
    expected = plain.reshape(8, 4, 12, 4).mean((1, 3))
    assert torch.allclose(blocked, expected.repeat_interleave(4, 0).repeat_interleave(4, 1), atol=1e-6)
    chosen = top(blocked, 6 * 16).reshape(8, 4, 12, 4).sum((1, 3))
    assert sorted(chosen.unique().tolist()) == [0, 16]
    assert torch.equal(score(weight, rank=4, exact=True, block=1), plain)
    assert torch.equal(score(weight, rank=4, exact=True, block=4, reverse=True), -blocked)


@given(m=st.integers(1, 9), n=st.integers(1, 9), block=st.integers(1, 12))
def test_tiles_at_the_edges_hold_what_is_left(m: int, n: int, block: int) -> None:
    scores = torch.rand(m, n)
    means = tiles(scores, block)
    assert means.shape == scores.shape
    for i in range(m):
        for j in range(n):
            a, b = i // block * block, j // block * block
            assert float(means[i, j]) == pytest.approx(float(scores[a : a + block, b : b + block].mean()), rel=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [{"rank": 0}, {"oversample": 1}, {"iterations": 0}, {"warm_iterations": 0}, {"block": 0}],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, int]) -> None:
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=rf"`Principal\({name}={value}\)` must be at least"):
        Principal(**kwargs)  # type: ignore[arg-type]
