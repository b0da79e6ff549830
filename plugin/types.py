"""The whole vocabulary on one page: units, scores, budgets, rules and effects.

A method is a choice of five slots. Each slot is a small frozen dataclass with one idea:

    units   what is scored and selected           ``bind(model) -> Bound``
    score   how important each unit is            ``init``, ``due``, ``update``, ``read``
    budget  how many units are selected           ``at(step, total) -> int or float``
    rule    scores and budget to a mask           ``select(draw) -> (mask, state)``
    effect  what selection does to the training   ``open``, ``apply``, ``close``

State is explicit: every slot that remembers something gets its state as a dictionary of tensors and gives back a new
one, so one function saves and restores all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apportion import sync

if TYPE_CHECKING:
    from apportion.owner import Owner

State = dict[str, Tensor]
"""What a slot remembers between steps: names to CPU tensors, so that checkpoints load with ``weights_only``."""


@dataclass(frozen=True, eq=False)
class Unit:
    """One thing that is scored and selected: a layer, or a matrix of a layer.

    Attributes:
        name: Dotted path of the module in the model, as ``named_modules`` gives it.
        params: Parameter names and tensors of this unit in model order; only those that require a gradient.
        module: The module at ``name``; probes scale its adapters, calibration looks at its matrices.
        block: Index of the layer that holds the unit.
        category: What the unit is inside its layer (``layer``, ``q``, ``up``, ``norm`` ...).
        group: The family that a balanced rule splits evenly (``layer``, ``attention``, ``ffn``, ``norm``, ``other``).
    """

    name: str
    params: Mapping[str, nn.Parameter]
    module: nn.Module
    block: int = 0
    category: str = "layer"
    group: str = "layer"


@dataclass(frozen=True, eq=False)
class Bound:
    """Units found in one model.

    Attributes:
        units: The units in model order.
        always: Trainable parameters outside the units that train at every step, by name.
        never: Trainable parameters outside the units that this selection keeps frozen, by name.
        found: Names of the parameters outside the layers by role (``embedding``, ``head``, ``norm``, ``other``).
    """

    units: tuple[Unit, ...]
    always: Mapping[str, nn.Parameter] = field(default_factory=dict)
    never: Mapping[str, nn.Parameter] = field(default_factory=dict)
    found: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.units)

    @property
    def names(self) -> tuple[str, ...]:
        """Unit names in order, shape (n,)."""
        return tuple(unit.name for unit in self.units)

    @cached_property
    def sizes(self) -> Tensor:
        """Entries of each unit, int64, shape (n,)."""
        return torch.tensor([sum(p.numel() for p in unit.params.values()) for unit in self.units], dtype=torch.int64)

    def covered(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that this selection decides about: those of the units and those it never trains."""
        for unit in self.units:
            yield from unit.params.items()
        yield from self.never.items()

    def spread(self, mask: Tensor) -> dict[str, nn.Parameter]:
        """Parameters of the selected units by name. ``mask``: bool, shape (n,)."""
        chosen: dict[str, nn.Parameter] = {}
        for unit, selected in zip(self.units, mask.tolist(), strict=True):
            if selected:
                chosen.update(unit.params)
        return chosen


class Probe(Protocol):
    """A loss that can be asked for between two steps without leaving a trace on model, metrics or random numbers."""

    def refresh(self) -> None:
        """Moves on to the next probe batch; until then every `loss` sees the same data."""

    def loss(self) -> float:
        """The loss on the present probe batch, without gradient, in eval mode, averaged over ranks."""


@dataclass(frozen=True, eq=False)
class View:
    """What a score may look at when it is updated.

    Attributes:
        step: Optimizer steps done so far.
        bound: The units and, through them, weights and modules.
        generator: CPU generator of the scores' own random stream, equal on all ranks.
        probe: The probe, or None where no batch is at hand.
        mean: Averages a tensor over ranks; the tensor itself where there is one.
    """

    step: int
    bound: Bound
    generator: torch.Generator
    probe: Probe | None = None
    mean: Callable[[Tensor], Tensor] = sync.mean


@dataclass(frozen=True, eq=False)
class Draw:
    """What a rule chooses from.

    Attributes:
        scores: Importance, float64, shape (n,); higher is more important.
        k: Number of units to select, in [0, n].
        bound: The units, with their blocks, groups and sizes.
        generator: CPU generator of the draws' own random stream, equal on all ranks.
        state: What the rule gave back last time; empty at first.
        mask: The present selection, bool, shape (n,), or None at first.
    """

    scores: Tensor
    k: int
    bound: Bound
    generator: torch.Generator
    state: State = field(default_factory=dict)
    mask: Tensor | None = None


@runtime_checkable
class Units(Protocol):
    """What is scored and selected."""

    def bind(self, model: nn.Module) -> Bound:
        """Finds the units in ``model``; raises `ValueError` with what was found when there are none."""


@runtime_checkable
class Score(Protocol):
    """How important each unit is; higher is more important, always."""

    needs: ClassVar[frozenset[str]]
    """What `update` reads: ``weight``, ``grad``, ``loss`` (a probe), ``activation`` (a probe with hooks)."""

    def init(self, n: int) -> State:
        """The state before any update, for ``n`` units."""

    def due(self, step: int) -> bool:
        """Whether `update` is called before optimizer step ``step`` (0 is the first)."""

    def update(self, state: State, view: View) -> State:
        """The state after looking at ``view``."""

    def read(self, state: State) -> Tensor:
        """Importance of each unit, float64, shape (n,)."""


@runtime_checkable
class Budget(Protocol):
    """How many units are selected."""

    def at(self, step: int, total: int | None) -> int | float:
        """The amount at optimizer step ``step`` of ``total``: an int counts units, a float is a fraction of them."""


@runtime_checkable
class Rule(Protocol):
    """Scores and budget to a mask."""

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """The mask (bool, shape (n,), exactly ``draw.k`` True) and the state to hand back at the next draw."""


@runtime_checkable
class Effect(Protocol):
    """What selection does to the training."""

    hides: ClassVar[frozenset[str]]
    """What an unselected unit no longer has (``grad``): a score that needs it cannot be paired with this effect."""

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the parameters that the selection called ``key`` decides about."""

    def apply(self, owner: Owner, key: str, bound: Bound, mask: Any) -> None:
        """Makes ``mask`` the set that trains: of units (bool, shape (n,)), or a choice of entries."""

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found; ``final`` as for `Owner.release`."""


@dataclass(frozen=True)
class When:
    """Which optimizer steps something happens at: ``begin, begin + every, ...`` below ``end``.

    Args:
        every: Period in optimizer steps, at least 1.
        begin: First step, at least 0.
        end: No step at or after this one; None for no end. ``When(end=1)`` means once, before the first step.
        clock: ``step`` counts optimizer steps; ``epoch`` fires at the first step of an epoch and counts epochs.

    Raises:
        ValueError: If a number is out of its range or ``clock`` is unknown.

    Example:
        >>> [s for s in range(9) if When(every=3, begin=1).due(s, epoch=0, fresh=False)]
        [1, 4, 7]
    """

    every: int = 1
    begin: int = 0
    end: int | None = None
    clock: str = "step"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`When(every={self.every})` must be at least 1: it is a period in optimizer steps.")
        if self.begin < 0:
            raise ValueError(f"`When(begin={self.begin})` must be at least 0: it is an optimizer step.")
        if self.end is not None and self.end <= self.begin:
            raise ValueError(f"`When(begin={self.begin}, end={self.end})` never happens: `end` must lie above `begin`.")
        if self.clock not in ("step", "epoch"):
            raise ValueError(f"`When(clock={self.clock!r})` must be 'step' or 'epoch'.")

    def due(self, step: int, epoch: int, fresh: bool) -> bool:
        """Whether it happens before step ``step`` in epoch ``epoch``; ``fresh`` marks the first step of an epoch."""
        now = step if self.clock == "step" else epoch
        if self.clock == "epoch" and not fresh:
            return False
        return now >= self.begin and (self.end is None or now < self.end) and (now - self.begin) % self.every == 0


def resolve(amount: int | float, n: int, call: str = "A budget") -> int:
    """Number of units that ``amount`` asks for: counts as they are, fractions truncated, at least one unit.

        k = amount                      for an int
        k = max(1, floor(amount * n))   for a float

    Args:
        amount: A count in [1, n] or a fraction in (0, 1].
        n: Number of units.
        call: Where the amount comes from, for the error.

    Raises:
        TypeError: If the amount is not a number.
        ValueError: If the count or fraction lies outside its range.

    Example:
        >>> resolve(0.25, 28), resolve(2, 28), resolve(0.25, 3)
        (7, 2, 1)
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"{call} of {amount!r} is neither a count (int) nor a fraction (float) of units.")
    if isinstance(amount, int):
        if not 1 <= amount <= n:
            raise ValueError(
                f"{call} of {amount} over {n} units must lie in [1, {n}]: lower it, or give a fraction (float)."
            )
        return amount
    if not 0.0 < amount <= 1.0:
        raise ValueError(
            f"{call} of the fraction {amount} must lie in (0, 1]: give a count (int) to select that many units."
        )
    return max(1, int(amount * n + 1e-9))  # 0.29 * 100 is 28.999999999999996
