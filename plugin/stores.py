"""What stands between a parameter and its optimizer: the tensor that is stepped, and what happens around a step.

Master     all entries, in fp32             (`apportion.master`)
Gathered   the selected entries, in fp32    (`apportion.compact`)
Held       the parameter itself; what is not selected is put back after the step   (`apportion.hold`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Watch = Callable[[nn.Parameter], bool]
"""Told of a gradient that a backward pass has left; says whether it sees to it, so that the store must not."""


class Store(Protocol):
    """The place of one parameter in its optimizer."""

    leaf: nn.Parameter
    """What stands in the param group."""

    def before_step(self, p: nn.Parameter) -> None:
        """Right before the optimizer's step; not called for a step that a gradient scaler skips.

        Whatever others have written into the parameter since the last step is taken up here at the latest.
        """

    def write_through(self, p: nn.Parameter) -> None:
        """Right after the optimizer's step: gives the parameter its new values."""

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the optimizer's state."""

    def restore(self, p: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Takes up what `saved` gave, once the parameter has its values."""

    def close(self) -> None:
        """Removes hooks; the parameter keeps its values."""


class Narrow(Store, Protocol):
    """A store that trains some entries of its parameter."""

    index: Tensor
    """Sorted flat indices of the selected entries; int32, or int64 for 2^31 entries and more."""

    watch: Watch | None
    """Who else wants the gradient."""

    def collect(self, p: nn.Parameter) -> None:
        """Takes from the parameter's gradient what is selected, and lets the rest go."""

    def move(self, p: nn.Parameter, index: Tensor, state: dict[str, Any], picks: Picks | None) -> None:
        """Makes ``index`` what is selected.

        Args:
            p: The parameter.
            index: Sorted flat indices, any integer type.
            state: The optimizer's state for `leaf`, changed in place.
            picks: Gradients of entries that the present step shall train with, where `collect` has not seen them.
        """

    def take_up(self, p: nn.Parameter) -> None:
        """Takes up what others have written into the parameter since, such as weights loaded after the optimizer."""

    def vacate(self) -> None:
        """Selects nothing, as if nothing had ever been selected: no value goes back, no gradient stays."""

    def forget(self) -> None:
        """Told that the optimizer's state for `leaf` has been dropped."""


@dataclass(frozen=True, eq=False)
class Picks:
    """Gradients of single entries.

    Attributes:
        index: Sorted flat indices, int64, shape (k,).
        grad: Their gradients, shape (k,).
    """

    index: Tensor
    grad: Tensor


@dataclass(frozen=True, eq=False)
class Carry:
    """How the present selection continues in the next one.

    Attributes:
        kept: Places in the new selection of entries that were selected before, int64, shape (c,).
        source: Their places in the old selection, int64, shape (c,).
        left: Places in the old selection of entries that are selected no more, int64.
        size: Entries of the new selection.

    Example:
        >>> carry = Carry.between(torch.tensor([1, 4, 6]), torch.tensor([0, 4, 6, 9]))
        >>> carry.kept, carry.source, carry.left
        (tensor([1, 2]), tensor([1, 2]), tensor([0]))
        >>> carry.over(torch.tensor([0.1, 0.2, 0.3]))
        tensor([0.0000, 0.2000, 0.3000, 0.0000])
    """

    kept: Tensor
    source: Tensor
    left: Tensor
    size: int

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> Carry:
        """Compares two sorted lists of indices."""
        if len(old) == 0 or len(new) == 0:
            none = torch.empty(0, dtype=torch.int64, device=new.device)
            return cls(none, none, torch.arange(len(old), device=new.device), len(new))
        stays = among(old, new)
        return cls(
            among(new, old).nonzero().flatten(), stays.nonzero().flatten(), (~stays).nonzero().flatten(), len(new)
        )

    def over(self, values: Tensor) -> Tensor:
        """Values of the new selection: those of kept entries, zero for entering ones. Shape (size,)."""
        fresh = values.new_zeros(self.size)
        fresh[self.kept] = values[self.source]
        return fresh


_DENSE = 128
"""Of as many entries, one is enough for marks to be faster than a search."""


def among(some: Tensor, others: Tensor) -> Tensor:
    """Which of ``some`` indices are in ``others``, both sorted: bool, in the shape of ``some``.

    Example:
        >>> among(torch.tensor([1, 4, 6]), torch.tensor([0, 4, 6, 9]))
        tensor([False,  True,  True])
    """
    if len(some) == 0 or len(others) == 0:
        return torch.zeros(len(some), dtype=torch.bool, device=some.device)
    span = 1 + max(int(some[-1]), int(others[-1])) if some.device.type == "cpu" else 0
    if span and _DENSE * len(others) >= span:  # 3 to 14 times as fast as a search, for a byte an entry
        marked = torch.zeros(span, dtype=torch.bool, device=some.device)
        return marked.index_fill_(0, others.long(), True).index_select(0, some)
    place = torch.searchsorted(others, some.to(others.dtype)).clamp_(max=len(others) - 1)
    return others[place] == some


def merged(old: Tensor, new: Tensor) -> Tensor:
    """The union of two sorted lists of indices without a common one, sorted, in one pass.

    Example:
        >>> merged(torch.tensor([1, 5, 8]), torch.tensor([0, 6]))
        tensor([0, 1, 5, 6, 8])
    """
    if len(old) == 0 or len(new) == 0:
        return new if len(old) == 0 else old
    place = torch.searchsorted(old, new) + torch.arange(len(new), device=new.device)
    union = old.new_empty(len(old) + len(new))
    before = torch.ones(len(union), dtype=torch.bool, device=old.device)
    before[place] = False
    union[place] = new
    union[before] = old
    return union


def index_type(p: Tensor) -> torch.dtype:
    """The smallest type that counts the entries of ``p``: int32 below 2^31 of them."""
    return torch.int32 if p.numel() < 2**31 else torch.int64


def stamp(p: Tensor) -> tuple[int, int]:
    """Tells whether others have written into ``p``: another one after `p.add_()` or `p.data = ...`.

    It is the same after `p.data.add_()`, which leaves no trace but the values.

    Example:
        >>> p = torch.ones(2)
        >>> before = stamp(p)
        >>> stamp(p) == before, stamp(p.add_(1)) == before
        (True, False)
    """
    return p._version, p.untyped_storage()._cdata


def digest(index: Tensor) -> str:
    """What a checkpoint holds in place of ``index``, to tell whether state is of the same entries.

    Example:
        >>> digest(torch.tensor([1, 4])) == digest(torch.tensor([1, 5]))
        False
    """
    return hashlib.sha256(index.cpu().numpy().data).hexdigest()


def read(p: Tensor, index: Tensor) -> Tensor:
    """A copy of the entries of ``p`` at the flat ``index``, which counts in the order of its shape."""
    return p.detach().reshape(-1).index_select(0, index)


@torch.no_grad()
def write(p: Tensor, index: Tensor, values: Tensor) -> None:
    """Sets the entries of ``p`` at the flat ``index``, whatever its memory layout, rounding to its precision."""
    place = index.long()
    if p.is_contiguous():
        p.detach().view(-1).index_copy_(0, place, values.to(p.dtype))
    else:
        p.detach()[torch.unravel_index(place, p.shape)] = values.to(p.dtype)
