"""Probe losses from a LightningModule: its own training step, leaving no trace in logs, metrics or random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apportion import randomness, sync
from apportion.calibrate import Term, gather
from apportion.candidates import Calibration
from apportion.probe import BatchProbe, endless


@contextmanager
def muted(module: Any) -> Iterator[None]:
    """Silences ``self.log`` and ``self.log_dict`` of ``module`` and puts its torchmetrics back as they were."""
    metrics = [m for m in module.modules() if hasattr(m, "_defaults") and hasattr(m, "_update_count")]
    before = [{k: deepcopy(v) for k, v in vars(m).items() if k in m._defaults or k in _METRIC_CACHE} for m in metrics]
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, _ignore)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        for metric, state in zip(metrics, before, strict=True):
            for key, value in state.items():
                object.__setattr__(metric, key, value)


_METRIC_CACHE = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced", "_to_sync", "_should_unsync")


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log`` during a probe."""


_NO_BATCH = "`probe_data` has no batch: give a loader with one at least, or leave it out to probe training batches."


class TrainerProbe:
    """Asks a LightningModule for the loss on a probe batch, as `apportion.types.Probe`.

    Args:
        trainer: The trainer of the present fit.
        module: Its LightningModule.
        data: Batches to probe with, an iterable that is gone through again and again; None probes with ``current``.
        loss: ``loss(module, batch)``; by default the module's ``training_step``.
        drawn: Batches taken from ``data`` by earlier parts of this run; as many are passed over first.
        seed: Seed of what drawing from ``data`` draws itself, such as a shuffling loader's order: batch by batch, so
            that passing over gives the batches of the earlier parts.

    Attributes:
        current: The training batch of the step that is being prepared.
        drawn: Batches taken from ``data`` so far.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        data: Iterable[Any] | None,
        loss: Callable[[Any, Any], Any] | None,
        drawn: int = 0,
        seed: int = 0,
    ) -> None:
        self.trainer, self.module, self.data, self._loss = trainer, module, data, loss or training_step_loss
        self.current: Any = None
        self.drawn, self.seed = 0, seed
        self._batches = endless(data or (), _NO_BATCH)
        self._probe = BatchProbe(self._measure, self._next, module, sync.mean)
        for _ in range(drawn):
            self._draw()

    def refresh(self) -> None:
        """Moves on to the next probe batch."""
        self._probe.refresh()

    def loss(self) -> float:
        """The loss on the present probe batch, averaged over ranks; in eval mode, with nothing recorded."""
        return self._probe.loss()

    def gather(
        self, params: Mapping[str, nn.Parameter], term: Term, calibration: Calibration, present: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of some batches, as `apportion.calibrate.gather` adds them up.

        The batches come from ``data``, or from the start of a new pass over the training data; with ``present``, the
        one batch of the step that is being prepared takes the place of a new pass. The loss is that of the probe.
        """
        if present and self.data is None:
            one = replace(calibration, batches=1)
            return gather(self.module, self._measure, [self.current], params, term, one, sync.mean)
        with self.batches() as batches:
            shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
            return gather(self.module, self._measure, batches, params, term, calibration, sync.mean, shown)

    @contextmanager
    def batches(self) -> Iterator[Iterator[Any]]:
        """Batches on the device: of ``data``, or of a new pass over the training data, which stays where it is."""
        source = self._training_data() if self.data is None else None
        with _unmoved(source):
            yield self._endless() if source is None else self._pass(source)

    def measure(self, batch: Any) -> Any:
        """The loss on ``batch``, with a gradient where gradients are on, and without a trace in logs and metrics."""
        return self._measure(batch)

    def _pass(self, loader: Any) -> Iterator[Any]:
        """One pass, which begins when the first batch is asked for: it may draw random numbers."""
        for batch in loader:
            yield self._place(batch)

    def _endless(self) -> Iterator[Any]:
        while True:
            yield self._place(self._draw())

    def _training_data(self) -> Any:
        # `trainer.train_dataloader` is there only once the training goes on; its source is there from the start.
        loader = self.trainer.fit_loop._data_source.dataloader()
        if getattr(loader, "persistent_workers", False):  # they serve one pass, and that may be under way
            loader = copy(loader)
            loader._iterator = None
        return loader

    def _place(self, batch: Any) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        return self.trainer.strategy.batch_to_device(batch, self.module.device)

    def _next(self) -> Any:
        if self.data is None:
            return self.current
        return self._place(self._draw())

    def _draw(self) -> Any:
        with randomness.seeded(self.seed + self.drawn):
            batch = next(self._batches)
        self.drawn += 1
        return batch

    def _measure(self, batch: Any) -> Any:
        with muted(self.module), self.trainer.precision_plugin.forward_context():
            value = self._loss(self.module, batch)
        if not isinstance(value, Tensor | float | int) or (isinstance(value, Tensor) and value.numel() != 1):
            raise ValueError(
                f"`probe_loss` gave {value!r:.100}, which is not a loss: return a tensor with one element, or a number."
            )
        return value


@contextmanager
def _unmoved(loader: Any) -> Iterator[None]:
    """Goes through a loader beside the training; its place, if it knows one, and its generator are put back."""
    place = loader.state_dict() if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") else None
    generator = getattr(loader, "generator", None)
    drawn = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        yield
    finally:
        if place is not None:
            loader.load_state_dict(place)
        if generator is not None and drawn is not None:
            generator.set_state(drawn)


def training_step_loss(module: Any, batch: Any) -> Tensor:
    """The loss that ``module.training_step(batch, 0)`` returns.

    Raises:
        ValueError: Under manual optimization, whose training step steps the optimizers, or if it returns no loss.
    """
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "`probe_loss` is needed under manual optimization, as its `training_step` would step the optimizers: pass "
            "`probe_loss=lambda module, batch: module.loss(batch)` or the like."
        )
    arguments = (batch, 0)
    output = module.training_step(*arguments[: _arity(module.training_step)])
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            "`training_step` returned no loss to probe with: pass `probe_loss=` (a function of module and batch)."
        )
    return loss


def _arity(step: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in inspect.signature(step).parameters.values() if p.kind in kinds]
    return 1 if len(positional) == 1 else 2
