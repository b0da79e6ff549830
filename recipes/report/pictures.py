"""The pictures of the report, each drawn into a folder and put into the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apportion import report, report_curves, report_ranks
from apportion.entry_selection import EntryHistory
from apportion.recipes.report.summary import Method, Summary, first
from apportion.recipes.sweeps.runs import Run
from apportion.report_page import picture
from apportion.selection import History

PANELS = 6
"""Selections in one picture."""

DRAWN = 24
"""Methods whose selections are drawn."""

DOTS = 40
"""Methods in the picture of the quality, and of the memory."""


def quality(summary: Summary, folder: Path) -> str:
    """Every seed of every method, best first."""
    chosen = [method for method in summary.methods if method.spread(summary.quality)]
    values = {method.label: _values(method, summary.quality) for method in chosen[:DOTS]}
    if not values:
        return ""
    caption = "Dots are seeds; the bar is the mean and the whisker its standard error. One dot has no standard error."
    if len(chosen) > DOTS:
        caption += f" The first {DOTS} of {len(chosen)} methods in the order of the table."
    return picture(report_curves.quality(values, summary.quality, folder / "quality.png"), caption)


def _values(method: Method, metric: str) -> tuple[float, ...]:
    found = method.spread(metric)
    return found.values if found else ()


def learning(summary: Summary, folder: Path) -> str:
    """Loss in training and the validated metric of the best methods."""
    most = len(report_curves.COLOURS)
    chosen = [method for method in summary.methods if any(run.curves for run in method.runs)]
    panels: dict[str, dict[str, Sequence[report_curves.Curve]]] = {}
    for metric in _followed(summary):
        found = {method.label: _curves(method, metric) for method in chosen[:most]}
        if any(found.values()):
            panels[metric] = {label: curves for label, curves in found.items() if curves}
    if not panels:
        return ""
    caption = "Mean over the seeds; the band reaches from the lowest to the highest seed. Values as they were logged."
    if len(chosen) > most:
        caption += f" The first {most} of {len(chosen)} methods in the order of the table."
    return picture(report_curves.learning(panels, folder / "learning.png"), caption)


def _followed(summary: Summary) -> list[str]:
    """The training loss, what is validated in the place of the quality, and the validation loss."""
    return list(dict.fromkeys(["train/loss", summary.quality.replace("test/", "val/"), "val/loss"]))


def _curves(method: Method, metric: str) -> list[report_curves.Curve]:
    return [run.curves[metric] for run in method.runs if run.curves.get(metric)]


def memory(summary: Summary, folder: Path) -> str:
    """The memory by part of the methods that were measured."""
    held = {label: run.measured["memory"] for label, run in first(summary.methods).items() if _peak(run)}
    if not held:
        return ""
    shown = dict(list(held.items())[:DOTS])
    return picture(report_curves.memory(shown, folder / "memory.png"), "Memory by part at the peak, first seed.")


def _peak(run: Run) -> bool:
    return bool(run.measured and run.measured["memory"])


def timelines(summary: Summary, folder: Path) -> str:
    """The memory by part over the steps, of the first methods."""
    told = {label: run.measured["timeline"] for label, run in first(summary.methods).items() if run.measured}
    told = dict(list({label: points for label, points in told.items() if points}.items())[: 2 * PANELS])
    if not told:
        return ""
    caption = "Memory by part at the fullest moment of each of the first steps, first seed, one scale for all."
    return picture(report.memory_timeline(_titled(told), folder / "timeline.png"), caption)


def selections(summary: Summary, folder: Path) -> list[tuple[str, str]]:
    """Which layers were trained when, where selected entries lie, and the ranks of each matrix, first seed of each.

    Returns:
        What a picture shows, in a few words, and the picture.
    """
    layers: dict[str, History] = {}
    ranks: dict[str, History] = {}
    entries: dict[str, EntryHistory] = {}
    steps: dict[str, int] = {}
    for label, run in list(first(summary.methods).items())[:DRAWN]:
        for callback, history in run.histories.items():
            name = label if len(run.histories) == 1 else f"{label}: {callback}"
            steps[name] = max(int(run.number("steps") or 0), history["steps"][-1] + 1)
            if "counts" in history:
                entries[name] = _entries(history)
            else:
                (ranks if _of_ranks(history) else layers)[name] = _masks(history)
    made = []
    for at, chunk in enumerate(_chunks(layers)):
        file = folder / f"layers{at}.png"
        report.selection_heatmap(_titled(chunk), max(steps[name] for name in chunk), file)
        shown = picture(file, "Which layers were trained when; the bars give the share of the steps. First seed.")
        made.append((f"Layers: {', '.join(chunk)}", shown))
    for at, chunk in enumerate(_chunks(entries)):
        file = report.density_heatmap(_titled(chunk), folder / f"density{at}.png")
        caption = (
            "The share of each matrix that is selected in the end; every panel has a scale of its own. First seed."
        )
        made.append((f"Entries: {', '.join(chunk)}", picture(file, caption)))
    for at, (name, told) in enumerate(list(ranks.items())[:PANELS]):
        file, title = folder / f"ranks{at}.png", report_curves.plain([name], 60)[0]
        report_ranks.rank_heatmap(told, steps[name], file, title)
        made.append((f"Ranks: {name}", picture(file, "Ranks of each matrix that are in, over the steps. First seed.")))
    return made


def _of_ranks(history: Mapping[str, Any]) -> bool:
    numbered = all(str(name).rpartition(".")[2].isdigit() for name in history["names"])
    return history.get("units") == "ranks" and numbered


def _chunks(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = list(told)
    for begin in range(0, len(names), PANELS):
        yield {name: told[name] for name in names[begin : begin + PANELS]}


def _titled(told: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(report_curves.plain(list(told), length=60), told.values(), strict=True))


def _masks(history: Mapping[str, Any]) -> History:
    return History(list(history["steps"]), torch.tensor(history["masks"]).bool(), tuple(map(str, history["names"])))


def _entries(history: Mapping[str, Any]) -> EntryHistory:
    counts, sizes = torch.tensor(history["counts"]), torch.tensor(history["sizes"])
    return EntryHistory(list(history["steps"]), counts, sizes, tuple(map(str, history["names"])))
