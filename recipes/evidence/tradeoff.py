"""What is gained against what is forgotten, at every learning rate that was run: one without the other misleads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apportion.recipes.evidence.cells import SEARCH_SEED, Records
from apportion.recipes.evidence.methods import BY_KEY, METHODS
from apportion.recipes.evidence.tables import LAYOUTS, Layout, before

ABOUT = """\
A higher learning rate learns more and forgets more, so two methods, each at the rate that suits it best on new text,
differ in what they forget whatever they choose. One forgets less by its choice only where its points lie below those of
the other at the same test loss. *Minus random there* is that distance, from the line that joins those points of its
random counterpart that no other of them beats in both; it is given for points that no other of the same method beats in
both, where that line reaches. *Not reached* means that no rate of random choice came to so low a test loss."""
NEVER = "not reached"
GREYS, BLUE, ORANGE = "#777777", "#0072B2", "#E69F00"


@dataclass(frozen=True)
class Point:
    """A method at a learning rate, as means over seeds.

    Args:
        rate: The learning rate.
        seeds: How many seeds.
        gained: What is measured on new text.
        forgotten: The change on text of before.
    """

    rate: float
    seeds: int
    gained: float
    forgotten: float


def frontier(some: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, by what is measured on new text, which is to be low.

    Example:
        >>> at = [Point(1e-3, 1, 3.0, 0.5), Point(1e-2, 1, 2.0, 1.0), Point(1e-1, 1, 2.5, 2.0)]
        >>> [point.rate for point in frontier(at)]
        [0.01, 0.001]
    """
    kept: list[Point] = []
    for point in sorted(some, key=lambda p: (p.gained, p.forgotten)):
        if not kept or point.forgotten < kept[-1].forgotten:
            kept.append(point)
    return kept


def above(point: Point, some: Sequence[Point]) -> float | None:
    """How far a point lies above the frontier of others, at the same measure on new text; negative below it.

        f - (f_a + (f_b - f_a) (g - g_a) / (g_b - g_a))     between the neighbours a and b of g on the frontier

    Args:
        point: The point (g, f).
        some: The others.

    Returns:
        None where the frontier does not reach.

    Example:
        >>> others = [Point(1e-3, 1, 3.0, 0.5), Point(1e-2, 1, 2.0, 1.5)]
        >>> above(Point(1e-2, 1, 2.5, 1.25), others), above(Point(1e-2, 1, 1.9, 1.0), others)
        (0.25, None)
    """
    line = frontier(some)
    for a, b in pairwise(line):
        if a.gained <= point.gained <= b.gained:
            share = (point.gained - a.gained) / (b.gained - a.gained)
            return point.forgotten - (a.forgotten + share * (b.forgotten - a.forgotten))
    return None


def has(layout: Layout) -> bool:
    """Whether a grid measures both."""
    return len(layout.measures) == 2 and layout.measures[1].change


def points(records: Records, grid: str, task: str) -> dict[str, list[Point]]:
    """The points of every method on a task, by key, in the order of their rates."""
    gain, loss = LAYOUTS[grid].measures
    start = before(records, grid, task)[1]
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for path in sorted((records.out / grid / task).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics, cell = record.get("metrics", {}), record["cell"]
        values = (metrics.get(gain.key), metrics.get(loss.key))
        if cell["seed"] != SEARCH_SEED and cell["method"] != "base" and None not in (*values, start):
            found.setdefault((cell["method"], cell["rate"]), []).append((values[0], values[1] - start))
    made: dict[str, list[Point]] = {}
    for method in METHODS:
        rates = sorted(rate for key, rate in found if key == method.key)
        some = [(rate, found[method.key, rate]) for rate in rates]
        if some:
            made[method.key] = [
                Point(rate, len(v), statistics.fmean(a for a, _ in v), statistics.fmean(b for _, b in v))
                for rate, v in some
            ]
    return made


def table(records: Records, grid: str, task: str) -> list[str]:
    """The Markdown lines of one task; none without cells."""
    gain, loss = LAYOUTS[grid].measures
    found = points(records, grid, task)
    if not found:
        return []
    made = [
        f"### {LAYOUTS[grid].tasks[task]}: both, at every rate that was run",
        "",
        f"| method | learning rate | seeds | {gain.title} | {loss.title} | minus random there |",
        "|---|---|---|---|---|---|",
    ]
    for key, some in found.items():
        bar = found.get(BY_KEY[key].bar or "", [])
        best = frontier(some)
        for at in some:
            beside = _beside(at, bar, loss.digits) if at in best else ""
            shown = f"{at.gained:.{gain.digits}f} | {at.forgotten:+.{loss.digits}f}"
            made.append(f"| {BY_KEY[key].title} | {at.rate:g} | {at.seeds} | {shown} | {beside} |")
    return [*made, ""]


def _beside(at: Point, bar: Sequence[Point], digits: int) -> str:
    found = above(at, bar)
    if found is not None:
        return f"{found:+.{digits}f}"
    return NEVER if len(bar) > 1 and at.gained < min(point.gained for point in bar) else ""


def picture(records: Records, grid: str, path: Path) -> bool:
    """Draws every method's points, joined from rate to rate; whether there was anything to draw.

    Points that have learned nothing, whose measure on new text is no better than before, are left to the table.

    Args:
        records: The cells that were run.
        grid: Name of the grid.
        path: Of the PNG file.
    """
    layout = LAYOUTS[grid]
    tasks = {task: found for task in layout.tasks if (found := points(records, grid, task))}
    if not tasks:
        return False
    figure = Figure(figsize=(6.4 * len(tasks), 5.2), layout="constrained")
    for axes, (task, found) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        start = before(records, grid, task)[0]
        assert start is not None
        _panel(axes, {key: [at for at in some if at.gained < start] for key, some in found.items()})
        axes.set_title(layout.tasks[task], fontsize=10)
        axes.set_xlabel(f"{layout.measures[0].title} (lower is better)", fontsize=9)
        axes.set_ylabel(f"{layout.measures[1].title} (lower is better)", fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _panel(axes: Axes, found: Mapping[str, list[Point]]) -> None:
    bars = {method.bar for method in METHODS}
    for number, (key, some) in enumerate(found.items()):
        method = BY_KEY[key]
        colour = BLUE if method.bar else ORANGE if key in bars else GREYS
        xs, ys = [at.gained for at in some], [at.forgotten for at in some]
        axes.plot(xs, ys, "-", color=colour, alpha=0.5, linewidth=1)
        axes.plot(xs, ys, "os^vDPX*<>ph"[number % 12], color=colour, markersize=5, label=method.title)
    axes.legend(fontsize=7, frameon=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
