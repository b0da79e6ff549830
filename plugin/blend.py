"""Blending after the step: every entry takes as much of it as the task wants more than the pretrained model does.

It is no selection of k entries: the share M of each lies between 0 and 1 and is worked out anew after every step. The
costs are those of training everything, and two tensors more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apportion.discrepancy import blend_mask
from apportion.stores import Picks, Watch, index_type


class Blended:
    """A parameter that is drawn back to its first value after every step, entry by entry.

        A <- A + g;   M = min(1, raw / mean of the raw above 0),   raw = G / (I + G) if I < G else 0
        w <- (1 - M) w_0 + M w'        with I, G the relative importance of w_0 and of A in their tensor

    Memory beside that of the optimizer: w_0 in the parameter's precision and A in fp32.

    Args:
        p: The parameter.
    """

    def __init__(self, p: nn.Parameter) -> None:
        self.leaf = p
        self.watch: Watch | None = None
        self.index = torch.empty(0, dtype=index_type(p), device=p.device)
        self.origin = p.detach().clone()
        self._begun = False
        self.sum = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
        self._handle = p.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, p: Any) -> None:
        if self.watch is not None:
            self.watch(p)

    def collect(self, p: nn.Parameter) -> None:
        """The gradient stays whole."""

    def move(self, p: nn.Parameter, index: Tensor, state: dict[str, Any], picks: Picks | None = None) -> None:
        """All entries take part."""

    def forget(self) -> None:
        """Nothing to do."""

    def vacate(self) -> None:
        """Lets go of the gradient and of what is selected; what there is to go back to is loaded with the state."""
        self.index, self.leaf.grad = self.index[:0], None

    def take_up(self, p: nn.Parameter) -> None:
        """Nothing to do: the optimizer steps the parameter itself."""

    @torch.no_grad()
    def before_step(self, p: nn.Parameter) -> None:
        """Adds the gradient, averaged and clipped, to the sum; the first values are those that the first step meets."""
        if not self._begun:  # weights may have been loaded since the run was set up
            self.origin.copy_(p)
            self._begun = True
        if p.grad is not None:
            self.sum.add_(p.grad)

    @torch.no_grad()
    def write_through(self, p: nn.Parameter) -> None:
        """Draws the parameter back; where M is 0 or 1 nothing is rounded."""
        share = blend_mask(self.origin, self.sum)
        between = (self.origin.float() + share * (p.float() - self.origin.float())).to(p.dtype)
        p.copy_(torch.where(share == 0, self.origin, torch.where(share == 1, p, between)))

    def saved(self) -> dict[str, Tensor]:
        """The first values and the sum of gradients."""
        return {"origin": self.origin, "sum": self.sum}

    def restore(self, p: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Takes up saved first values and sums."""
        if saved:
            self._begun = True
            self.origin = saved["origin"].to(device=p.device, dtype=p.dtype, copy=True)
            self.sum = saved["sum"].to(device=p.device, dtype=torch.float32, copy=True)

    def close(self) -> None:
        """Removes the hook."""
        self._handle.remove()
