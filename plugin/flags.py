"""Whose ``requires_grad`` is what: a selection's while it trains, the user's own at the ends of epochs.

    in a step                           requires_grad = whether it trains now
    from `show` to the next `check`     requires_grad = as the user left it

What waits for its turn has ``requires_grad=False``, so that nobody could tell who set it: a user who freezes such a
parameter would see it train at its next turn. Where users freeze, at the start of a fit and at both ends of an epoch,
all flags are therefore shown as they were found, and what differs then is the user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from apportion.claims import Claim, plain

if TYPE_CHECKING:
    from apportion.places import Slot

_GLANCE = 64
"""Parameters that are looked at in a step without a switch: about 20 microseconds, whatever the model's size."""


class Flags:
    """The ``requires_grad`` of all parameters that the selections on a run decide about.

    Args:
        slots: The places of the parameters.
        claims: The claims of the selections.

    Attributes:
        shown: Whether the flags are those that the user gave the model.
    """

    def __init__(self, slots: Mapping[nn.Parameter, Slot], claims: Mapping[str, Claim]) -> None:
        self.slots, self.claims = slots, claims
        self.shown = False
        self._known: tuple[tuple[str, ...], list[tuple[nn.Parameter, Slot]]] = ((), [])
        self._next = 0

    def _covered(self) -> list[tuple[nn.Parameter, Slot]]:
        """Every parameter that a selection decides about and its place, listed once for the same selections."""
        if self._known[0] != tuple(self.claims):
            params = dict.fromkeys(p for claim in self.claims.values() for p in claim.covered)
            self._known = tuple(self.claims), [(p, self.slots[p]) for p in params]
        return self._known[1]

    def show(self, module: nn.Module) -> None:
        """Gives every parameter the flag that its user gave it.

        Args:
            module: See `check`.

        Raises:
            RuntimeError: See `check`.
        """
        if not self.shown:
            self.check(module)
            for p, slot in self._covered():
                if not slot.trains:
                    p.requires_grad_(True)
            self.shown = True

    def hide(self) -> None:
        """Gives every parameter the flag of the selections again."""
        if not self.shown:
            return
        self.shown = False
        for p, slot in self._covered():
            if not slot.trains:
                p.requires_grad_(False)
                p.grad = None  # of a user's own backward pass in between; nobody would ever free it

    def check(self, module: nn.Module, glance: bool = False) -> None:
        """Compares the flags with those that were set, and hides again what was shown.

        Args:
            module: The LightningModule, whose `toggle_optimizer` sets flags for part of a batch and knows the others.
            glance: Looks at some of them, at others the next time, unless they are shown.

        Raises:
            RuntimeError: If somebody else has set one.
        """
        covered = self._covered()
        if self.shown:
            wrong = [p for p, _ in covered if not p.requires_grad]
        elif glance:
            first, self._next = self._next, self._next + _GLANCE if self._next + _GLANCE < len(covered) else 0
            wrong = [p for p, slot in covered[first : first + _GLANCE] if p.requires_grad != slot.trains]
        else:
            wrong = [p for p, slot in covered if p.requires_grad != slot.trains]
        toggled = getattr(module, "_param_requires_grad_state", None)
        if wrong and toggled:
            wrong = [p for p in wrong if toggled.get(p, p.requires_grad) == p.requires_grad]
        if wrong:
            self._refuse(wrong)
        self.hide()

    def _refuse(self, wrong: list[nn.Parameter]) -> None:
        key, claim = next((k, c) for k, c in self.claims.items() if wrong[0] in c.covered)
        name, now = claim.covered[wrong[0]], wrong[0].requires_grad
        would = (
            "hold dense gradients of what it does not train" if now else "train them all the same at their next turn"
        )
        raise RuntimeError(
            f"`{plain(key)}` decides about {len(wrong)} parameters, such as {name}, of which `requires_grad` was set "
            f"to {now} by others since the fit began: it would {would}. Freeze and unfreeze before `fit`, in "
            "`__init__` or `configure_model`, or leave them out of the selection by `exclude=`."
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leaves frozen what the user has frozen while the flags were shown, though a selection ends."""
        frozen = [p for p, _ in self._covered() if not p.requires_grad] if self.shown else []
        yield
        for p in frozen:
            p.requires_grad_(False)
