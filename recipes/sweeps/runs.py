"""Run folders of ``apportion-train`` on disk: found in a tree, and read with whatever is missing or damaged in them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: Where it is.
        name: Where it is below the folder that was asked for.
        config: Its config as it was composed, interpolations unresolved.
        results: Its ``metrics.json``; empty if it has none.
        state: ``done``, ``failed``, ``running`` or ``unfinished``.
        reason: Why it is not done; empty if it is.
        curves: By metric, its value at each optimizer step at which it was logged, in order; finite values only.
        histories: By callback, what it selected when.
        measured: Its ``measured.json``: ``memory``, ``timeline``, ``seconds_per_step``; empty if it has none.
        damaged: One line for each file that could not be read.
    """

    folder: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    state: str = "done"
    reason: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    histories: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether it wrote its results."""
        return self.state == "done"

    @property
    def metrics(self) -> dict[str, float]:
        """Its metrics at the end, without those that are no finite number."""
        found = self.results.get("metrics")
        return {str(name): float(value) for name, value in found.items() if _is_number(value)} if found else {}

    def number(self, key: str) -> float | None:
        """A number out of its results, such as ``seconds``; None if it has none."""
        value: Any = self.results.get(key)
        return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def collect(root: Path) -> list[Run]:
    """Every run in ``root`` and below it, in the order of their folders.

    Raises:
        ValueError: If there is none.
    """
    if not root.is_dir():
        raise ValueError(
            f"`{root}` is no folder: give a run folder, a multirun folder, or one that holds such folders."
        )
    found = sorted(_folders(root), key=lambda folder: _natural(folder.relative_to(root).as_posix()))
    if not found:
        raise ValueError(
            f"`{root}` holds no run: a run folder is one with `.hydra/config.yaml`, as `apportion-train` writes it "
            "into outputs/ or multirun/."
        )
    return [
        read(folder, folder.relative_to(root).as_posix() if folder != root else root.resolve().name) for folder in found
    ]


def _folders(root: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(root):
        if (Path(place) / ".hydra" / "config.yaml").is_file():
            below.clear()  # what is deeper belongs to the run
            yield Path(place)
        else:
            below[:] = [name for name in below if not name.startswith(".")]


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that puts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def read(folder: Path, name: str) -> Run:
    """Reads one run folder; a file that cannot be read becomes a line of ``damaged``."""
    damaged: list[str] = []
    failure, results = (_object(folder / file, damaged) for file in ("failure.json", "metrics.json"))
    state, reason = standing(folder, results, failure, damaged)
    return Run(
        folder,
        name,
        config=_object(folder / ".hydra" / "config.yaml", damaged),
        results=results,
        state=state,
        reason=reason,
        curves=curves(folder, damaged),
        histories={
            file.stem: history
            for file in sorted((folder / "history").glob("*.json"))
            if (history := _object(file, damaged)) and _sound(history, file, damaged)
        },
        measured=_measured(folder / "measured.json", damaged),
        damaged=tuple(damaged),
    )


def standing(
    folder: Path, results: Mapping[str, Any], failure: Mapping[str, Any], damaged: list[str]
) -> tuple[str, str]:
    """State of a run and why it is not done."""
    if failure:
        return "failed", str(failure.get("error") or "failure.json names no error").strip().split("\n")[0]
    if isinstance(results.get("metrics"), Mapping):
        return "done", ""
    if any(line.startswith("metrics.json") for line in damaged):
        return "unfinished", next(line for line in damaged if line.startswith("metrics.json"))
    if results:
        return "unfinished", "metrics.json holds no metrics"
    if _locked(folder / ".lock"):
        return "running", "it is running"
    error = last_error(folder / "train.log")
    return ("failed", error) if error else ("unfinished", "it stopped without an error before it wrote metrics.json")


def last_error(log: Path) -> str | None:
    """The last line of a log that names an exception; None if there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)), None)


def _locked(lock: Path) -> bool:
    """Whether a process holds the claim of `apportion.recipes.sweeps.sweep.claimed`."""
    try:
        import fcntl

        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _object(path: Path, damaged: list[str]) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; empty, and told if the file is there, when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        damaged.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(content, dict):
        damaged.append(f"{path.name} holds a {type(content).__name__} and no mapping")
        return {}
    return content


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _sound(history: Mapping[str, Any], file: Path, damaged: list[str]) -> bool:
    """Whether a history has steps, names, and one row of one value per name for each step."""
    rows: Any = history.get("masks", history.get("counts"))
    names: Any = history.get("names")
    steps: Any = history.get("steps")
    try:
        whole = bool(steps) and len(steps) == len(rows) and all(len(row) == len(names) for row in rows)
        whole = whole and all(_is_number(value) for row in [steps, *rows] for value in row)
        whole = whole and ("counts" not in history or len(history["sizes"]) == len(names))
    except (TypeError, KeyError):
        whole = False
    if not whole:
        damaged.append(f"history/{file.name} holds no selections of one length")
    return whole


def _measured(file: Path, damaged: list[str]) -> dict[str, Any]:
    """Memory by part, its timeline and the time of a step, as `apportion.recipes.measure.Measure` writes them."""
    content = _object(file, damaged)
    memory, timeline = content.get("memory") or {}, content.get("timeline") or []
    seconds = content.get("seconds_per_step")
    try:
        sound = all(_is_number(size) for point in [memory, *timeline] for size in point.values())
        sound = sound and all("step" in point for point in timeline) and (seconds is None or _is_number(seconds))
    except (AttributeError, TypeError):
        sound = False
    if not sound:
        damaged.append(f"{file.name} holds something else than bytes by part and seconds")
        return {}
    return {"memory": memory, "timeline": timeline, "seconds_per_step": seconds} if content else {}


def curves(folder: Path, damaged: list[str]) -> dict[str, list[tuple[int, float]]]:
    """What CSV loggers wrote, by metric. Of a run that was resumed, a later file replaces the steps it has again."""
    points: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("metrics.csv"), key=lambda file: _natural(file.as_posix())):  # log.0/ before log/
        try:
            with file.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            damaged.append(f"{file.name} cannot be read: {error}")
            continue
        for row in rows:
            values = {name: _float(text) for name, text in row.items() if name}
            step = values.pop("step", None)
            if step is None:
                continue  # cut short, or no row of a Trainer
            for name, value in values.items():
                if value is not None and name != "epoch":
                    points.setdefault(name, {})[int(step)] = value
    return {name: sorted(at.items()) for name, at in points.items()}


def _float(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
