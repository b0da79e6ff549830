"""Effects: what selection does to the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apportion.owner import Owner
from apportion.types import Bound


@dataclass(frozen=True)
class Freeze:
    """Trains the selected units and freezes the others: no gradient, no optimizer state, no step, no decay.

        selected:     w <- step(w, g, state)
        unselected:   w <- w, bit for bit; g = None

    Args:
        state: What happens to the optimizer state of a unit that is no longer selected. ``drop`` forgets it: the
            next time, the unit takes the optimizer's first step again (about lr per entry under Adam, whatever the
            gradient's size). ``offload`` moves it to (pinned) CPU memory and brings it back; ``keep`` leaves it on the
            device.
        master: ``fp32`` trains half-precision units through full-precision copies, which exist for what is selected;
            None leaves the precision to the optimizer and the Trainer.

    Raises:
        ValueError: If ``state`` or ``master`` is unknown.

    Example:
        >>> Freeze(state="offload")
        Freeze(state='offload', master=None)
    """

    state: str = "drop"
    master: str | None = None

    hides: ClassVar[frozenset[str]] = frozenset({"grad"})

    def __post_init__(self) -> None:
        if self.state not in ("drop", "keep", "offload"):
            raise ValueError(f"`Freeze(state={self.state!r})` must be 'drop', 'keep' or 'offload'.")
        if self.master not in ("fp32", None):
            raise ValueError(f"`Freeze(master={self.master!r})` must be 'fp32' or None.")

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the parameters that the selection called ``key`` decides about."""
        covered = dict(bound.covered())
        if self.master is not None:  # what always trains is of the same precision as what trains in turn
            covered.update(bound.always)
        owner.claim(key, covered, self.state, self.master)

    def apply(self, owner: Owner, key: str, bound: Bound, mask: Tensor) -> None:
        """Makes ``mask`` (bool, shape (n,)) the set that trains."""
        owner.select(key, [*bound.spread(mask).values(), *bound.always.values()])

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        owner.release(key, final)
