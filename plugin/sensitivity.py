"""Sensitivity: how much the loss would change without a weight, smoothed over steps, pooled to ranks.

All tensors of the adapters go through the same few operations at once; nothing here loops over matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.rank_stacks import pieces
from apportion.rank_units import Triplets
from apportion.types import State


@dataclass(frozen=True)
class Sensitivity:
    """Smoothed sensitivity times its uncertainty, of ranks.

        I_t = |w g|;   I = b1 I + (1 - b1) I_t;   U = b2 U + (1 - b2) |I_t - I|;   s = I U
        score_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

    The gradient is the one that the step was taken with, the weight the one that it led to. Means make the width of a
    layer irrelevant. A steady sensitivity loses: s measures its size and how much it varies. fp32 throughout.

    Args:
        beta1: Decay of the mean, in (0, 1).
        beta2: Decay of the uncertainty, in (0, 1).
        uncertainty: Whether the uncertainty is a factor; without it s = I.

    Raises:
        ValueError: If a decay is out of its range.

    References:
        Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, ICLR 2023,
        https://arxiv.org/abs/2303.10512
    """

    beta1: float = 0.85
    beta2: float = 0.85
    uncertainty: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        for key in ("beta1", "beta2"):
            if not 0.0 < getattr(self, key) < 1.0:
                raise ValueError(f"`Sensitivity({key}={getattr(self, key)!r})` must lie in (0, 1): it is a decay.")

    def init(self, bound: Triplets) -> State:
        """Averages of zero, in the shapes of the tensors."""
        keys = ("mean", "doubt") if self.uncertainty else ("mean",)
        return {
            f"{key}.{i}": torch.zeros(
                (len(stack.params), *stack.params[0].shape), dtype=torch.float32, device=stack.params[0].device
            )
            for i, stack in enumerate(bound.stacks)
            for key in keys
        }

    def due(self, step: int) -> bool:
        """After every step."""
        return step > 0

    @torch.no_grad()
    def update(self, state: State, bound: Triplets, params: Collection[nn.Parameter] | None = None) -> State:
        """The averages, moved in place by one more gradient; tensors without one keep theirs."""
        for i, stack in enumerate(bound.stacks):
            mean, doubt = state[f"mean.{i}"], state.get(f"doubt.{i}")
            live = [p.grad is not None and (params is None or p in params) for p in stack.params]
            for piece in pieces(stack.params, live):
                self._move(stack.params[piece], mean[piece], None if doubt is None else doubt[piece])
        return state

    def _move(self, params: Sequence[nn.Parameter], mean: Tensor, doubt: Tensor | None) -> None:
        """Moves averages, shape (k, ...), by the gradients of k tensors."""
        grads: Any = [p.grad for p in params]
        now = torch.stack(list(params)).float()  # a product of half-precision numbers may vanish
        now.mul_(torch.stack(grads)).abs_()
        mean.lerp_(now, 1.0 - self.beta1)
        if doubt is not None:
            doubt.lerp_(now.sub_(mean).abs_(), 1.0 - self.beta2)

    @torch.no_grad()
    def scores(self, state: State, bound: Triplets) -> Tensor:
        """Importance of every rank, float64, shape (n,), on the CPU."""
        pooled = []
        for i, stack in enumerate(bound.stacks):
            mean = state[f"mean.{i}"]
            doubt = state[f"doubt.{i}"] if self.uncertainty else None
            parts = [pool(mean[p] if doubt is None else mean[p] * doubt[p], stack.dim) for p in pieces(stack.params)]
            pooled.append(torch.cat(parts))
        return added(pooled, bound)


def pool(entries: Tensor, dim: int) -> Tensor:
    """Means over what belongs to one rank.

    Args:
        entries: Scores of entries of k tensors, shape (k, ...).
        dim: The dimension of one tensor along which its ranks lie.

    Returns:
        Shape (k, r).
    """
    others = [d for d in range(1, entries.ndim) if d != dim + 1]
    return entries.mean(others)


def added(pooled: Sequence[Tensor], bound: Triplets) -> Tensor:
    """The sum of what the tensors of an adapter say about its ranks.

    Args:
        pooled: For each of ``bound.stacks``, shape (k, r).
        bound: The ranks.

    Returns:
        float64, shape (n,), on the CPU.
    """
    scores = torch.zeros(bound.n, dtype=torch.float64)
    for part, stack in zip(pooled, bound.stacks, strict=True):
        scores.index_add_(0, stack.ranks.flatten(), part.double().cpu().flatten())
    return scores
