"""What a selection of ranks does around an optimizer step: the penalty before it, the choice after it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from apportion.owner import Owner
from apportion.rank_ramp import Ramp
from apportion.rank_selection import RankSelection
from apportion.windows import Clock, Stage


class RankWindow(Stage):
    """The windows of a selection of ranks.

    Args:
        owner: The owner of the param groups.
        key: What the owner calls the selection.
        selection: The selection, bound to the model.
        effect: Its effect, open.

    Attributes:
        penalty: The penalty on the factors at the last step, weighted.
    """

    def __init__(self, owner: Owner, key: str, selection: RankSelection, effect: Any) -> None:
        self.owner, self.key, self.selection, self.effect = owner, key, selection, effect
        self.penalty: Tensor | None = None
        self.ramp = Ramp(getattr(effect, "ramp", 0), selection)
        self._fined = -1
        self._total: int | None = None
        self._checked = False

    def begin(self, clock: Clock) -> None:
        """Refuses a run that the budget does not fit, and looks at every step from now on."""
        total, elapsed = clock()
        self.selection.begin(total, elapsed)
        self._total = total
        self.owner.stepped[self.key] = self._look
        self.owner.remembered[self.key] = self.selection.remembered

    def arm(self, passes: int | None, scale: float | None) -> None:
        """Sees to it that the adapters go with the selection, when a window begins."""
        del passes, scale
        self._refuse_strays()
        choice = self.selection.choice
        if choice is not None:
            self.effect.arm(self.owner, self.key, self.selection.bound, choice, self.selection.step)

    def _refuse_strays(self) -> None:
        """Refuses weights that were loaded for another selection.

        Raises:
            RuntimeError: If they have ranks at work that are not in.
        """
        stray = sorted(self.owner.opened[self.key].stray)
        if stray:
            raise RuntimeError(
                f"`{self.selection.label}`: the weights that were loaded have ranks of {len(stray)} adapters at work, "
                f"such as {stray[0]}, that are not in here: load the selection that was saved with them as well."
            )

    def _look(self, optimizer: Optimizer) -> None:
        params = None
        if len(self.owner.optimizers) > 1:
            slots = self.owner.slots
            params = {p for _, p in self.selection.bound.covered() if slots[p].optimizer is optimizer}
        self.ramp.after(params)
        self.selection.look(self._total, params)

    def wants_scale(self) -> bool:
        """Whether a penalty is added to the gradients."""
        return self.effect.penalty is not None

    def finish(self, scale: float) -> None:
        """Adds the penalty's gradient, once per step, when the gradients are averaged over ranks."""
        self._check()
        if self._fined == self.selection.step:
            return
        self._fined = self.selection.step
        self._refuse_strays()
        self.ramp.before()
        if self.effect.penalty is not None:
            self.penalty = self.effect.penalty.add(self.selection.bound.adapters, scale)

    def _check(self) -> None:
        """At the first step, the adapters that train must have had gradients."""
        if self._checked:
            return
        self._checked = True
        held = [a for a in self.selection.bound.adapters if a.a.requires_grad]
        without = [a.name for a in held if a.a.grad is None and a.b.grad is None]
        if not without:
            return
        told = f"`{self.selection.label}`: {len(without)} of {len(held)} adapted layers, such as {without[0]},"
        if len(without) == len(held):
            raise RuntimeError(
                f"{told} got no gradient, so that nothing can be said about their ranks. The usual reasons: reentrant "
                "activation checkpointing over frozen inputs (pass use_reentrant=False), or an adapter that is not the "
                "active one (`model.set_adapter(...)`)."
            )
        warnings.warn(
            f"{told} got no gradient at the first step: ranks without one keep their scores, 0 at first, and count "
            "least. Leave out by `exclude=` what the loss never depends on.",
            stacklevel=3,
        )

    def after_step(self, clock: Clock) -> bool:
        """Makes a choice where one is due, and keeps out what is out; whether a choice was made."""
        chosen = not self.selection.final and self.selection.after_step(*clock())
        if chosen or (self.selection.final and not self.effect.shrink):
            self._put_out()
        return chosen

    def _put_out(self) -> None:
        bound, choice = self.selection.bound, self.selection.choice
        self.effect.put_out(bound, choice)
        self.effect.apply(self.owner, self.key, bound, choice)

    def metrics(self) -> dict[str, Any]:
        """The penalty on the factors, if there is one: as a tensor, since reading it would wait for the device."""
        return {} if self.penalty is None else {"orthogonality": self.penalty}

    def conclude(self, clock: Clock) -> None:
        """The run ends; a budget that has not arrived is enforced, and that is said."""
        before = self.selection.count
        if not self.selection.finish(clock()[0]):
            return
        chosen = self.selection.count > before
        if chosen:
            self._put_out()
        assert self.selection.mask is not None
        step, count, n = self.selection.step, int(self.selection.mask.sum()), self.selection.bound.n
        told = (
            f"the final {count} of {n} ranks were chosen at once, and nothing was trained with them alone."
            if chosen
            else f"{count} of {n} ranks are in, fewer than it was to end with."
        )
        warnings.warn(
            f"`{self.selection.label}`: the run ended after {step} steps, before its schedule; {told}", stacklevel=3
        )
