"""Selected entries of a gradient as one dot product for each: where few are selected, the CPU is done with them sooner.

    (gy^T x)_ij = sum over t of gy_ti x_tj        for the selected (i, j) alone

The sum goes over a few hundred tokens at a time, so that what is multiplied stays in the cache. It adds up in another
order than a dense product, with differences in the last digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHUNK = 256
"""Tokens at a time."""

LEAST = 2**18
"""Entries of the smallest matrix for which it pays: below, calls cost more than what they save."""

MOST = 1 / 8
"""The largest share of selected entries for which it pays: at this one it takes two thirds of the dense product."""


@dataclass(frozen=True, eq=False)
class Dots:
    """Where the selected entries of a matrix lie, in compressed rows.

    Attributes:
        index: Sorted flat indices of the selected entries, shape (k,).
        shape: Of the matrix.
        starts: Where the entries of each row begin, and where the last one's end; shape (height + 1,).

    Example:
        >>> dots = Dots.of(torch.tensor([1, 2]), (2, 2))
        >>> gy, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 1.0], [1.0, 0.0]])
        >>> dots.take(gy, x)  # of [[13, 1], [24, 2]]
        tensor([ 1., 24.])
    """

    index: Tensor
    shape: tuple[int, int]
    starts: Tensor

    @classmethod
    def of(cls, index: Tensor, shape: Sequence[int]) -> Dots:
        """The layout of ``index`` in a matrix of ``shape``."""
        height, width = shape
        edges = torch.arange(height, dtype=index.dtype, device=index.device) * width
        starts = torch.searchsorted(index, edges, out_int32=index.dtype == torch.int32)
        return cls(index, (height, width), torch.cat([starts, starts.new_tensor([len(index)])]))

    def take(self, gy: Tensor, x: Tensor) -> Tensor:
        """The selected entries of ``gy^T x``; see `apportion.tiled.Tiles.take`."""
        columns = self.index % self.shape[1]
        sums = torch.sparse_csr_tensor(
            self.starts, columns, gy.new_zeros(len(self.index)), self.shape, check_invariants=False
        )
        for t in range(0, len(gy), CHUNK):
            sums = torch.sparse.sampled_addmm(sums, gy[t : t + CHUNK].t(), x[t : t + CHUNK])
        return sums.values()


def possible(index: Tensor, dtype: torch.dtype) -> bool:
    """Whether entries at ``index`` of gradients of this precision can be had so: on the CPU, in fp32 or fp64."""
    right = index.device.type == "cpu" and dtype in (torch.float32, torch.float64)
    return right and not isinstance(index, FakeTensor) and _works()


def pays(index: Tensor, size: int) -> bool:
    """Whether it is faster, for ``index`` of a matrix of ``size`` entries, than the dense product."""
    return size >= LEAST and len(index) <= MOST * size


@cache
def _works() -> bool:
    """Whether this build of torch can; that sparse tensors are in beta it says here, unheard, and then no more."""
    eye = torch.eye(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.equal(Dots.of(torch.tensor([0, 1, 3]), (2, 2)).take(eye, eye), torch.tensor([1.0, 0.0, 1.0]))
        except RuntimeError:
            return False
