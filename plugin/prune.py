"""Putting ranks out: to zero while they may come back, out of memory when they are out for good.

Whatever the live tensors look like, state dicts have the shapes that the adapters were built with, with zeros for ranks
that are gone: every checkpoint loads into the model as its user builds it, with this package and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apportion.adapters import Adapter
from apportion.orthogonality import Orthogonality
from apportion.owner import Owner
from apportion.rank_selection import RankChoice
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


class Shrunk:
    """An adapter of which only some ranks are in memory.

    Args:
        adapter: The adapter.
        mask: Ranks that stay, bool, shape (r,).
        owner: Knows the optimizer of each tensor, whose state shrinks with it.
    """

    def __init__(self, adapter: Adapter, mask: Tensor, owner: Owner) -> None:
        self.adapter, self.mask, self.owner = adapter, mask, owner
        self.kept = mask.nonzero().flatten()
        # A convolution has at least one channel: factors of zero get gradients of zero, so a rank of them stays out.
        self.void = not len(self.kept) and isinstance(adapter.module.lora_A[adapter.adapter], _ConvNd)
        if self.void:
            self.kept = torch.zeros(1, dtype=torch.int64)
        for p, dim in adapter.tensors():
            owner.resize(p, partial(self.cut, dim=dim), partial(self.whole, dim=dim))
        self._handles = [
            adapter.module.register_state_dict_post_hook(partial(self._pad)),
            adapter.module.register_load_state_dict_pre_hook(self._slice),
        ]
        _announce(adapter, len(self.kept))

    def cut(self, value: Tensor, dim: int) -> Tensor:
        """What is in memory of a whole tensor."""
        held = value.detach().index_select(dim, self.kept.to(value.device))
        return torch.zeros_like(held) if self.void else held

    def whole(self, value: Tensor, dim: int) -> Tensor:
        """A tensor in the shape that the adapter was built with, zeros for ranks that are gone."""
        shape = list(value.shape)
        shape[dim] = self.adapter.capacity
        return value.new_zeros(shape).index_copy_(dim, self.kept.to(value.device), value.detach())

    def _pad(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, dim in self.adapter.names():
            if prefix + key in state_dict and state_dict[prefix + key].shape[dim] == len(self.kept):
                state_dict[prefix + key] = self.whole(state_dict[prefix + key], dim)

    def _slice(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = list(self.adapter.names())
        gate, dim = names[-1] if self.adapter.e is None else names[1]
        whole: Any = state_dict.get(prefix + gate)
        gone = (~self.mask).nonzero().flatten()
        fits = whole is not None and whole.shape[dim] == self.adapter.capacity
        if fits and whole.index_select(dim, gone.to(whole.device)).any():
            raise RuntimeError(
                f"The weights to load have ranks of {self.adapter.name} that are out for good in this run: load "
                "them before the fit starts, or when it has ended."
            )
        for key, dim in names:
            if prefix + key in state_dict and state_dict[prefix + key].shape[dim] == self.adapter.capacity:
                state_dict[prefix + key] = self.cut(state_dict[prefix + key], dim)

    def expand(self) -> None:
        """Gives the tensors and their optimizer state the shapes that they were built with."""
        for handle in self._handles:
            handle.remove()
        for p, dim in self.adapter.tensors():
            self.owner.resize(p, partial(self.whole, dim=dim), None)
        _announce(self.adapter, self.adapter.capacity)


@dataclass(eq=False)
class Opened:
    """What an open `Prune` has to put back.

    Attributes:
        hosts: PEFT's tuners that would add a penalty of their own to the loss.
        mask: The final choice, once it is in memory alone; bool, shape (n,).
        shrunk: Adapters of which only some ranks are in memory.
    """

    hosts: list[Any]
    mask: Tensor | None = None
    shrunk: list[Shrunk] = field(default_factory=list)

    def expand(self) -> None:
        """Gives all adapters the shapes that they were built with."""
        for part in self.shrunk:
            part.expand()
        self.mask, self.shrunk = None, []


def _announce(adapter: Adapter, rank: int) -> None:
    """Tells the modules that hold the factors how many ranks they have; the scale stays that of the first rank."""
    for holder, key in ((adapter.module.lora_A, "out_features"), (adapter.module.lora_B, "in_features")):
        inner = holder[adapter.adapter]
        if isinstance(inner, nn.Linear):
            setattr(inner, key, rank)


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
        covered = dict(bound.covered())
        owner.claim(key, covered, "keep", None, ranks=covered)
        owner.select(key, covered.values())
        owner.opened[key] = Opened(_hosts(bound))
        for host in owner.opened[key].hosts:  # at most one penalty, ours, and none in the loss
            host.forward = host.model.forward

    def put_out(self, bound: Triplets, choice: RankChoice) -> None:
        """Sets the ranks that ``choice`` leaves out to zero."""
        silence(bound.adapters, bound.split(choice.mask))

    def apply(self, owner: Owner, key: str, bound: Bound, mask: RankChoice) -> None:
        """Gives the adapters the shapes that go with the choice ``mask``; what may come back keeps its values."""
        assert isinstance(bound, Triplets)
        opened: Opened = owner.opened[key]
        masks = bound.split(mask.mask)
        if not (mask.final and self.shrink):
            opened.expand()
        elif opened.mask is None or not torch.equal(opened.mask, mask.mask):
            opened.expand()
            opened.mask = mask.mask
            opened.shrunk = [Shrunk(a, m, owner) for a, m in zip(bound.adapters, masks, strict=True) if not m.all()]

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        opened = owner.opened.pop(key, None)
        if opened is not None:
            opened.expand()
            for host in opened.hosts:
                host.__dict__.pop("forward", None)
        owner.release(key, final)


def _hosts(bound: Triplets) -> list[Any]:
    """PEFT's AdaLoRA tuner around the adapters, whose forward pass adds a penalty to the loss of some models."""
    return [h for h in bound.hosts if getattr(h.forward, "__func__", None) is type(h).forward]
