"""Rules: scores and budget to a mask of exactly k units. Ties go to the lower index, NaN scores come last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.candidates import Ask, Chooser
from apportion.entry_rules import compared
from apportion.race import mask_of, race
from apportion.shares import largest_remainder, nearest, systematic
from apportion.types import Bound, Draw, State


def _raw(scores: Tensor) -> Tensor:
    if bool((scores < 0).any()):
        raise ValueError(
            f"`Sample(weights='score')` met a score of {float(scores[scores < 0][0]):.3g}, which is no weight: use "
            "weights='sigmoid' or 'softmax' for scores of both signs."
        )
    return scores.log()


_LOG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "score": _raw,
    "sigmoid": torch.nn.functional.logsigmoid,
    "softmax": lambda scores: scores,
}


@dataclass(frozen=True)
class Sample:
    """Draws k units without replacement, the important ones more often.

        P(next = i) = w_i / sum of w_j over the units not drawn yet
        w = score, sigmoid(score) or exp(score);   floor mixes in the uniform draw: (1 - floor) w_i / sum w + floor / n

    Equal scores make it uniform. Units of weight 0 come after all others, NaN scores last of all, so that there are
    always k.

    Args:
        weights: ``score`` (scores of at least 0), ``sigmoid`` or ``softmax``.
        floor: Share of the uniform draw, in [0, 1); above 0 every unit keeps a chance.

    Raises:
        ValueError: If an argument is out of its range, or at a draw if ``weights='score'`` meets a negative score.

    Example:
        >>> from apportion.types import Unit
        >>> units = Bound(tuple(Unit(f"layer{i}", {}, torch.nn.Identity()) for i in range(4)))
        >>> scores = torch.tensor([0.0, 3.0, 0.0, 1.0], dtype=torch.float64)
        >>> mask, _ = Sample().select(Draw(scores, 2, units, torch.Generator().manual_seed(0)))
        >>> mask
        tensor([False,  True, False,  True])
    """

    weights: str = "score"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.weights not in _LOG_WEIGHTS:
            raise ValueError(f"`Sample(weights={self.weights!r})` must be 'score', 'sigmoid' or 'softmax'.")
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(
                f"`Sample(floor={self.floor!r})` must lie in [0, 1): it mixes the weights with the uniform draw."
            )

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """Exactly ``draw.k`` units; no state."""
        scores = draw.scores.cpu().double()
        log_weights = _LOG_WEIGHTS[self.weights](scores)
        if self.floor > 0.0:
            log_weights = self._mixed(log_weights)
        return mask_of(race(log_weights, draw.k, draw.generator), len(scores)), {}

    def _mixed(self, log_weights: Tensor) -> Tensor:
        n = len(log_weights)
        proper = log_weights < math.inf  # NaN and infinite weights keep their places
        total = log_weights[proper].logsumexp(0)
        if not total.isfinite():  # all weights are 0: the draw is uniform without help
            return log_weights
        uniform = torch.full_like(log_weights, math.log(self.floor / n))
        return torch.where(proper, torch.logaddexp(log_weights - total + math.log1p(-self.floor), uniform), log_weights)


@dataclass(frozen=True)
class Cycle:
    """Takes k units at a time until every unit had its turn, then begins another pass; scores play no part.

    Where k does not divide n, a selection takes the last units of one pass and the first of the next, never one unit
    twice.

    Args:
        order: Order of each pass: ``shuffled`` anew for every pass, ``ascending`` or ``descending`` in model order, or
            ``fixed``: shuffled once and kept.

    Raises:
        ValueError: If ``order`` is unknown.

    Example:
        >>> from apportion.types import Unit
        >>> units = Bound(tuple(Unit(f"layer{i}", {}, torch.nn.Identity()) for i in range(3)))
        >>> mask, state = Cycle("descending").select(Draw(torch.ones(3), 2, units, torch.Generator()))
        >>> mask, state["queue"]
        (tensor([False,  True,  True]), tensor([0]))
    """

    order: str = "shuffled"

    def __post_init__(self) -> None:
        if self.order not in ("shuffled", "ascending", "descending", "fixed"):
            raise ValueError(f"`Cycle(order={self.order!r})` must be 'shuffled', 'ascending', 'descending' or 'fixed'.")

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """Exactly ``draw.k`` units, and what is left of the pass as ``queue``."""
        n = len(draw.scores)
        state = dict(draw.state)
        queue = state.get("queue", torch.empty(0, dtype=torch.int64))
        taken = queue[: draw.k]
        queue = queue[len(taken) :]
        if len(taken) < draw.k:
            order = self._next_pass(n, state, draw.generator)
            fresh = order[~mask_of(taken, n)[order]]
            new = fresh[: draw.k - len(taken)]
            taken = torch.cat([taken, new])
            # Units that the last pass gave to this selection still have their turn in the new one.
            queue = order[~mask_of(new, n)[order]]
        state["queue"] = queue
        return mask_of(taken, n), state

    def _next_pass(self, n: int, state: State, generator: torch.Generator) -> Tensor:
        if self.order == "ascending":
            return torch.arange(n)
        if self.order == "descending":
            return torch.arange(n).flip(0)
        if self.order == "fixed" and "order" in state:
            return state["order"]
        order = torch.randperm(n, generator=generator)
        if self.order == "fixed":
            state["order"] = order
        return order


@dataclass(frozen=True)
class TopK:
    """Selects the k units with the highest scores; ties go to the lower index, NaN comes last, after minus infinity.

    For entries and rows, minus and plus infinity are as little a score as NaN: all three come last, as equals.

    Args:
        per: ``model`` compares all units; ``group``, ``block`` and ``tensor`` compare within each group, layer or
            tensor, which gets its share of the budget by the largest remainder. ``group`` is for layers and matrices
            only, ``tensor`` for entries, rows and ranks only.
        grow: Keeps what is selected and adds the best of the others; a budget that falls keeps the best of the
            selected. Shares then count what is added.

    Raises:
        ValueError: If ``per`` is unknown or does not fit the units.

    Example:
        >>> from apportion.types import Unit
        >>> units = Bound(tuple(Unit(f"layer{i}", {}, torch.nn.Identity()) for i in range(4)))
        >>> TopK().select(Draw(torch.tensor([1.0, 3.0, float("nan"), 3.0]), 2, units, torch.Generator()))[0]
        tensor([False,  True, False,  True])
    """

    per: str = "model"
    grow: bool = False

    def __post_init__(self) -> None:
        if self.per not in ("model", "group", "block", "tensor"):
            raise ValueError(f"`TopK(per={self.per!r})` must be 'model', 'group', 'block' or 'tensor'.")

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """Exactly ``draw.k`` units; no state."""
        if self.per == "tensor" and not all(unit.category == "rank" for unit in draw.bound.units):
            raise ValueError(
                f"`{self!r}` compares entries, rows or ranks of one tensor, but units are whole here: use 'block'."
            )
        kept = draw.mask.cpu() if self.grow and draw.mask is not None else torch.zeros(draw.bound.n, dtype=torch.bool)
        more = draw.k - int(kept.sum())
        return (kept | self._best(draw, ~kept, more) if more >= 0 else self._best(draw, kept, draw.k)), {}

    def _best(self, draw: Draw, among: Tensor, k: int) -> Tensor:
        ranking = torch.argsort(-draw.scores.cpu().double(), stable=True)  # NaN sorts last
        if self.per == "model":
            return mask_of(ranking[among[ranking]][:k], draw.bound.n)
        order: list[int] = ranking.tolist()
        parts: dict[object, list[int]] = {}
        for i in among.nonzero().flatten().tolist():
            unit = draw.bound.units[i]
            key = {"group": unit.group, "block": unit.block, "tensor": id(unit.module)}[self.per]
            parts.setdefault(key, []).append(i)
        counts = largest_remainder([len(part) for part in parts.values()], k)
        left = dict(zip(parts, counts, strict=True))
        home = {i: key for key, part in parts.items() for i in part}
        chosen = []
        for i in order:
            if i in home and left[home[i]] > 0:
                left[home[i]] -= 1
                chosen.append(i)
        return mask_of(torch.tensor(chosen, dtype=torch.int64), draw.bound.n)

    def open(self, ask: Ask) -> Chooser:
        """A chooser of exactly ``ask.k`` entries or rows; those selected now are kept apart if it grows."""
        return compared(self.per, ask, ask.taken if self.grow else {}, repr(self))


@dataclass(frozen=True)
class Balanced:
    """A random set that is spread evenly over layers and, inside each, over attention, feed-forward part and norms.

    A cell is the units of one group in one layer, such as the four attention matrices. Every cell and every group
    gets its share of the budget rounded down or up, and the total is k:

        f = k / n;   c_cell in {floor(f m_cell), ceil(f m_cell)},   sum c_cell = k

    One half of 4 + 3 + 2 units per layer is 2 attention matrices, 1 norm, and 2 feed-forward matrices in a random
    half of the layers, 1 in the other. Fused projections and feed-forward parts of two matrices are smaller cells of
    the same kind. Where the budget was truncated, f is the simplest fraction that truncates to k. Scores play no part.

    Args:
        by: ``count`` draws units inside a cell uniformly; ``size`` draws among the choices of as many units whose
            entries come closest to the fraction f, errors carried from layer to layer (grouped-query attention: q
            and o are large, k and v small).

    Raises:
        ValueError: If ``by`` is unknown.

    Example:
        >>> from apportion.types import Unit
        >>> none = torch.nn.Identity()
        >>> units = Bound(tuple(Unit(f"{b}.{c}", {}, none, b, c, "attention") for b in (0, 1) for c in "qkvo"))
        >>> mask, _ = Balanced().select(Draw(torch.ones(8), 4, units, torch.Generator().manual_seed(0)))
        >>> mask.view(2, 4).sum(1)
        tensor([2, 2])
    """

    by: str = "count"

    def __post_init__(self) -> None:
        if self.by not in ("count", "size"):
            raise ValueError(f"`Balanced(by={self.by!r})` must be 'count' or 'size'.")

    def select(self, draw: Draw) -> tuple[Tensor, State]:
        """Exactly ``draw.k`` units; no state."""
        cells = _cells(draw.bound, draw.generator)
        counts = systematic([len(cell) for cell in cells], draw.k, draw.generator)
        if self.by == "count":
            chosen = [cell[i] for cell, c in zip(cells, counts, strict=True) for i in _permutation(len(cell), draw)[:c]]
        else:
            families = [draw.bound.units[cell[0]].group for cell in cells]
            chosen = nearest(cells, counts, draw.bound.sizes.tolist(), families, draw.generator)
        return mask_of(torch.tensor(chosen, dtype=torch.int64), draw.bound.n), {}


def _permutation(n: int, draw: Draw) -> list[int]:
    order: list[int] = torch.randperm(n, generator=draw.generator).tolist()
    return order


def _cells(bound: Bound, generator: torch.Generator) -> list[list[int]]:
    """Unit indices by group and layer: groups side by side, groups and layers in random order."""
    groups: dict[str, dict[int, list[int]]] = {}
    for i, unit in enumerate(bound.units):
        groups.setdefault(unit.group, {}).setdefault(unit.block, []).append(i)
    cells: list[list[int]] = []
    families = list(groups.values())
    for f in torch.randperm(len(families), generator=generator).tolist():
        layers = list(families[f].values())
        cells += [layers[j] for j in torch.randperm(len(layers), generator=generator).tolist()]
    return cells
