"""Runs of several methods and seeds made comparable: one row per method, and one sentence that holds them to a bar."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table of results.

    Attributes:
        name: The method.
        accuracies: One per seed, in [0, 1].
        seconds: Median seconds per optimizer step, or None where that was not measured.
        memory: Bytes by part at the moment of the peak, and their sum as ``peak``; empty where that was not measured.

    Example:
        >>> row = Row("lisa", (0.90, 0.94))
        >>> round(row.mean, 4), round(row.spread, 4)
        (0.92, 0.0283)
    """

    name: str
    accuracies: tuple[float, ...]
    seconds: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Sample standard deviation of the accuracy over the seeds; 0 for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def summarise(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One `Row` per method, in order of appearance, over all its seeds.

    Accuracies are kept per seed, seconds are the median of the runs' medians, and the memory is that of the run with
    the highest peak.

    Args:
        results: One mapping per run: ``method``, ``accuracy``, ``seconds_per_step`` (or None) and ``memory`` (bytes by
            part and ``peak``, or empty).

    Example:
        >>> run = {"method": "full", "seconds_per_step": 0.01, "memory": {"peak": 8}}
        >>> [(row.name, row.accuracies) for row in summarise([run | {"accuracy": 0.5}, run | {"accuracy": 0.7}])]
        [('full', (0.5, 0.7))]
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        runs.setdefault(str(result["method"]), []).append(result)
    rows = []
    for name, group in runs.items():
        times = [float(run["seconds_per_step"]) for run in group if run["seconds_per_step"] is not None]
        rows.append(
            Row(
                name,
                tuple(float(run["accuracy"]) for run in group),
                statistics.median(times) if times else None,
                max((run["memory"] for run in group), key=lambda memory: int(memory.get("peak", 0))),
            )
        )
    return rows


def verdict(rows: Sequence[Row], bar: str) -> str:
    """One sentence that says which methods differ from ``bar`` by more than the spread, and which do not.

        d = mean - mean of the bar,   s = sqrt(spread^2 + spread of the bar^2);   above if d > s, below if d < -s

    Args:
        rows: The table, each row with the accuracies of the same seeds.
        bar: Name of the row that the others are held to.

    Raises:
        ValueError: If no row is called ``bar``.

    Example:
        >>> verdict([Row("random", (0.80, 0.82)), Row("lisa", (0.90, 0.92)), Row("hft", (0.80, 0.83))], bar="random")
        'Held to random (81.0 ± 1.4 %): above it by more than the spread: lisa (+10.0); within the spread: hft (+0.5).'
    """
    base = next((row for row in rows if row.name == bar), None)
    if base is None:
        raise ValueError(f"`verdict(bar={bar!r})` names no row; there are {', '.join(row.name for row in rows)}.")
    if min(len(row.accuracies) for row in rows) < 2:
        return f"One seed has no spread: no method can be held to {bar}."
    above, within, below = "above it by more than the spread", "within the spread", "below it by more than the spread"
    sides: dict[str, list[str]] = {above: [], within: [], below: []}
    for row in rows:
        if row is base:
            continue
        difference, spread = row.mean - base.mean, math.hypot(row.spread, base.spread)
        side = above if difference > spread else below if difference < -spread else within
        sides[side].append(f"{row.name} ({100 * difference:+.1f})")
    found = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    return f"Held to {bar} ({100 * base.mean:.1f} ± {100 * base.spread:.1f} %): {found}."
