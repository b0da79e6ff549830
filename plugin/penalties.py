"""Penalties on selected entries: a gradient that is added to theirs before the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apportion.stores import Narrow, read


@runtime_checkable
class Penalty(Protocol):
    """Something that is added to the loss as a function of the selected entries alone."""

    def add(
        self,
        tensors: Sequence[nn.Parameter],
        stores: Sequence[Narrow],
        generator: torch.Generator,
        step: int,
        scale: float = 1.0,
    ) -> float:
        """Adds the penalty's gradient to that of the selected entries, before clipping.

        Args:
            tensors: The candidate tensors.
            stores: Their stores.
            generator: CPU generator, equal on all ranks.
            step: Optimizer steps done so far.
            scale: The loss scale in the gradients.

        Returns:
            The value of the penalty, for the log.
        """


@dataclass(frozen=True)
class Nuclear:
    """The nuclear norm of one matrix of selected entries, drawn anew each time, as a penalty.

        loss += weight ||P * M||_*;   gradient: weight (U_r V_r^T)[index],   P * M = U S V^T with r values above 0

    ``P`` is the matrix, ``M`` its mask. At rank-deficient matrices it is the subgradient of least norm: directions
    whose singular value is 0 do not count.

    Args:
        weight: Factor, at least 0; 0 computes nothing.
        every: Period in optimizer steps.
        min_side: Matrices with a shorter side are left out.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> nuclear_gradient(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))[0]
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    References:
        Hu et al., *SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation*, ICLR
        2025, https://arxiv.org/abs/2409.06633
    """

    weight: float = 5e-4
    every: int = 1
    min_side: int = 65

    def __post_init__(self) -> None:
        if not self.weight >= 0.0:
            raise ValueError(f"`Nuclear(weight={self.weight!r})` must be at least 0: it is the factor of a norm.")
        if self.every < 1 or self.min_side < 1:
            raise ValueError(f"`Nuclear(every={self.every}, min_side={self.min_side})` must both be at least 1.")

    @torch.no_grad()
    def add(
        self,
        tensors: Sequence[nn.Parameter],
        stores: Sequence[Narrow],
        generator: torch.Generator,
        step: int,
        scale: float = 1.0,
    ) -> float:
        """Adds the penalty's gradient; see `Penalty`."""
        fitting = [i for i, p in enumerate(tensors) if p.ndim == 2 and min(p.shape) >= self.min_side]
        if self.weight == 0.0 or step % self.every or not fitting:
            return 0.0
        i = fitting[int(torch.randint(len(fitting), (1,), generator=generator))]
        p, store = tensors[i], stores[i]
        if store.leaf.grad is None or not len(store.index):
            return 0.0
        masked = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        masked[store.index.long()] = read(p, store.index).float() if store.leaf is p else store.leaf.detach().float()
        gradient, norm = nuclear_gradient(masked.view(p.shape))
        part = (scale * self.weight * read(gradient, store.index)).to(store.leaf.grad.dtype)
        if store.leaf is p:
            store.leaf.grad.view(-1)[store.index.long()] += part
        else:
            store.leaf.grad += part
        return self.weight * norm


def nuclear_gradient(matrix: Tensor) -> tuple[Tensor, float]:
    """The subgradient of least norm of the nuclear norm, U_r V_r^T, and the norm. Shapes: as ``matrix``, fp32."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    real = s > s[:1] * max(matrix.shape) * torch.finfo(s.dtype).eps
    return (u * real.to(u.dtype)) @ vh, float(s.sum())
