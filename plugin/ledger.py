"""Sums of bytes by part over births and deaths of storages, made when it is known what each storage was."""

from __future__ import annotations

import weakref
from dataclasses import astuple, dataclass, fields

import torch

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARIES, OFFLOADED = range(6)
_BINS = 64  # points of the timeline per stretch of the log
_OUTLIVES = 2  # optimizer steps after which what backward met is no activation: it is an average, a cache, a copy


@dataclass(frozen=True)
class Parts:
    """Bytes by part at one moment.

    Example:
        >>> Parts(weights=8, gradients=8, optimizer=16, offloaded=4).total
        32
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporaries: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device: all parts but ``offloaded``."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries

    def as_dict(self) -> dict[str, int]:
        """The parts by name, and their sum on the device as ``peak``."""
        return {f.name: getattr(self, f.name) for f in fields(Parts)} | {"peak": self.total}


@dataclass(frozen=True)
class Point:
    """One point of the timeline: ``event`` counts births and deaths of storages since the tracker was entered."""

    event: int
    parts: Parts


class Held:
    """One storage in the log."""

    __slots__ = ("bytes", "counted", "crossed", "dead", "part", "ref", "steps")

    def __init__(self, size: int, part: int | None) -> None:
        self.bytes = size
        self.part = part
        self.counted = -1
        self.crossed = False
        self.dead = False
        self.steps = 0
        self.ref: weakref.ref[torch.UntypedStorage] | None = None

    def resolved(self) -> int:
        if self.part is not None:
            return self.part
        return ACTIVATIONS if self.crossed else TEMPORARIES


class Ledger:
    """Sums by part over a log of births (True) and deaths (False)."""

    def __init__(self) -> None:
        self.log: list[tuple[Held, bool]] = []
        self.event = 0
        self.now = [0] * 6
        self.peak = [0] * 6
        self.peak_since_mark = [0] * 6
        self.highest = [0] * 6
        self.timeline: list[Point] = []
        self._undecided: list[Held] = []

    def fold(self, step: bool = False) -> None:
        """Empties the log into the sums; ``step`` says that an optimizer step has ended."""
        for held in self._undecided:
            self._count(held)
        width = max(1, len(self.log) // _BINS)
        bin_end, best = self.event + width, -1
        for held, born in self.log:
            self.event += 1
            if born:
                held.counted = held.resolved()
                self.now[held.counted] += held.bytes
                self.highest[held.counted] = max(self.highest[held.counted], self.now[held.counted])
            else:
                self.now[held.counted] -= held.bytes
            total = sum(self.now[:OFFLOADED])
            if total > best:
                best, point = total, Point(self.event, Parts(*self.now))
            if self.event >= bin_end:
                self._keep(point)
                bin_end, best = self.event + width, -1
        if best >= 0:
            self._keep(point)
        seen = dict.fromkeys([*self._undecided, *(held for held, born in self.log if born)])
        self._undecided = [held for held in seen if held.part is None and not held.dead]
        self.log.clear()
        for held in self._undecided if step else ():
            held.steps += 1
            if held.steps >= _OUTLIVES:
                held.part = TEMPORARIES

    def _count(self, held: Held) -> None:
        part = held.resolved()
        if part != held.counted:
            self.now[held.counted] -= held.bytes
            self.now[part] += held.bytes
            held.counted = part

    def _keep(self, point: Point) -> None:
        self.timeline.append(point)
        parts = list(astuple(point.parts))
        if point.parts.total > sum(self.peak[:OFFLOADED]):
            self.peak = parts
        if point.parts.total > sum(self.peak_since_mark[:OFFLOADED]):
            self.peak_since_mark = parts
