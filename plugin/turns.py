"""Several optimizers under manual optimization: a choice by gradients is one choice for all of them.

    right     all backward passes;  opt_a.step();  opt_b.step()      the choice is made at the first step
    refused   loss_a, opt_a.step();  loss_b, opt_b.step()            it would be made without the gradients of loss_b

At the first step nobody knows what is still to come, so it is seen when it comes: a gradient that reaches a candidate
after the choice and before the step that it was chosen for.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.optim import Optimizer

from apportion.candidates import Candidates
from apportion.owner import Owner

_ADVICE = (
    "Under manual optimization with several optimizers, let all backward passes of a batch run before the first "
    "`step()` and step every optimizer, or choose by a score of weights or of a calibration, or once before training."
)


class Turns:
    """Watches that the gradients which choose entries are those that the optimizers step with.

    Args:
        owner: The owner of the param groups.
        bound: The candidate tensors.
        label: The selection.
    """

    def __init__(self, owner: Owner, bound: Candidates, label: str) -> None:
        self.owner, self.bound, self.label = owner, bound, label
        self._tensors: dict[Optimizer, list[tuple[str, nn.Parameter]]] = {}
        for name, p in zip(bound.names, bound.tensors, strict=True):
            self._tensors.setdefault(owner.slots[p].optimizer, []).append((name, p))
        self._waiting: list[Optimizer] = []

    def settled(self) -> None:
        """A choice by gradients was made: from now on, until each optimizer has stepped, none may come.

        Raises:
            RuntimeError: If an optimizer has not stepped since the choice before.
        """
        if self._waiting:
            raise RuntimeError(
                f"`{self.label}` has chosen entries by the gradients of two steps, but the optimizer that holds "
                f"{self._tensors[self._waiting[0]][0][0]} did not step in between: its entries were chosen by "
                f"gradients that it was never stepped with. {_ADVICE}"
            )
        self._waiting = list(self._tensors)
        for tensors in self._tensors.values():
            for name, p in tensors:
                self.owner.narrow(p).watch = partial(self._late, name)

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step: what comes to its tensors after that is of the next step."""
        if optimizer in self._waiting:
            self._waiting.remove(optimizer)
            self._leave(optimizer)

    def detach(self) -> None:
        """Watches no more."""
        while self._waiting:
            self._leave(self._waiting.pop())

    def _leave(self, optimizer: Optimizer) -> None:
        for _, p in self._tensors[optimizer]:
            store: object = self.owner.slots[p].store
            watch = getattr(store, "watch", None)
            if isinstance(watch, partial) and watch.func == self._late:  # a choice under way has put its own there
                self.owner.narrow(p).watch = None

    def _late(self, name: str, p: nn.Parameter) -> bool:
        raise RuntimeError(
            f"`{self.label}` chose entries by the gradients that were there when an optimizer stepped, and {name}, "
            f"which another one holds, got a gradient after that: it would have had no say. {_ADVICE}"
        )
