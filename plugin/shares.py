"""Whole numbers from shares: how many of a total each part gets, without losing or gaining one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch


def simplest(k: int, n: int) -> Fraction:
    """The fraction with the smallest denominator that truncates to ``k`` of ``n``.

        k / n <= p / q < (k + 1) / n      with q as small as possible

    A budget of one half over 27 units is truncated to 13 of them; this gives the one half back.

    Args:
        k: Selected units, in [0, n].
        n: All units, at least 1.

    Example:
        >>> simplest(13, 27), simplest(8, 27), simplest(27, 27)
        (Fraction(1, 2), Fraction(3, 10), Fraction(1, 1))
    """
    low, high = Fraction(k, n), Fraction(k + 1, n)
    denominator = 1
    while True:
        numerator = -(
            -low.numerator * denominator // low.denominator
        )  # the first multiple of 1/denominator at or above low
        if Fraction(numerator, denominator) < high:
            return Fraction(numerator, denominator)
        denominator += 1


def systematic(sizes: Sequence[int], k: int, generator: torch.Generator) -> list[int]:
    """Splits ``k`` over parts in proportion to their sizes, rounding at random.

        c_i = floor(f M_i + u) - floor(f M_(i-1) + u),    M_i = m_1 + ... + m_i,   f = simplest(k, n)

    with one random u for all. So each part gets its share f m_i rounded down or up, and so does every run of
    neighbouring
    parts: order the parts family by family and each family gets its share as well. Exact integer arithmetic throughout.

    Args:
        sizes: Units in each part, n in total.
        k: Units to give out, in [0, n].
        generator: CPU generator.

    Returns:
        Counts that add up to ``k``, each at most its size.

    Example:
        >>> systematic([4, 4, 4], 6, torch.Generator().manual_seed(0))
        [2, 2, 2]
    """
    n = sum(sizes)
    if n == 0:
        return [0 for _ in sizes]
    share = simplest(k, n)
    p, q = share.numerator, share.denominator
    spare = p * n % q  # what truncation cut off; u stays clear of it so that the total is k and not k + 1
    u = int(torch.randint(q - spare, (1,), generator=generator))
    counts, seen, given = [], 0, 0
    for size in sizes:
        seen += size
        upto = (p * seen + u) // q
        counts.append(upto - given)
        given = upto
    return counts


def largest_remainder(sizes: Sequence[int], k: int) -> list[int]:
    """Splits ``k`` over parts in proportion to their sizes; what rounding down leaves goes to the largest remainders.

    Args:
        sizes: Units in each part, n in total.
        k: Units to give out, in [0, n].

    Returns:
        Counts that add up to ``k``, each at most its size; equal remainders go to the earlier part.

    Example:
        >>> largest_remainder([5, 5, 2], 6)
        [3, 2, 1]
    """
    n = max(1, sum(sizes))
    counts = [k * size // n for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % n))  # stable: ties stay in order
    for i in by_remainder[: k - sum(counts)]:
        counts[i] += 1
    return counts


SUBSETS = 512
"""Choices that a part is searched for; a part with more of them (many experts) is searched at random."""


def nearest(
    parts: Sequence[Sequence[int]],
    counts: Sequence[int],
    sizes: Sequence[int],
    families: Sequence[str],
    generator: torch.Generator,
) -> list[int]:
    """Chooses in every part as many units as asked, so that their entries come closest to the same share everywhere.

        minimise |e + sum of sizes chosen - f * sum of sizes in the part|,   f = sum of counts / number of units

    part by part, where e is what the parts before it in the same family have too much. Equally good choices are drawn
    from at random.

    Args:
        parts: Unit indices of each part.
        counts: Units to choose in each part.
        sizes: Entries of each unit, by index.
        families: Family of each part; those of one family are neighbours.
        generator: CPU generator.

    Returns:
        The chosen unit indices.

    Example:
        >>> nearest([[0, 1, 2, 3]], [2], [8, 2, 2, 8], ["attention"], torch.Generator().manual_seed(0))
        [0, 1]
    """
    p, q = sum(counts), sum(len(part) for part in parts)
    chosen: list[int] = []
    family, excess = None, 0  # q times the entries chosen beyond the share so far, exactly
    for part, count, this in zip(parts, counts, families, strict=True):
        if this != family:
            family, excess = this, 0
        options: list[tuple[int, ...]]
        if math.comb(len(part), count) <= SUBSETS:
            options = list(itertools.combinations(part, count))
        else:
            orders = (torch.randperm(len(part), generator=generator).tolist() for _ in range(SUBSETS))
            options = [tuple(part[i] for i in order[:count]) for order in orders]
        target = p * sum(sizes[i] for i in part)
        errors = [excess + q * sum(sizes[i] for i in option) - target for option in options]
        least = min(abs(e) for e in errors)
        best = [j for j, e in enumerate(errors) if abs(e) == least]
        pick = best[int(torch.randint(len(best), (1,), generator=generator))]
        chosen += options[pick]
        excess = errors[pick]
    return chosen
