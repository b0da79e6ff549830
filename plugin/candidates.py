"""The vocabulary of entries: what is scored and selected when single weights, or rows of matrices, are the units.

Nothing here is ever as large as the model: scores are worked out tensor by tensor, at the moment a tensor's gradient is
final, and a rule sees them one tensor at a time. A choice is a sorted list of flat indices for each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apportion.types import Bound

POOLS = ("sum", "mean", "abs_sum")


@dataclass(frozen=True, eq=False)
class Candidates(Bound):
    """Tensors whose entries, or rows, are the units: one `Unit` with one parameter for each tensor.

    Attributes:
        charged: Entries outside the candidates that train at every step and that the budget pays for.
        pool: None if single entries are units; else how the scores of a row become the row's: ``sum``, ``mean``, or
            ``abs_sum``, the absolute value of the sum.
    """

    charged: int = 0
    pool: str | None = None

    @cached_property
    def tensors(self) -> tuple[nn.Parameter, ...]:
        """The candidate tensors in model order."""
        return tuple(next(iter(unit.params.values())) for unit in self.units)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Entries of one unit, for each tensor: 1, or the length of a row."""
        if self.pool is None:
            return tuple(1 for _ in self.units)
        return tuple(max(1, p.numel() // max(1, p.shape[0] if p.ndim else 1)) for p in self.tensors)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Units of each tensor."""
        return tuple(p.numel() // w for p, w in zip(self.tensors, self.widths, strict=True))

    @property
    def n(self) -> int:
        """Number of units, over all tensors."""
        return sum(self.counts)

    def pooled(self, i: int, scores: Tensor) -> Tensor:
        """Scores of the units of tensor ``i``, shape (counts[i],), from those of its entries, in the tensor's shape."""
        if self.pool is None:
            return scores.reshape(-1)
        rows = scores.reshape(self.counts[i], self.widths[i])
        if self.pool == "mean":
            return rows.mean(1)
        return rows.sum(1).abs() if self.pool == "abs_sum" else rows.sum(1)

    def entries(self, i: int, units: Tensor) -> Tensor:
        """Flat indices of the entries of ``units`` (sorted, int64) of tensor ``i``, sorted, int64."""
        width = self.widths[i]
        if width == 1:
            return units
        return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)


@dataclass(frozen=True, eq=False)
class Site:
    """One candidate tensor, as a score sees it.

    Attributes:
        name: Name of the parameter.
        index: Its place among the candidates.
        weight: Its values now, detached, in its own shape and precision.
        grad: Its gradient in the weight's shape: summed over micro-batches, averaged over ranks, without loss scale; or
            what a calibration gathered. None if the score needs none.
        step: Optimizer steps done so far.
        seed: Seed of the selection, equal on all ranks.
        memory: What the score remembers about this tensor; a score may write into it, and checkpoints hold it.
    """

    name: str
    index: int
    weight: Tensor
    grad: Tensor | None = None
    step: int = 0
    seed: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """How a score gathers gradients before training, without a step of the optimizer.

    Args:
        batches: Batches to go through.
        per: ``batch`` takes the gradient of each batch's loss; ``sample`` that of each example by itself.
        mode: ``eval`` turns dropout off, ``train`` leaves it on.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> Calibration(batches=16, per="batch", mode="train")
        Calibration(batches=16, per='batch', mode='train')
    """

    batches: int = 16
    per: str = "batch"
    mode: str = "eval"

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"`Calibration(batches={self.batches})` must be at least 1: gradients come from batches.")
        if self.per not in ("batch", "sample"):
            raise ValueError(f"`Calibration(per={self.per!r})` must be 'batch' or 'sample'.")
        if self.mode not in ("eval", "train"):
            raise ValueError(f"`Calibration(mode={self.mode!r})` must be 'eval' or 'train'.")


@runtime_checkable
class EntryScore(Protocol):
    """How important each entry of a tensor is; higher is more important, always.

    A score that needs a ``calibration`` also has an attribute ``calibration`` and a method ``term(grad, weight)``: what
    one gradient contributes, fp32. The mean of the terms over batches (or samples) and ranks is its ``site.grad``.
    """

    needs: ClassVar[frozenset[str]]
    """What `entries` reads: ``weight``, ``grad``, ``calibration``."""

    def entries(self, site: Site) -> Tensor:
        """Importance of each entry, fp32, in the weight's shape."""


@dataclass(frozen=True, eq=False)
class Ask:
    """What a rule of entries is asked to choose.

    Attributes:
        counts: Units of each tensor.
        shapes: Shape of each tensor.
        k: Units to choose; what is to be added, for a rule that grows.
        taken: Sorted indices of the units selected now, by tensor, in any integer type, on the tensor's device.
        quotas: Units of each tensor, where the budget fixes them; their sum is ``k``.
        blocks: Index of the layer that each tensor lies in.
    """

    counts: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    k: int
    taken: Mapping[int, Tensor] = field(default_factory=dict)
    quotas: tuple[int, ...] | None = None
    blocks: tuple[int, ...] = ()


class Chooser(Protocol):
    """One pass of a rule over the candidate tensors, which come in any order, each once."""

    def push(self, i: int, scores: Tensor, payload: Tensor | None = None) -> None:
        """Looks at the units of tensor ``i``.

        Args:
            i: The tensor's place among the candidates.
            scores: fp32, shape (counts[i],).
            payload: What is to be known about the chosen ones later, shape (counts[i], ...).
        """

    def chosen(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Sorted indices (int64) of the chosen units by tensor, and their payloads in the same order.

        A tensor without a chosen unit is missing.
        """


@runtime_checkable
class EntryRule(Protocol):
    """Scores and budget to a choice of entries.

    A rule may have two attributes more: ``grow``, whether what it chooses is added to what is selected, and
    ``budgeted``, whether it minds the budget at all.
    """

    def open(self, ask: Ask) -> Chooser:
        """Starts a pass over the candidate tensors."""
