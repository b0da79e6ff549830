"""Pictures and page of a run: the numbers behind them, and that the files are whole."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from apportion import comparison, report
from apportion.comparison import Row
from apportion.selection import History


def history(steps: list[int], masks: list[list[int]], names: list[str]) -> History:
    return History(steps, torch.tensor(masks).bool(), tuple(names))


LAYERS = [f"model.encoder.layer.{i}" for i in range(3)]


def test_a_selection_holds_until_the_next_one() -> None:
    rows, grid = report.shares(history([0, 2], [[1, 0, 0], [0, 0, 1]], LAYERS), total_steps=5)
    assert rows == LAYERS
    assert grid.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]


def test_steps_before_the_first_selection_are_blank() -> None:
    _, grid = report.shares(history([2], [[1, 0, 1]], LAYERS), total_steps=4)
    assert np.isnan(grid[:, :2]).all()
    assert grid[:, 2:].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_matrices_count_as_shares_of_their_layer() -> None:
    names = [f"encoder.layer.{i}.{part}" for i in range(2) for part in ("q.dense", "k", "up.3", "down")]
    rows, grid = report.shares(history([0], [[1, 0, 0, 0, 1, 1, 1, 0]], names), total_steps=2)
    assert rows == ["encoder.layer.0", "encoder.layer.1"]
    assert grid.tolist() == [[0.25, 0.25], [0.75, 0.75]]


def test_encoder_and_decoder_layers_are_kept_apart() -> None:
    rows, _ = report.shares(history([0], [[1, 0, 1]], ["encoder.block.0", "decoder.block.0", "lm_head"]), total_steps=1)
    assert rows == ["encoder.block.0", "decoder.block.0", "lm_head"]


def test_spread_is_the_sample_standard_deviation() -> None:
    row = Row("lisa", (0.80, 0.90, 0.85))
    assert row.mean == pytest.approx(0.85)
    assert row.spread == pytest.approx(0.05)
    assert Row("once", (0.8,)).spread == 0.0


def run(method: str, accuracy: float, seconds: float | None, peak: int) -> dict[str, object]:
    return {"method": method, "accuracy": accuracy, "seconds_per_step": seconds, "memory": {"weights": 3, "peak": peak}}


def test_runs_of_a_method_become_one_row() -> None:
    results = [
        run("full", 0.5, 0.01, 8),
        run("lisa", 0.6, 0.03, 5),
        run("full", 0.7, 0.05, 9),
        run("full", 0.6, None, 7),
    ]
    full, lisa = comparison.summarise(results)
    assert (full.name, full.accuracies, lisa.name) == ("full", (0.5, 0.7, 0.6), "lisa")
    assert full.seconds == pytest.approx(0.03)
    assert full.memory["peak"] == 9
    assert comparison.summarise([run("short", 0.5, None, 8)])[0].seconds is None


@pytest.mark.parametrize(
    ("accuracies", "side"),
    [((0.70, 0.72), "above it by more"), ((0.60, 0.64), "within"), ((0.50, 0.52), "below it by more")],
)
def test_verdict_puts_a_method_on_the_right_side_of_the_bar(accuracies: tuple[float, ...], side: str) -> None:
    said = comparison.verdict([Row("random", (0.60, 0.62)), Row("lisa", accuracies)], bar="random")
    assert side in said
    assert [other in said for other in ("above it by more", "within", "below it by more")].count(True) == 1


def test_a_difference_as_large_as_the_spread_is_within_it() -> None:
    rows = [Row("random", (0.5, 0.5)), Row("lisa", (0.5, 1.0))]
    assert rows[1].mean - rows[0].mean < math.hypot(rows[1].spread, rows[0].spread)
    assert "within the spread: lisa (+25.0)" in comparison.verdict(rows, bar="random")


def test_verdict_without_the_bar_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"`verdict\(bar='random'\)` names no row; there are lisa"):
        comparison.verdict([Row("lisa", (0.5,))], bar="random")


def test_verdict_on_one_seed_claims_nothing() -> None:
    said = comparison.verdict([Row("random", (0.6, 0.7)), Row("lisa", (0.9,))], bar="random")
    assert said == "One seed has no spread: no method can be held to random."


def picture(tmp_path: Path) -> Path:
    made = history([0, 3], [[1, 0, 0], [0, 1, 1]], LAYERS)
    return report.selection_heatmap({"lisa": made, "badam": made}, 9, tmp_path / "new" / "layers.png", "when")


def test_the_heat_map_is_dark_where_a_layer_is_trained(tmp_path: Path) -> None:
    def ink(mask: list[int]) -> float:
        file = report.selection_heatmap({"run": history([0], [mask], LAYERS)}, 4, tmp_path / "layers.png")
        return float(imread(file)[:, :800, :3].mean())

    none, one, three = ink([0, 0, 0]), ink([1, 0, 0]), ink([1, 1, 1])
    assert none > one > three


def orange(tmp_path: Path, *gradients: int) -> int:
    """Pixels in the colour of gradients, in a picture of one run per argument."""
    runs = {
        f"run {i}": [{"step": step, "weights": 2**20, "gradients": g} for step in range(4)]
        for i, g in enumerate(gradients)
    }
    image = imread(report.memory_timeline(runs, tmp_path / "memory.png"))
    return int((np.abs(image[..., :3] - np.array([0xE6, 0x9F, 0x00]) / 255).max(-1) < 0.02).sum())


def test_the_memory_timeline_shows_the_parts_in_their_colours(tmp_path: Path) -> None:
    assert orange(tmp_path, 2**20) > 10 * orange(tmp_path, 0)


def test_the_memory_timeline_draws_an_odd_run_as_well(tmp_path: Path) -> None:
    assert orange(tmp_path, 0, 0, 2**20) > 10 * orange(tmp_path, 0, 0, 0)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.images: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.outside += [v for k, v in attrs if k in ("href", "src") and v and not v.startswith("data:")]
        if tag == "img":
            self.images.append(str(values["src"]))
        if tag == "tr":
            self.cells.append([])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "button"):
            self.cells[-1].append(data)


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    memory = {
        "weights": 3 * 2**20,
        "gradients": 2**19,
        "optimizer": 2**20,
        "activations": 0,
        "temporaries": 0,
        "peak": 5 * 2**20,
    }
    rows = [Row("no fine-tuning", (0.6,)), Row("<LISA> & co", (0.90, 0.94), 0.0123, memory)]
    file = picture(tmp_path)
    page = report.html_page(rows, {"A <caption>": file}, tmp_path / "index.html", "Costs $5", ["x < y"]).read_text(
        "utf-8"
    )
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.outside == []
    assert re.search(r"url\(|@import|fetch\(|https?://", page) is None
    assert [base64.b64decode(image.split(",")[1]) for image in parsed.images] == [file.read_bytes()]
    assert parsed.cells[0] == list(report.HEADINGS)
    assert parsed.cells[1] == ["no fine-tuning", "60.0", *"--------"]
    assert parsed.cells[2] == ["<LISA> & co", "92.0 ± 2.8", "5.00", "3.00", "0.50", "1.00", "0.00", "0.00", "-", "12.3"]
    assert "x &lt; y" in page
    assert "Costs $5" in page


def test_the_page_sorts_by_numbers_and_not_by_text(tmp_path: Path) -> None:
    rows = [Row("a", (0.95,), 0.1), Row("b", (1.0,), 0.02)]
    page = report.html_page(rows, {}, tmp_path / "index.html", "t").read_text("utf-8")
    assert re.findall(r'data-value="([^"]*)"', page)[0::9] == ["0.95", "1.0"]
    assert 'data-value="0.1">100.0' in page
