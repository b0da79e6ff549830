"""Runs as the report shows them: one method for all seeds of a config, and which metric tells them apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apportion.recipes.sweeps.objective import better
from apportion.recipes.sweeps.runs import Run
from apportion.report_groups import Group, Spread, grouped


@dataclass(frozen=True)
class Method:
    """The runs of one config with their seeds.

    Attributes:
        label: Short name.
        cells: What each column of the summary says of it.
        runs: Those that are done, no two with the same seeds.
        others: Those that are not done.
        repeats: Those that are done and have a newer twin among ``runs``.
    """

    label: str
    cells: tuple[str, ...]
    runs: tuple[Run, ...]
    others: tuple[Run, ...]
    repeats: tuple[Run, ...]

    def spread(self, metric: str) -> Spread | None:
        """A metric over the runs that have it; None if none has."""
        values = tuple(run.metrics[metric] for run in self.runs if metric in run.metrics)
        return Spread(values) if values else None

    def numbers(self, key: str) -> Spread | None:
        """A number of the results over the runs that have it; None if none has."""
        values = tuple(value for run in self.runs if (value := run.number(key)) is not None)
        return Spread(values) if values else None


@dataclass(frozen=True)
class Summary:
    """All runs of a report.

    Args:
        runs: The runs.
        metric: What the methods are compared by; None for that of the objective, on the test set if all have it.

    Raises:
        ValueError: If no run has ``metric``.
    """

    runs: tuple[Run, ...]
    metric: str | None = None

    def __post_init__(self) -> None:
        known = sorted({name for run in self.runs if run.done for name in run.metrics})
        if self.metric is not None and self.metric not in known:
            raise ValueError(f"`--metric {self.metric}` is in no run; there are {', '.join(known) or 'none'}.")

    @cached_property
    def _grouping(self) -> Any:
        return grouped([run.config for run in self.runs])

    @property
    def columns(self) -> tuple[str, ...]:
        """Settings that differ between the methods."""
        columns: tuple[str, ...] = self._grouping.columns
        return columns

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The methods, the best first, those without the metric last."""
        made = [self._method(group) for group in self._grouping.groups]
        sign = -1.0 if better(self.quality) == "maximize" else 1.0

        def place(method: Method) -> float:
            found = method.spread(self.quality)
            return sign * found.mean if found and better(self.quality) else math.inf

        return tuple(sorted(made, key=place))

    def _method(self, group: Group) -> Method:
        members = [self.runs[at] for at in group.members]
        newest: dict[Any, Run] = {}
        for run in sorted((run for run in members if run.done), key=_written):
            newest[seeds(run.config)] = run
        kept = tuple(run for run in members if run in newest.values())
        return Method(
            group.label,
            group.cells,
            kept,
            tuple(run for run in members if not run.done),
            tuple(run for run in members if run.done and run not in kept),
        )

    @cached_property
    def quality(self) -> str:
        """The metric that the methods are compared by; empty if no run is done."""
        done = [run for run in self.runs if run.done and run.metrics]
        if self.metric is not None or not done:
            return self.metric or ""
        found = objective(done[0])
        tested = found.replace("val/", "test/")
        return tested if all(tested in run.metrics for run in done) else found

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the validation and test set and the training loss, ``quality`` first."""
        names = dict.fromkeys(name for run in self.runs if run.done for name in run.metrics)
        shown = [name for kind in ("test/", "val/", "train/") for name in names if name.startswith(kind)]
        return tuple(dict.fromkeys([self.quality, *shown])) if self.quality else ()


def objective(run: Run) -> str:
    """The name of the metric that a run returned."""
    named, value = run.config.get("objective"), run.number("objective")
    if isinstance(named, str) and named in run.metrics:
        return named
    order = sorted(run.metrics, key=lambda name: (not name.startswith("val/"), not name.startswith("test/")))
    return next((name for name in order if run.metrics[name] == value), order[0])


def seeds(config: Any, key: str = "") -> tuple[tuple[str, str], ...]:
    """All seeds of a config, by where they stand.

    Example:
        >>> seeds({"seed": 1, "data": {"seed": 2, "size": 3}})
        (('seed', '1'), ('data.seed', '2'))
    """
    if isinstance(config, dict):
        return tuple(pair for name, value in config.items() for pair in seeds(value, f"{key}.{name}".lstrip(".")))
    return ((key, str(config)),) if key.rpartition(".")[2] == "seed" else ()


def _written(run: Run) -> float:
    try:
        return (Path(run.folder) / "metrics.json").stat().st_mtime
    except OSError:
        return 0.0


def first(methods: Sequence[Method]) -> dict[str, Run]:
    """The first run of every method that has one, by label."""
    return {method.label: method.runs[0] for method in methods if method.runs}
