"""Budgets of ranks by points: when in the run, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from apportion.rank_budgets import check_period, span


@dataclass(frozen=True)
class Piecewise:
    """Numbers of ranks by phases of the run: as listed, or on straight lines between the listed ones.

        steps     b(t) = b_i                                         for t_i <= t < t_(i+1)
        linear    b(t) = floor(b_i + (b_(i+1) - b_i) (t - t_i) / (t_(i+1) - t_i))

    From the last point on the choice is final.

    Args:
        points: Pairs (t_i, b_i), the first at 0: t_i counts optimizer steps (int) or is a fraction of the run (float),
            b_i counts ranks over all matrices (int) or is a fraction of them (float).
        form: ``steps`` or ``linear``.
        every: Optimizer steps between choices.

    Raises:
        ValueError: If there are no two points, or one is out of its range or order.

    Example:
        >>> budget = Piecewise([(0, 1.0), (0.25, 0.5), (60, 36)])
        >>> [budget.at(t, 80, 144) for t in (0, 19, 20, 59, 60, 80)]
        [144, 144, 72, 72, 36, 36]
    """

    points: Sequence[Sequence[int | float]]
    form: str = "steps"
    every: int = 1

    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        call = f"Piecewise(points={self.points!r})"
        object.__setattr__(self, "points", tuple(tuple(point) for point in self.points))
        if len(self.points) < 2 or any(len(point) != 2 for point in self.points) or self.points[0][0] != 0:
            raise ValueError(f"`{call}` must be at least two pairs (when, how many), the first of them at 0.")
        for when, amount in self.points:
            if isinstance(when, bool) or when < 0 or (isinstance(when, float) and when >= 1.0):
                raise ValueError(f"`{call}`: {when!r} must be a step (int) of at least 0 or a fraction in [0, 1).")
            if isinstance(amount, bool) or amount < 0 or (isinstance(amount, float) and amount > 1.0):
                raise ValueError(f"`{call}`: {amount!r} must be a count (int) of at least 0 or a fraction in [0, 1].")
        if self.form not in ("steps", "linear"):
            raise ValueError(f"`Piecewise(form={self.form!r})` must be 'steps' or 'linear'.")
        check_period(self)

    def _placed(self, total: int) -> list[int]:
        """The steps of the points.

        Raises:
            ValueError: If they are not in order.
        """
        steps = [span(when, total) for when, _ in self.points]
        if any(a >= b for a, b in pairwise(steps)) or steps[-1] > total:
            raise ValueError(
                f"`{self!r}` has its points at the steps {steps} of a run of {total}: they must follow each other, and "
                "end with the run at the latest. Give fractions, or train longer."
            )
        return steps

    def ends(self, total: int, n: int | None = None, matrices: int = 1) -> tuple[int, int]:
        """The last step with the ranks of the start, and the first with the final choice."""
        del n, matrices
        steps = self._placed(total)
        return (steps[1] - 1 if self.form == "steps" else 0), steps[-1]

    def first(self, n: int, matrices: int) -> int:
        """Ranks before the first step, of ``n``."""
        del matrices
        return self._count(0, n)

    def last(self, n: int, matrices: int) -> int:
        """Ranks in the end, of ``n``.

        Raises:
            ValueError: If there are not as many, in the end or before.
        """
        del matrices
        return [self._count(i, n) for i in range(len(self.points))][-1]

    def _count(self, i: int, n: int) -> int:
        amount = self.points[i][1]
        count = amount if isinstance(amount, int) else int(amount * n + 1e-9)
        if count > n:
            raise ValueError(f"`{self!r}` asks for {count} ranks, but the adapters have {n}: build larger ones.")
        return count

    def at(self, step: int, total: int | None, n: int | None = None, matrices: int = 1) -> int | float:
        """Ranks after ``step`` of ``total`` optimizer steps."""
        del matrices
        if total is None or n is None:
            raise ValueError(f"`{self!r}` follows the length of the run and the number of ranks: give both.")
        steps = self._placed(total)
        i = max(j for j, start in enumerate(steps) if start <= step)
        if self.form == "steps" or i + 1 == len(steps):
            return self._count(i, n)
        here, there = self._count(i, n), self._count(i + 1, n)
        return int(here + (there - here) * (step - steps[i]) / (steps[i + 1] - steps[i]) + 1e-9)
