"""Putting ranks out: to zero while they may come back, out of memory when they are out for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apportion.adapters import Adapter
from apportion.orthogonality import Orthogonality
from apportion.owner import Owner
from apportion.rank_selection import RankChoice
from apportion.rank_shapes import Shrunk, leave, take_over
from apportion.rank_units import Triplets
from apportion.types import Bound


@torch.no_grad()
def silence(adapters: Sequence[Adapter], masks: Sequence[Tensor]) -> None:
    """Sets what gates the unselected ranks to zero: E, or B where there is no E.

    Args:
        adapters: The adapters, with all their ranks in memory.
        masks: Selected ranks of each, bool, shapes (r,).
    """
    dead = [(adapter.gate, ~mask) for adapter, mask in zip(adapters, masks, strict=True) if not mask.all()]
    for (p, dim), out in dead:
        p.index_fill_(dim, out.nonzero().flatten().to(p.device), 0.0)


@dataclass(frozen=True)
class Prune:
    """Puts ranks out: to zero while the choice may change, out of memory when it is final.

        before:   E_i <- 0 for unselected ranks (without E: B's column), after every choice; they go on training
        final:    A, B, E <- their selected rows and columns; gradients and optimizer state with them

    The scale of an adapter stays that of the rank it was built with. State dicts keep the shapes that the adapters were
    built with, zeros for ranks that are gone; when training ends, so do the adapters.

    Args:
        shrink: Whether tensors shrink at the final choice; otherwise ranks that are out are set to zero after every
            step, and go on costing what they cost.
        penalty: A penalty on the factors whose gradient is added before the step, or None.

    Example:
        >>> Prune()
        Prune(shrink=True, penalty=None)
    """

    shrink: bool = True
    penalty: Orthogonality | None = None

    hides: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "rank"

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the adapters that the selection called ``key`` decides about; all their ranks train."""
        assert isinstance(bound, Triplets)
        take_over(owner, key, bound)

    def arm(self, owner: Owner, key: str, bound: Triplets, choice: RankChoice, step: int) -> None:
        """Before a step: what is not in from the start is put out before the first one."""
        del owner, key
        if step == 0 and not bool(choice.mask.all()):
            self.put_out(bound, choice)

    def put_out(self, bound: Triplets, choice: RankChoice) -> None:
        """Sets the ranks that ``choice`` leaves out to zero."""
        silence(bound.adapters, bound.split(choice.mask))

    def apply(self, owner: Owner, key: str, bound: Bound, mask: RankChoice) -> None:
        """Gives the adapters the shapes that go with the choice ``mask``; what may come back keeps its values."""
        assert isinstance(bound, Triplets)
        opened = owner.opened[key]
        masks = bound.split(mask.mask)
        if not (mask.final and self.shrink):
            opened.expand()
        elif opened.mask is None or not torch.equal(opened.mask, mask.mask):
            opened.expand()
            opened.mask = mask.mask
            opened.shrunk = [Shrunk(a, m, owner) for a, m in zip(bound.adapters, masks, strict=True) if not m.all()]

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        leave(owner, key, final)
