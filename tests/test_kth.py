"""The k-th largest of many numbers: what a sort says, whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apportion import kth
from apportion.kth import kth_largest

N = 8 * kth.SAMPLE + 12_345


def made(kind: str) -> Tensor:
    """Numbers of one kind, more of them than are sorted out at once."""
    draw = torch.rand(N, generator=torch.Generator().manual_seed(0))
    return {
        "uniform": draw,
        "heavy": (draw - 0.5).tan(),
        "sorted": draw.sort().values,
        "ties": (4 * draw).round(),
        "one value": torch.ones(N),
        "mostly one value": torch.where(draw < 0.9, 0.25, draw),
        "infinite": torch.where(draw < 0.7, -math.inf, draw),
        # What a sample sees is nothing like the rest: the guess is wrong and must be noticed.
        "hidden": torch.where(torch.arange(N) % (N // kth.SAMPLE | 1) == 0, draw, 10.0 + draw),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["uniform", "heavy", "sorted", "ties", "one value", "mostly one value", "infinite", "hidden"]
)
def test_it_is_what_a_sort_finds(kind: str) -> None:
    keys = made(kind)
    before, descending = keys.clone(), keys.sort(descending=True).values
    for k in (1, 2, 100, N // 100, N // 3, N // 2, N - N // 50, N - 1, N):
        assert kth_largest(keys, k) == descending[k - 1], k
    assert torch.equal(keys, before)


@pytest.mark.parametrize("kind", ["uniform", "heavy", "sorted", "ties", "one value", "infinite"])
def test_only_a_small_part_of_the_numbers_is_ever_moved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    topk = Tensor.topk
    monkeypatch.setattr(Tensor, "topk", lambda keys, *a, **k: sizes.append(len(keys)) or topk(keys, *a, **k))
    kth_largest(made(kind), N // 4)
    assert max(sizes, default=0) <= 8 * kth.SAMPLE
