"""Budgets of ranks, in phases: all of them, fewer and fewer, then the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Decay:
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

    target: int | float = 0.5
    mean_rank: float | None = None
    warmup: int | float = 0.12
    final: int | float = 0.48
    power: float = 3.0
    every: int = 1

    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        whole = isinstance(self.target, int) and not isinstance(self.target, bool)
        if not (self.target >= 0 if whole else isinstance(self.target, float) and 0.0 < self.target <= 1.0):
            raise ValueError(
                f"`Decay(target={self.target!r})` must be a count of at least 0 (int) or a fraction in (0, 1] (float)."
            )
        if self.mean_rank is not None and not self.mean_rank >= 0:
            raise ValueError(f"`Decay(mean_rank={self.mean_rank!r})` must be at least 0: it is a mean over matrices.")
        for key in ("warmup", "final"):
            value = getattr(self, key)
            if isinstance(value, bool) or not value >= 0 or (isinstance(value, float) and value >= 1.0):
                raise ValueError(
                    f"`Decay({key}={value!r})` must be a number of steps (int) of at least 0 or a fraction (float) in "
                    "[0, 1)."
                )
        if not self.power > 0.0:
            raise ValueError(f"`Decay(power={self.power!r})` must be above 0: 1 is linear, 3 cubic.")
        if self.every < 1:
            raise ValueError(f"`Decay(every={self.every})` must be at least 1: it is a period in optimizer steps.")

    def ends(self, total: int) -> tuple[int, int]:
        """The last step with all ranks, and the first with the final choice.

        Raises:
            ValueError: If no step lies between them.
        """
        begin = self.warmup if isinstance(self.warmup, int) else int(self.warmup * total)
        tail = self.final if isinstance(self.final, int) else int(self.final * total)
        if begin + tail >= total:
            raise ValueError(
                f"`Decay(warmup={self.warmup!r}, final={self.final!r})` leaves no step in between in a run of {total} "
                "optimizer steps: lower one of them, give fractions, or train longer."
            )
        return begin, total - tail

    def last(self, n: int, matrices: int) -> int:
        """Ranks in the end, of ``n`` in as many ``matrices``.

        Raises:
            ValueError: If there are not as many.
        """
        if self.mean_rank is not None:
            count = int(self.mean_rank * matrices)
        else:
            count = self.target if isinstance(self.target, int) else int(self.target * n + 1e-9)
        if count > n:
            raise ValueError(
                f"`{self!r}` asks for {count} ranks in the end, but the {matrices} adapters have {n}: build them with "
                "a larger rank, or lower the target."
            )
        return count

    def at(self, step: int, total: int | None, n: int | None = None, matrices: int = 1) -> int | float:
        """Ranks after ``step`` of ``total`` optimizer steps."""
        if total is None or n is None:
            raise ValueError(f"`{self!r}` follows the length of the run and the number of ranks: give both.")
        begin, end = self.ends(total)
        last = self.last(n, matrices)
        if step <= begin:
            return n
        if step >= end:
            return last
        return int((n - last) * (1 - (step - begin) / (end - begin)) ** self.power + last)
