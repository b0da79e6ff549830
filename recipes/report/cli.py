"""``apportion-report``: one run, a multirun, or a tree of them as one self-contained HTML page, and as Markdown.

apportion-report multirun/2026-11-21/15-00-00
apportion-report outputs multirun --out report.html --title "Which layers?" --metric test/accuracy
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from apportion.recipes.report import pictures, tables
from apportion.recipes.report.reported import SHOWN, Figure, reported
from apportion.recipes.report.summary import Summary
from apportion.recipes.sweeps.runs import Run, collect
from apportion.report_page import Table, folded, link, marked, notes, page, section

BESIDE = (
    "A paper's figure and ours can be compared as far as model, data, length and metric are those of the recipe, which "
    "its card in recipes/ describes.",
)


def told(summary: Summary) -> list[str]:
    """What a reader of the tables must know."""
    done = sum(len(method.runs) for method in summary.methods)
    others = sum(len(method.others) for method in summary.methods)
    repeats = sum(len(method.repeats) for method in summary.methods)
    methods = sum(bool(method.runs) for method in summary.methods)
    lines = [f"Runs that are compared: {done}, of {methods} configs. A config with other seeds is the same method."]
    if others:
        lines.append(f"Runs that are not done: {others}. They are in no figure, and listed with their reasons.")
    if repeats:
        lines.append(
            f"Runs that repeat a config and its seeds: {repeats}. The newest counts; all are in the last table."
        )
    if done:
        lines.append(
            f"Methods are compared by {summary.quality}, best first. A cell with ± is mean ± standard error (number of "
            "seeds); one without has one seed. Differences of less than two or three standard errors show nothing."
        )
    lost = [run.name for method in summary.methods for run in method.runs if summary.quality not in run.metrics]
    if lost:
        names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        lines.append(
            f"Runs without a finite {summary.quality}, as after a divergence: {len(lost)}, namely {names}. They are in "
            "no mean: a cell with (1 of 2) is that of one seed out of two, and flatters its method."
        )
    return lines


def unsure(figures: Sequence[Figure]) -> list[str]:
    """Reported figures that are not shown, one line each."""
    return [
        f"{figure.experiment}, {figure.metric}: reported by a secondary source, not shown."
        for figure in figures
        if figure.grade not in SHOWN
    ]


def damaged(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Files that could not be read, one line each."""
    return [f"{run.name}: {line}" for run in runs for line in run.damaged] + list(files)


def write(summary: Summary, title: str, path: Path) -> tuple[Path, Path]:
    """Writes the page, and the tables as Markdown beside it.

    Args:
        summary: The runs.
        title: Heading of the page.
        path: Where the page goes; the Markdown has its name with ``.md``.

    Returns:
        Where page and Markdown are.
    """
    broken: list[str] = []
    figures = reported((name for method in summary.methods if (name := tables.recipe(method))), broken)
    known, resources = tables.papers(summary, [f for f in figures if f.shown]), tables.resources(summary)
    missing, every = tables.missing(summary), tables.runs(summary)
    sources = [link(found, address) for found, address in dict.fromkeys((f.title, f.link) for f in figures)]
    lost = damaged(summary.runs, broken)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        content = [
            notes(told(summary)),
            section("Methods", tables.methods(summary).html(search=True), pictures.quality(summary, folder)),
            section(
                "The papers' figures",
                _html(known),
                notes(BESIDE if known else []),
                notes(unsure(figures)),
                *(f"<p>{source}</p>" for source in sources),
            ),
            section("Learning curves", pictures.learning(summary, folder)),
            section(
                "Memory and time",
                _html(resources),
                pictures.memory(summary, folder),
                folded("Memory over the first steps", pictures.timelines(summary, folder)),
            ),
            section("What was selected", *(folded(*shown) for shown in pictures.selections(summary, folder))),
            section("Not done", missing.html(search=True) if missing else ""),
            section("Files that could not be read", notes(lost)),
            section("All runs", folded(f"{len(every.rows)} runs", every.html(search=True))) if every.rows else "",
        ]
        page(title, content, path)
    text = [f"# {marked(title)}", *map(marked, told(summary)), tables.methods(summary).markdown()]
    parts = {"The papers' figures": known, "Memory and time": resources, "Not done": missing}
    for name, table in parts.items():
        text += [f"## {name}", table.markdown()] if table else []
    text += [f"- {marked(line)}" for line in (*unsure(figures), *lost)]
    plain = path.with_suffix(".md")
    plain.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return path, plain


def _html(table: Table | None) -> str:
    return table.html() if table else ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="apportion-report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run, a multirun, or a tree of them")
    parser.add_argument("--out", help="the page, or a folder for report.html (default: the first DIR)")
    parser.add_argument("--title", help="heading of the page (default: the names of the folders)")
    parser.add_argument("--metric", help="what methods are compared by (default: the objective, on the test set)")
    options = parser.parse_args(arguments)
    options.error = parser.error
    try:
        options.out = place(options.out) if options.out is not None else options.folders[0] / "report.html"
    except ValueError as error:
        parser.error(str(error))
    return options


def place(out: str) -> Path:
    """Where ``--out`` puts the page: there, or as ``report.html`` into a folder.

    Raises:
        ValueError: If the page, or the Markdown beside it, cannot be there.

    Example:
        >>> place("new/"), place("new/page.html")
        (PosixPath('new/report.html'), PosixPath('new/page.html'))
    """
    path = Path(out)
    if path.is_dir() or out.endswith(("/", os.sep)):
        path = path / "report.html"
    if path.suffix.lower() == ".md":
        raise ValueError(
            f"`--out {out}` is where the tables go as Markdown: name the page, such as {path.with_suffix('.html')}; "
            f"{path.name} is written beside it."
        )
    for file in (path, path.with_suffix(".md")):
        if file.is_dir():
            raise ValueError(f"`--out {out}`: {file} is a folder, and a file must go there: choose another name.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"`--out {out}`: {above} is a file, and a folder must be there: choose another place.")
    return path


def gather(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The runs of all folders, each once.

    Raises:
        ValueError: If one of them holds no run.
    """
    found = {run.folder.resolve(): run for folder in folders for run in collect(folder)}
    return tuple(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``apportion-report``."""
    options = parse(arguments)
    console = Console()
    with Console(stderr=True).status("reading and drawing ..."):
        try:
            summary = Summary(gather(options.folders), options.metric)
        except ValueError as error:
            options.error(str(error))
        title = options.title or "Runs of " + ", ".join(folder.resolve().name for folder in options.folders)
        try:
            paths = write(summary, title, options.out)
        except OSError as error:
            options.error(f"`--out {options.out}` cannot be written: {error}. Choose another place.")
    for line in told(summary):
        console.print(line, highlight=False, markup=False)
    for path in paths:
        console.print(path, soft_wrap=True, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
