"""The tables of the report: methods, memory and time, the papers' figures, all runs, and those that are not done."""

from __future__ import annotations

from collections.abc import Sequence

from apportion import comparison, report
from apportion.recipes.report.reported import Figure, ours
from apportion.recipes.report.summary import Method, Summary, logged
from apportion.recipes.sweeps.runs import Run
from apportion.report_groups import Spread
from apportion.report_page import Cell, Table

NOTHING: Cell = ("-", None)


def methods(summary: Summary) -> Table:
    """One row per method: quality and other metrics over its seeds, what it took, and its settings that differ."""
    shown = [method for method in summary.methods if method.runs]
    settings = [_column([method.cells[at] for method in shown]) for at in range(len(summary.columns))]
    rows = []
    for at, method in enumerate(shown):
        metrics = [_metric(method, metric) for metric in summary.metrics]
        took = [_spread(method.numbers("seconds")), _spread(method.numbers("steps"), "{:,.0f}")]
        trained = _spread(method.numbers("trainable"), "{:,.0f}")
        rows.append((_named(method.label), *metrics, *took, trained, *(column[at] for column in settings)))
    return Table(
        ("method", *summary.metrics, "seconds of the fit", "steps", "entries that may train", *summary.columns),
        tuple(rows),
    )


def _named(text: str) -> Cell:
    return text, text


def _metric(method: Method, metric: str) -> Cell:
    found = method.spread(metric)
    if found is None and any(metric in logged(run) for run in method.runs):
        return f"- (0 of {len(method.runs)})", None
    return _spread(found)


def _spread(found: Spread | None, form: str = "") -> Cell:
    if found is None:
        return NOTHING
    return (form.format(found.mean) if form else found.text()), found.mean


def _column(cells: Sequence[str]) -> list[Cell]:
    """Settings, sorted as numbers where all of them are numbers."""
    try:
        return [(cell, float(cell)) if cell else NOTHING for cell in cells]
    except ValueError:
        return [(cell or "-", cell) for cell in cells]


def resources(summary: Summary) -> Table | None:
    """Memory by part and time per step of the methods that were measured; None if none was."""
    results = [
        {"method": method.label, "accuracy": 0.0, **run.measured}
        for method in summary.methods
        for run in method.runs
        if run.measured
    ]
    if not results:
        return None
    rows = [(_named(row.name), *report.cells(row)[1:]) for row in comparison.summarise(results)]
    return Table(("method", *report.HEADINGS[2:]), tuple(rows))


def runs(summary: Summary) -> Table:
    """One row per run that is done."""
    rows = []
    for method in summary.methods:
        for run in (*method.runs, *method.repeats):
            seed = run.config.get("seed")
            seeded: Cell = (str(seed), float(seed)) if isinstance(seed, int | float) else NOTHING
            values = [_value(run, metric) for metric in summary.metrics]
            rows.append((_named(run.name), _named(method.label), seeded, *values, _number(run.number("seconds"))))
    return Table(("folder", "method", "seed", *summary.metrics, "seconds of the fit"), tuple(rows))


def _value(run: Run, metric: str) -> Cell:
    if metric in logged(run) and metric not in run.metrics:
        return "not finite", None
    return _number(run.metrics.get(metric))


def _number(value: float | None) -> Cell:
    return NOTHING if value is None else (f"{value:.4g}", value)


def missing(summary: Summary) -> Table | None:
    """Runs that are not done and why; None if all are."""
    rows = [
        (_named(run.name), _named(method.label), _named(run.state), _named(_short(run.reason)))
        for method in summary.methods
        for run in method.others
    ]
    return Table(("folder", "method", "state", "reason"), tuple(rows)) if rows else None


def _short(reason: str, length: int = 400) -> str:
    return reason if len(reason) <= length else f"{reason[: length - 1]}…"


def papers(summary: Summary, figures: Sequence[Figure]) -> Table | None:
    """Reported figures beside ours, of the methods that run a recipe; None if there are none to show."""
    rows = []
    for figure in figures:
        for method in summary.methods:
            if not method.runs or recipe(method) != figure.experiment:
                continue
            metric, value = ours(figure, method, summary.quality)
            smoke = bool(method.runs[0].config.get("smoke"))
            mine: Cell = ("smoke run: not comparable", "") if smoke else value
            rows.append(
                (
                    _named(figure.experiment),
                    _named(figure.metric),
                    (f"{figure.value:g} {figure.unit}".strip(), figure.value),
                    _named(figure.place),
                    (mine[0], mine[0]),
                    _named(metric or "-"),
                    _named(method.label),
                )
            )
    headings = ("experiment", "what the paper reports", "paper", "where", "here", "our metric", "method")
    return Table(headings, tuple(rows)) if rows else None


def recipe(method: Method) -> str | None:
    """The recipe that a method runs."""
    named = next((run.config.get("recipe") for run in _all(method)), None)
    return named if isinstance(named, str) else None


def _all(method: Method) -> tuple[Run, ...]:
    return (*method.runs, *method.others)
