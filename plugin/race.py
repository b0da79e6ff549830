"""Drawing without replacement by a race: the one source of chance behind weighted selections."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ranked(keys: Tensor, classes: Tensor) -> Tensor:
    """Indices in order of class, then key, then index, all ascending. Shapes: (n,)."""
    by_key = torch.argsort(keys, stable=True)
    return by_key[torch.argsort(classes[by_key], stable=True)]


def race(log_weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draws k of n without replacement, with probability in proportion to weight at every draw.

        key_i = E_i / w_i,   E_i ~ Exp(1);   the k smallest keys win

    is the same as drawing one after another, each time in proportion to the weights that are left. Infinite weights
    win first, zero weights come after all positive ones and NaN after those; within such a class every unit is as
    likely.

    Args:
        log_weights: Logarithms of the weights, float64, shape (n,).
        k: Number of units, in [0, n].
        generator: CPU generator; n numbers are drawn from it whatever the weights are.

    Returns:
        The winners in the order of the race, int64, shape (k,).

    References:
        Efraimidis, Spirakis, *Weighted random sampling with a reservoir*, Information Processing Letters 97, 2006,
        https://doi.org/10.1016/j.ipl.2005.11.003
    """
    log_time = torch.empty(len(log_weights), dtype=torch.float64).exponential_(generator=generator).log_()
    finite = log_weights.isfinite()
    if finite.any():  # the largest becomes 0, so that equal weights give the same race whatever they are
        log_time = torch.where(finite, log_time - (log_weights - log_weights[finite].max()), log_time)
    classes = torch.full((len(log_weights),), 1)
    classes[log_weights == math.inf] = 0
    classes[log_weights == -math.inf] = 2
    classes[log_weights.isnan()] = 3
    return ranked(log_time, classes)[:k]


def mask_of(indices: Tensor, n: int) -> Tensor:
    """The mask, bool, shape (n,), that is True at ``indices``."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[indices] = True
    return mask
