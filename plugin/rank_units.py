"""Ranks: the rank-1 parts of low-rank adapters as units."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apportion.adapters import Adapter, find
from apportion.categories import matches
from apportion.discovery import inside, stacks, unwrapped, walk
from apportion.rank_stacks import Stack, stacked
from apportion.types import Bound, State, Unit


@dataclass(frozen=True, eq=False)
class Triplets(Bound):
    """The ranks of the adapters of one model; a rank is a unit, adapter after adapter.

    Attributes:
        adapters: The adapted layers, in model order.
        hosts: Modules around them that hold several of them, such as PEFT's tuner.
    """

    adapters: tuple[Adapter, ...] = ()
    hosts: tuple[nn.Module, ...] = ()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where the ranks of each adapter begin among the units, and where the last ones end."""
        ends = [0]
        for adapter in self.adapters:
            ends.append(ends[-1] + adapter.capacity)
        return tuple(ends)

    @cached_property
    def sizes(self) -> Tensor:
        """Entries of each rank, int64, shape (n,)."""
        return torch.tensor([a.entries for a in self.adapters for _ in range(a.capacity)], dtype=torch.int64)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The tensors by shape; to be looked at first while all ranks are in memory."""
        return stacked(self.adapters)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each adapter of ``values``, shape (n,)."""
        parts: tuple[Tensor, ...] = torch.split(values, [adapter.capacity for adapter in self.adapters])
        return parts

    def covered(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that this selection decides about."""
        for adapter in self.adapters:
            for (key, _), (p, _) in zip(adapter.names(), adapter.tensors(), strict=True):
                yield f"{adapter.name}.{key}", p


@runtime_checkable
class RankScore(Protocol):
    """How important each rank is, from the gradients of the steps; higher is more important, always."""

    needs: ClassVar[frozenset[str]]
    """What `update` reads: ``weight``, ``grad``, or ``own_grad`` if the gradients of ranks that are in are enough."""

    def init(self, bound: Triplets) -> State:
        """The state before any step."""

    def due(self, step: int) -> bool:
        """Whether `update` is called when ``step`` steps are done."""

    def update(self, state: State, bound: Triplets, params: Collection[nn.Parameter] | None = None) -> State:
        """The state after a step of ``params``, all of them if None, whose gradients are still there."""

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """Importance of each rank, float64, shape (n,), on the CPU."""


@runtime_checkable
class RankBudget(Protocol):
    """How many ranks are in, as a function of the run's length."""

    every: int
    """Optimizer steps between choices."""

    def ends(self, total: int, n: int | None = None, matrices: int = 1) -> tuple[int, int]:
        """The last step with the ranks of the start, and the first with the final choice."""

    def first(self, n: int, matrices: int) -> int:
        """Ranks before the first step, of ``n`` in as many ``matrices``."""

    def last(self, n: int, matrices: int) -> int:
        """Ranks in the end, of ``n`` in as many ``matrices``."""

    def at(self, step: int, total: int | None, n: int | None = None, matrices: int = 1) -> int | float:
        """Ranks after ``step`` of ``total`` optimizer steps."""


@dataclass(frozen=True)
class Ranks:
    r"""The ranks of low-rank adapters: every rank-1 part of every adapted layer is a unit.

    Works on PEFT's AdaLoRA layers (a rank is a row of A, a singular value and a column of B) and on its LoRA and DoRA
    layers (a row of A and a column of B).

    Args:
        adapter: Name of the adapter, matched exactly; None for the one that trains.
        pattern: Regular expression that must match the last parts of the dotted path of an adapted layer as a whole;
            the ranks of the others all train. None for all.
        exclude: Regular expression, matched in the same way, for layers all of whose ranks train.

    Raises:
        ValueError: If a pattern is no regular expression.
    """

    adapter: str | None = None
    pattern: str | None = None
    exclude: str | None = None

    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        for key in ("pattern", "exclude"):
            pattern = getattr(self, key)
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise ValueError(f"`Ranks({key}={pattern!r})` is no regular expression: {error}.") from None

    def bind(self, model: nn.Module) -> Triplets:
        """Finds the ranks in ``model``.

        Raises:
            ValueError: If there is no trainable adapter, several train, or a pattern leaves none.
        """
        model = unwrapped(model)
        found = find(model, self.adapter)
        kept = [
            a
            for a in found
            if (self.pattern is None or matches(self.pattern, a.name))
            and not (self.exclude is not None and matches(self.exclude, a.name))
        ]
        if not kept:
            raise ValueError(
                f"`{self!r}` leaves none of the {len(found)} adapted layers, such as {found[0].name}: the patterns "
                "must match the last parts of their paths as a whole."
            )
        layers = [name for stack in stacks(model) for name, _ in stack.blocks]
        units = []
        for a in kept:
            block = next((i for i, layer in enumerate(layers) if inside(a.name, layer)), 0)
            kind = a.name.rpartition(".")[2]
            units += [Unit(f"{a.name}.{i}", {}, a.module, block, "rank", kind) for i in range(a.capacity)]
        hosts = tuple(m for _, m in walk(model) if hasattr(type(m), "update_and_allocate"))  # wrappers pass names on
        return Triplets(tuple(units), adapters=tuple(kept), hosts=hosts)
