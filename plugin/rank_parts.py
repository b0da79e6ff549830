"""Sums over what belongs to each rank, of adapters that have different numbers of them in memory.

Tensors of one width stand side by side for this, so that the work is a few operations, however many matrices there are.
A rank that is in memory is told by its place: those of an adapter that are in come first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.rank_units import Triplets


def by_rank(tensors: Sequence[Tensor], dims: Sequence[int], others: Sequence[Tensor] | None = None) -> Tensor:
    """Sums of products over what belongs to each rank, in fp32.

        s_i = sum_j x_ij y_ij      y = x if there are no others

    Args:
        tensors: The tensors x.
        dims: The dimension along which the ranks of each of them lie, 0 or 1.
        others: The tensors y, of the shapes of x.

    Returns:
        One number for each rank, tensor after tensor.

    Example:
        >>> by_rank([torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[2.0], [1.0]])], [0, 1])
        tensor([5., 9., 5.])
    """
    groups: dict[object, list[int]] = {}
    for i, (x, dim) in enumerate(zip(tensors, dims, strict=True)):
        groups.setdefault((dim, x.numel() // max(1, x.shape[dim]), x.dtype, x.device), []).append(i)
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    for members in groups.values():
        dim = dims[members[0]]
        x = _side_by_side([tensors[i] for i in members], dim)
        y = x if others is None else _side_by_side([others[i] for i in members], dim)
        sums = (x * y).sum(1 - dim).split([tensors[i].shape[dim] for i in members])
        for i, part in zip(members, sums, strict=True):
            found[i] = part
    return torch.cat([part.to(found[0].device) for part in found])


def _side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """One fp32 matrix, whose rows (``dim`` 0) or columns (1) are the ranks; a product of halves may vanish."""
    flat = [t.detach().movedim(dim, 0).flatten(1) for t in tensors]  # convolutions have more dimensions
    return torch.cat(flat if dim == 0 else [t.mT for t in flat], dim).float()


def held(bound: Triplets) -> list[int]:
    """Ranks of every adapter that are in memory."""
    return [adapter.a.shape[0] for adapter in bound.adapters]


def homes(counts: Sequence[int]) -> Tensor:
    """Which adapter each rank in memory belongs to, int64.

    Example:
        >>> homes([2, 0, 1])
        tensor([0, 0, 2])
    """
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def spread(values: Tensor, bound: Triplets) -> Tensor:
    """Values of the ranks in memory at the places of their units, 0 for the others; float64, shape (n,), on the CPU."""
    counts = torch.tensor(held(bound), dtype=torch.int64)
    begins = torch.tensor(bound.starts[:-1]) - (counts.cumsum(0) - counts)
    places = torch.arange(int(counts.sum())) + begins.repeat_interleave(counts)
    found = torch.zeros(bound.n, dtype=torch.float64)
    found[places] = values.double().cpu()
    return found
