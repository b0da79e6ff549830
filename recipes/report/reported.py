"""Figures that papers report, as ``recipes/<paper>/reported.json`` holds them, beside what a run gave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion.recipes.report.summary import Method

SHOWN = ("paper", "code")
"""Grades of evidence that stand beside our figures: read in the paper or in its released code."""


@dataclass(frozen=True)
class Figure:
    """One reported figure.

    Attributes:
        experiment: Name of the recipe, ``<paper>/<row>``.
        metric: What it is, in words that begin with the name of the metric.
        value: The figure.
        unit: Its unit, such as ``%``; may be empty.
        table: Where it stands.
        grade: How well it is known: ``paper``, ``code``, ``secondary`` or ``recalled``.
        note: What else must be known.
        title: Of the paper, with venue and year.
        link: To the paper.
    """

    experiment: str
    metric: str
    value: float
    unit: str
    table: str
    grade: str
    note: str
    title: str
    link: str

    @property
    def shown(self) -> bool:
        """Whether the figure may be shown as a fact."""
        return self.grade in SHOWN

    @property
    def place(self) -> str:
        """Where it stands and what must be known."""
        return "; ".join(part for part in (self.table, self.note) if part)


def reported(recipes: Iterable[str], damaged: list[str]) -> list[Figure]:
    """The figures that belong to some recipes, in the order of the files.

    Args:
        recipes: Names, ``<paper>/<row>``; those without a file have no figures.
        damaged: Gets a line for each file that cannot be read.
    """
    wanted = dict.fromkeys(recipes)
    found: list[Figure] = []
    for paper in dict.fromkeys(name.partition("/")[0] for name in wanted):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", paper):
            continue  # a name out of a config is no path
        file = files("apportion.recipes") / paper / "reported.json"
        try:
            found += figures(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"recipes/{paper}/reported.json cannot be read: {type(error).__name__}: {error}")
    return [figure for figure in found if figure.experiment in wanted]


def figures(content: Any) -> list[Figure]:
    """The figures of one file."""
    paper = content["paper"]
    title = f"{paper['title']} ({paper['venue']}, {paper['year']})"
    return [
        Figure(
            str(entry["experiment"]),
            str(entry["metric"]),
            float(entry["value"]),
            str(entry.get("unit", "")),
            str(entry.get("table", "")),
            str(entry["grade"]),
            str(entry.get("note", "")),
            title,
            str(paper["link"]),
        )
        for entry in content["figures"]
    ]


def ours(figure: Figure, method: Method, quality: str) -> tuple[str | None, tuple[str, float | None]]:
    """Our metric that a reported figure is to be held to, and its value over the seeds.

    It is the one whose last component begins the words of the figure, on the test set before the validation set; none
    if the paper reports something that the run does not log. Metrics of ours lie in [0, 1] where a paper has per cent.

    Args:
        figure: The reported figure.
        method: The runs.
        quality: The metric that the report compares methods by; it is taken before others of the same name.
    """
    said = re.sub(r"[^a-z0-9]+", "_", figure.metric.lower())
    names = dict.fromkeys(name for run in method.runs for name in run.metrics)
    fitting = [name for name in names if re.match(rf"{re.escape(_last(name))}(_|$)", said)]
    fitting.sort(key=lambda name: (-len(_last(name)), name != quality, not name.startswith("test/")))
    spread = method.spread(fitting[0]) if fitting else None
    if spread is None:
        return None, ("-", None)
    factor = 100.0 if figure.unit == "%" else 1.0
    return fitting[0], (f"{spread.text(factor)} {figure.unit}".strip(), spread.mean)


def _last(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.rpartition("/")[2].lower())
