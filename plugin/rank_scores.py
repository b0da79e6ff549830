"""Scores of ranks from what they are now: how large, and how strongly the loss pulls at them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.rank_parts import by_rank, spread
from apportion.rank_units import Triplets
from apportion.still import Still
from apportion.types import State


@torch.no_grad()
def magnitudes(bound: Triplets) -> Tensor:
    """How large the part of the update is that each rank in memory makes, fp32.

    SVD form        |E_i|
    LoRA and DoRA   ||B_i|| ||A_i||      the norm of B_i A_i; that of c B_i A_i is c times as large
    """
    adapters = bound.adapters
    values = [adapter.e for adapter in adapters if adapter.e is not None]
    if values:
        return torch.cat([value.detach().flatten() for value in values]).float().abs()
    rows = by_rank([adapter.a for adapter in adapters], [0] * len(adapters))
    columns = by_rank([adapter.b for adapter in adapters], [1] * len(adapters))
    return rows.mul_(columns).sqrt_()


@dataclass(frozen=True)
class RankMagnitude(Still):
    """How large the part of the update is that a rank makes; the steps play no part.

        score_i = |E_i|                 in the SVD form
        score_i = ||B_i|| ||A_i||       in LoRA and DoRA

    Ranks that are not in memory score 0.

    Example:
        >>> RankMagnitude()
        RankMagnitude()
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    grain: ClassVar[str] = "rank"

    def init(self, bound: Triplets) -> State:
        """Nothing to remember."""
        del bound
        return {}

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """Importance of every rank, float64, shape (n,), on the CPU."""
        del state
        return spread(magnitudes(bound), bound)


@dataclass(frozen=True)
class RankGradient:
    """The norm of the gradient of what belongs to a rank, averaged over steps.

        g_i = sqrt(||dL/dA_i||^2 + (dL/dE_i)^2 + ||dL/dB_i||^2)         without E in LoRA and DoRA
        score_i <- beta score_i + (1 - beta) g_i,      from 0

    Args:
        beta: Decay of the average, in [0, 1); 0 takes the last step alone.

    Raises:
        ValueError: If ``beta`` is out of its range.

    Example:
        >>> RankGradient(beta=0.0)
        RankGradient(beta=0.0)
    """

    beta: float = 0.85

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"`RankGradient(beta={self.beta!r})` must lie in [0, 1): it is a decay.")

    def init(self, bound: Triplets) -> State:
        """Averages of zero, fp32, shape (n,)."""
        return {"mean": torch.zeros(bound.n, dtype=torch.float32, device=bound.adapters[0].a.device)}

    def due(self, step: int) -> bool:
        """After every step."""
        return step > 0

    @torch.no_grad()
    def update(self, state: State, bound: Triplets, params: Collection[nn.Parameter] | None = None) -> State:
        """The averages, moved by one more gradient; ranks of adapters without one keep theirs."""
        parts = [list(adapter.tensors()) for adapter in bound.adapters]
        live = [all(p.grad is not None and (params is None or p in params) for p, _ in part) for part in parts]
        if not any(live):
            return state
        squares: Any = 0
        for kind in range(len(parts[0])):  # A, E and B
            mine = [part[kind] for part, lives in zip(parts, live, strict=True) if lives]
            grads: Any = [p.grad for p, _ in mine]
            squares = squares + by_rank(grads, [dim for _, dim in mine])
        moved = torch.tensor(live).repeat_interleave(torch.tensor([a.capacity for a in bound.adapters]))
        mean = state["mean"]
        place = moved.nonzero().flatten().to(mean.device)
        mean[place] = mean[place].lerp(squares.sqrt(), 1.0 - self.beta)
        return state

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """Importance of every rank, float64, shape (n,), on the CPU."""
        del bound
        return state["mean"].double().cpu()
