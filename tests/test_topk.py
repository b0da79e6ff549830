"""The k best of many scores: exactly those of a sort of everything, whatever the order they come in, in O(k) memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import apportion.topk
from apportion.topk import Split, Stream, best

FEW = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -3.0, math.nan, math.inf, -math.inf])
SCORES = st.one_of(FEW, st.floats(width=32))
MODEL = st.lists(st.lists(SCORES, max_size=9), min_size=1, max_size=6)


def brute(tensors: list[Tensor], k: int, taken: dict[int, Tensor] | None = None) -> dict[int, list[int]]:
    """A sort of all scores by (finite first, score descending, tensor, index)."""
    blocked = {(i, int(j)) for i, units in (taken or {}).items() for j in units}
    units = [(i, j, float(x)) for i, scores in enumerate(tensors) for j, x in enumerate(scores)]
    units = [unit for unit in units if unit[:2] not in blocked]
    units.sort(key=lambda unit: (not math.isfinite(unit[2]), -unit[2] if math.isfinite(unit[2]) else 0.0, *unit[:2]))
    chosen: dict[int, list[int]] = {}
    for i, j, _ in sorted(units[:k]):
        chosen.setdefault(i, []).append(j)
    return chosen


def listed(chosen: dict[int, Tensor]) -> dict[int, list[int]]:
    assert all(index.dtype == torch.int64 for index in chosen.values())
    return {i: index.tolist() for i, index in chosen.items()}


@contextmanager
def small(chunk: int, sample: int) -> Iterator[None]:
    """Chunks and samples small enough for tests to cross their borders."""
    kept = apportion.topk.CHUNK, apportion.topk.SAMPLE
    apportion.topk.CHUNK, apportion.topk.SAMPLE = chunk, sample
    try:
        yield
    finally:
        apportion.topk.CHUNK, apportion.topk.SAMPLE = kept


def model(seed: int, sizes: list[int], kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "equal":
        return [torch.full((n,), 2.5) for n in sizes]
    if kind == "nan":
        return [torch.full((n,), math.nan) for n in sizes]
    if kind == "inf":
        return [torch.full((n,), math.inf) for n in sizes]
    if kind == "mixed":
        values = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, math.nan, math.inf, -math.inf])
        return [values[torch.randint(8, (n,), generator=generator)] for n in sizes]
    if kind == "periodic":  # what a sample with a stride would see one value of
        return [(torch.arange(n) % 16).float() for n in sizes]
    if kind == "sorted":
        return [torch.arange(n, dtype=torch.float32) for n in sizes]
    return [torch.randn(n, generator=generator) for n in sizes]


KINDS = ["equal", "nan", "inf", "mixed", "periodic", "sorted", "normal"]


# One tensor
# ------------------------------------------------------------------------------------------------------------------


@given(scores=st.lists(SCORES, max_size=40), k=st.integers(0, 45), chunk=st.integers(1, 50))
@settings(max_examples=200)
def test_the_k_best_of_a_tensor_are_those_of_a_sort(scores: list[float], k: int, chunk: int) -> None:
    tensor = torch.tensor(scores, dtype=torch.float32)
    with small(chunk, 2):
        found = best(tensor, k)
    assert found.dtype == torch.int64
    assert found.tolist() == brute([tensor], k).get(0, [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 50, 900, 2999, 3000])
def test_guessed_cutoffs_and_chunks_do_not_change_the_choice(kind: str, k: int) -> None:
    (scores,) = model(0, [3000], kind)
    for chunk, sample in ((64, 16), (1000, 64), (4096, 700)):
        with small(chunk, sample):
            assert best(scores, k).tolist() == brute([scores], k)[0]


def test_a_sample_that_misleads_costs_a_second_look_and_nothing_else() -> None:
    scores = torch.rand(4000)
    with small(256, 100):
        scores[:: 4000 // 100 | 1] += 100.0  # the sample sees only these
        assert best(scores, 500).tolist() == brute([scores], 500)[0]


def test_negative_zero_ties_with_zero_and_infinities_tie_with_nan() -> None:
    scores = torch.tensor([math.inf, -0.0, 0.0, math.nan, -1.0, -math.inf])
    assert [best(scores, k).tolist() for k in range(1, 7)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [0, 1, 2, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


def test_scores_are_left_as_they_were() -> None:
    scores = torch.tensor([math.inf, 1.0, math.nan, 0.0])
    before = scores.clone()
    best(scores, 2)
    Stream(2, {0: torch.tensor([1])}).push(0, scores)
    assert torch.equal(scores.nan_to_num(7.0), before.nan_to_num(7.0))


# Many tensors
# ------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), lists=MODEL)
@settings(max_examples=300)
def test_a_stream_chooses_what_a_sort_of_all_tensors_chooses_in_any_order(
    data: st.DataObject, lists: list[list[float]]
) -> None:
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in lists]
    taken = {
        i: torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(x) - 1)))), dtype=torch.int64)
        for i, x in enumerate(tensors)
        if len(x) and data.draw(st.booleans())
    }
    k = data.draw(st.integers(0, sum(map(len, tensors)) + 2))
    stream = Stream(k, taken)
    with small(data.draw(st.integers(1, 10)), 1):
        for i in data.draw(st.permutations(range(len(tensors)))):
            # A payload that says where it comes from: two numbers for each unit.
            origin = torch.stack([torch.full((len(tensors[i]),), i), torch.arange(len(tensors[i]))], 1)
            stream.push(i, tensors[i], origin)
            assert stream.held <= stream.peak <= 2 * k
    chosen, payloads = stream.chosen()
    assert listed(chosen) == brute(tensors, k, taken)
    assert list(payloads) == list(chosen)
    for i, index in chosen.items():
        assert payloads[i].tolist() == [[i, j] for j in index.tolist()]
    assert listed(stream.chosen()[0]) == listed(chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 40, 700, 2500])
@pytest.mark.parametrize(
    "order", [range(6), range(5, -1, -1), (3, 0, 5, 1, 4, 2)], ids=["forward", "backward", "mixed"]
)
def test_long_streams_agree_with_a_sort(kind: str, k: int, order: tuple[int, ...]) -> None:
    tensors = model(1, [500, 3, 800, 64, 1, 1200], kind)
    taken = {0: torch.arange(0, 500, 3), 5: torch.arange(100, 300), 3: torch.arange(64)}
    with small(128, 20):
        for blocked in ({}, taken):
            stream = Stream(k, blocked)
            for i in order:
                stream.push(i, tensors[i])
            chosen = listed(stream.chosen()[0])
            assert chosen == brute(tensors, k, blocked)
            assert sum(map(len, chosen.values())) == min(k, 2568 - sum(map(len, blocked.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_payloads_keep_their_dtype_and_their_trailing_shape(dtype: torch.dtype) -> None:
    payload = torch.arange(5 * 2 * 3).reshape(5, 2, 3).to(dtype)
    stream = Stream(2)
    stream.push(0, torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0]), payload)
    stream.push(1, torch.tensor([2.0, 0.0]))
    chosen, payloads = stream.chosen()
    assert listed(chosen) == {0: [1, 3]}
    assert payloads[0].dtype == dtype
    assert torch.equal(payloads[0], payload[[1, 3]])


def test_a_tensor_that_comes_twice_is_refused() -> None:
    stream = Stream(1)
    stream.push(0, torch.ones(2))
    with pytest.raises(ValueError, match=r"`push\(0, ...\)` came twice"):
        stream.push(0, torch.ones(2))


# Memory
# ------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_stream_holds_twice_k_candidates_and_makes_nothing_as_large_as_a_tensor(kind: str, backward: bool) -> None:
    k, n = 200, 20_000
    tensors = model(2, [n] * 4, kind)
    stream = Stream(k)
    with small(512, 128), Largest() as largest:
        for i in reversed(range(4)) if backward else range(4):
            stream.push(i, tensors[i], tensors[i])
        chosen, payloads = stream.chosen()
    assert stream.peak <= 2 * k
    assert stream.held == k
    assert largest.numel <= 2 * k + 512
    assert listed(chosen) == brute(tensors, k)
    assert {i: len(payload) for i, payload in payloads.items()} == {i: len(index) for i, index in chosen.items()}


def test_one_tensor_of_equal_scores_needs_no_buffer_of_its_size() -> None:
    scores = torch.ones(50_000)
    with small(512, 128), Largest() as largest:
        assert torch.equal(best(scores, 100), torch.arange(100))
    assert largest.numel <= 2 * 100 + 512


def test_most_tensors_pass_a_full_stream_without_a_candidate() -> None:
    first, rest = torch.arange(1000.0), [torch.arange(900.0) for _ in range(50)]
    stream = Stream(100)
    stream.push(50, first)
    for i in reversed(range(50)):
        stream.push(i, rest[i])
        stream.settle()
        assert stream.held == 100
    stream.chosen()
    assert stream.peak == 200  # the last hundred of the first two tensors, then nothing


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    calls: list[None] = []
    function = getattr(apportion.topk, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(apportion.topk, name, counted)
    return calls


def test_equal_scores_are_sorted_out_once_not_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "_top")
    stream = Stream(10)
    with small(100, 10**6):
        for i in range(20):
            stream.push(i, torch.ones(1000))
    assert listed(stream.chosen()[0]) == {0: list(range(10))}
    # Twice in the first tensor. The second one still ties with it, and from then on the bar is known.
    assert len(calls) <= 8


def test_a_guess_is_not_misled_by_the_high_scores_of_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "_scan")
    scores = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    taken = torch.arange(0, 20_000, 2)
    scores[taken] += 1.0
    stream = Stream(1000, {0: taken})
    with small(1000, 500):
        stream.push(0, scores)
    assert listed(stream.chosen()[0]) == brute([scores], 1000, {0: taken})
    assert len(calls) == 1


# Parts
# ------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), lists=MODEL)
@settings(max_examples=100)
def test_a_split_chooses_in_every_part_what_a_sort_of_the_part_chooses(
    data: st.DataObject, lists: list[list[float]]
) -> None:
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in lists]
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(tensors), max_size=len(tensors)))
    counts = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    split = Split(parts, counts)
    for i in data.draw(st.permutations(range(len(tensors)))):
        split.push(i, tensors[i], tensors[i])
    chosen, payloads = split.chosen()
    expected: dict[int, list[int]] = {}
    for part, k in enumerate(counts):
        expected |= brute([x if home == part else x[:0] for x, home in zip(tensors, parts, strict=True)], k)
    assert listed(chosen) == dict(sorted(expected.items()))
    assert all(torch.equal(payloads[i].nan_to_num(), tensors[i][chosen[i]].nan_to_num()) for i in chosen)


def test_a_part_that_is_complete_holds_no_more_than_its_count() -> None:
    split = Split([0, 0, 1], [3, 5])
    split.push(0, torch.rand(50))
    split.push(2, torch.rand(50))
    assert split.streams[1].held == 5
    split.push(1, torch.rand(50))
    assert split.streams[0].held == 3


@pytest.mark.parametrize("n", [0, 3, 8, 200, 207])
@pytest.mark.parametrize("every", [1, 5, 41, 1000])
def test_positions_in_a_mask_are_found_whether_they_are_few_or_many(n: int, every: int) -> None:
    mask = torch.arange(n, 0, -1) % every == 1 % every  # the last one is among them
    assert apportion.topk._true(mask).tolist() == [i for i in range(n) if bool(mask[i])]
