"""Random numbers as scores of ranks: the bars that every other score of ranks has to clear."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from apportion.rank_units import Triplets
from apportion.still import Still
from apportion.types import State


@dataclass(frozen=True)
class RandomRanks(Still):
    """A random number for every rank, drawn once: what is out stays out.

    Args:
        seed: Of the numbers.
    """

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "rank"

    def init(self, bound: Triplets) -> State:
        """The numbers, float64, shape (n,)."""
        generator = torch.Generator().manual_seed(self.seed)
        return {"draw": torch.rand(bound.n, generator=generator, dtype=torch.float64)}

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """The numbers."""
        return state["draw"]


@dataclass(frozen=True)
class RandomMatrices:
    """A random number for every adapter, the same for all its ranks, drawn anew after every step.

    Args:
        seed: Of the numbers.
    """

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "rank"

    def init(self, bound: Triplets) -> State:
        """How often they were drawn."""
        return {"draws": torch.zeros(1, dtype=torch.int64)}

    def due(self, step: int) -> bool:
        """After every step."""
        return step > 0

    def update(self, state: State, bound: Triplets, params: Collection[nn.Parameter] | None = None) -> State:
        """The next numbers are due."""
        state["draws"] += 1
        return state

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """The numbers, float64, shape (n,)."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + int(state["draws"]))
        drawn = torch.rand(len(bound.adapters), generator=generator, dtype=torch.float64)
        return drawn.repeat_interleave(torch.tensor([adapter.capacity for adapter in bound.adapters]))
