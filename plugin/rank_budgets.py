"""Budgets of ranks, in phases: those of the start, fewer or more of them, then the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


def check_target(budget: Any) -> None:
    """Refuses a ``target`` that is no number of ranks and a ``mean_rank`` that is no mean."""
    call, target, mean = type(budget).__name__, budget.target, budget.mean_rank
    whole = isinstance(target, int) and not isinstance(target, bool)
    if not (target >= 0 if whole else isinstance(target, float) and 0.0 < target <= 1.0):
        raise ValueError(
            f"`{call}(target={target!r})` must be a count of at least 0 (int) or a fraction in (0, 1] (float)."
        )
    if mean is not None and not mean >= 0:
        raise ValueError(f"`{call}(mean_rank={mean!r})` must be at least 0: it is a mean over matrices.")


def check_span(budget: Any, *keys: str) -> None:
    """Refuses spans of the run that are neither steps nor fractions."""
    for key in keys:
        value = getattr(budget, key)
        if isinstance(value, bool) or not value >= 0 or (isinstance(value, float) and value >= 1.0):
            raise ValueError(
                f"`{type(budget).__name__}({key}={value!r})` must be a number of steps (int) of at least 0 or a "
                "fraction (float) in [0, 1)."
            )


def check_period(budget: Any) -> None:
    """Refuses a period that is none."""
    if budget.every < 1:
        raise ValueError(
            f"`{type(budget).__name__}(every={budget.every})` must be at least 1: it is a period in optimizer steps."
        )


def counted(budget: Any, n: int, matrices: int) -> int:
    """Ranks that ``budget`` asks for in the end, of ``n`` in as many ``matrices``.

    Raises:
        ValueError: If there are not as many.
    """
    if budget.mean_rank is not None:
        count = int(budget.mean_rank * matrices)
    else:
        count = budget.target if isinstance(budget.target, int) else int(budget.target * n + 1e-9)
    if count > n:
        raise ValueError(
            f"`{budget!r}` asks for {count} ranks in the end, but the {matrices} adapters have {n}: build them with "
            "a larger rank, or lower the target."
        )
    return count


def span(value: int | float, total: int) -> int:
    """Steps of a run of ``total``: an int counts them, a float is a fraction of the run."""
    return value if isinstance(value, int) else int(value * total)


@dataclass(frozen=True)
class Phases(ABC):
    """What budgets share that have a first phase, one in which they move, and a last one; see `Decay`."""

    target: int | float = 0.5
    mean_rank: float | None = None
    warmup: int | float = 0.12
    final: int | float = 0.48

    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        check_target(self)
        check_span(self, "warmup", "final")
        check_period(self)

    def ends(self, total: int, n: int | None = None, matrices: int = 1) -> tuple[int, int]:
        """The last step of the first phase, and the first with the final choice.

        Raises:
            ValueError: If no step lies between them.
        """
        del n, matrices
        begin, tail = span(self.warmup, total), span(self.final, total)
        if begin + tail >= total:
            raise ValueError(
                f"`{type(self).__name__}(warmup={self.warmup!r}, final={self.final!r})` leaves no step in between in "
                f"a run of {total} optimizer steps: lower one of them, give fractions, or train longer."
            )
        return begin, total - tail

    def first(self, n: int, matrices: int) -> int:
        """Ranks before the first step, of ``n`` in as many ``matrices``: all."""
        del matrices
        return n

    def last(self, n: int, matrices: int) -> int:
        """Ranks in the end, of ``n`` in as many ``matrices``.

        Raises:
            ValueError: If there are not as many.
        """
        return counted(self, n, matrices)

    def at(self, step: int, total: int | None, n: int | None = None, matrices: int = 1) -> int | float:
        """Ranks after ``step`` of ``total`` optimizer steps."""
        if total is None or n is None:
            raise ValueError(f"`{self!r}` follows the length of the run and the number of ranks: give both.")
        begin, end = self.ends(total, n, matrices)
        first, last = self.first(n, matrices), self.last(n, matrices)
        if step <= begin:
            return first
        if step >= end:
            return last
        return self._between((step - begin) / (end - begin), first, last)

    @abstractmethod
    def _between(self, done: float, first: int, last: int) -> int:
        """Ranks when ``done`` of the phase between is over, in (0, 1)."""


@dataclass(frozen=True)
class Decay(Phases):
    """All ranks at first, then fewer along a polynomial, then the target until the end.

        b(t) = b0                                            for t <= t_i
               floor(bT + (b0 - bT) (1 - (t - t_i) / (T - t_f - t_i))^power)
               bT                                            for t >= T - t_f

    t counts the optimizer steps done, T those of the run; b0 is the number of ranks, bT the target. After T - t_f the
    choice is final.

    Args:
        target: Ranks in the end: an int counts them over all matrices, a float is a fraction of them.
        mean_rank: Ranks in the end per matrix, on average, in place of ``target``; None for ``target``.
        warmup: Steps t_i with all ranks; an int counts steps, a float is a fraction of the run.
        final: Steps t_f with the final choice, in the same way.
        power: Exponent, above 0; 3 is cubic.
        every: Optimizer steps between choices.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> budget = Decay(target=48, warmup=10, final=20)
        >>> [budget.at(t, 80, 144) for t in (0, 10, 11, 20, 35, 59, 60)]
        [144, 144, 138, 97, 60, 48, 48]
    """

    power: float = 3.0
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0.0:
            raise ValueError(f"`Decay(power={self.power!r})` must be above 0: 1 is linear, 3 cubic.")

    def _between(self, done: float, first: int, last: int) -> int:
        return int((first - last) * (1 - done) ** self.power + last)


@dataclass(frozen=True)
class Fixed(Phases):
    """The same number of ranks at every step; which ones is chosen anew now and then, and for good in the end.

        b(t) = bT;   before the first choice as many of every matrix as there are for all

    Args:
        target: Ranks that are in: an int counts them over all matrices, a float is a fraction of them.
        mean_rank: Ranks that are in per matrix, on average, in place of ``target``; None for ``target``.
        warmup: Steps before the first choice; an int counts steps, a float is a fraction of the run.
        final: Steps with the final choice, in the same way.
        every: Optimizer steps between choices.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> [Fixed(target=0.25).at(t, 80, 144) for t in (0, 40, 79)]
        [36, 36, 36]
    """

    every: int = 1

    def first(self, n: int, matrices: int) -> int:
        """Ranks before the first step: as many as later."""
        return self.last(n, matrices)

    def _between(self, done: float, first: int, last: int) -> int:
        del done, first
        return last
