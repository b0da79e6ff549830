"""Letting ranks come in over time: what is not in waits without a gradient, optimizer state or effect on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apportion.adapters import Adapter
from apportion.orthogonality import Orthogonality
from apportion.owner import Owner
from apportion.rank_parts import by_rank
from apportion.rank_selection import RankChoice
from apportion.rank_shapes import Waiting, leave, take_over
from apportion.rank_units import Triplets
from apportion.types import Bound


@dataclass(frozen=True)
class Grow:
    """Trains the ranks that are in, in tensors of their size; the others come in later and change nothing when they do.

        in:        row of A, entry of E and column of B train; gradients and optimizer state as large as what is in
        waiting:   no gradient, no state, no step, no decay; E_i (without E: B's column) is 0, the rest as it was built

    An adapter is built by PEFT with the largest rank that it may have. Its scale stays that of this rank, so that what
    is learned keeps its weight when others come in, and a rank comes in with E_i, or its column of B, at zero: the
    function does not jump. Moments of a rank that comes in start at zero, while the step count of its tensor goes on.

    The values of ranks that wait stay in memory, B's columns of zeros excepted. State dicts have the shapes of the
    largest rank at every step, and compute what the live model does.

    Args:
        ramp: Optimizer steps in which the learning rate of a rank that has come in rises to its full value; 0 for none.
        penalty: A penalty on the factors that are in, whose gradient is added before the step, or None.

    Raises:
        ValueError: If ``ramp`` is negative; at the start, if ranks that wait are at work, or could never learn.

    Example:
        >>> Grow()
        Grow(ramp=0, penalty=None)
    """

    ramp: int = 0
    penalty: Orthogonality | None = None

    hides: ClassVar[frozenset[str]] = frozenset({"grad"})
    grain: ClassVar[str] = "rank"
    grows: ClassVar[bool] = True
    shrink: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ramp < 0:
            raise ValueError(f"`Grow(ramp={self.ramp!r})` must be at least 0: it is a number of optimizer steps.")

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the adapters that the selection called ``key`` decides about."""
        assert isinstance(bound, Triplets)
        take_over(owner, key, bound)

    def arm(self, owner: Owner, key: str, bound: Triplets, choice: RankChoice, step: int) -> None:
        """Before a step: nothing."""

    def put_out(self, bound: Triplets, choice: RankChoice) -> None:
        """Nothing: what is not in has never been at work."""

    def apply(self, owner: Owner, key: str, bound: Bound, mask: RankChoice) -> None:
        """Gives the adapters the shapes that go with the choice ``mask``; of the others no bit moves."""
        assert isinstance(bound, Triplets)
        opened = owner.opened[key]
        masks = bound.split(mask.mask)
        check_order(self, bound, masks)
        if opened.mask is None:
            check_start(self, bound)
        wanted = dict(zip(bound.adapters, masks, strict=True))
        for part in opened.shrunk:
            if not torch.equal(part.mask, wanted[part.adapter]):
                part.expand()
        held = {part.adapter: part for part in opened.shrunk if not part.expanded}
        check_waiting(self, {adapter: mask for adapter, mask in wanted.items() if adapter not in held})
        opened.shrunk = [
            held.get(adapter) or Waiting(adapter, now, owner, opened.stray)
            for adapter, now in wanted.items()
            if not now.all()
        ]
        opened.mask = mask.mask

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        leave(owner, key, final)


def check_order(effect: Grow, bound: Triplets, masks: Sequence[Tensor]) -> None:
    """Refuses a choice that passes over ranks that wait.

    Args:
        effect: For the error.
        bound: The ranks.
        masks: Those that are to be in of every adapter, bool, shapes (r,).

    Raises:
        ValueError: See above.
    """
    for adapter, mask in zip(bound.adapters, masks, strict=True):
        if not mask[: int(mask.sum())].all():
            raise ValueError(
                f"`{effect!r}`: ranks that wait are alike and come in by their index, but of {adapter.name} "
                f"{mask.nonzero().flatten().tolist()} are to be in: use a rule that adds to whole matrices, "
                "`BestMatrices()`, or one whose scores tie where ranks wait."
            )


@torch.no_grad()
def check_waiting(effect: Grow, masks: Mapping[Adapter, Tensor]) -> None:
    """Refuses to let ranks wait that are at work.

    Args:
        effect: For the error.
        masks: Ranks that are to be in by adapter, bool, shapes (r,); the adapters have all of theirs in memory.

    Raises:
        ValueError: If the model would be another one without the others.
    """
    if not masks:
        return
    gates = [adapter.gate for adapter in masks]
    silent = by_rank([p for p, _ in gates], [dim for _, dim in gates]).cpu() == 0
    loud = (~torch.cat(list(masks.values())) & ~silent).nonzero().flatten()
    if len(loud):
        names = [f"{adapter.name}.{i}" for adapter in masks for i in range(adapter.capacity)]
        raise ValueError(
            f"`{effect!r}` lets ranks wait of which {len(loud)}, such as {names[int(loud[0])]}, are at work: the model "
            "would be another one without them. Grow fresh adapters, in which PEFT has set E or B to zero "
            "(`init_lora_weights=True`), or begin with more ranks; budgets must not fall; and weights of an earlier "
            "step must be loaded before the selection that was saved with them."
        )


@torch.no_grad()
def check_start(effect: Grow, bound: Triplets) -> None:
    """Refuses adapters with ranks that could never learn.

    A rank learns if at most one of its parts is zero: the gradient of each has the others as factors.

    Args:
        effect: For the error.
        bound: The ranks, all in memory.

    Raises:
        ValueError: See above.
    """
    parts = [list(adapter.tensors()) for adapter in bound.adapters]
    empty = torch.zeros(bound.n, dtype=torch.int64)
    for kind in range(len(parts[0])):  # A, E and B
        mine = [part[kind] for part in parts]
        empty += by_rank([p for p, _ in mine], [dim for _, dim in mine]).cpu() == 0
    dead = (empty > 1).nonzero().flatten()
    if len(dead):
        raise ValueError(
            f"`{effect!r}`: {len(dead)} ranks, such as {bound.names[int(dead[0])]}, have two parts of zeros, so that "
            "every gradient of theirs is zero for ever. Let one part alone be zero, as PEFT does "
            "(`init_lora_weights=True`)."
        )
