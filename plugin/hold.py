"""The dense twin of the compact store: simple, slow, as large as the model; what the compact one is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apportion.compact import Fate, carry_state
from apportion.stores import Carry, Picks, Watch, index_type, read, write


class Held:
    """A parameter whose unselected entries are put back after every step.

        g[unselected] = 0        when the gradient is final
        p = step(p, g);   p[unselected] = what it was

    Moments are dense, and those of unselected entries are zero. Values, moments and ages of kept, leaving and entering
    entries have the fates that the compact store gives them.

    Args:
        p: The parameter.
        fate: What happens when the selection changes; ages of single entries are the compact store's alone.

    Raises:
        ValueError: If the fate asks for ages of single entries.
    """

    def __init__(self, p: nn.Parameter, fate: Fate) -> None:
        if fate.age != "tensor":
            raise ValueError("`Hold(age='entry')` does not exist: ages of single entries need `Compact`.")
        self.fate, self.leaf = fate, p
        self.watch: Watch | None = None
        self.index = torch.empty(0, dtype=index_type(p), device=p.device)
        self.origin: Tensor | None = p.detach().clone() if fate.leaving == "revert" else None
        self._before: Tensor | None = None
        self._handle = p.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, p: Any) -> None:
        if p.grad is not None and not (self.watch is not None and self.watch(p)):
            self.collect(p)

    @torch.no_grad()
    def collect(self, p: nn.Parameter) -> None:
        """Zeroes the gradient of unselected entries."""
        if p.grad is not None:
            kept = read(p.grad, self.index)
            p.grad.zero_()
            write(p.grad, self.index, kept)

    @torch.no_grad()
    def move(self, p: nn.Parameter, index: Tensor, state: dict[str, Any], picks: Picks | None = None) -> None:
        """Makes ``index`` what is selected; see `apportion.stores.Narrow`."""
        new = index.to(self.index.dtype)
        carry = Carry.between(self.index, new)
        if self.origin is not None and len(carry.left):
            write(p, self.index[carry.left], read(self.origin, self.index[carry.left]))
        sparse = {k: read(v, self.index) for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
        dense = {k: state[k] for k in sparse if k != "step"}
        carry_state(sparse, carry, len(self.index), reset=self.fate.kept == "reset")
        if self.fate.kept == "reset":
            state.clear()
        else:
            for key, value in dense.items():
                value.zero_()
                write(value, new, sparse[key])
        if p.grad is not None:
            kept = carry.over(read(p.grad, self.index))
            p.grad.zero_()
            write(p.grad, new, kept)
        if picks is not None:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            write(p.grad, picks.index, picks.grad)
        self.index = new

    def vacate(self) -> None:
        """Lets go of the gradient and of what is selected; what there is to go back to is loaded with the state."""
        self.index, self.leaf.grad = self.index[:0], None

    def take_up(self, p: nn.Parameter) -> None:
        """Nothing to do: the optimizer steps the parameter itself."""

    def forget(self) -> None:
        """Nothing to do."""

    def before_step(self, p: nn.Parameter) -> None:
        """Remembers every entry."""
        self._before = p.detach().clone()

    @torch.no_grad()
    def write_through(self, p: nn.Parameter) -> None:
        """Puts the unselected entries back."""
        assert self._before is not None
        write(self._before, self.index, read(p, self.index))
        p.copy_(self._before)
        self._before = None

    def saved(self) -> dict[str, Tensor]:
        """Values to go back to."""
        return {} if self.origin is None else {"origin": self.origin}

    def restore(self, p: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Takes up saved values to go back to."""
        if self.origin is not None and "origin" in saved:
            self.origin = saved["origin"].to(device=p.device, dtype=p.dtype, copy=True)

    def close(self) -> None:
        """Removes the hook."""
        self._handle.remove()
