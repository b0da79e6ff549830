"""Budgets of ranks on tensors without values: how many ranks are in at a moment of the run, spread over matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.optim import Selective
from apportion.rank_selection import RankChoice, RankSelection
from apportion.rank_shapes import Waiting
from apportion.rank_units import Triplets
from apportion.shares import largest_remainder
from apportion.types import State


@dataclass(frozen=True)
class Moment:
    """What is in memory of the ranks at one step of a run.

    Attributes:
        step: Optimizer steps done.
        ranks: Ranks that are in.
        held: Ranks that are in the tensors that train.
        most: Ranks that the adapters were built with.
        matrices: Number of adapters.
    """

    step: int
    ranks: int
    held: int
    most: int
    matrices: int


def schedule(build: Callable[[], nn.Module], method: Any, total: int, shares: Sequence[float]) -> list[Moment]:
    """The budget of ``method`` over a run of ``total`` optimizer steps.

    Args:
        build: Makes the model; called on the meta device.
        method: A method whose units are ranks.
        total: Optimizer steps of the run.
        shares: Moments, as shares of the run in [0, 1].

    Raises:
        ValueError: If the budget does not fit the run or the ranks.
    """
    with torch.device("meta"):
        model = build()
    bound = method.slots.units.bind(model)
    return [moment(method, bound, int(share * total), total) for share in shares]


def moment(method: Any, bound: Triplets, step: int, total: int) -> Moment:
    """What is in memory after ``step`` of ``total`` steps."""
    matrices = len(bound.adapters)
    count = int(method.slots.budget.at(step, total, bound.n, matrices))
    shrinks = method.slots.effect.shrink and (_grows(method) or _final(method, bound, step, total))
    return Moment(step, count, count if shrinks else bound.n, bound.n, matrices)


def _final(method: Any, bound: Triplets, step: int, total: int) -> bool:
    return bool(step >= method.slots.budget.ends(total, bound.n, len(bound.adapters))[1])


def _grows(method: Any) -> bool:
    return bool(getattr(method.slots.effect, "grows", False))


def valueless(method: Any, fake: Any) -> Any:
    """The method, with a score that keeps the state of its own but reads no value, and an effect that checks none."""
    made = copy(method)
    made.slots = replace(method.slots, score=_Blank(method.slots.score, fake), effect=_Unseeing(method.slots.effect))
    return made


def arrive(optimizer: Selective, step: int, total: int) -> Moment:
    """Goes to the moment when ``step`` of ``total`` steps are done.

    Returns:
        What is in memory then.
    """
    selection: Any = optimizer.selection
    assert isinstance(selection, RankSelection)
    bound, effect = selection.bound, selection.slots.effect
    now = moment(optimizer.method, bound, step, total)
    capacities = [adapter.capacity for adapter in bound.adapters]
    counts = largest_remainder(capacities, now.ranks)
    selection.mask = torch.cat([torch.arange(r) < c for r, c in zip(capacities, counts, strict=True)])
    selection.step, selection.final = step, _final(optimizer.method, bound, step, total)
    if selection.final:
        selection._score = {}
    choice = RankChoice(selection.mask, selection.final)
    effect.put_out(bound, choice)  # type: ignore[attr-defined]
    effect.apply(optimizer.owner, optimizer._key, bound, choice)
    return now


@dataclass(frozen=True, eq=False)
class _Blank:
    """A score of ranks that remembers as much as ``score`` does; the first ranks of all matrices come first."""

    score: Any
    fake: Any

    needs: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "rank"

    def init(self, bound: Triplets) -> State:
        with self.fake:
            state: State = self.score.init(bound)
        return state

    def due(self, step: int) -> bool:
        return bool(self.score.due(step))

    def update(self, state: State, bound: Triplets, params: Collection[nn.Parameter] | None = None) -> State:
        made: State = self.score.update(state, bound, params)
        return made

    def scores(self, state: State, bound: Triplets) -> Tensor:
        del state
        return torch.cat([-torch.arange(adapter.capacity, dtype=torch.float64) for adapter in bound.adapters])


class _Unseeing:
    """An effect on ranks that does not look at the values of fresh adapters; all else is that of ``effect``."""

    def __init__(self, effect: Any) -> None:
        self.effect = effect

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("effect"), name)

    def apply(self, owner: Any, key: str, bound: Triplets, mask: RankChoice) -> None:
        if not getattr(self.effect, "grows", False):
            self.effect.apply(owner, key, bound, mask)
            return
        opened = owner.opened[key]
        opened.expand()
        opened.mask = mask.mask
        parts = zip(bound.adapters, bound.split(mask.mask), strict=True)
        opened.shrunk = [Waiting(adapter, now, owner, opened.stray) for adapter, now in parts if not now.all()]
