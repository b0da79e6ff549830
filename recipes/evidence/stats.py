"""What a few seeds say about a difference: means, standard errors, and whether it can be told from chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apportion.report_groups import Spread

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, that of the normal is close."""


class Estimate(Spread):
    """A mean over seeds.

    Args:
        values: One number for each seed, at least one.

    Example:
        >>> Estimate((1.0, 2.0, 3.0)).told(1)
        '2.0 ± 0.6'
    """

    def told(self, digits: int, sign: bool = False) -> str:
        """Mean ± standard error; the mean alone where one seed was run."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.error is None else f"{mean} ± {self.error:.{digits}f}"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The difference of two methods, seed by seed: both see the same batches and begin with the same head.

        d_k = ours_k - theirs_k     over the seeds k that both have

    Args:
        ours: Values by seed.
        theirs: Values by seed.

    Returns:
        None if they share no seed.

    Example:
        >>> paired({1: 0.9, 2: 0.8}, {1: 0.7, 2: 0.8, 3: 0.1}).told(2)
        '0.10 ± 0.10'
    """
    shared = sorted(set(ours) & set(theirs))
    return Estimate(tuple(ours[k] - theirs[k] for k in shared)) if shared else None


def verdict(difference: Estimate | None, higher: bool = True) -> str:
    """Whether a difference can be told from chance.

        |mean| > t(n - 1) s / sqrt(n),   t the two-sided 95 % quantile of Student's distribution

    Args:
        difference: Of a method from random choice; None if it was not run.
        higher: Whether higher is better.

    Returns:
        ``better``, ``worse``, ``not distinguishable``, ``one seed`` or ``not run``.

    Example:
        >>> verdict(Estimate((2.0, 2.1, 1.9))), verdict(Estimate((2.0, -1.0, 0.5)))
        ('better', 'not distinguishable')
    """
    if difference is None:
        return "not run"
    if difference.error is None:
        return "one seed"
    n = len(difference.values)
    quantile = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    if abs(difference.mean) <= quantile * difference.error:
        return "not distinguishable"
    return "better" if (difference.mean > 0) == higher else "worse"


def within(values: Sequence[float]) -> str:
    """Whether a chosen value lies inside the ones that were tried, which is the last of them.

    Args:
        values: Those that were tried, and then the chosen one.

    Example:
        >>> within([1e-3, 3e-3, 1e-2, 1e-2]), within([1e-3, 3e-3, 1e-2, 3e-3])
        (' (highest tried)', '')
    """
    *tried, chosen = values
    if len(tried) < 2:
        return ""
    return " (highest tried)" if chosen == max(tried) else " (lowest tried)" if chosen == min(tried) else ""
