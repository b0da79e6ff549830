"""MemoryMonitor: logs the peak memory of every training step by part."""

from __future__ import annotations

from typing import Any

import torch

from apportion.driver import _Callback
from apportion.ledger import Parts
from apportion.memory import Tracker

_MIB = 2**20


class MemoryMonitor(_Callback):
    """Logs ``memory/<part>`` and ``memory/peak`` of every optimizer step, in MiB, and keeps the timeline of the run.

        on the CPU    the parts at the moment of the step's peak, by `apportion.memory.Tracker`
        on CUDA       the peak by torch.cuda.max_memory_allocated; the parts as they stand before the optimizer's step,
                      without activations and temporaries, which are gone by then

    On the CPU every operator passes through Python while the monitor is on: for small models, or for a few steps.

    Args:
        steps: Optimizer steps to watch; None for all.

    Raises:
        ValueError: If ``steps`` is below 1.

    Example:
        >>> MemoryMonitor(steps=20).tracker is None  # until the fit begins
        True
    """

    def __init__(self, steps: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"`MemoryMonitor(steps={steps})` must be at least 1, or None for every step.")
        self.steps = steps
        self.tracker: Tracker | None = None
        self._active = False
        self._first = self._seen = 0
        self._held = Parts()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts to follow the training."""
        self._first = self._seen = trainer.global_step
        self.tracker = Tracker(pl_module, trainer.optimizers)
        self._active = True
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        else:
            self.tracker.__enter__()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """On CUDA: the parts as they stand now."""
        if self._active and pl_module.device.type == "cuda":
            self._held = Tracker(pl_module, trainer.optimizers).now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: logs its peak."""
        if not self._active or trainer.global_step == self._seen:
            return
        assert self.tracker is not None
        self._seen = trainer.global_step
        if pl_module.device.type == "cuda":
            figures = self._held.as_dict() | {"peak": torch.cuda.max_memory_allocated(pl_module.device)}
            figures = {k: v for k, v in figures.items() if k not in ("activations", "temporaries")}
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        else:
            figures = self.tracker.mark(f"step {self._seen}").as_dict()
        pl_module.log_dict({f"memory/{name}": size / _MIB for name, size in figures.items()})
        if self.steps is not None and self._seen - self._first >= self.steps:
            self._stop()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stops following; `tracker` keeps the timeline."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stops following; `tracker` keeps the timeline."""
        self._stop()

    def _stop(self) -> None:
        if self._active and self.tracker is not None and self.tracker.entered:
            self.tracker.__exit__(None, None, None)
        self._active = False
