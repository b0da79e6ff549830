"""Five slots at work on the ranks of adapters: which are in now, and which are in for good.

Unlike layers and entries, ranks are chosen after a step: the score wants the gradient that the step was taken with and
the weights that it led to, and what is put out must stay out of what is saved after the step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from apportion import sync
from apportion.rank_rules import evenly
from apportion.rank_units import RankBudget, Triplets
from apportion.selection import Selection
from apportion.types import Bound, Draw

NOMINAL = 10_000
"""Steps that a run without a number of steps is taken to have; its clock says how many of them are done."""


@dataclass(frozen=True, eq=False)
class RankChoice:
    """The ranks that are in.

    Attributes:
        mask: Bool, shape (n,).
        final: Whether the others are out for good.
    """

    mask: Tensor
    final: bool


class RankSelection(Selection):
    """One choice of slots at work on the ranks of one model; see `apportion.selection.Selection`.

    Attributes:
        final: Whether the choice is final.
        progress: Share of the run that is done, as the budget sees it.
        forced: Whether the final choice was made because the run ended before its budget did.
        entered: Optimizer steps that were done when each rank came in first, int64, shape (n,); -1 for one that has
            not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.final = self.forced = False
        self.progress = 0.0
        self.entered = torch.empty(0, dtype=torch.int64)

    @property
    def bound(self) -> Triplets:
        found = super().bound
        assert isinstance(found, Triplets)
        return found

    @property
    def _budget(self) -> RankBudget:
        return cast(RankBudget, self.slots.budget)

    def _prepare(self, bound: Bound) -> None:
        """Gets the score ready for the ranks; a restored one goes where the adapters are."""
        assert isinstance(bound, Triplets)
        fresh = {} if self.final else self.slots.score.init(bound)
        saved = self._score
        self._score = {k: saved[k].to(v.device) if k in saved else v for k, v in fresh.items()}
        self._check(bound)

    def _check(self, bound: Triplets) -> None:
        count = (bound.n, len(bound.adapters))
        first, last = self._budget.first(*count), self._budget.last(*count)
        if self._grows and (first > last or not getattr(self.slots.rule, "grow", False)):
            raise ValueError(
                f"`{self.slots.effect!r}` of `{self.label}` lets ranks come in for good: it goes with a budget that "
                f"grows, such as `Growth()`, and a rule that adds to what is in, `BestMatrices()` or "
                f"`TopK(grow=True)`, not with `{self.slots.budget!r}` and `{self.slots.rule!r}`."
            )

    @property
    def _grows(self) -> bool:
        return bool(getattr(self.slots.effect, "grows", False))

    def _amount(self, steps: int, whole: int) -> int:
        return int(self._budget.at(steps, whole, self.bound.n, len(self.bound.adapters)))

    def _ends(self, whole: int) -> tuple[int, int]:
        return self._budget.ends(whole, self.bound.n, len(self.bound.adapters))

    @property
    def choice(self) -> Any:
        """The ranks that are in."""
        return None if self.mask is None else RankChoice(self.mask, self.final)

    def advance(self, epoch: int = 0, fresh: bool = True, total: int | None = None, probe: Any = None) -> bool:
        """Before the first step, equally many ranks of every matrix are in; whether that was just decided."""
        self.prepared = self.step
        if self.mask is not None:
            return False
        capacities = [adapter.capacity for adapter in self.bound.adapters]
        counts = evenly(capacities, self._budget.first(self.bound.n, len(capacities)))
        self._record(torch.cat([torch.arange(r) < c for r, c in zip(capacities, counts, strict=True)]))
        return True

    def begin(self, total: int | None, elapsed: float | None = None) -> None:
        """Refuses a run that the budget does not fit.

        Args:
            total: Optimizer steps of the run; None if only its time is limited.
            elapsed: Share of the time of the run that is over, equal on all ranks; None if it is not limited.

        Raises:
            ValueError: If the run has no end, or no step for the budget to fall in.
        """
        if total is None and elapsed is None:
            raise ValueError(
                f"`{self.slots.budget!r}` of `{self.label}` follows the length of the run, but it has none: give the "
                "Trainer `max_epochs`, `max_steps` or `max_time`, or the optimizer wrapper `total_steps`."
            )
        counts = [key for key in ("warmup", "final") if isinstance(getattr(self.slots.budget, key, 0.0), int)]
        if total is None and counts:
            raise ValueError(
                f"`{self.slots.budget!r}` of `{self.label}` counts steps, but only the time of the run is limited: "
                f"give `{counts[0]}` as a fraction (float)."
            )
        if total is None and not getattr(self.slots.budget, "timed", True):
            raise ValueError(
                f"`{self.slots.budget!r}` of `{self.label}` counts steps, but only the time of the run is limited: "
                "give the Trainer `max_steps` or `max_epochs` too, or use a budget of fractions such as `Growth()`."
            )
        self._ends(total or NOMINAL)

    def look(self, total: int | None, params: Collection[nn.Parameter] | None) -> None:
        """Scores the step that was just taken, while its gradients are there.

        Args:
            total: Optimizer steps of the run, as for `begin`.
            params: What was stepped; None for all.
        """
        step = self.step + 1
        if self.final or not self.slots.score.due(step):
            return
        if total is not None and step >= self._ends(total)[1] and not self._grows:
            return  # what goes for good is chosen by the scores of the phase before
        self._score = self.slots.score.update(self._score, self.bound, params)

    def after_step(self, total: int | None, elapsed: float | None = None) -> bool:
        """Makes a choice if one is due after the step that was just taken; whether one was.

        Args:
            total: As for `begin`.
            elapsed: As for `begin`.
        """
        if self.final or self.mask is None:
            return False
        steps, whole = self._clock(total, elapsed)
        begin, end = self._ends(whole)
        if steps <= begin or (steps < end and self.step % self._budget.every):
            return False
        if self._grows and steps < end and self._amount(steps, whole) == int(self.mask.sum()):
            return False  # none comes in, and none goes
        self._choose(steps, whole, final=steps >= end)
        return True

    def _clock(self, total: int | None, elapsed: float | None) -> tuple[int, int]:
        """Steps done and steps of the run, as the budget counts them."""
        if total is not None and elapsed is None:
            self.progress = self.step / total
            return self.step, total
        done = 0.0 if total is None else self.step / total
        self.progress = max(self.progress, done, elapsed or 0.0)
        whole = total or NOMINAL
        return int(self.progress * whole + 1e-9), whole

    def finish(self, total: int | None) -> bool:
        """The run ends: makes the final choice if it was not made; whether it was not.

        Ranks that would only now come in do not: nothing would be trained with them.
        """
        if self.final or self.mask is None or self.step == 0:
            return False
        self.forced = True
        whole = total or NOMINAL
        if self._grows and self._amount(whole, whole) > int(self.mask.sum()):
            self.final, self._score = True, {}
        else:
            self._choose(whole, whole, final=True)
        return True

    def _choose(self, steps: int, whole: int, final: bool) -> None:
        bound = self.bound
        k = self._amount(steps, whole)
        scores = self.slots.score.scores(self._score, bound)
        mask, self._rule = self.slots.rule.select(Draw(scores, k, bound, self.draws, self._rule, self.mask))
        if int(mask.sum()) != k and getattr(self.slots.rule, "budgeted", True):
            raise RuntimeError(f"`{self.slots.rule!r}` selected {int(mask.sum())} ranks where the budget is {k}.")
        sync.agree(f"the ranks of `{self.label}` at step {self.step}", str(mask.nonzero().flatten().tolist()))
        self.final = final
        chosen = getattr(self.slots.score, "chosen", None)
        if chosen is not None:
            self._score = chosen(self._score, bound)
        if final:
            self._score = {}
        self._record(mask)

    def _record(self, mask: Tensor) -> None:
        before = self.entered if len(self.entered) else torch.full((len(mask),), -1)
        self.entered = torch.where(mask & (before < 0), self.step, before)
        self.previous, self.mask = self.mask, mask
        self._steps.append(self.step)
        self._masks += bytes(mask.tolist())

    @property
    def per_adapter(self) -> dict[str, int]:
        """Ranks that are in, by adapted layer."""
        assert self.mask is not None
        masks = self.bound.split(self.mask)
        return {a.name: int(m.sum()) for a, m in zip(self.bound.adapters, masks, strict=True)}

    def metrics(self) -> dict[str, float]:
        """The number of ranks that are in, and their shares of all for the log."""
        assert self.mask is not None
        return {**super().metrics(), "ranks": float(self.mask.sum())}

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as plain data and CPU tensors that load with ``weights_only=True``."""
        held = {key: value.detach().cpu().clone() for key, value in self._score.items()}
        more = {"final": self.final, "forced": self.forced, "progress": self.progress}
        return {**super().state_dict(), "score": held, **more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called."""
        super().load_state_dict(state)
        self.final, self.forced = bool(state["final"]), bool(state["forced"])
        self.progress = float(state["progress"])
        masks = self.history.masks
        first = torch.tensor([*self._steps, -1])[masks.to(torch.uint8).argmax(0)] if len(masks) else self.entered[:0]
        self.entered = torch.where(masks.any(0), first, -1)
        if self._bound is not None:
            self._prepare(self._bound)
