"""Budgets: how many units are selected at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.types import resolve


def _check(call: str, amount: int | float) -> None:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"`{call}` is neither a count (int) nor a fraction (float) of the units.")
    if isinstance(amount, int) and amount < 1:
        raise ValueError(
            f"`{call}` must be at least 1 as a count; give a fraction in (0, 1] as a float to scale with the model."
        )
    if isinstance(amount, float) and not 0.0 < amount <= 1.0:
        raise ValueError(f"`{call}` must lie in (0, 1] as a fraction; give an int to select that many units.")


@dataclass(frozen=True)
class Constant:
    """The same amount at every step.

    Args:
        amount: An int counts units; a float is a fraction of them, truncated to whole units, at least one.

    Raises:
        TypeError: If ``amount`` is not a number.
        ValueError: If a count is below 1 or a fraction outside (0, 1].

    Example:
        >>> Constant(2).at(step=100, total=None), Constant(0.25).at(step=0, total=None)
        (2, 0.25)
    """

    amount: int | float

    def __post_init__(self) -> None:
        _check(f"Constant(amount={self.amount!r})", self.amount)

    def at(self, step: int, total: int | None) -> int | float:
        """The amount, whatever the step."""
        del step, total
        return self.amount


@dataclass(frozen=True)
class Polynomial:
    """From one amount to another along a polynomial: linear for power 1, cubic for power 3.

        x = (t - begin) / (finish - begin), kept in [0, 1]
        amount(t) = end + (start - end) (1 - x)^power

    Args:
        start: Amount up to step ``begin``; both amounts are counts (int), which are truncated, or both fractions
            (float).
        end: Amount from step ``finish`` on.
        power: Exponent, above 0.
        begin: Last optimizer step with the full ``start``.
        finish: First optimizer step with ``end``; None for the number of optimizer steps of the run, so that ``end`` is
            reached where training stops.

    Raises:
        TypeError: If an amount is not a number, or one is a count and the other a fraction.
        ValueError: If a number is out of its range.

    Example:
        >>> budget = Polynomial(12, 4, power=3, begin=10, finish=20)
        >>> [budget.at(step, None) for step in (0, 10, 15, 20, 99)]
        [12, 12, 5, 4, 4]
    """

    start: int | float
    end: int | float
    power: float = 1.0
    begin: int = 0
    finish: int | None = None

    def __post_init__(self) -> None:
        _check(f"Polynomial(start={self.start!r})", self.start)
        _check(f"Polynomial(end={self.end!r})", self.end)
        if isinstance(self.start, int) != isinstance(self.end, int):
            raise TypeError(
                f"`Polynomial(start={self.start!r}, end={self.end!r})` mixes a count (int) with a fraction (float): "
                "give two of a kind."
            )
        if not self.power > 0.0:
            raise ValueError(f"`Polynomial(power={self.power!r})` must be above 0: 1 is linear, 3 is cubic.")
        if self.begin < 0:
            raise ValueError(f"`Polynomial(begin={self.begin!r})` must be at least 0: it is an optimizer step.")
        if self.finish is not None and self.finish <= self.begin:
            raise ValueError(
                f"`Polynomial(begin={self.begin}, finish={self.finish})` must have `finish` above `begin`."
            )

    def at(self, step: int, total: int | None) -> int | float:
        """The amount at optimizer step ``step`` of ``total``.

        Raises:
            ValueError: If ``finish`` is None and the length of the run is unknown or not above ``begin``.
        """
        finish = total if self.finish is None else self.finish
        if finish is None:
            raise ValueError(
                "`Polynomial(finish=None)` ends with the run, whose number of optimizer steps is unknown: give "
                "`finish` as a step."
            )
        if finish <= self.begin:
            raise ValueError(
                f"`Polynomial(begin={self.begin}, finish=None)` starts after the run of {finish} optimizer steps: "
                "lower `begin`."
            )
        done = min(1.0, max(0.0, (step - self.begin) / (finish - self.begin)))
        amount = float(self.end + (self.start - self.end) * (1.0 - done) ** self.power)
        if isinstance(self.start, int):
            return int(amount + 1e-9)  # 28.999999999999996 is 29
        return amount


@dataclass(frozen=True)
class Increment:
    """A count that grows from step to step by whole units until it is reached: B units in T steps.

        even    n(t) = floor((t + 1) B / T)
        front   n(t) = (t + 1) floor(B / T) + min(t + 1, B mod T)
        n(t) = B   from t = T - 1 on

    n(t) is how many units are selected once step t, counted from 0, has made its choice. Where B < T, some steps add
    nothing, and ``even`` begins with none selected: 0 is a legal count here.

    Args:
        amount: Units in the end, B; an int counts them, a float is a fraction of them, to be made a count by
            `counted`.
        form: ``even`` spreads the units over the steps; ``front`` gives what the division leaves to the first ones.
        finish: Number of steps to grow in, T; None for the optimizer steps of the run.

    Raises:
        TypeError: If ``amount`` is not a number.
        ValueError: If an argument is out of its range.

    Example:
        >>> [Increment(10, form, finish=4).at(step, None) for form in ("even", "front") for step in range(5)]
        [2, 5, 7, 10, 10, 3, 6, 8, 10, 10]

    References:
        Agarwal et al., *Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models*, TACL
        2025, https://arxiv.org/abs/2408.14470
    """

    amount: int | float
    form: str = "even"
    finish: int | None = None

    def __post_init__(self) -> None:
        _check(f"Increment(amount={self.amount!r})", self.amount)
        if self.form not in ("even", "front"):
            raise ValueError(f"`Increment(form={self.form!r})` must be 'even' or 'front'.")
        if self.finish is not None and self.finish < 1:
            raise ValueError(f"`Increment(finish={self.finish!r})` must be at least 1: it is a number of steps.")

    def counted(self, n: int) -> Increment:
        """The same with the amount as a count of ``n`` units, truncated, at least one; see `resolve`."""
        return replace(self, amount=resolve(self.amount, n, f"`{self!r}`: a budget"))

    def at(self, step: int, total: int | None) -> int:
        """The count once optimizer step ``step`` of ``total`` has made its choice.

        Raises:
            ValueError: If the amount is a fraction, or ``finish`` is None and the length of the run is unknown.
        """
        if not isinstance(self.amount, int):
            raise ValueError(
                f"`{self!r}` grows by whole units, and a fraction does not say how many: take `counted(n)` for n units."
            )
        steps = total if self.finish is None else self.finish
        if steps is None or steps < 1:
            raise ValueError(
                "`Increment(finish=None)` ends with the run, whose number of optimizer steps is unknown: give "
                "`finish` as a number of steps."
            )
        done = min(step + 1, steps)
        if self.form == "even":
            return done * self.amount // steps
        return done * (self.amount // steps) + min(done, self.amount % steps)


@dataclass(frozen=True)
class RankEquivalent:
    """As many entries of each matrix as its low-rank adapter of a given rank would have.

        k_i = min((m + n) rank, m n)   for a matrix of m rows and n columns

    Tensors of more dimensions are matrices of as many rows as their first dimension; a vector is one column, and trains
    as a whole.

    Args:
        rank: Rank of the adapter, at least 1.

    Raises:
        ValueError: If ``rank`` is below 1.

    Example:
        >>> RankEquivalent(128).quotas([(4096, 4096), (4096,)])
        (1048576, 4096)

    References:
        Liu et al., *LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
        Supervised Fine-Tuning*, ICML 2025, https://arxiv.org/abs/2506.00772
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`RankEquivalent(rank={self.rank!r})` must be at least 1: it is the rank of an adapter.")

    def quotas(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Entries to select in each tensor.

        Args:
            shapes: Shape of each tensor.
        """
        rows = [shape[0] if shape else 1 for shape in shapes]
        sizes = [math.prod(shape) for shape in shapes]
        return tuple(min((m + size // max(1, m)) * self.rank, size) for m, size in zip(rows, sizes, strict=True))

    def at(self, step: int, total: int | None) -> int | float:
        """Not to be asked.

        Raises:
            RuntimeError: Always: the counts depend on the shapes.
        """
        del step, total
        raise RuntimeError(
            f"`{self!r}` fixes a count for each tensor, not one for the model: ask `quotas(shapes)`, and select with "
            "`TopK(per='tensor')`."
        )
