"""Runs as the report shows them: one method for all seeds of a config, and which metric tells them apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from apportion.recipes.sweeps.objective import better, objective_of
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
        """A metric over the runs that have it as a finite number; None if none has."""
        values = tuple(run.metrics[metric] for run in self.runs if metric in run.metrics)
        return Spread(values, len(self.runs)) if values else None

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
        known = sorted({name for run in self.runs for name in logged(run)})
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
        """The metric that the methods are compared by; empty if no run has metrics."""
        done = [run for run in self.runs if logged(run)]
        if self.metric is not None or not done:
            return self.metric or ""
        found = objective(done)
        tested = found.replace("val/", "test/")
        whole = all(tested in logged(run) for run in done)  # one that diverged has it as well
        return tested if whole and any(tested in run.metrics for run in done) else found

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the validation and test set and the training loss, ``quality`` first."""
        names = dict.fromkeys(name for run in self.runs for name in logged(run))
        shown = [name for kind in ("test/", "val/", "train/") for name in names if name.startswith(kind)]
        return tuple(dict.fromkeys([self.quality, *shown])) if self.quality else ()


def logged(run: Run) -> tuple[str, ...]:
    """The metrics of a run that is done, also those that are no finite number, as after a divergence."""
    found = run.results.get("metrics") if run.done else None
    return tuple(str(name) for name in found) if found else ()


def objective(runs: Sequence[Run]) -> str:
    """The name of the metric that most runs returned: what a config names, else what has the value that was returned.

    One run may leave several open, such as all that are NaN or 0; more runs, or the class of the model, tell.

    Args:
        runs: Runs that are done, with metrics.
    """
    votes = Counter(name for run in runs for name in _returned(run))
    names = list(dict.fromkeys(name for run in runs for name in logged(run)))
    fitting = [name for name in names if votes[name] == max(votes.values(), default=0)]
    if len(fitting) > 1:
        meant = Counter(name for run in runs if (name := _meant(run)) in fitting)
        fitting = [name for name, _ in meant.most_common(1)] or fitting
    return min(fitting, key=lambda name: (not name.startswith("val/"), not name.startswith("test/")))


def _returned(run: Run) -> tuple[str, ...]:
    """The metrics that may be what a run returned, by its config or by their values."""
    named, value = run.config.get("objective"), run.number("objective")
    if isinstance(named, str) and named in logged(run):
        return (named,)
    return tuple(name for name in logged(run) if "objective" in run.results and run.metrics.get(name) == value)


def _meant(run: Run) -> str:
    """The metric that the class of the model returns; empty if that is not known."""
    model = run.config.get("model")
    # Classes of others are not imported: a page must not run what a folder names.
    if not isinstance(model, dict) or not str(model.get("_target_")).startswith("apportion.recipes.tasks."):
        return ""
    try:
        return objective_of(OmegaConf.create({"model": model}))
    except Exception:  # a config of another version, or cut short
        return ""


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
