"""Pictures that compare groups of runs: quality of every seed, learning curves with a band over the seeds, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apportion.report import MIB, PARTS, save
from apportion.report_cells import unique
from apportion.report_groups import Spread

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
"""One for each group, apart for colour-blind readers (Okabe and Ito)."""

_SIZE = 9.5
_POINTS = 500

Curve = Sequence[tuple[int, float]]


def plain(names: Sequence[str], length: int = 38) -> list[str]:
    """Names as the text of a picture: no formulas, no line breaks, not too long, still different from each other.

    Example:
        >>> plain(["a $x$", "_b", "c" * 50], length=10)
        ['a \\\\$x\\\\$', ' _b', 'ccccccccc…']
    """
    made = []
    for name in names:
        line = " ".join(name.split())
        short = line if len(line) <= length else f"{line[: length - 1]}…"
        made.append((" " if short.startswith("_") else "") + short)  # a legend leaves out what begins with _
    return [name.replace("\\", "/").replace("$", r"\$") for name in unique(made)]


def quality(groups: Mapping[str, Sequence[float]], name: str, path: str | Path) -> Path:
    """Draws a dot for every seed, and mean and standard error of each group, the first group on top.

    Args:
        groups: Values by label, at least one each.
        name: What the values are.
        path: Where the picture goes; the suffix says the format.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(7.0, 1.1 + 0.32 * len(groups)), layout="constrained", dpi=160)
    axis = figure.subplots()
    for at, values in enumerate(groups.values()):
        spread = Spread(tuple(values))
        axis.plot(values, [at] * len(values), "o", color="#56B4E9", markersize=5, alpha=0.8, markeredgewidth=0)
        axis.errorbar(spread.mean, at, xerr=spread.error, fmt="|", color="#003F66", markersize=13, capsize=3, lw=1.6)
    axis.set_yticks(range(len(groups)), plain(list(groups)), fontsize=_SIZE)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(f"{plain([name])[0]}: each seed, mean and standard error", fontsize=_SIZE)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis="x", color="#DDDDDD", lw=0.6)
    axis.set_axisbelow(True)
    _open(axis)
    return save(figure, path)


def band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest of several curves at each step at which one of them has a value.

    Between its own steps a curve is taken to be straight; before its first and after its last step it plays no part.

    Args:
        curves: Points (step, value) in order of their steps, one curve per seed, none empty.

    Returns:
        Steps, means, lowest and highest values, float64, shape (steps,).

    Example:
        >>> steps, mean, low, high = band([[(0, 1.0), (2, 3.0)], [(0, 3.0), (1, 3.0)]])
        >>> steps.tolist(), mean.tolist(), low.tolist()
        ([0.0, 1.0, 2.0], [2.0, 2.5, 3.0], [1.0, 2.0, 3.0])
    """
    grid = np.unique(np.array([step for curve in curves for step, _ in curve], dtype=np.float64))
    if len(grid) > _POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, _POINTS).astype(int)]
    rows = []
    for curve in curves:
        steps, values = np.array(curve, dtype=np.float64).T
        rows.append(np.interp(grid, steps, values, left=np.nan, right=np.nan))
    table = np.stack(rows)
    seen = ~np.isnan(table).all(0)
    grid, table = grid[seen], table[:, seen]
    return grid, np.nanmean(table, 0), np.nanmin(table, 0), np.nanmax(table, 0)


def learning(panels: Mapping[str, Mapping[str, Sequence[Curve]]], path: str | Path) -> Path:
    """Draws learning curves, one panel per metric, one line per group with a band from its lowest to its highest seed.

    Args:
        panels: By metric, the curves of every seed by label; at most as many labels as there are `COLOURS`.
        path: Where the picture goes; the suffix says the format.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(7.0, 0.6 + 2.7 * len(panels)), layout="constrained", dpi=160)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    every = list(dict.fromkeys(label for groups in panels.values() for label in groups))
    names = dict(zip(every, plain(every), strict=True))
    lines: dict[str, Any] = {}
    for (metric, groups), axis in zip(panels.items(), axes, strict=True):
        for label, curves in groups.items():
            steps, mean, low, high = band(curves)
            colour = COLOURS[every.index(label) % len(COLOURS)]
            (lines[label],) = axis.plot(steps, mean, color=colour, lw=1.5, marker="." if len(steps) < 12 else "")
            if len(curves) > 1:
                axis.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
        axis.set_ylabel(plain([metric])[0], fontsize=_SIZE)
        axis.grid(color="#E5E5E5", lw=0.6)
        _open(axis)
    axes[-1].set_xlabel("optimizer step", fontsize=_SIZE)
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    box: dict[str, Any] = {"loc": "outside upper center", "ncols": 2 if len(every) > 3 else 3, "frameon": False}
    figure.legend([lines[label] for label in every], [names[label] for label in every], fontsize=_SIZE, **box)
    return save(figure, path)


def memory(groups: Mapping[str, Mapping[str, float]], path: str | Path) -> Path:
    """Draws the memory by part at the moment of the peak, one bar per group, the first on top.

    Args:
        groups: Bytes by part, by label.
        path: Where the picture goes; the suffix says the format.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(7.0, 1.3 + 0.34 * len(groups)), layout="constrained", dpi=160)
    axis = figure.subplots()
    left = np.zeros(len(groups))
    for part, colour in PARTS.items():
        widths = np.array([parts.get(part, 0) / MIB for parts in groups.values()])
        axis.barh(range(len(groups)), widths, left=left, color=colour, label=part, height=0.7)
        left += widths
    axis.set_yticks(range(len(groups)), plain(list(groups)), fontsize=_SIZE)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel("memory at the peak (MiB)", fontsize=_SIZE)
    _open(axis)
    box: dict[str, Any] = {"loc": "outside upper center", "ncols": len(PARTS), "frameon": False}
    figure.legend(*axis.get_legend_handles_labels(), fontsize=_SIZE, **box)
    return save(figure, path)


def _open(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
