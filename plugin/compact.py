"""The compact store: of one tensor, the optimizer sees only the selected entries.

    index    sorted flat indices, int32       4 k bytes
    leaf     their values, fp32               4 k
    grad     their gradients, fp32            4 k, from the backward pass to the step
    state    two moments under Adam           8 k

The dense gradient lives from the moment autograd has finished it until the selected entries are taken out of it, one
tensor at a time; that of a large linear map is made for those entries alone (`apportion.tiled`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion import ages
from apportion.stores import Carry, Picks, Watch, among, index_type, read, stamp, write
from apportion.tiled import SparseForward


@dataclass(frozen=True)
class Fate:
    """What happens to entries and their optimizer state when the selection changes.

    Args:
        kept: Entries that stay selected ``keep`` value, moments and age, or ``reset`` the moments and the step count
            of their tensor.
        leaving: Entries that leave ``keep`` their trained value, or ``revert`` to the one they entered with.
        age: Steps that Adam's bias correction counts: those of the ``tensor`` (a newcomer's first step is then up to
            (1 - b1) / sqrt(1 - b2) times the learning rate), or of the ``entry`` (its first step is the learning rate).

    Raises:
        ValueError: If an argument is unknown.
    """

    kept: str = "keep"
    leaving: str = "keep"
    age: str = "tensor"

    def __post_init__(self) -> None:
        for key, known in (("kept", ("keep", "reset")), ("leaving", ("keep", "revert")), ("age", ("tensor", "entry"))):
            if getattr(self, key) not in known:
                raise ValueError(f"`Compact({key}={getattr(self, key)!r})` must be {' or '.join(map(repr, known))}.")


class Gathered:
    """The selected entries of one parameter as a leaf of their own.

        g_leaf += g[index]      when the parameter's gradient is final; g itself is freed at once
        p[index] = leaf         after the optimizer's step

    The leaf is fp32 (fp64 for an fp64 parameter): in bf16 an update below half a unit in the last place is lost, so
    that at lr 1e-4 an entry with |w| > 2^-5 would never move.

    Args:
        p: The parameter.
        fate: What happens when the selection changes.
        optimizer: The optimizer that holds the leaf, if entries have ages of their own.
        layer: The linear layer whose weight ``p`` is, if its backward pass may work out the selected entries alone.
        capture: How, see `apportion.tiled.layout`.
    """

    def __init__(
        self,
        p: nn.Parameter,
        fate: Fate,
        optimizer: Optimizer | None = None,
        layer: nn.Linear | None = None,
        capture: str = "auto",
    ) -> None:
        self.fate, self.optimizer = fate, optimizer
        self.watch: Watch | None = None
        self.index = torch.empty(0, dtype=index_type(p), device=p.device)
        kind = torch.float64 if p.dtype == torch.float64 else torch.float32
        self.leaf = nn.Parameter(torch.empty(0, dtype=kind, device=p.device))
        self.age: Tensor | None = None
        self.origin: Tensor | None = None
        if fate.age == "entry":
            self.age = torch.empty(0, dtype=torch.int32, device=p.device)
        if fate.leaving == "revert":
            self.origin = torch.empty(0, dtype=p.dtype, device=p.device)
        self._rounds = p.dtype != kind
        self._stamp: tuple[int, int] | None = stamp(p)
        self._stepped = False  # since the first selection
        self._before: Tensor | None = None
        self._young: Tensor | None = None
        self._counter: Tensor | None = None  # the step that `_young` was found with
        p.grad = None  # of a step before, which nobody could free any more
        self._handle = p.register_post_accumulate_grad_hook(self._arrived)
        self._forward = None if layer is None else SparseForward(layer, p, self, self._handle.id, capture)

    def _arrived(self, p: Any) -> None:
        if p.grad is None or (self.watch is not None and self.watch(p)):
            return
        if self.leaf.requires_grad:
            self.collect(p)
        else:  # another optimizer's turn, by Lightning's `toggle_optimizer`
            p.grad = None

    @torch.no_grad()
    def collect(self, p: nn.Parameter) -> None:
        """Adds the selected entries of the gradient to the leaf's, and frees the gradient."""
        if p.grad is None:
            return
        if p.grad.layout != torch.strided:
            raise RuntimeError(
                f"A parameter of shape {tuple(p.shape)} got a sparse gradient, from which no entries are taken: build "
                "its `nn.Embedding` with `sparse=False`, or leave it out of the units."
            )
        part = read(p.grad, self.index).to(self.leaf.dtype)
        if self.leaf.grad is None:
            self.leaf.grad = part
        else:
            self.leaf.grad.add_(part)
        p.grad = None

    @torch.no_grad()
    def move(self, p: nn.Parameter, index: Tensor, state: dict[str, Any], picks: Picks | None = None) -> None:
        """Makes ``index`` what is selected; see `apportion.stores.Narrow`."""
        self.take_up(p)
        new = index.to(self.index.dtype)
        carry = Carry.between(self.index, new)
        if self.origin is not None and len(carry.left):
            write(p, self.index[carry.left], self.origin[carry.left])
        values = read(p, new).to(self.leaf.dtype)
        values[carry.kept] = self.leaf.detach()[carry.source]  # the master knows more digits than the weight
        carry_state(state, carry, len(self.index), reset=self.fate.kept == "reset")
        if self.age is not None:
            self.age = carry.over(self.age) if self.fate.kept == "keep" else self.age.new_zeros(len(new))
            self._young = None
        if self.origin is not None:
            before = self.origin
            self.origin = read(p, new)
            self.origin[carry.kept] = before[carry.source]
        grad = None if self.leaf.grad is None else carry.over(self.leaf.grad)
        if picks is not None:
            grad = values.new_zeros(len(new)) if grad is None else grad
            grad[among(new, picks.index)] = picks.grad.to(grad.dtype)
        self.leaf.grad = None
        # A loss that is still alive keeps the leaf's place in autograd, and with it the old size: another type ends it.
        self.leaf.data = values.new_empty(0, dtype=torch.float16)
        self.index, self.leaf.data = new, values
        self.leaf.grad = grad
        self._stamp = stamp(p)

    @torch.no_grad()
    def take_up(self, p: nn.Parameter) -> None:
        """Reads the selected values anew, if others have written into the parameter since."""
        if stamp(p) == self._stamp:
            return
        now = read(p, self.index)
        same = self.leaf.to(p.dtype) == now  # the leaf may know more digits
        self.leaf.data = torch.where(same, self.leaf, now.to(self.leaf.dtype))
        if self.origin is not None and not self._stepped:  # weights loaded after the first selection was made
            self.origin = now
        self._stamp = stamp(p)

    def vacate(self) -> None:
        """Lets go of index, values, ages and values to go back to."""
        self.index, self.leaf.grad, self.leaf.data = self.index[:0], None, self.leaf.data[:0]
        self.age = None if self.age is None else self.age[:0]
        self.origin = None if self.origin is None else self.origin[:0]
        self._young = None

    def forget(self) -> None:
        """Makes all ages zero, as moments that begin anew have to be corrected anew."""
        self._young = None
        if self.age is not None:
            self.age.zero_()

    def before_step(self, p: nn.Parameter) -> None:
        """Counts the step for every selected entry, where entries have an age."""
        self.take_up(p)
        if self.age is not None and self.leaf.grad is not None:
            self.age += 1
            self._before = self.leaf.detach().clone()

    def write_through(self, p: nn.Parameter) -> None:
        """Rounds the selected values into the parameter."""
        if self._before is not None:
            assert self.age is not None
            assert self.optimizer is not None
            group = next(g for g in self.optimizer.param_groups if any(q is self.leaf for q in g["params"]))
            state = self.optimizer.state[self.leaf]
            if self._young is None or self._counter is not state["step"]:
                self._young, self._counter = ages.younger(self.age, state["step"]), state["step"]
            ages.correct(self.leaf.detach(), self._before, self.age, self._young, state, group)
            self._before = None
        if len(self.index):
            write(p, self.index, self.leaf.detach())
        self._stamp, self._stepped = stamp(p), True

    def saved(self) -> dict[str, Tensor]:
        """Masters where the parameter is rounder than they are, ages, and values to go back to."""
        parts = {"age": self.age, "origin": self.origin, "master": self.leaf.detach() if self._rounds else None}
        return {key: value for key, value in parts.items() if value is not None}

    def restore(self, p: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Takes up saved values for the present index; without masters, those of the parameter."""
        wrong = [key for key, value in saved.items() if len(value) != len(self.index)]
        if wrong:
            raise ValueError(
                f"The checkpoint's optimizer holds {len(saved[wrong[0]])} entries ({wrong[0]}) of a tensor of shape "
                f"{tuple(p.shape)} of which {len(self.index)} are selected: load the selection that was saved with it."
            )
        values = saved.get("master", read(p, self.index))
        self.leaf.data = values.to(device=p.device, dtype=self.leaf.dtype, copy=True)
        self._stamp = None  # weights may have been written after the step that the masters are of
        if self.age is not None and "age" in saved:
            self.age = saved["age"].to(device=p.device, dtype=torch.int32, copy=True)
            self._young = None
        if self.origin is not None and "origin" in saved:
            self.origin = saved["origin"].to(device=p.device, dtype=p.dtype, copy=True)
            self._stepped = True

    def close(self) -> None:
        """Removes the hook; the parameter keeps its last values."""
        self._handle.remove()
        if self._forward is not None:
            self._forward.detach()
        self.leaf.grad = None


def carry_state(state: dict[str, Any], carry: Carry, size: int, reset: bool) -> None:
    """Moves optimizer state, in place, from the old selection of ``size`` entries to the new one."""
    if reset:
        state.clear()
    for key, value in state.items():
        if isinstance(value, Tensor) and key != "step" and value.shape == (size,):
            if not value.is_floating_point() or type(value).__name__ not in ("Tensor", "Parameter", "FakeTensor"):
                raise ValueError(
                    f"The optimizer keeps {key!r} of the selected entries as {value.dtype} of type "
                    f"`{type(value).__name__}` (quantized in blocks?), which cannot follow entries to another "
                    "selection: use a choice that is made once, or moments of 32 or 16 bits."
                )
            state[key] = carry.over(value)
