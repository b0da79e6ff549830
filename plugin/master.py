"""Full-precision masters: a half-precision parameter trains through an fp32 copy in its place in the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.stores import stamp

_PIECE = 2**22
"""Entries that are compared at a time: the largest tensor of a model must not stand in memory twice."""


def full_precision_copy(p: Tensor) -> Tensor:
    """An fp32 copy of ``p``, without history. Shapes: ``p`` and result alike."""
    return p.detach().to(torch.float32, copy=True)


class Master:
    """The fp32 copy of one half-precision parameter.

        g_master += fp32(g)      whenever the parameter's gradient is final; g itself is freed at once
        p = half(master)         after the optimizer's step

    In bf16 an update below half a unit in the last place is lost: at lr 1e-4 an entry with |w| > 2^-5 never moves. The
    master takes every update, and micro-batch gradients are summed in fp32.

    Args:
        p: The half-precision parameter.
        value: Its fp32 value; becomes the master's storage.
    """

    def __init__(self, p: nn.Parameter, value: Tensor) -> None:
        self.leaf = nn.Parameter(value)
        self._stamp: tuple[int, int] | None = None  # while it was parked, others may have written into the parameter
        p.grad = None  # of a step before, which nobody could free any more
        self._handle = p.register_post_accumulate_grad_hook(self._gather)

    def _gather(self, p: Tensor) -> None:
        if p.grad is None:
            return
        if not self.leaf.requires_grad:  # another optimizer's turn, by Lightning's `toggle_optimizer`
            pass
        elif self.leaf.grad is None:
            self.leaf.grad = p.grad.to(torch.float32)
        else:
            self.leaf.grad.add_(p.grad)
        p.grad = None

    @torch.no_grad()
    def before_step(self, p: nn.Parameter) -> None:
        """Takes up values that others have written into the parameter; the rest keeps the digits that only it knows."""
        if stamp(p) == self._stamp:
            return
        mine, theirs = self.leaf.detach(), p.detach()
        if mine.is_contiguous() and theirs.is_contiguous():
            mine, theirs = mine.view(-1), theirs.view(-1)
            pieces = zip(mine.split(_PIECE), theirs.split(_PIECE), strict=True)
        else:
            pieces = zip((mine,), (theirs,), strict=True)
        for master, now in pieces:
            torch.where(master.to(now.dtype) == now, master, now.to(master.dtype), out=master)
        self._stamp = stamp(p)

    @torch.no_grad()
    def write_through(self, p: Tensor) -> None:
        """Rounds the master into the parameter."""
        p.copy_(self.leaf)
        self._stamp = stamp(p)

    def saved(self) -> dict[str, Tensor]:
        """The master itself."""
        return {"master": self.leaf.detach()}

    def restore(self, p: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Takes up a saved master, but for weights that were written after the step that it is of."""
        if "master" in saved:
            self.leaf.data.copy_(saved["master"])
            self._stamp = None

    def close(self) -> None:
        """Removes the hook; the parameter keeps its last value."""
        self._handle.remove()
        self.leaf.grad = None
