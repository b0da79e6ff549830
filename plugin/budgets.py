"""Budgets: how many units are selected at a step."""

from __future__ import annotations

from dataclasses import dataclass


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
