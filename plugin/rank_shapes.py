"""Adapters of which only some ranks are in memory, whatever becomes of the others.

Whatever the live tensors look like, state dicts have the shapes that the adapters were built with: every checkpoint
loads into the model as its user builds it, with this package and without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apportion.adapters import Adapter
from apportion.owner import Owner
from apportion.rank_units import Triplets


class Shrunk:
    """An adapter of which only some ranks are in memory; the others are gone, and read as zeros.

    Args:
        adapter: The adapter.
        mask: Ranks that stay, bool, shape (r,).
        owner: Knows the optimizer of each tensor, whose state shrinks with it.

    Attributes:
        expanded: Whether all ranks are in memory again.
    """

    def __init__(self, adapter: Adapter, mask: Tensor, owner: Owner) -> None:
        self.adapter, self.mask, self.owner = adapter, mask, owner
        self.expanded = False
        self.kept = mask.nonzero().flatten()
        # A convolution has at least one channel: factors of zero get gradients of zero, so a rank of them stays out.
        self.void = not len(self.kept) and isinstance(adapter.module.lora_A[adapter.adapter], _ConvNd)
        if self.void:
            self.kept = torch.zeros(1, dtype=torch.int64)
        for p, dim in adapter.tensors():
            owner.resize(p, partial(self.cut, dim=dim), partial(self.whole, dim=dim))
        self._handles = [
            adapter.module.register_state_dict_post_hook(partial(self._pad)),  # a method takes no marks
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

    def filled(self, key: str, value: Tensor, dim: int) -> Tensor:
        """The whole tensor called ``key``, as state dicts have it."""
        del key
        return self.whole(value, dim)

    def _pad(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, dim in self.adapter.names():
            if prefix + key in state_dict and state_dict[prefix + key].shape[dim] == len(self.kept):
                state_dict[prefix + key] = self.filled(key, state_dict[prefix + key], dim)

    def _slice(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        gone = (~self.mask).nonzero().flatten()
        for key, dim in self.adapter.names():
            whole: Any = state_dict.get(prefix + key)
            if whole is not None and whole.shape[dim] == self.adapter.capacity:
                self.part_with(key, whole.index_select(dim, gone.to(whole.device)))
                state_dict[prefix + key] = self.cut(whole, dim)

    def part_with(self, key: str, values: Tensor) -> None:
        """Told what is loaded for ranks that are not in memory.

        Raises:
            RuntimeError: If they would be at work.
        """
        if key == self.adapter.gate_name and values.any():
            raise RuntimeError(
                f"The weights to load have ranks of {self.adapter.name} that are out for good in this run: load "
                "them before the fit starts, or when it has ended."
            )

    def expand(self) -> None:
        """Gives the tensors and their optimizer state the shapes that they were built with."""
        self.expanded = True
        for handle in self._handles:
            handle.remove()
        for p, dim in self.adapter.tensors():
            self.owner.resize(p, partial(self.whole, dim=dim), None)
        _announce(self.adapter, self.adapter.capacity)


class Waiting(Shrunk):
    """An adapter of which some ranks are in, while the others wait for their turn and keep every bit.

    Args:
        adapter: The adapter; what gates the ranks that wait is zero.
        mask: Ranks that are in, bool, shape (r,).
        owner: Knows the optimizer of each tensor, whose state is as large as what is in.
        stray: Where the adapter is named when weights are loaded that have others at work.
    """

    def __init__(self, adapter: Adapter, mask: Tensor, owner: Owner, stray: set[str]) -> None:
        self.waiting, self.stray = (~mask).nonzero().flatten(), stray
        self.rest = {
            key: p.detach().index_select(dim, self.waiting.to(p.device))
            for (key, dim), (p, _) in zip(adapter.names(), adapter.tensors(), strict=True)
            if key != adapter.gate_name
        }
        super().__init__(adapter, mask, owner)

    def filled(self, key: str, value: Tensor, dim: int) -> Tensor:
        """The whole tensor, with the values that wait."""
        whole, rest = self.whole(value, dim), self.rest.get(key)
        return whole if rest is None else whole.index_copy_(dim, self.waiting.to(whole.device), rest.to(whole))

    def part_with(self, key: str, values: Tensor) -> None:
        """Keeps what is loaded for ranks that wait; a selection that has them in must follow."""
        if key != self.adapter.gate_name:
            self.rest[key] = values.to(self.rest[key])
        elif values.any():
            self.rest[key] = values.to(self.adapter.gate[0])
            self.stray.add(self.adapter.name)
        else:
            self.rest.pop(key, None)

    @torch.no_grad()
    def expand(self) -> None:
        """Gives the tensors the shapes and the values that they were built with."""
        super().expand()
        for (key, dim), (p, _) in zip(self.adapter.names(), self.adapter.tensors(), strict=True):
            if key in self.rest:
                p.index_copy_(dim, self.waiting.to(p.device), self.rest[key].to(p))
        self.stray.discard(self.adapter.name)


@dataclass(eq=False)
class Opened:
    """What an open effect on ranks has to put back.

    Attributes:
        hosts: PEFT's tuners that would add a penalty of their own to the loss.
        mask: The choice that the shapes go with, bool, shape (n,); None while all ranks are in memory.
        shrunk: Adapters of which only some ranks are in memory.
        stray: Names of adapters into which weights were loaded that have other ranks at work.
    """

    hosts: list[Any]
    mask: Tensor | None = None
    shrunk: list[Shrunk] = field(default_factory=list)
    stray: set[str] = field(default_factory=set)

    def expand(self) -> None:
        """Gives all adapters the shapes that they were built with."""
        for part in self.shrunk:
            if not part.expanded:  # a choice that is refused half-way leaves some
                part.expand()
        self.mask, self.shrunk = None, []


def take_over(owner: Owner, key: str, bound: Triplets) -> None:
    """Announces the adapters that the selection called ``key`` decides about; all their ranks train."""
    covered = dict(bound.covered())
    owner.claim(key, covered, "keep", None, ranks=covered)
    owner.select(key, covered.values())
    # PEFT's AdaLoRA tuner adds a penalty to the loss of some models: at most one, ours, and none in the loss.
    hosts: list[Any] = [h for h in bound.hosts if getattr(h.forward, "__func__", None) is type(h).forward]
    owner.opened[key] = Opened(hosts)
    for host in hosts:
        host.forward = host.model.forward


def leave(owner: Owner, key: str, final: bool) -> None:
    """Leaves the adapters and the optimizers as `take_over` found them."""
    opened = owner.opened.pop(key, None)
    if opened is not None:
        opened.expand()
        for host in opened.hosts:
            host.__dict__.pop("forward", None)
    owner.release(key, final)


def _announce(adapter: Adapter, rank: int) -> None:
    """Tells the modules that hold the factors how many ranks they have; the scale stays that of the first rank."""
    for holder, key in ((adapter.module.lora_A, "out_features"), (adapter.module.lora_B, "in_features")):
        inner = holder[adapter.adapter]
        if isinstance(inner, nn.Linear):
            setattr(inner, key, rank)
