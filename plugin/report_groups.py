"""Runs told apart by what differs in their configs, and numbers of several seeds brought together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.report_cells import ABSENT, brief, canonical, cells, unique

APART = ("hydra", "ckpt_path", "on_failure", "logger", "checkpoint")
"""Top-level keys that say how a run is started, watched and saved: no difference between methods."""

UNSEEN = ("_convert_", "_recursive_")
"""Keys of a node that say how Hydra makes it: no difference between methods."""

FIRST = ("method", "recipe", "callbacks")
"""Columns that name a method before others do."""


@dataclass(frozen=True)
class Spread:
    """One number of several runs.

    Attributes:
        values: One per run that has it, at least one.
        runs: How many runs there are, with those that have no such number; 0 for as many as values.

    Example:
        >>> found = Spread((0.80, 0.90, 0.85))
        >>> round(found.mean, 3), round(found.error, 4), found.text()
        (0.85, 0.0289, '0.85 ± 0.029 (3)')
        >>> Spread((0.9,), runs=2).text()
        '0.9 (1 of 2)'
    """

    values: tuple[float, ...]
    runs: int = 0

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean, the sample standard deviation over the root of n; None for one value."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    def text(self, factor: float = 1.0) -> str:
        """Mean, standard error and n: ``0.85 ± 0.029 (3)``; of one run only its value; ``(3 of 4)`` if some lack it."""
        n = len(self.values)
        of = f" ({n} of {self.runs})" if self.runs > n else f" ({n})" if n > 1 else ""
        error = "" if self.error is None else f" ± {factor * self.error:.2g}"
        return f"{factor * self.mean:.4g}{error}{of}"


@dataclass(frozen=True)
class Group:
    """Runs whose configs differ in their seeds only.

    Attributes:
        label: Short name, different for every group.
        cells: What each column of the grouping says of it; empty where it has no such setting.
        members: Which of the runs.
    """

    label: str
    cells: tuple[str, ...]
    members: tuple[int, ...]


@dataclass(frozen=True)
class Grouping:
    """All runs by what differs between them.

    Attributes:
        columns: Settings that differ, as dotted keys of the config.
        groups: In order of appearance.
    """

    columns: tuple[str, ...]
    groups: tuple[Group, ...]


def grouped(configs: Sequence[Mapping[str, Any]]) -> Grouping:
    """Groups runs by their configs.

    Whole values decide; cells show them briefly, but differently where they differ. A setting that all runs share is no
    column, and seeds are none. A node that another one takes the place of is one column, not one for each of its
    settings: an optimizer says its class, callbacks their names. At the top, a key that is not there is one that is
    null; a run with an empty config has nothing in common with others.

    Args:
        configs: One per run, as plain mappings.

    Example:
        >>> lisa, ist = {"lisa": {"_target_": "LISA", "layers": 2}}, {"ist": {"_target_": "IST"}}
        >>> runs = [(1, lisa), (1, ist), (2, ist)]
        >>> found = grouped([{"seed": seed, "lr": 0.1, "callbacks": chosen} for seed, chosen in runs])
        >>> found.columns, [(group.label, group.members) for group in found.groups]
        (('callbacks',), [('lisa', (0,)), ('ist', (1, 2))])
    """
    made = [_kept(config) for config in configs]
    known = dict.fromkeys(key for config in made for key in config if key not in APART)
    kept = [{key: config.get(key) for key in known} if config else {} for config in made]
    columns = dict(_children(kept, ""))
    if not all(configs) and any(configs):
        columns["config"] = [ABSENT if config else None for config in configs]
    members: dict[tuple[bool, str], list[int]] = {}
    for at, config in enumerate(kept):
        members.setdefault((bool(configs[at]), canonical(config)), []).append(at)
    shown = [cells(values) for values in columns.values()]
    rows = [tuple(column[at] for column in shown) for at, *_ in members.values()]
    names = labels(tuple(columns), rows)
    if len(members) == 1 and configs:
        names = [brief(configs[0].get("callbacks")) if configs[0].get("callbacks") else "run"]
    groups = zip(names, rows, members.values(), strict=True)
    return Grouping(tuple(columns), tuple(Group(name, row, tuple(at)) for name, row, at in groups))


def _kept(node: Any, seeds: bool = False) -> Any:
    """A node without `UNSEEN` and the seeds that `recipes.report.summary.seeds` tells apart, and with 1 for 1.0."""
    if isinstance(node, Mapping):
        told = {str(key): value for key, value in node.items() if key not in UNSEEN}
        seeded = not seeds and "seed" in told and not isinstance(told["seed"], Mapping)
        return {key: _kept(value, seeds) for key, value in told.items() if not (seeded and key == "seed")}
    if isinstance(node, list | tuple):
        return [_kept(inner, seeds=True) for inner in node]  # those in lists are settings
    return int(node) if isinstance(node, float) and node.is_integer() and abs(node) < 2**53 else node


def _children(nodes: Sequence[Any], path: str) -> Iterator[tuple[str, list[Any]]]:
    """The columns of what the mappings among ``nodes`` hold."""
    maps = [node for node in nodes if isinstance(node, Mapping)]
    for key in dict.fromkeys(key for node in maps for key in node if key != "_target_"):
        inner = [node.get(key, ABSENT) if isinstance(node, Mapping) else ABSENT for node in nodes]
        yield from _column(inner, f"{path}.{key}".lstrip("."))


def _column(nodes: Sequence[Any], path: str) -> Iterator[tuple[str, list[Any]]]:
    there = [node for node in nodes if node is not ABSENT]
    if len(set(map(canonical, there))) == 1:
        return  # whether it is there is a difference of the node that holds it
    maps = [node for node in there if isinstance(node, Mapping)]
    if len(maps) < len(there) or len({canonical(node.get("_target_")) for node in maps}) > 1:
        yield path, [_shell(node) for node in nodes]
    elif any(set(node) != set(maps[0]) for node in maps):
        shared = set.intersection(*(set(node) for node in maps))
        yield path, [_shell(node, shared) for node in nodes]
    yield from _children(nodes, path)


def _shell(node: Any, without: Iterable[str] = ()) -> Any:
    """A mapping's class and the names of its settings; their values have columns of their own."""
    if not isinstance(node, Mapping):
        return node
    return {key: value if key == "_target_" else "…" for key, value in node.items() if key not in without}


def labels(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A short name for each row, all different, from as few columns as tell the rows apart.

    Args:
        columns: Dotted keys.
        rows: One cell per column each.

    Example:
        >>> labels(["optimizer.lr", "callbacks"], [("0.1", "lisa"), ("0.1", "ist"), ("0.2", "ist")])
        ['lisa, lr 0.1', 'ist, lr 0.1', 'ist, lr 0.2']
    """
    chosen = sorted(range(len(columns)), key=lambda at: (FIRST.index(columns[at]) if columns[at] in FIRST else 9, at))
    needed: list[int] = []
    for at in chosen:
        if _apart(rows, [*needed, at]) > _apart(rows, needed):
            needed.append(at)
    for at in list(needed):  # what a later column made superfluous
        without = [other for other in needed if other != at]
        if _apart(rows, without) == _apart(rows, needed):
            needed = without
    names = [", ".join(_part(columns[at], row[at]) for at in needed if _part(columns[at], row[at])) for row in rows]
    return unique([name or "other" for name in names])


def _apart(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> int:
    """How many rows some columns tell apart."""
    return len({tuple(row[at] for at in columns) for row in rows})


def _part(column: str, cell: str) -> str:
    last = column.rpartition(".")[2]
    if cell in ("", "none"):
        return f"no {last}" if cell and column in ("callbacks", "config") else ""
    return cell if column in FIRST else f"{last} {cell}"
