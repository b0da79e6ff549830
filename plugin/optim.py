"""Selective: selection around any torch optimizer, for training loops without Lightning."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion import checks, clips, sync, trainer_clips, wrapped
from apportion.calibrate import Term, gather
from apportion.candidates import Calibration
from apportion.entry_selection import EntrySelection
from apportion.kinds import stage_of
from apportion.owner import Owner
from apportion.probe import BatchProbe
from apportion.selection import Selection
from apportion.zeroing import ZeroGrad


class Selective(Optimizer):
    """Steps a torch optimizer on what a method selects, and keeps the rest of the model and of the memory out of it.

    The wrapper owns no state: param groups and optimizer state are the wrapped optimizer's, so schedulers and gradient
    scalers take it as they take any optimizer. Gradients are averaged over the ranks of a process group, if there is
    one. A step that a gradient scaler skips is no step here; the callback counts it, as Lightning does. Keep the
    wrapper as long as the training goes on: one that is dropped ends as if it were closed.

    Args:
        optimizer: The optimizer, over every parameter that may ever train.
        model: The model.
        method: A method such as ``apportion.callbacks.LISA(active_layers=2)``; only its slots and seed are used.
        probe: A function that returns the loss, for methods that probe it: on the same batch until the next step, since
            the losses it gives between two steps are compared with each other.
        epoch_steps: Optimizer steps in an epoch, for methods that select anew once an epoch.
        total_steps: Optimizer steps of the whole run, for methods whose budget follows it.
        micro_batches: Backward passes to a step, for methods that select entries by their gradients: each dense
            gradient is looked at in the last of them, and freed. None keeps all of them until the step; a gradient
            scaler, or clipping in a loop of one's own, then comes too early for entries that join at that step.

    Raises:
        ValueError: If no unit is found, the optimizer lacks parameters, the method needs a probe that is not given, or
            one of optimizer and model is in the hands of a wrapper that rules a selection out.

    Example:
        >>> from apportion.callbacks import LISA
        >>> layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
        >>> optimizer = Selective(torch.optim.AdamW(layers.parameters()), layers, LISA(active_layers=2, interval=5))
        >>> for _ in range(3):
        ...     loss = layers(torch.ones(2, 4)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sum(p.requires_grad for p in layers.parameters())
        4
        >>> optimizer.close()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        method: Any,
        *,
        probe: Callable[[], Any] | None = None,
        epoch_steps: int | None = None,
        total_steps: int | None = None,
        micro_batches: int | None = 1,
    ) -> None:
        if epoch_steps is None and method.slots.select_when.clock == "epoch":
            raise ValueError(
                f"`Selective(...)` of `{method.label}`, which selects anew once an epoch, needs to know how long one "
                "is: pass `epoch_steps=` (optimizer steps)."
            )
        if epoch_steps is not None and epoch_steps < 1:
            raise ValueError(f"`Selective(epoch_steps={epoch_steps})` must be at least 1: it counts optimizer steps.")
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(
                f"`Selective(micro_batches={micro_batches})` must be at least 1, or None: it counts backward passes."
            )
        wrapped.check_model(model, method.label)
        self.epoch_steps, self.total_steps, self.micro_batches = epoch_steps, total_steps, micro_batches
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.base, self.method = optimizer, method
        self.state = optimizer.state
        self.selection: Selection = method.new_selection()
        self.owner = Owner.of([optimizer])
        bound = checks.meet(self.selection, self.owner, model)
        sync.broadcast(p.data for p in model.parameters())
        self._probe = _probe_of(probe, model) if probe is not None else None
        self._reducer = sync.Reducer()
        self._key = f"{self.selection.label}@{id(self):x}"
        self._unchecked, self._stepped = False, False
        zeroing: list[ZeroGrad] = []
        # Whoever drops the wrapper without `close` has the model back as it was found all the same.
        self._end = weakref.finalize(self, _end, method.slots.effect, self.owner, self._key, zeroing)
        self._end.atexit = False
        try:
            method.slots.effect.open(self.owner, self._key, bound)
            self._stage = stage_of(self.owner, self._key, self.selection)
            self._stage.begin(lambda: (self.total_steps, None))
            if self.owner.claims[self._key].narrow or self.owner.displaced(self._key):
                free = weakref.WeakMethod(self._free)
                zeroing.append(ZeroGrad(model, lambda module, to_none: _call(free, module, to_none)))
            if self.owner.displaced(self._key):
                clips.in_loop(sys._getframe(1), self.selection.label)
            self._select()
        except BaseException:
            self._end()
            raise

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's, with what the last backward pass has chosen: scalers and clipping look here."""
        if "_stage" in vars(self):
            self._stage.ready()
        return self.base.param_groups if "base" in vars(self) else self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups  # of the base class, before there is a wrapped optimizer

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a gradient scaler asks, and nobody else."""
        blind = self.micro_batches is None or sync.world_size() > 1
        if blind and "grad" in self.method.slots.score.needs and self.method.slots.grain == "entry":
            raise ValueError(
                f"`Selective(...)` of `{self.method.label}` selects by the gradients of the step, and a gradient "
                "scaler has finished with them before they are known to be the last: pass `micro_batches=` (backward "
                "passes to a step) on one process, use bfloat16, or a score of weights."
            )
        return False

    def _select(self) -> None:
        epoch, done = divmod(self.selection.step, self.epoch_steps) if self.epoch_steps else (0, self.selection.step)
        if self.selection.advance(epoch, fresh=done == 0, total=self.total_steps, probe=self._probe):
            self.method.slots.effect.apply(self.owner, self._key, self.selection.bound, self.selection.choice)
            self._unchecked = True
        self._stage.arm(self.micro_batches, None)
        self._stage.announce(final=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Averages gradients over ranks, steps the optimizer on what is selected, and selects for the next step.

        Args:
            closure: Reevaluates the model and returns the loss, as for any optimizer.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        else:
            loss = None
        if self._stage.settle():
            self._unchecked = True
        self._reducer.reduce([p for p in self.owner.training() if p not in self.owner.averaged])
        self._stage.finish(1.0)
        if not self._stepped and self.owner.displaced(self._key):
            trainer_clips.in_stack(sys._getframe(1), self.selection.label)
        self._stepped = True
        if self._unchecked and not checks.skipped(self.base):
            self._check()
            self._unchecked = False
        self.base.step()
        self.selection.step += 1
        if self._stage.after_step(lambda: (self.total_steps, None)):
            self._unchecked = True
        self._stage.end()
        self._select()
        return loss

    def _check(self) -> None:
        """A loss that leaves out some parameters of a unit is the user's business; one that leaves out all is not."""
        bound, label = self.selection.bound, self.selection.label
        if isinstance(self.selection, EntrySelection):
            checks.entry_gradients(self.owner, self.base, self.selection.bound, label)
            return
        assert self.selection.mask is not None
        list(checks.gradients(self.owner, self.base, bound, self.selection.mask, label))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Frees the gradients of what is selected; what is not selected has none, or will have none after the step.

        Where the gradients have made a choice already, it stays.
        """
        self.base.zero_grad(set_to_none)
        self._stage.restart()

    def _free(self, module: nn.Module, set_to_none: bool) -> None:
        self.owner.free(module, set_to_none)
        self._stage.restart()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state under its own keys, and the selection under ``selection``."""
        return {**self.base.state_dict(), "selection": {**self.selection.state_dict(), **self.selection.origin()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called."""
        selection = state_dict.get("selection")
        if selection is not None:
            self._stage.disarm()
            self.selection.load_state_dict(selection)
            self.method.slots.effect.apply(self.owner, self._key, self.selection.bound, self.selection.choice)
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "selection"})
        self.state = self.base.state
        if selection is not None:
            self._stage.arm(self.micro_batches, None)
            self._stage.announce(final=True)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuses `copy` and `pickle`: what steps in place of the model's parameters belongs to one model."""
        raise TypeError(
            f"`Selective(...)` of `{self.selection.label}` cannot be copied or pickled: it has hooks on its model. "
            "Save its `state_dict()`. For a second one, build model and optimizer anew, put a `Selective` around them, "
            "and load the `state_dict()` of the model and of this one."
        )

    def close(self) -> None:
        """Ends the selection and leaves the model and the optimizer as they were found.

        A budget of ranks that has not arrived is enforced before, with a warning.
        """
        self._stage.conclude(lambda: (self.total_steps, None))
        self._end()


def _end(effect: Any, owner: Owner, key: str, zeroing: list[ZeroGrad]) -> None:
    """Leaves the model and the optimizer as they were found; it must not hold the wrapper."""
    for stands in zeroing:
        stands.detach()
    effect.close(owner, key, final=False)


def _call(method: weakref.WeakMethod[Any], module: nn.Module, to_none: bool) -> None:
    free = method()
    if free is not None:
        free(module, to_none)


def _probe_of(function: Callable[[], Any], model: nn.Module) -> _FunctionProbe:
    """A probe whose batches the function chooses itself."""
    return _FunctionProbe(lambda batch: function(), lambda: None, model, sync.mean)


class _FunctionProbe(BatchProbe):
    """Asks a function for losses, also for losses with a gradient."""

    def gather(
        self, params: Mapping[str, nn.Parameter], term: Term, calibration: Calibration, present: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of as many calls, or of one on the ``present`` batch, as `apportion.calibrate.gather` adds them."""
        calibration = replace(calibration, batches=1) if present else calibration
        calls = (None for _ in range(calibration.batches))
        return gather(
            self.module, lambda _: torch.as_tensor(self.loss_fn(None)), calls, params, term, calibration, self.mean
        )
