"""The k-th largest of very many numbers, without sorting them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE = 2**15
"""Numbers that the first guess is made from."""


def kth_largest(keys: Tensor, k: int) -> Tensor:
    """The value of the ``k``-th largest of some numbers, exactly.

    `torch.topk` moves all numbers about on the CPU. Here a sample tells between which two values the k-th lies, very
    likely; one pass counts what is above them, and only what is between them is looked at further.

    Args:
        keys: fp32 without NaN, shape (n,); minus infinity is a number here.
        k: From 1 to n.

    Returns:
        A scalar tensor.

    Example:
        >>> kth_largest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3)
        tensor(2.)

    References:
        Floyd, Rivest, *Expected Time Bounds for Selection*, Communications of the ACM 18(3), 1975,
        https://doi.org/10.1145/360680.360691
    """
    while keys.device.type == "cpu" and len(keys) > 8 * SAMPLE:
        low, high = _bracket(keys, k)
        above = int(torch.count_nonzero(keys > high))
        between = keys[(keys >= low) & (keys <= high)]
        if not above < k <= above + len(between):  # the sample was misleading
            break
        if low == high:
            return low
        if 2 * len(between) > len(keys):  # most are equal, or nearly so
            break
        keys, k = between, k - above
    # `kthvalue` is no faster and has no deterministic form on CUDA.
    return keys.topk(k, sorted=False).values.min()


def _bracket(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two values between which the ``k``-th largest lies, very likely, and few others do."""
    step = len(keys) // SAMPLE | 1  # odd, so that it walks through the columns of matrices as wide as a power of two
    sample = keys[::step].sort(descending=True).values
    share = k / len(keys)
    place = share * len(sample)
    margin = 4.0 * math.sqrt(place * (1.0 - share)) + 4.0  # four standard deviations either way
    first, last = int(place - margin) - 1, int(place + margin) + 1
    high = sample[first] if first >= 0 else sample.new_tensor(math.inf)
    low = sample[last] if last < len(sample) else sample.new_tensor(-math.inf)
    return low, high
