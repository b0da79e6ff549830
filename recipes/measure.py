"""A callback that times the steps of a run and follows its memory, and writes both beside the run's other results."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from apportion.memory import Tracker


class Measure(pl.Callback):
    """Follows the memory by part through the first steps, times the later ones, and writes both at the end.

    The tracker slows a step down, so no step is both tracked and timed. A step is timed from the end of the one before
    to its own end: it holds loading the batch, the probes of the callbacks, and Lightning's own work.

    Args:
        path: Where the measurements go, as JSON.
        track: Optimizer steps whose memory is followed, from the first on.

    Raises:
        ValueError: If ``track`` is negative.
    """

    def __init__(self, path: str, track: int = 60) -> None:
        if track < 0:
            raise ValueError(f"`Measure(track={track})` must be at least 0: it is a number of optimizer steps.")
        self.path, self.track = Path(path), track
        self.timeline: list[dict[str, int]] = []
        self.seconds: list[float] = []
        self._tracker: Tracker | None = None
        self._step = 0
        self._ended: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts to follow the memory."""
        self._step = trainer.global_step
        if self.track:
            self._tracker = Tracker(pl_module, trainer.optimizers).__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """After an optimizer step: notes its memory or its time."""
        if trainer.global_step == self._step:
            return
        if self._tracker is not None:
            peak = self._tracker.mark(f"step {self._step}")
            self.timeline.append({"step": self._step, **peak.as_dict()})
            if len(self.timeline) == self.track:
                self._stop()
        else:
            now = time.perf_counter()
            if self._ended is not None:
                self.seconds.append(now - self._ended)
            self._ended = now
        self._step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what was measured."""
        self._stop()
        fullest = max(self.timeline, key=lambda point: point["peak"], default={})
        parked = {"offloaded": max(point["offloaded"] for point in self.timeline)} if self.timeline else {}
        measured = {
            "timeline": self.timeline,
            "memory": fullest | parked,  # what is parked is no part of the peak and has a moment of its own
            "seconds_per_step": statistics.median(self.seconds) if self.seconds else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(measured) + "\n", encoding="utf-8")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops to follow the memory."""
        self._stop()

    def _stop(self) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self._tracker = None
