"""The picture of ranks: what it counts, and that it can be drawn from a finished run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from rank_methods import RANK_METHODS, svd_net
from toys import Task, fit

from apportion import report_ranks
from apportion.callbacks import AdaLoRA
from apportion.recipes.train import save_history
from apportion.report_ranks import rank_counts, rank_heatmap, short
from apportion.selection import History

NAMES = tuple(f"net.{m}.{i}" for m in ("a", "b") for i in range(3))
MASKS = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()


def test_counts_are_those_after_each_step() -> None:
    names, grid = rank_counts(History([1, 3, 4], MASKS, NAMES), 5)
    assert names == ["net.a", "net.b"]
    assert np.isnan(grid[:, 0]).all()
    assert grid[:, 1:].tolist() == [[3, 3, 2, 1, 1], [3, 3, 1, 0, 0]]


def test_matrices_of_unequal_ranks_and_orders_are_counted_by_name() -> None:
    history = History([0], torch.tensor([[1, 1, 0, 1]]).bool(), ("b.0", "a.0", "b.1", "b.2"))
    assert rank_counts(history, 0)[1].tolist() == [[2.0], [1.0]]


def test_what_is_no_history_of_ranks_is_refused() -> None:
    for names in (("layers.0", "layers.x"), ("0", "1"), ()):
        with pytest.raises(ValueError, match="needs a history of ranks"):
            rank_counts(History([0], torch.ones(1, len(names)).bool(), names), 3)


def test_names_lose_what_all_of_them_begin_with() -> None:
    assert short(["m.layers.0.q", "m.layers.0.v", "m.layers.1.q"]) == ["0.q", "0.v", "1.q"]
    assert short(["m.q", "m.q.k"]) == ["q", "q.k"]


def test_the_picture_shows_counts_final_ranks_and_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    keep = report_ranks.save
    monkeypatch.setattr(report_ranks, "save", lambda figure, path: (drawn.append(figure), keep(figure, path))[1])
    path = rank_heatmap(History([0, 3, 4], MASKS, NAMES), 5, tmp_path / "deep" / "ranks.png", "a run")
    assert imread(path).std() > 0.05
    total, axis, *_ = drawn[0].axes
    assert total.lines[0].get_ydata().tolist() == [6, 6, 6, 3, 1, 1, 1]  # type: ignore[union-attr]
    assert np.asarray(axis.images[0].get_array()).tolist() == [[3, 3, 3, 2, 1, 1], [3, 3, 3, 1, 0, 0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.child_axes[0].get_yticklabels()] == ["1", "0"]
    assert drawn[0].get_suptitle() == "a run"


@pytest.mark.parametrize("name", RANK_METHODS)
def test_a_finished_run_folder_has_all_that_the_picture_needs(name: str, tmp_path: Path) -> None:
    row = RANK_METHODS[name]
    driver = row.make()
    fit(Task(row.net()), driver, steps=8)
    save_history(tmp_path / "history" / f"{name}.json", driver)
    saved: dict[str, Any] = json.loads((tmp_path / "history" / f"{name}.json").read_text())
    history = History(saved["steps"], torch.tensor(saved["masks"]).bool(), tuple(saved["names"]))
    names, grid = rank_counts(history, 8)
    per_adapter = driver.selection.per_adapter  # type: ignore[attr-defined]
    assert dict(zip(names, grid[:, -1].tolist(), strict=True)) == per_adapter
    assert tuple(grid.sum(0)[1:].astype(int)) == row.selected
    assert rank_heatmap(history, 8, tmp_path / "ranks.png").stat().st_size > 1000


def test_an_interrupted_run_is_drawn_up_to_where_it_got() -> None:
    driver = AdaLoRA(target=20, warmup=1, final=3, every=2)
    fit(Task(svd_net()), driver, steps=8)
    assert rank_counts(driver.history, 3)[1].shape == (12, 4)
