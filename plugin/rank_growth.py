"""Budgets of ranks that grow: a few at first, more in the course of the run, never more than the target."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from apportion.rank_budgets import Phases, check_period, check_span, check_target, counted, span


def _check_counts(budget: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(budget, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{type(budget).__name__}({key}={value!r})` must be a whole number of at least 1.")


def _begun(budget: Any, n: int, matrices: int) -> int:
    """Ranks before the first step.

    Raises:
        ValueError: If there are more than in the end.
    """
    count: int = budget.start * matrices
    last = budget.last(n, matrices)
    if count > last:
        raise ValueError(
            f"`{budget!r}` begins with {count} ranks in {matrices} matrices, but ends with {last}: lower `start`, or "
            "raise the target."
        )
    return count


@dataclass(frozen=True)
class Growth(Phases):
    """A few ranks of every matrix at first, then more along a polynomial, then the target until the end.

        b(t) = b0                                            for t <= t_i
               floor(b0 + (bT - b0) ((t - t_i) / (T - t_f - t_i))^power)
               bT                                            for t >= T - t_f

    t counts the optimizer steps done, T those of the run; b0 is ``start`` times the number of matrices, bT the target.

    Args:
        target: Ranks in the end: an int counts them over all matrices, a float is a fraction of those built.
        mean_rank: Ranks in the end per matrix, on average, in place of ``target``; None for ``target``.
        warmup: Steps t_i with the first ranks; an int counts steps, a float is a fraction of the run.
        final: Steps t_f with the final choice, in the same way.
        start: Ranks of every matrix at first, at least 1.
        power: Exponent, above 0; 1 is linear.
        every: Optimizer steps between choices.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> budget = Growth(target=40, warmup=10, final=20)
        >>> [budget.at(t, 80, 80, matrices=10) for t in (0, 10, 11, 35, 59, 60, 80)]
        [10, 10, 10, 25, 39, 40, 40]
    """

    start: int = 1
    power: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "start")
        if not self.power > 0.0:
            raise ValueError(f"`Growth(power={self.power!r})` must be above 0: 1 is linear, 3 cubic.")

    def first(self, n: int, matrices: int) -> int:
        """Ranks before the first step."""
        return _begun(self, n, matrices)

    def _between(self, done: float, first: int, last: int) -> int:
        return int(first + (last - first) * done**self.power + 1e-9)


class _Choices:
    """What budgets that grow by choices have in common."""

    target: int | float
    mean_rank: float | None
    start: int
    warmup: int | float
    every: int

    grain: ClassVar[str] = "rank"
    timed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_target(self)
        _check_counts(self, "start", "add")
        check_span(self, "warmup")
        check_period(self)

    def first(self, n: int, matrices: int) -> int:
        """Ranks before the first step."""
        return _begun(self, n, matrices)

    def last(self, n: int, matrices: int) -> int:
        """Ranks in the end."""
        return counted(self, n, matrices)

    def ends(self, total: int, n: int | None = None, matrices: int = 1) -> tuple[int, int]:
        """The last step of the warm-up, and the one at which the target is reached.

        Raises:
            ValueError: If that is after the run.
        """
        if n is None:
            raise ValueError(f"`{self!r}` ends when the target is reached: give the number of ranks.")
        begin = span(self.warmup, total)
        end = max(begin + 1, self._reached(total, self.first(n, matrices), self.last(n, matrices), matrices))
        if end > total:
            raise ValueError(
                f"`{self!r}` reaches its target after {end} steps, but the run has {total}: let more matrices grow at "
                "a time, by more ranks each, or more often."
            )
        return begin, end

    def at(self, step: int, total: int | None, n: int | None = None, matrices: int = 1) -> int | float:
        """Ranks after ``step`` of ``total`` optimizer steps."""
        if total is None or n is None:
            raise ValueError(f"`{self!r}` follows the length of the run and the number of ranks: give both.")
        return self._count(step, total, self.first(n, matrices), self.last(n, matrices), matrices)

    def _reached(self, total: int, first: int, last: int, matrices: int) -> int:
        """The step at which there are ``last`` ranks; any after the run if it ends before."""
        raise NotImplementedError

    def _count(self, step: int, total: int, first: int, last: int, matrices: int) -> int:
        """Ranks after ``step``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rounds(_Choices):
    """A few ranks of every matrix at first, then as many more at every choice, until the target is reached.

        b = min(bT, b0 + h add e)      after e choices, at the steps t > t_i that ``every`` divides

    The target is never exceeded: the last round gives what is left.

    Args:
        target: Ranks in the end: an int counts them over all matrices, a float is a fraction of those built.
        mean_rank: Ranks in the end per matrix, on average, in place of ``target``; None for ``target``.
        start: Ranks of every matrix at first, at least 1.
        matrices: Matrices that grow at a choice, h, at least 1.
        add: Ranks that each of them is given, at least 1.
        warmup: Steps t_i without a choice; an int counts steps, a float is a fraction of the run.
        every: Optimizer steps between choices.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> budget = Rounds(mean_rank=8, matrices=22, add=4, warmup=500, every=500)
        >>> [budget.at(t, 20000, 720, matrices=72) for t in (0, 999, 1000, 3000, 3500, 20000)]
        [72, 72, 160, 512, 576, 576]
    """

    target: int | float = 0.5
    mean_rank: float | None = None
    start: int = 1
    matrices: int = 1
    add: int = 1
    warmup: int | float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "matrices")

    def _reached(self, total: int, first: int, last: int, matrices: int) -> int:
        rounds = math.ceil((last - first) / (self.matrices * self.add))
        return (span(self.warmup, total) // self.every + rounds) * self.every

    def _count(self, step: int, total: int, first: int, last: int, matrices: int) -> int:
        rounds = max(0, step // self.every - span(self.warmup, total) // self.every)
        return min(last, first + self.matrices * self.add * rounds)


@dataclass(frozen=True)
class Gap(_Choices):
    """A few ranks of every matrix at first, then more matrices grow at a choice the later it is, up to the target.

        p = (t - t_i) / (T - t_i);   d = bT - b
        linear         h = floor(d p)             kept in [1, number of matrices]
        exponential    h = floor(exp(p ln d))
        b <- min(bT, b + h add)                   at the steps t > t_i that ``every`` divides

    The target is never exceeded: the last choice gives what is left.

    Args:
        target: Ranks in the end: an int counts them over all matrices, a float is a fraction of those built.
        mean_rank: Ranks in the end per matrix, on average, in place of ``target``; None for ``target``.
        start: Ranks of every matrix at first, at least 1.
        add: Ranks that each growing matrix is given, at least 1.
        form: ``linear`` or ``exponential``.
        warmup: Steps t_i without a choice; an int counts steps, a float is a fraction of the run.
        every: Optimizer steps between choices.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> budget = Gap(target=144, warmup=100, every=100)
        >>> counts = [budget.at(t, 3900, 288, matrices=72) for t in range(100, 800, 100)]
        >>> [b - a for a, b in zip(counts, counts[1:])]
        [1, 3, 5, 6, 7, 7]

    References:
        Liang et al., *TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
        Fine-Tuning*, 2025, https://arxiv.org/abs/2501.08008
    """

    target: int | float = 0.5
    mean_rank: float | None = None
    start: int = 1
    add: int = 1
    form: str = "linear"
    warmup: int | float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("linear", "exponential"):
            raise ValueError(f"`Gap(form={self.form!r})` must be 'linear' or 'exponential'.")

    def _reached(self, total: int, first: int, last: int, matrices: int) -> int:
        end, count = _path(self, total, first, last, matrices)[-1]
        return end if count == last else total + 1

    def _count(self, step: int, total: int, first: int, last: int, matrices: int) -> int:
        path = _path(self, total, first, last, matrices)
        return path[bisect_right(path, (step, last)) - 1][1]


@lru_cache(maxsize=32)
def _path(budget: Gap, total: int, first: int, last: int, matrices: int) -> tuple[tuple[int, int], ...]:
    """The steps at which ranks come in, with how many there are from then on, until there are ``last``."""
    begin, count = span(budget.warmup, total), first
    path = [(0, count)]
    for step in range((begin // budget.every + 1) * budget.every, total + 1, budget.every):
        if count == last:
            break
        done = (step - begin) / (total - begin)
        gap = last - count
        grown = gap * done if budget.form == "linear" else math.exp(done * math.log(gap))
        count = min(last, count + budget.add * max(1, min(matrices, int(grown + 1e-9))))
        path.append((step, count))
    return tuple(path)
