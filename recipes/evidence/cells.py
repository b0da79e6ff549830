"""Cells of an evidence grid as files: which there are, which come next, and which learning rate the search chose.

    <out>/<grid>/<task>/<method>-seed<k>-lr<x>.json

A cell of the search has the search's seed and nothing measured on rows that are reported. The search begins with the
rates of its method; while the best one is the highest or the lowest, it goes one further that way. A reported cell is
made only when the search is complete, at the rate with the best score on the dev split.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apportion.recipes.evidence.methods import Method

SEARCH_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
"""Seeds that are reported; a table takes those that were run, and says how many."""
WIDENINGS = 2
"""Rates that a search may go beyond those of its method."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Args:
        grid: Name of the grid.
        task: Name of the task.
        method: Key of the method.
        seed: `SEARCH_SEED` in the search.
        rate: Learning rate.

    Example:
        >>> Cell("encoder", "trec", "id3", 1, 3e-3).file.as_posix()
        'encoder/trec/id3-seed1-lr0.003.json'
    """

    grid: str
    task: str
    method: str
    seed: int
    rate: float

    @property
    def file(self) -> Path:
        """Where it is kept, relative to the folder of all results."""
        return Path(self.grid, self.task, f"{self.method}-seed{self.seed}-lr{self.rate:g}.json")

    @property
    def searches(self) -> bool:
        """Whether it belongs to the search."""
        return self.seed == SEARCH_SEED


class Records:
    """The cells that were run, in a folder.

    Args:
        out: Folder of all results.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._known: dict[Cell, dict[str, Any]] = {}

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell left behind; None if it was not run."""
        if cell not in self._known:
            path = self.out / cell.file
            if not path.is_file():
                return None
            self._known[cell] = json.loads(path.read_text(encoding="utf-8"))
        return self._known[cell]

    def put(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Writes what a cell left behind; a reader finds the whole file or none."""
        path = self.out / cell.file
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps({"cell": asdict(cell), **record}, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)

    def claim_file(self, cell: Cell) -> Path:
        """The file that says which process of this machine has a cell in hand; it lies where nothing is kept."""
        name = hashlib.sha256(str((self.out / cell.file).resolve()).encode()).hexdigest()[:32]
        user = getattr(os, "getuid", int)()  # 0 where there are no users
        return Path(tempfile.gettempdir(), f"apportion-claims-{user}", f"{name}.claim")

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether the cell is ours to run: no other process of this machine has it in hand, and none has run it."""
        path = self.claim_file(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = _take(path)
        try:
            yield mine and self.get(cell) is None
        finally:
            if mine:
                path.unlink(missing_ok=True)


def _take(path: Path) -> bool:
    """Makes a file that names this process, unless a living one has made it."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        if _alive(path):
            return False
    path.unlink(missing_ok=True)
    return _take(path)


def _alive(path: Path) -> bool:
    """Whether the process that a claim names is there; a claim without a number is just being written."""
    try:
        told = path.read_text(encoding="utf-8")
        os.kill(int(told), 0) if told else None
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


def search(records: Records, grid: str, task: str, method: Method) -> list[Cell]:
    """The cells that the rate of a method is chosen by; none if there is nothing to choose.

    They are those of the method's rates, then one at a time those beyond the best of them while that is at an edge, at
    most `WIDENINGS`.

    Args:
        records: The cells that were run: the edge is not known before.
        grid: Name of the grid.
        task: Name of the task.
        method: The method.
    """
    rates = method.rates[grid] if len(method.rates[grid]) > 1 else ()
    cells = [Cell(grid, task, method.key, SEARCH_SEED, rate) for rate in rates]
    for _ in range(WIDENINGS):
        tried = [cell.rate for cell in cells]
        rate = best(records, cells)
        if rate is None or min(tried) < rate < max(tried):
            break
        cells.append(Cell(grid, task, method.key, SEARCH_SEED, beyond(rate, up=rate == max(tried))))
    return cells


def beyond(rate: float, up: bool) -> float:
    """The rate next to one of the series ... 0.01, 0.03, 0.1, 0.3 ...

    Args:
        rate: One of the series.
        up: Whether the next higher is meant.

    Example:
        >>> beyond(3e-3, up=True), beyond(3e-3, up=False)
        (0.01, 0.001)
    """
    ten = f"{rate:e}".startswith("1.0")
    return float(f"{rate * (3.0 if ten == up else 10.0 / 3.0) ** (1 if up else -1):.6g}")


def best(records: Records, cells: Sequence[Cell]) -> float | None:
    """The rate of the best of some cells of a search; the lower of equal ones, None if one is missing or all failed.

        argmax over rates of the score on the dev split

    Args:
        records: The cells that were run.
        cells: Those of the search.
    """
    found = [records.get(cell) for cell in cells]
    scored = [
        (record["dev_score"], -cell.rate)
        for cell, record in zip(cells, found, strict=True)
        if record is not None and record.get("dev_score") is not None
    ]
    return None if None in found or not scored else -max(scored)[1]


def chosen(records: Records, grid: str, task: str, method: Method) -> float | None:
    """The learning rate that a method is reported at: the best one of its search.

    Args:
        records: The cells that were run.
        grid: Name of the grid.
        task: Name of the task.
        method: The method.

    Returns:
        None while a cell of the search is missing, or if all of them failed.
    """
    cells = search(records, grid, task, method)
    return best(records, cells) if cells else method.rates[grid][0]


def reported(
    records: Records, grid: str, task: str, method: Method, seeds: Sequence[int] = SEEDS
) -> list[tuple[Cell, dict[str, Any] | None]]:
    """The cells that a table shows for a method, at the rate that the search chose; empty before the choice."""
    rate = chosen(records, grid, task, method)
    cells = [] if rate is None else [Cell(grid, task, method.key, seed, rate) for seed in seeds]
    return [(cell, records.get(cell)) for cell in cells]


def pending(
    records: Records,
    grid: str,
    tasks: Iterable[str],
    methods: Sequence[Method],
    seeds: Sequence[int] = SEEDS,
    every_rate: bool = False,
) -> Iterator[Cell]:
    """The cells that are missing and can be run: task by task, first the search of all methods, then seed by seed.

    Args:
        records: The cells that were run.
        grid: Name of the grid.
        tasks: Names of the tasks, the most telling first.
        methods: The methods.
        seeds: The seeds that are reported.
        every_rate: Whether the seeds are run at every rate of the search, besides the one that it chose.
    """
    for task in tasks:
        for method in methods:
            yield from (cell for cell in search(records, grid, task, method) if records.get(cell) is None)
        for seed in seeds:
            for method in methods:
                cells = [cell for cell, _ in reported(records, grid, task, method, (seed,))]
                if every_rate and cells:
                    cells += [replace(cell, seed=seed) for cell in search(records, grid, task, method)]
                yield from (cell for cell in cells if records.get(cell) is None)
