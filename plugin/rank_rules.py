"""Rules for ranks: those that let whole matrices grow, and those that ask no budget. Ties go to the lower index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.types import Draw, State


def evenly(capacities: Sequence[int], k: int) -> list[int]:
    """Splits ``k`` over parts as evenly as their capacities allow; what is left over goes to the lower index.

    Args:
        capacities: What each part can hold.
        k: What there is, at most the sum of the capacities.

    Example:
        >>> evenly([4, 1, 4], 8), evenly([4, 4, 4], 4)
        ([4, 1, 3], [2, 1, 1])
    """
    counts = [0] * len(capacities)
    while k > 0:
        room = [i for i, capacity in enumerate(capacities) if counts[i] < capacity]
        if not room:
            raise ValueError(f"`evenly(...)` cannot split {k} more over parts that hold {sum(capacities)}.")
        level = max(1, k // len(room))
        for i in room:
            more = min(level, capacities[i] - counts[i], k)
            counts[i] += more
            k -= more
    return counts


def grants(scores: Sequence[float], room: Sequence[int], add: int, k: int) -> list[int]:
    """Hands out ``k`` in portions of ``add``, the highest score first, in as many rounds as it takes.

    Args:
        scores: What each part deserves; ties go to the lower index, NaN comes last.
        room: What each part can still take.
        add: The portion, at least 1; the last one is what is left.
        k: What there is, at most the sum of the room.

    Example:
        >>> grants([0.2, 0.9, 0.9], [4, 4, 1], add=2, k=4)
        [1, 2, 1]
    """
    order = sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))
    given = [0] * len(scores)
    while k > 0:
        before = k
        for i in order:
            more = min(add, room[i] - given[i], k)
            given[i] += more
            k -= more
        if k == before:
            raise ValueError(f"`grants(...)` has {k} left over that no part can take.")
    return given


@dataclass(frozen=True)
class BestMatrices:
    """Adds ranks to the matrices with the highest scores, as many to each; what is in stays in.

        s_m = mean of the scores of the ranks of matrix m that are in
        the matrices are given ``add`` ranks each in the order of s, until the budget is met

    The ranks of a matrix that are not in yet are alike: they come in by their index. A matrix that is full is passed
    over, and the last one is given what is left of the budget.

    Args:
        add: Ranks that a matrix is given, at least 1.

    Raises:
        ValueError: If ``add`` is below 1, or at a choice if the budget falls.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from apportion.rank_units import Ranks
        >>> layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        >>> bound = Ranks().bind(get_peft_model(layers, LoraConfig(r=3, target_modules=["0", "1"])))
        >>> now, scores = torch.tensor([True, False, False] * 2), torch.tensor([0.1] * 3 + [0.5] * 3)
        >>> BestMatrices().select(Draw(scores, 3, bound, torch.Generator(), mask=now))[0].int()
        tensor([1, 0, 0, 1, 1, 0], dtype=torch.int32)
    """

    add: int = 1

    grain: ClassVar[str] = "rank"
    grow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.add, bool) or not isinstance(self.add, int) or self.add < 1:
            raise ValueError(f"`BestMatrices(add={self.add!r})` must be a whole number of at least 1.")

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """Exactly ``draw.k`` ranks; no state."""
        split = _split(self, draw)
        present = torch.zeros(draw.bound.n, dtype=torch.bool) if draw.mask is None else draw.mask.cpu()
        masks = [mask.clone() for mask in split(present)]
        more = draw.k - sum(int(mask.sum()) for mask in masks)
        if more < 0:
            raise ValueError(
                f"`{self!r}` only adds ranks, but the budget takes {-more} away: use `TopK()` for a budget that falls."
            )
        pooled = [
            float(part[mask].mean()) if mask.any() else -math.inf
            for part, mask in zip(split(draw.scores.double()), masks, strict=True)
        ]
        given = grants(pooled, [int((~mask).sum()) for mask in masks], self.add, more)
        for mask, count in zip(masks, given, strict=True):
            mask[(~mask).nonzero().flatten()[:count]] = True
        return torch.cat(masks), {}


@dataclass(frozen=True)
class Above:
    """Selects every rank with a score above a fixed value, however many there are.

        selected = {i: score_i > above},   with ``within`` only among the selected ones

    The budget says when a choice is made and when it is final, not how many ranks it leaves. NaN is never above.

    Args:
        above: The value to exceed.
        within: Chooses only among the ranks that are in: they can go, not come back.

    Raises:
        ValueError: If ``above`` is not finite.

    Example:
        >>> Above(0.25)
        Above(above=0.25, within=False)
    """

    above: float
    within: bool = False

    grain: ClassVar[str] = "rank"
    budgeted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.above):
            raise ValueError(f"`Above(above={self.above!r})` must be finite: ranks with a higher score are selected.")

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """All ranks above the value; no state."""
        _split(self, draw)
        mask = draw.scores.cpu() > self.above
        return (mask & draw.mask.cpu() if self.within and draw.mask is not None else mask), {}


def _split(rule: Any, draw: Draw) -> Any:
    """Splits what belongs to ranks by adapter.

    Raises:
        TypeError: If other things than ranks are selected.
    """
    split = getattr(draw.bound, "split", None)
    if split is None:
        raise TypeError(f"`{rule!r}` is for ranks of adapters, `units=Ranks()`; use `TopK()` for other units.")
    return split
