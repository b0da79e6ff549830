"""Pictures and one HTML page of a run or a sweep: what was trained when, the memory by part, and the table of results.

Everything here takes plain data and writes files. The figures use colours that colour-blind readers tell apart (Okabe
and Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from apportion.comparison import Row
from apportion.report_page import Table, page, picture
from apportion.report_page import notes as paragraphs

PARTS = {
    "weights": "#999999",
    "gradients": "#E69F00",
    "optimizer": "#0072B2",
    "activations": "#009E73",
    "temporaries": "#CC79A7",
}
"""The parts of the memory in the order in which they are stacked, and their colours."""

MIB = 2**20
_COLUMNS = ("peak", *PARTS, "offloaded")
HEADINGS = ("method", "accuracy (%)", "peak (MiB)", *_COLUMNS[1:], "ms per step")
"""What stands over the columns of the table."""

_TRAINED = LinearSegmentedColormap.from_list("trained", ["#F2F2F2", "#56B4E9", "#003F66"])
_SIZE = 9.5


class HistoryLike(Protocol):
    """What was selected when: steps (h of them), how much of each unit (shape (h, n), in [0, 1]) and n unit names."""

    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def amounts(self) -> Tensor: ...
    @property
    def names(self) -> Sequence[str]: ...


def shares(history: HistoryLike, total_steps: int) -> tuple[list[str], np.ndarray]:
    """How much of each layer was selected at each step.

    A unit belongs to the layer that its name holds up to the first component that is a number (``encoder.layer.3``); a
    unit without one is a row of its own. The value is the share of the layer's units that were selected.

    Args:
        history: Selections; each holds until the next one.
        total_steps: Optimizer steps of the run.

    Returns:
        Names of the rows and the shares, float64, shape (layers, total_steps), NaN before the first selection.
    """
    owners = [_layer(name) for name in history.names]
    layers = list(dict.fromkeys(owners))
    member = np.array([[owner == layer for owner in owners] for layer in layers], dtype=np.float64)
    chosen = np.asarray(history.amounts.numpy(), dtype=np.float64) @ (member / member.sum(1, keepdims=True)).T
    last = np.searchsorted(np.asarray(history.steps), np.arange(total_steps), side="right") - 1
    return layers, np.where(last >= 0, chosen[last].T, np.nan)


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def selection_heatmap(
    histories: Mapping[str, HistoryLike], total_steps: int, path: str | Path, title: str = ""
) -> Path:
    """Draws which layers were trained when, one panel per run, and beside it the share of the steps of each layer.

    Args:
        histories: Selections by title of the panel.
        total_steps: Optimizer steps of the runs.
        path: Where the picture goes; the suffix says the format.
        title: Above all panels.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(7.0, 0.9 + 1.55 * len(histories)), layout="constrained", dpi=160)
    axes = figure.subplots(len(histories), 2, sharex="col", squeeze=False, width_ratios=(6, 1))
    image = None
    for (name, history), (when, much) in zip(histories.items(), axes, strict=True):
        layers, grid = shares(history, total_steps)
        rows = range(len(layers))
        image = when.imshow(
            grid, aspect="auto", interpolation="nearest", origin="lower", vmin=0, vmax=1, cmap=_TRAINED,
            extent=(0, total_steps, -0.5, len(layers) - 0.5),
        )  # fmt: skip
        when.set_title(name, loc="left", fontsize=10.5, fontweight="bold")
        when.set_ylabel("layer", fontsize=_SIZE)
        when.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        much.barh(rows, 100 * np.nanmean(grid, axis=1), color="#0072B2", height=0.8)
        much.set(ylim=(-0.5, len(layers) - 0.5), xlim=(0, 100), yticks=[])
        for side in ("top", "right"):
            much.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("optimizer step", fontsize=_SIZE)
    axes[-1, 1].set_xlabel("% of steps", fontsize=_SIZE)
    if image is not None:
        scale = figure.colorbar(image, ax=axes[:, 0], location="top", fraction=0.02, pad=0.01, aspect=60)
        scale.set_label("share of the layer's units that are trained", size=_SIZE)
    figure.suptitle(title, fontsize=12)
    return save(figure, path)


def density_heatmap(histories: Mapping[str, HistoryLike], path: str | Path, title: str = "") -> Path:
    """Draws the share of selected entries of every matrix at the end of a run, one panel per run, layers from below.

    Args:
        histories: Selections of entries by title of the panel.
        path: Where the picture goes; the suffix says the format.
        title: Above all panels.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(7.0, 0.9 + 2.1 * len(histories)), layout="constrained", dpi=160)
    axes = figure.subplots(len(histories), 1, squeeze=False)[:, 0]
    for (name, history), axis in zip(histories.items(), axes, strict=True):
        layers, kinds, grid = densities(history)
        image = axis.imshow(100 * grid, aspect="auto", interpolation="nearest", origin="lower", vmin=0, cmap=_TRAINED)
        axis.set_title(name, loc="left", fontsize=10.5, fontweight="bold")
        axis.set_ylabel("layer", fontsize=_SIZE)
        axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_ylim(-0.5, len(layers) - 0.5)
        figure.colorbar(image, ax=axis, pad=0.01).set_label("% of its entries", size=_SIZE)
    figure.suptitle(title, fontsize=12)
    return save(figure, path)


def densities(history: HistoryLike) -> tuple[list[str], list[str], np.ndarray]:
    """How much of every matrix was selected last.

    Args:
        history: Selections of entries; names of tensors end with the matrix and ``weight``.

    Returns:
        Names of the layers, of the matrices in a layer, and the shares, float64, shape (layers, matrices), NaN where a
        layer has no such matrix.
    """
    places = [(_layer(name), _matrix(name)) for name in history.names]
    layers = list(dict.fromkeys(layer for layer, _ in places))
    kinds = list(dict.fromkeys(kind for _, kind in places))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), share in zip(places, history.amounts[-1].tolist(), strict=True):
        grid[layers.index(layer), kinds.index(kind)] = share
    return layers, kinds, grid


def _matrix(name: str) -> str:
    """What the tensor is called inside its layer, without what all names there have in common."""
    inside = name.removeprefix(_layer(name)).strip(".").removesuffix("weight").strip(".")
    return inside.rpartition(".")[2] or name


def memory_timeline(timelines: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path, title: str = "") -> Path:
    """Draws the memory by part over the steps, stacked, one panel per run with one scale for all.

    Args:
        timelines: By title of the panel, one point per step, in order: ``step``, and bytes by part.
        path: Where the picture goes; the suffix says the format.
        title: Above all panels.

    Returns:
        ``path``.
    """
    columns = 2 if len(timelines) > 1 else 1
    lines = math.ceil(len(timelines) / columns)
    figure = Figure(figsize=(7.0, 1.2 + 1.65 * lines), layout="constrained", dpi=160)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[len(timelines) :]:
        panel.set_visible(False)
    for at, ((name, points), panel) in enumerate(zip(timelines.items(), axes.flat, strict=False)):
        held = [*points, {**points[-1], "step": points[-1]["step"] + 1}]  # the last step has a width as well
        steps = [point["step"] for point in held]
        layers = [[point.get(part, 0) / MIB for point in held] for part in PARTS]
        panel.stackplot(steps, layers, colors=PARTS.values(), labels=PARTS, linewidth=0, step="post")
        peak = max(sum(column) for column in zip(*layers, strict=True))
        panel.axhline(peak, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(f"{name}: peak {peak:.1f} MiB", loc="left", fontsize=10)
        panel.margins(x=0)
        if at % columns == 0:
            panel.set_ylabel("memory (MiB)", fontsize=_SIZE)
        if at + columns >= len(timelines):  # the lowest of its column
            panel.set_xlabel("optimizer step", fontsize=_SIZE)
            panel.tick_params(labelbottom=True)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    box: dict[str, Any] = {"loc": "outside upper center", "ncols": len(PARTS), "frameon": False}
    figure.legend(handles, labels, title=title or None, fontsize=_SIZE, title_fontsize=12, **box)
    return save(figure, path)


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure and returns where it is; folders that are missing are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def cells(row: Row) -> list[tuple[str, float | None]]:
    """The cells of a row after the name: text and the number to sort by."""
    made: list[tuple[str, float | None]] = [(f"{100 * row.mean:.1f} ± {100 * row.spread:.1f}", row.mean)]
    if len(row.accuracies) == 1:
        made = [(f"{100 * row.mean:.1f}", row.mean)]
    for part in _COLUMNS:
        size = row.memory.get(part)
        made.append(("-" if size is None else f"{size / MIB:.2f}", None if size is None else float(size)))
    made.append(("-" if row.seconds is None else f"{1000 * row.seconds:.1f}", row.seconds))
    return made


def html_page(
    rows: Sequence[Row], figures: Mapping[str, str | Path], path: str | Path, title: str, notes: Sequence[str] = ()
) -> Path:
    """Writes one page that needs nothing else: table, notes, and the pictures inside it.

    Args:
        rows: The table; a click on a heading sorts it.
        figures: PNG files by caption.
        path: Where the page goes.
        title: Heading of the page.
        notes: Paragraphs under the table, plain text.

    Returns:
        ``path``.
    """
    listed = tuple(((row.name, row.name), *cells(row)) for row in rows)
    pictures = [picture(file, caption) for caption, file in figures.items()]
    return page(title, [Table(HEADINGS, listed).html(), paragraphs(notes), *pictures], path)
