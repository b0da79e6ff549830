"""The picture of a budget of ranks: how many each matrix has, over the steps of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apportion.report import HistoryLike, save

_RANKS = LinearSegmentedColormap.from_list("ranks", ["#F2F2F2", "#56B4E9", "#003F66"])
_ROW = 0.17  # inches


def rank_counts(history: HistoryLike, total_steps: int) -> tuple[list[str], np.ndarray]:
    """How many ranks of each matrix were in after each optimizer step.

    A choice of step s was made when s steps were done, so that it shows from step s on; step 0 is the start.

    Args:
        history: Choices of ranks; a name is that of a matrix and the number of a rank, with a dot in between.
        total_steps: Optimizer steps of the run.

    Returns:
        Names of the matrices, in the order of the model, and the counts, float64, shape (matrices, total_steps + 1),
        NaN before the first choice.

    Raises:
        ValueError: If a name does not end with a number, as those of ranks do.

    Example:
        >>> import torch
        >>> from apportion.selection import History
        >>> masks = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
        >>> rank_counts(History([0, 2], masks, ("q.0", "q.1", "v.0", "v.1")), 3)
        (['q', 'v'], array([[2., 2., 1., 1.],
               [2., 2., 0., 0.]]))
    """
    owners = [name.rpartition(".") for name in history.names]
    wrong = [".".join((owner, index)) for owner, _, index in owners if not owner or not index.isdigit()]
    if wrong or not owners:
        raise ValueError(
            "`rank_counts(...)` needs a history of ranks, whose names end with a number behind a dot, but has "
            f"{wrong[0] if wrong else 'no name'}: draw layers with `apportion.report.selection_heatmap`."
        )
    matrices = list(dict.fromkeys(owner for owner, _, _ in owners))
    places = {name: i for i, name in enumerate(matrices)}
    member = np.zeros((len(owners), len(matrices)))
    member[np.arange(len(owners)), [places[owner] for owner, _, _ in owners]] = 1.0
    counts = np.asarray(history.amounts.numpy(), dtype=np.float64) @ member
    last = np.searchsorted(np.asarray(history.steps), np.arange(total_steps + 1), side="right") - 1
    return matrices, np.where(last >= 0, counts[last].T, np.nan)


def short(names: list[str]) -> list[str]:
    """Names without the parts that all of them begin with.

    Example:
        >>> short(["model.layers.0.q", "model.layers.1.q"])
        ['0.q', '1.q']
        >>> short(["model.q"])
        ['q']
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def rank_heatmap(history: HistoryLike, total_steps: int, path: str | Path, title: str = "") -> Path:
    """Draws the ranks of each matrix over the steps; its last number stands at the right, their sum above.

    Args:
        history: Choices of ranks, as a callback's ``history`` or a run folder's ``history/<callback>.json`` has them.
        total_steps: Optimizer steps of the run.
        path: Where the picture goes; the suffix says the format.
        title: Above the picture.

    Returns:
        ``path``.
    """
    names, grid = rank_counts(history, total_steps)
    n = len(names)
    size = 7.5 if n <= 60 else max(2.5, 7.5 * 60 / n)
    figure = Figure(figsize=(7.5, min(14.0, 2.2 + _ROW * n)), layout="constrained", dpi=160)
    total, axis = figure.subplots(2, 1, sharex=True, height_ratios=(1.0, max(1.5, _ROW * n)))
    held = grid.sum(0)
    total.step(np.arange(total_steps + 2), [*held, held[-1]], where="post", color="#0072B2")
    total.set_ylim(bottom=0)
    total.set_ylabel("ranks in all", fontsize=8.5)
    for side in ("top", "right"):
        total.spines[side].set_visible(False)
    image = axis.imshow(
        grid, aspect="auto", interpolation="nearest", vmin=0, vmax=np.nanmax(grid), cmap=_RANKS,
        extent=(0, total_steps + 1, n - 0.5, -0.5),
    )  # fmt: skip
    axis.set_yticks(range(n), short(names), fontsize=size)
    axis.set_xlabel("optimizer steps done", fontsize=9.5)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    final = axis.secondary_yaxis("right")
    final.set_yticks(range(n), [f"{count:.0f}" for count in grid[:, -1]], fontsize=size)
    final.tick_params(length=0)
    axis.text(1.0, 1.0, " end", transform=axis.transAxes, fontsize=size, va="bottom")
    scale = figure.colorbar(image, ax=(total, axis), location="right", fraction=0.03, pad=0.02, aspect=30)
    scale.set_label("ranks that are in", size=9)
    scale.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.suptitle(title, fontsize=12)
    return save(figure, path)
