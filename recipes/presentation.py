"""What the demo shows of its runs: the table, what it says and does not say, the pictures and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from apportion import comparison, report, report_ranks
from apportion.entry_selection import EntryHistory
from apportion.selection import History

BARS = {
    "random layers": ("full tuning", "LoRA", "IST", "LISA", "HFT", "BAdam"),
    "random weights": ("ID3", "LIFT"),
}
"""Random choices, and the methods that are held to each."""

TITLE = "From printed to handwritten digits: ways to fine-tune one transformer"


def settings(experiment: str, overrides: Sequence[str] = ()) -> Any:
    """The config that ``apportion-train experiment=demo/<experiment>`` runs with."""
    with initialize_config_module("apportion.conf", version_base="1.3"):
        return compose("train", overrides=[f"experiment=demo/{experiment}", *overrides])


def references(overrides: Sequence[str]) -> tuple[list[comparison.Row], str]:
    """Rows for orientation, and what the accuracies are taken on.

    The rows: always the commonest class of the training set, and the pre-trained model as it is.
    """
    config = settings("full", overrides)
    data = instantiate(config.data, _convert_="all")
    data.setup("test")
    images, labels = (torch.stack([sample[key] for sample in data.test]) for key in ("pixel_values", "labels"))
    commonest = torch.stack([sample["labels"] for sample in data.train]).mode().values
    disable_progress_bar()
    module = instantiate(config.model, _convert_="all").eval()
    with torch.no_grad():
        guesses = module(pixel_values=images).logits.argmax(1)
    rows = [
        comparison.Row("majority class", (float((labels == commonest).float().mean()),)),
        comparison.Row("no fine-tuning", (float((labels == guesses).float().mean()),)),
    ]
    error = 100 * (0.9 * 0.1 / len(labels)) ** 0.5
    return rows, (
        f"Accuracy: on {len(labels)} handwritten digits after training on {len(data.train)} others, mean ± sample "
        f"standard deviation over the seeds. {len(labels)} images alone give an accuracy of 90 % a standard error of "
        f"{error:.1f} points."
    )


def draw(results: Sequence[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Draws the pictures of the first seed of every method, and returns them by caption."""
    first: dict[str, dict[str, Any]] = {}
    for result in results:
        first.setdefault(result["method"], result)
    told = {name: result["history"] for name, result in first.items() if result["history"]}
    histories = {name: history for name, history in told.items() if "masks" in history}
    pictures: dict[str, Path] = {}
    drawn: dict[str, History] = {}
    if histories:
        caption = (
            "Which layers were trained when, first seed. A cell is dark where all units of the layer are trained at "
            "that step (units are whole layers; for HFT, matrices; for AdaLoRA, ranks). The bars give the mean over "
            "the steps. Full tuning and LoRA train every layer at every step."
        )
        masks = {name: torch.tensor(history["masks"]).bool() for name, history in histories.items()}
        drawn = {n: History(h["steps"], masks[n], tuple(h["names"])) for n, h in histories.items()}
        steps = max(result["steps"] for result in first.values())
        pictures[caption] = report.selection_heatmap(drawn, steps, folder / "layers.png")
    ranks = next((name for name, history in told.items() if history.get("units") == "ranks"), None)
    if ranks is not None:
        caption = f"How many ranks of each matrix {ranks} has in, over the steps; first seed."
        last = first[ranks]["steps"]
        pictures[caption] = report_ranks.rank_heatmap(drawn[ranks], last, folder / "ranks.png", ranks)
    entries = {name: _entries(history) for name, history in told.items() if "counts" in history}
    if entries:
        caption = (
            "Where the selected entries lie at the end of the run, first seed: the share of each matrix that is "
            "trained. Every panel has a scale of its own."
        )
        pictures[caption] = report.density_heatmap(entries, folder / "density.png")
    timelines = {name: result["timeline"] for name, result in first.items() if result["timeline"]}
    if timelines:
        caption = (
            "Memory by part at the fullest moment of each of the first steps, first seed, one scale for all. It dips "
            "where an epoch ends with a smaller batch, and follows the lowest layer that trains."
        )
        pictures[caption] = report.memory_timeline(timelines, folder / "memory.png")
    return pictures


def _entries(history: dict[str, Any]) -> EntryHistory:
    counts, sizes = torch.tensor(history["counts"]), torch.tensor(history["sizes"])
    return EntryHistory(history["steps"], counts, sizes, tuple(history["names"]))


def table(rows: Sequence[comparison.Row]) -> Table:
    """The table for the terminal, 80 columns wide."""
    short = ("method", "accuracy %", "peak", "weights", "grads", "optim.", "activ.", "temp.", "offl.", "ms")
    caption = "memory in MiB at the moment of the peak; milliseconds per step"
    made = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption)
    for at, heading in enumerate(short):
        made.add_column(heading, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        made.add_row(row.name, *(text for text, _ in report.cells(row)))
    return made


def notes(rows: Sequence[comparison.Row], tracked: int) -> list[str]:
    """What a reader of the table must know; the first is what it shows."""
    return [
        " ".join(_held(rows, bar) for bar in BARS),
        "Random layers and IST train LoRA adapters in a quarter of the layers, drawn anew at every step; IST alone "
        "learns which layers matter, so it is the one that has to beat them. LISA, HFT and BAdam train the model's "
        "own weights and choose at random by design: their distance from random layers says what training weights "
        "instead of adapters is worth here. Random weights, ID3 and LIFT train the classifier and 5 % of the single "
        "weights of the matrices; AdaLoRA begins with twelve ranks in each matrix and ends with six on average.",
        f"Memory: by part, at the fullest moment of the first {tracked} steps, of the seed with the highest peak. What "
        "is offloaded (optimizer state of adapters that rest) is not in the peak; without an accelerator it lies in "
        "the same memory all the same. Full tuning and LoRA hold their gradients through the next forward pass, as "
        "Lightning does; the selecting callbacks free them after each step.",
        "Time: median over the steps after those, without tracking. At this size little of it is arithmetic: it says "
        "nothing about large models.",
        "Learning rates: for each method the best of five on validation images, with seeds not reported here.",
    ]


def _held(rows: Sequence[comparison.Row], bar: str) -> str:
    compared = [row for row in rows if row.memory and row.name in (bar, *BARS[bar])]
    if len(compared) < 2 or all(row.name != bar for row in compared):
        return f"Nothing to hold to {bar}: it, or all else, was left out."
    return comparison.verdict(compared, bar)


def present(results: Sequence[dict[str, Any]], overrides: Sequence[str], folder: Path, console: Console) -> None:
    """Prints the table and what it shows, and writes pictures, page and data."""
    orientation, measured_on = references(overrides)
    rows = [*orientation, *comparison.summarise(results)]
    shown, *known = notes(rows, max(len(result["timeline"]) for result in results))
    report.html_page(rows, draw(results, folder), folder / "index.html", TITLE, [shown, measured_on, *known])
    (folder / "results.json").write_text(json.dumps(list(results), indent=1) + "\n", encoding="utf-8")
    console.print(table(rows))
    console.print(shown, highlight=False)
