"""Runs told apart by what differs in their configs, and numbers of several seeds brought together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

APART = ("hydra", "ckpt_path", "on_failure", "logger", "checkpoint")
"""Top-level keys that say how a run is started, watched and saved: no difference between methods."""

FIRST = ("method", "recipe", "callbacks")
"""Columns that name a method before others do."""

_ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()


@dataclass(frozen=True)
class Spread:
    """One number of several runs.

    Attributes:
        values: One per run, at least one.

    Example:
        >>> found = Spread((0.80, 0.90, 0.85))
        >>> round(found.mean, 3), round(found.error, 4), found.text()
        (0.85, 0.0289, '0.85 ± 0.029 (3)')
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean, the sample standard deviation over the root of n; None for one value."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    def text(self, factor: float = 1.0) -> str:
        """Mean, standard error and n: ``0.85 ± 0.029 (3)``; of one value only that."""
        if self.error is None:
            return f"{factor * self.mean:.4g}"
        return f"{factor * self.mean:.4g} ± {factor * self.error:.2g} ({len(self.values)})"


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

    A setting that all runs share is no column, and seeds are none. A node that another one takes the place of is one
    column, not one for each of its settings: an optimizer says its class, callbacks their names. At the top, a key that
    is not there is one that is null; a run with an empty config has nothing in common with others.

    Args:
        configs: One per run, as plain mappings.

    Example:
        >>> lisa, ist = {"lisa": {"_target_": "LISA", "layers": 2}}, {"ist": {"_target_": "IST"}}
        >>> runs = [(1, lisa), (1, ist), (2, ist)]
        >>> found = grouped([{"seed": seed, "lr": 0.1, "callbacks": chosen} for seed, chosen in runs])
        >>> found.columns, [(group.label, group.members) for group in found.groups]
        (('callbacks',), [('lisa', (0,)), ('ist', (1, 2))])
    """
    known = dict.fromkeys(str(key) for config in configs for key in config if key not in APART)
    kept = [{key: config.get(key) for key in known} if config else {} for config in configs]
    columns = dict(_children(kept, ""))
    if not all(configs) and any(configs):
        columns["config"] = ["" if config else "none" for config in configs]
    rows = list(zip(*columns.values(), strict=True)) if columns else [()] * len(configs)
    members: dict[tuple[str, ...], list[int]] = {}
    for at, row in enumerate(rows):
        members.setdefault(row, []).append(at)
    names = labels(tuple(columns), list(members))
    if len(members) == 1 and configs:
        names = [brief(configs[0].get("callbacks")) if configs[0].get("callbacks") else "run"]
    groups = zip(names, members.items(), strict=True)
    return Grouping(tuple(columns), tuple(Group(name, row, tuple(at)) for name, (row, at) in groups))


def _children(nodes: Sequence[Any], path: str) -> Iterator[tuple[str, list[str]]]:
    """The columns of what the mappings among ``nodes`` hold."""
    maps = [node for node in nodes if isinstance(node, Mapping)]
    for key in dict.fromkeys(str(key) for node in maps for key in node):
        if key != "seed" and not key.startswith("_"):
            inner = [node.get(key, _ABSENT) if isinstance(node, Mapping) else _ABSENT for node in nodes]
            yield from _column(inner, f"{path}.{key}".lstrip("."))


def _column(nodes: Sequence[Any], path: str) -> Iterator[tuple[str, list[str]]]:
    there = [node for node in nodes if node is not _ABSENT]
    if all(node == there[0] for node in there):
        return  # whether it is there is a difference of the node that holds it
    maps = [node for node in there if isinstance(node, Mapping)]
    if len(maps) < len(there):
        yield path, ["" if node is _ABSENT else brief(node) for node in nodes]
    elif len({node.get("_target_") for node in maps}) > 1:
        yield path, [brief(node) if isinstance(node, Mapping) else "" for node in nodes]
    elif any(set(node) != set(maps[0]) for node in maps):
        shared = set.intersection(*(set(node) for node in maps))
        own = [
            {k: v for k, v in node.items() if k not in shared} if isinstance(node, Mapping) else "" for node in nodes
        ]
        yield path, [brief(node) for node in own]
    yield from _children(nodes, path)


def brief(value: Any) -> str:
    """A value of a config in a few characters: a class without its modules, other mappings as their keys.

    Example:
        >>> brief({"_target_": "torch.optim.AdamW", "lr": 0.1}), brief({"lisa": {}, "hft": {}}), brief(1e-4)
        ('AdamW', 'lisa + hft', '0.0001')
    """
    if isinstance(value, Mapping):
        if "_target_" in value:
            return str(value["_target_"]).rpartition(".")[2]
        return " + ".join(map(str, value)) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(brief, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def labels(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A short name for each row, from as few columns as tell all of them apart.

    Args:
        columns: Dotted keys.
        rows: One cell per column each, no two rows alike.

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
        if _apart(rows, without) == len(rows):
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


def unique(names: Sequence[str]) -> list[str]:
    """The same names, a number after those that are there already.

    Example:
        >>> unique(["a", "b", "a"])
        ['a', 'b', 'a (2)']
    """
    seen: dict[str, int] = {}
    made = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        made.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return made
