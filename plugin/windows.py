"""What a selection does in the window of one optimizer step, from its first backward pass to the end of the step.

    begin        when the run starts
    arm          before the first micro-batch
    announce     before each backward pass: whether it is the last
    settle       after the last one, before gradients are averaged over ranks
    finish       after that, before clipping
    after_step   when the optimizer has stepped, with the gradients of the step still there
    end          when the window is over
    conclude     when the run is over

A selection of layers does nothing there; the Lightning callback and the optimizer wrapper treat all kinds alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apportion import sync
from apportion.classes import kinds
from apportion.collector import Collector
from apportion.entry_selection import EntrySelection
from apportion.owner import Owner

Clock = Callable[[], tuple[int | None, float | None]]
"""Tells the number of optimizer steps of the run, None if only its time is limited; and the share of its time that is
over, equal on all ranks, None if it is not limited."""


class Stage:
    """The windows of a selection that does nothing in them."""

    def begin(self, clock: Clock) -> None:
        """See above; refuses a run that a schedule does not fit."""

    def wants_scale(self) -> bool:
        """Whether the loss scale matters in this window; reading it waits for the device."""
        return False

    def arm(self, passes: int | None, scale: float | None) -> None:
        """See above; ``passes`` backward passes make gradients final, see `apportion.collector.Collector`."""

    def disarm(self) -> None:
        """Forgets a window that has begun, for a selection that is about to be loaded."""

    def restart(self) -> None:
        """Forgets the gradients of a window that has begun, as its user has."""

    def announce(self, final: bool) -> None:
        """See above."""

    def ready(self) -> None:
        """Told before somebody looks at the gradients of the step, to clip or to unscale them."""

    def settle(self) -> bool:
        """See above; whether a selection was made."""
        return False

    def finish(self, scale: float) -> None:
        """See above."""

    def after_step(self, clock: Clock) -> bool:
        """See above; whether a selection was made."""
        return False

    def end(self) -> None:
        """See above."""

    def conclude(self, clock: Clock) -> None:
        """See above."""

    def metrics(self) -> dict[str, float]:
        """What there is to log beside the selection."""
        return {}


class Window(Stage):
    """The windows of a selection of entries: gradients may decide about it, and what they chose moves at once.

    Args:
        owner: The owner of the param groups.
        key: What the owner calls the selection.
        selection: The selection, bound to the model.
        effect: Its effect, open.
    """

    def __init__(self, owner: Owner, key: str, selection: EntrySelection, effect: Any) -> None:
        self.owner, self.key, self.selection, self.effect = owner, key, selection, effect
        self.collector: Collector | None = None
        self.penalty = 0.0
        self.exchanged = 0
        self._fined = -1
        self._poisoned = False
        self._made: bool | None = None  # before the step: whether a selection was made
        self._aside: list[tuple[nn.Parameter, Tensor | None]] | None = None  # gradients, while it is put off

    def wants_scale(self) -> bool:
        """Whether gradients decide, or a penalty is added to them."""
        return self.selection.awaits or getattr(self.effect, "penalty", None) is not None

    def arm(self, passes: int | None, scale: float | None) -> None:
        """Lets the rule see the gradients of this window, if it has to.

        Args:
            passes: Backward passes of which the last makes gradients final, see `Collector`.
            scale: The loss scale in the gradients, see `Collector`.
        """
        if not self.selection.awaits or self.collector is not None:
            return
        chooser, score = self.selection.open()
        stores = [self.owner.narrow(p) for p in self.selection.bound.tensors]
        self.collector = Collector(self.selection.bound, stores, score, chooser, passes, scale, self._complete)
        self.owner.averaged.update(store.leaf for store in stores)

    def disarm(self) -> None:
        """Forgets a window that has begun, and what is selected, for a selection that is about to be loaded."""
        if self.collector is not None:
            self.collector.leave()
            self.collector = self._made = self._aside = None
        self._fined = -1
        self.owner.vacate(self.key)

    def restart(self) -> None:
        """Frees gradients that stay for a selection to come, which no param group tells of.

        A choice that they have made already stays; gradients that come now are those of the entries it has chosen.
        """
        collector, tensors = self.collector, self.selection.bound.tensors
        if collector is not None and self._made is not None:
            collector.leave()
        if collector is None or self._made is not None or all(p.grad is None for p in tensors):
            return
        for p in tensors:
            p.grad = None
        collector.leave()
        self.collector = None
        self.arm(collector.passes, collector.scale)
        self.announce(collector.final)

    def announce(self, final: bool) -> None:
        """Says whether the coming micro-batch is the last of the window."""
        if self.collector is not None:
            self.collector.final = final

    def settle(self) -> bool:
        """Makes the selection that this window decides about; whether there was one to make."""
        collector, self.collector = self.collector, None
        if collector is None:
            return False
        if self._made is None:
            if self._aside is None:
                collector.flush()
            self._take_back()
            self._made = self._choose(collector)
        collector.leave()
        made, self._made = self._made, None
        return made

    def ready(self) -> None:
        """Makes the selection if nothing but tensors without a gradient is missing."""
        collector = self.collector
        if collector is not None and self._made is None and self._aside is None and collector.through:
            collector.look_at_rest()
            self._complete()

    def _complete(self) -> None:
        """Makes the selection as soon as it can be made.

        What joins stands in the param groups then when the backward pass is over, so that a loop of one's own unscales
        and clips its gradients with the others. The collector goes on refusing gradients that come too late.
        """
        collector = self.collector
        assert collector is not None
        if collector.overflown and collector.scale is None:
            self._put_off(collector)
        else:
            self._made = self._choose(collector)

    def _put_off(self, collector: Collector) -> None:
        """Waits for the step, as gradients are not finite: a gradient scaler will skip it, and they come again."""
        self._aside = [(store.leaf, store.leaf.grad) for store in collector.stores]
        self.owner.poison(self.key)
        collector.again = partial(self._again, collector.passes)

    def _take_back(self) -> None:
        """There is no scaler, and the step is taken with the gradients as they are."""
        if self._aside is not None:
            self.owner.write_groups()
            for leaf, grad in self._aside:
                leaf.grad = grad
            self._aside = None

    def _again(self, passes: int | None) -> None:
        self._aside = self.collector = None
        self.owner.write_groups()
        self.arm(passes, None)
        self.announce(final=True)

    def _choose(self, collector: Collector) -> bool:
        """Makes the selection; whether the gradients are of use for one."""
        self.exchanged += collector.exchanged
        if collector.blank:  # no micro-batch of the window had a loss
            self.selection.postpone()
            return False
        if collector.overflown and collector.scale is not None:
            self.selection.postpone()
            self.owner.poison(self.key)
            self._poisoned = True
            return False
        choice = self.selection.settle(collector.chooser)
        there = {i: picks for i, picks in choice.picks.items() if collector.had[i]}  # decay needs a gradient, even of 0
        choice = replace(choice, picks=there)
        self.effect.apply(self.owner, self.key, self.selection.bound, choice)
        return True

    def finish(self, scale: float) -> None:
        """Adds the effect's penalty to the gradients, once per window."""
        fine = getattr(self.effect, "penalty", None)
        if fine is None or self._fined == self.selection.step:
            return
        self._fined = self.selection.step
        tensors = self.selection.bound.tensors
        stores = [self.owner.narrow(p) for p in tensors]
        for p, store in zip(tensors, stores, strict=True):
            store.take_up(p)
        self.penalty = fine.add(tensors, stores, self.selection.draws, self.selection.step, scale)

    def metrics(self) -> dict[str, float]:
        """The penalty, if there is one."""
        return {} if getattr(self.effect, "penalty", None) is None else {"penalty": self.penalty}

    def end(self) -> None:
        """After the optimizer's step, or after one that a gradient scaler skipped."""
        self.owner.averaged.difference_update(
            self.owner.narrow(p).leaf for p in self.selection.bound.tensors if self.owner.slots[p].store is not None
        )
        if self._poisoned:
            self._poisoned = False
            self.owner.write_groups()
            for p in self.selection.bound.tensors:
                self.owner.narrow(p).leaf.grad = None


def run_clock(trainer: Any) -> tuple[int | None, float | None]:
    """The `Clock` of a trainer's run; its time is that of rank 0."""
    total = trainer.estimated_stepping_batches
    steps = None if total in (float("inf"), -1) else int(total)
    if steps is not None and not trainer.lightning_module.automatic_optimization and trainer.max_steps != -1:
        steps //= max(1, len(trainer.optimizers))  # Lightning counts the steps of each
    timers = (c for c in trainer.callbacks if "Timer" in kinds(c))
    timer: Any = next((c for c in timers if c._duration), None)
    if timer is None:
        return steps, None
    share = torch.tensor([timer.time_elapsed() / timer._duration], dtype=torch.float64)
    sync.broadcast([share])
    return steps, min(1.0, float(share))


def loss_scale(trainer: Any) -> float:
    """The loss scale in the gradients of a trainer's backward pass; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())
