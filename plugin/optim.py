"""Selective: selection around any torch optimizer, for training loops without Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from apportion import checks, sync
from apportion.owner import Owner
from apportion.probe import BatchProbe
from apportion.selection import Selection


class Selective(Optimizer):
    """Steps a torch optimizer on what a method selects, and keeps the rest of the model and of the memory out of it.

    The wrapper owns no state: param groups and optimizer state are the wrapped optimizer's, so schedulers and gradient
    scalers take it as they take any optimizer. Gradients are averaged over the ranks of a process group, if there is
    one. A step that a gradient scaler skips is no step here; the callback counts it, as Lightning does.

    Args:
        optimizer: The optimizer, over every parameter that may ever train.
        model: The model.
        method: A method such as ``apportion.callbacks.LISA(active_layers=2)``; only its slots and seed are used.
        probe: A function that returns the loss, for methods that probe it: on the same batch until the next step, since
            the losses it gives between two steps are compared with each other.
        epoch_steps: Optimizer steps in an epoch, for methods that select anew once an epoch.

    Raises:
        ValueError: If no unit is found, the optimizer lacks parameters, or the method needs a probe that is not given.

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
    ) -> None:
        if epoch_steps is None and method.slots.select_when.clock == "epoch":
            raise ValueError(
                f"`Selective(...)` of `{method.label}`, which selects anew once an epoch, needs to know how long one "
                "is: pass `epoch_steps=` (optimizer steps)."
            )
        if epoch_steps is not None and epoch_steps < 1:
            raise ValueError(f"`Selective(epoch_steps={epoch_steps})` must be at least 1: it counts optimizer steps.")
        self.epoch_steps = epoch_steps
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.base, self.method = optimizer, method
        self._share()
        self.selection: Selection = method.new_selection()
        self.owner = Owner.of([optimizer])
        bound = checks.meet(self.selection, self.owner, model)
        sync.broadcast(p.data for p in model.parameters())
        self._probe = _probe_of(probe, model) if probe is not None else None
        self._reducer = sync.Reducer()
        self._key = f"{self.selection.label}@{id(self):x}"
        method.slots.effect.open(self.owner, self._key, bound)
        self._unchecked = False
        self._select()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _select(self) -> None:
        epoch, done = divmod(self.selection.step, self.epoch_steps) if self.epoch_steps else (0, self.selection.step)
        if self.selection.advance(epoch, fresh=done == 0, probe=self._probe):
            assert self.selection.mask is not None
            self.method.slots.effect.apply(self.owner, self._key, self.selection.bound, self.selection.mask)
            self._unchecked = True

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
        self._reducer.reduce(list(self.owner.training()))
        if self._unchecked and not checks.skipped(self.base):
            assert self.selection.mask is not None
            found = checks.gradients(
                self.owner, self.base, self.selection.bound, self.selection.mask, self.selection.label
            )
            list(found)  # a loss that leaves out some parameters of a unit is the user's business
            self._unchecked = False
        self.base.step()
        self.selection.step += 1
        self._select()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Frees the gradients of what is selected; what is not selected has none."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state under its own keys, and the selection under ``selection``."""
        return {**self.base.state_dict(), "selection": self.selection.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called."""
        selection = state_dict.get("selection")
        if selection is not None:
            self.selection.load_state_dict(selection)
            assert self.selection.mask is not None
            self.method.slots.effect.apply(self.owner, self._key, self.selection.bound, self.selection.mask)
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "selection"})
        self._share()

    def close(self) -> None:
        """Ends the selection and leaves the model and the optimizer as they were found."""
        self.owner.release(self._key, final=False)


def _probe_of(function: Callable[[], Any], model: nn.Module) -> BatchProbe:
    """A probe whose batches the function chooses itself."""
    return BatchProbe(lambda batch: function(), lambda: None, model, sync.mean)
