"""Adapter tensors side by side: those of one shape stacked, in pieces that fit a processor's cache.

What is done to every entry of every adapter is limited by memory: each piece goes through all of its operations before
the next one is looked at. An accelerator takes everything at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from apportion.adapters import Adapter

CACHE = 2**17
"""Entries of a piece on a CPU."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Tensors of several adapters that have one shape and one dimension of ranks.

    Attributes:
        params: The tensors, k of them.
        dim: The dimension along which their ranks lie.
        ranks: Which rank, counted over all adapters, each of theirs is: int64, shape (k, r).
    """

    params: tuple[nn.Parameter, ...]
    dim: int
    ranks: Tensor


def stacked(adapters: Sequence[Adapter]) -> tuple[Stack, ...]:
    """The tensors of ``adapters``, which have all their ranks in memory, by shape."""
    groups: dict[object, list[tuple[nn.Parameter, int]]] = {}
    start = 0
    for adapter in adapters:
        for p, dim in adapter.tensors():
            groups.setdefault((p.shape, dim, p.device), []).append((p, start))
        start += adapter.capacity
    found = []
    for (_, dim, _), members in groups.items():  # type: ignore[misc]
        params = tuple(p for p, _ in members)
        ranks = torch.tensor([start for _, start in members])[:, None] + torch.arange(params[0].shape[dim])
        found.append(Stack(params, dim, ranks))
    return tuple(found)


def pieces(tensors: Sequence[Tensor], chosen: Sequence[bool] | None = None) -> Iterator[slice]:
    """Runs of ``tensors``, all of one shape, that are worked on together.

    Args:
        tensors: The tensors.
        chosen: Which of them take part; None for all.

    Example:
        >>> tensors = [torch.ones(2**16)] * 5
        >>> list(pieces(tensors))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
        >>> list(pieces(tensors, [True, False, True, True, True]))
        [slice(0, 1, None), slice(2, 4, None), slice(4, 5, None)]
    """
    first = tensors[0]
    size = max(1, CACHE // max(1, first.numel())) if first.device.type == "cpu" else len(tensors)
    start = 0
    for taken, run in groupby([True] * len(tensors) if chosen is None else chosen):
        end = start + len(list(run))
        if taken:
            yield from (slice(i, min(i + size, end)) for i in range(start, end, size))
        start = end
