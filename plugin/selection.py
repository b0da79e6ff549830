"""Five slots at work on one model: what is selected now, what is selected next, and all that a checkpoint holds of it.

Nothing here touches the training: a selection reads weights and asks a probe, draws from random streams of its own,
and says which units are selected. The driver and the optimizer wrapper act on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apportion import resumed, sync
from apportion.candidates import EntryRule, EntryScore
from apportion.rank_units import RankBudget, RankScore
from apportion.types import Bound, Budget, Draw, Effect, Probe, Rule, Score, State, Units, View, When, resolve

PROBE_STREAM = 0x9E3779B9
"""Distance between the seeds of the two random streams, so that a probe never shifts what is drawn for training."""


@dataclass(frozen=True, eq=False)
class History:
    """What was selected when.

    Attributes:
        steps: Optimizer steps at which a selection was made, in order.
        masks: The selections, bool, shape (h, n).
        names: Unit names, n of them.
    """

    steps: list[int]
    masks: Tensor
    names: tuple[str, ...]

    @property
    def amounts(self) -> Tensor:
        """How much of each unit was selected: 0 or 1, float64, shape (h, n)."""
        return self.masks.double()


@dataclass(frozen=True)
class Slots:
    """The choice of five things that makes a method.

    Args:
        units: What is scored and selected.
        score: How important each unit is.
        budget: How many units are selected.
        rule: Scores and budget to a mask.
        effect: What selection does to the training.
        select_when: The optimizer steps before which a new selection is made; the first step always makes one.

    Raises:
        ValueError: If the score needs what the effect takes away.
    """

    units: Units
    score: Any  # a Score, or an EntryScore if entries are the units
    budget: Budget
    rule: Any  # a Rule, or one that can `open` a pass over entries
    effect: Effect
    select_when: When = field(default_factory=When)

    @property
    def grain(self) -> str:
        """``unit`` if the units are whole parameters, ``entry`` if they are entries or rows of them."""
        return str(getattr(self.units, "grain", "unit"))

    def __post_init__(self) -> None:
        for slot, protocol in _PROTOCOLS[self.grain].items():
            value = getattr(self, slot)
            if isinstance(value, type) or not isinstance(value, protocol):
                raise TypeError(self._misfit(slot, value, protocol))
        if getattr(self.effect, "grain", "unit") != self.grain:
            raise TypeError(self._misfit("effect", self.effect, Effect))
        lost = self.score.needs & self.effect.hides
        if lost:
            raise ValueError(
                f"`{type(self.score).__name__}` needs the {'/'.join(sorted(lost))} of every unit, but "
                f"`{type(self.effect).__name__}` removes it for unselected units: they would score 0 and never be "
                "selected again. Use an effect that keeps it, or a score that needs only weights or a loss."
            )

    def _misfit(self, slot: str, value: Any, protocol: type) -> str:
        name = f"`{slot}={value!r}`"
        if isinstance(value, type) or not isinstance(value, _KINDS[slot]):
            return f"{name} is not a {protocol.__name__.lower()}: give an instance of one from `apportion`."
        kinds = {"unit": "whole parameters", "entry": "entries", "rank": "ranks of adapters"}
        fitting = _FITTING[self.grain][slot]
        return (
            f"{name} is not for {kinds[self.grain]}, which `{self.units!r}` selects: use {fitting} or the like, or "
            "other units."
        )


_PROTOCOLS: dict[str, dict[str, Any]] = {
    "unit": {"units": Units, "score": Score, "budget": Budget, "rule": Rule, "effect": Effect},
    "entry": {"units": Units, "score": EntryScore, "budget": Budget, "rule": EntryRule, "effect": Effect},
    "rank": {"units": Units, "score": RankScore, "budget": RankBudget, "rule": Rule, "effect": Effect},
}
_KINDS: dict[str, Any] = {
    "units": Units,
    "score": (Score, EntryScore, RankScore),
    "budget": (Budget, RankBudget),
    "rule": (Rule, EntryRule),
    "effect": Effect,
}
_FITTING = {
    "unit": {"score": "`Uniform()`", "budget": "`Constant(2)`", "rule": "`Sample()`", "effect": "`Freeze()`"},
    "entry": {"score": "`Magnitude()`", "budget": "`Constant(0.05)`", "rule": "`TopK()`", "effect": "`Compact()`"},
    "rank": {"score": "`Sensitivity()`", "budget": "`Decay(0.5)`", "rule": "`TopK()`", "effect": "`Prune()`"},
}


class Selection:
    """One choice of slots at work on one model.

    Args:
        slots: The five slots.
        seed: Seed of the random streams; the same on all ranks.
        label: Name for messages and logs.

    Attributes:
        bound: The units, once `bind` has found them.
        mask: What is selected, bool, shape (n,), or None before the first selection.
        step: Optimizer steps done under this selection.
        prepared: The step that `advance` was last called for.
    """

    def __init__(self, slots: Slots, seed: int = 0, label: str = "selection") -> None:
        self.slots, self.seed, self.label = slots, seed, label
        self.draws = torch.Generator().manual_seed(seed)
        self.probes = torch.Generator().manual_seed(seed + PROBE_STREAM)
        self.step, self.prepared = 0, -1
        self.mask: Tensor | None = None
        self.previous: Tensor | None = None
        self._bound: Bound | None = None
        self._score: State = {}
        self._rule: State = {}
        self._steps: list[int] = []
        self._masks = bytearray()
        self._saved_names: list[str] | None = None
        self._saved_sizes: list[int] | None = None

    @property
    def bound(self) -> Bound:
        if self._bound is None:
            raise RuntimeError(f"`{self.label}` has not met a model yet: `bind` it, or start the fit, first.")
        return self._bound

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which a copy meets anew."""
        names, sizes = self._made_on()
        return {**vars(self), "_bound": None, "_saved_names": names, "_saved_sizes": sizes}

    def _made_on(self) -> tuple[list[str] | None, list[int] | None]:
        """Names and sizes of the units that the selection is about, as far as they are known."""
        if self._bound is None:
            return self._saved_names, self._saved_sizes
        # A whole unit is what its name says whatever its size, which follows that of its adapters, for one.
        return list(self._bound.names), self._bound.sizes.tolist() if self.slots.grain == "entry" else None

    @property
    def names(self) -> tuple[str, ...]:
        """Unit names in order."""
        return self.bound.names

    @property
    def history(self) -> History:
        """Every selection made so far, over resumes as well."""
        n = len(self._masks) // max(1, len(self._steps))
        flat = torch.frombuffer(bytearray(self._masks), dtype=torch.uint8) if self._masks else torch.empty(0)
        masks = flat.bool().reshape(len(self._steps), n)
        names = self._bound.names if self._bound is not None else tuple(self._saved_names or ())
        return History(list(self._steps), masks, names)

    def bind(self, model: nn.Module) -> Bound:
        """Finds the units in ``model``; a selection that was made or restored must find the ones it was made on.

        Raises:
            ValueError: If names or sizes of the units differ, or the budget does not fit them.
        """
        bound = self.slots.units.bind(model)
        resumed.check(*self._made_on(), bound, self.label)
        self._prepare(bound)
        self._bound = bound
        return bound

    def _prepare(self, bound: Bound) -> None:
        """Gets the score ready for the units."""
        getattr(self.slots.score, "check", lambda _: None)(bound)  # some scores can only work on some units
        if not self._score:
            self._score = self.slots.score.init(bound.n)

    @property
    def choice(self) -> Any:
        """What an effect applies now; None before the first selection."""
        return self.mask

    @property
    def awaits(self) -> bool:
        """Whether the coming backward pass decides about the selection."""
        return False

    @property
    def count(self) -> int:
        """Number of selections made so far."""
        return len(self._steps)

    @property
    def needs_probe(self) -> bool:
        """Whether the next selection cannot be made without a probe."""
        return bool(self.slots.score.needs & {"loss", "activation"}) and self.slots.score.due(self.step)

    def advance(self, epoch: int = 0, fresh: bool = True, total: int | None = None, probe: Probe | None = None) -> bool:
        """Prepares the next optimizer step: updates the score and selects anew, each where it is due; once per step.

        Args:
            epoch: Epochs done; ``fresh`` says whether this is the first step of one.
            fresh: See ``epoch``.
            total: Optimizer steps of the whole run, for budgets that follow it.
            probe: The probe, for scores that need one.

        Returns:
            Whether a selection was made; it may equal the one before.
        """
        slots, bound = self.slots, self.bound
        if self.prepared == self.step:
            return False
        if slots.score.due(self.step):
            if self.needs_probe and probe is None:
                raise ValueError(
                    f"`{slots.score!r}` needs a probe: pass `probe=` (a function that returns the loss) to the wrapper."
                )
            self._score = slots.score.update(self._score, View(self.step, bound, self.probes, probe))
        self.prepared = self.step
        if self.mask is not None and not slots.select_when.due(self.step, epoch, fresh):
            return False
        k = resolve(slots.budget.at(self.step, total), bound.n, f"`{slots.budget!r}` of `{self.label}`: a budget")
        scores = slots.score.read(self._score)
        mask, self._rule = slots.rule.select(Draw(scores, k, bound, self.draws, self._rule, self.mask))
        if int(mask.sum()) != k:
            raise RuntimeError(
                f"`{slots.rule!r}` selected {int(mask.sum())} of {bound.n} units where the budget is {k}."
            )
        sync.agree(f"the selection of `{self.label}` at step {self.step}", str(mask.nonzero().flatten().tolist()))
        self.previous, self.mask = self.mask, mask
        self._steps.append(self.step)
        self._masks += bytes(mask.tolist())
        return True

    def remembered(self) -> Iterable[Tensor]:
        """The tensors of the score's state."""
        return self._score.values()

    def metrics(self) -> dict[str, float]:
        """Shares for the log: selected units and entries of all, and units that changed at the last selection."""
        assert self.mask is not None
        sizes = self.bound.sizes
        before = self.mask if self.previous is None else self.previous
        return {
            "selected_units": float(self.mask.sum()) / self.bound.n,
            "selected_entries": float(sizes[self.mask].sum()) / max(1, int(sizes.sum())),
            "churn": float((self.mask & ~before).sum()) / max(1, int(self.mask.sum())),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as plain data and CPU tensors that load with ``weights_only=True``."""
        history = self.history
        return {
            "step": self.step,
            "prepared": self.prepared,
            "seed": self.seed,
            "names": list(history.names),
            "score": dict(self._score),
            "rule": dict(self._rule),
            "mask": self.mask,
            "previous": self.previous,
            "draws": self.draws.get_state(),
            "probes": self.probes.get_state(),
            "steps": torch.tensor(history.steps, dtype=torch.int64),
            "masks": history.masks.to(torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called.

        Raises:
            ValueError: If a model is bound already and its units differ from the saved ones.
        """
        self._adopt(state)
        self._score, self._rule = dict(state["score"]), dict(state["rule"])
        self.mask, self.previous = state["mask"], state["previous"]
        self.draws.set_state(state["draws"])
        self.probes.set_state(state["probes"])
        self._steps = state["steps"].tolist()
        self._masks = bytearray(state["masks"].flatten().tolist())

    def _adopt(self, state: dict[str, Any]) -> None:
        """Takes up the counters and the names of the units."""
        names = list(state["names"])
        if self._bound is not None and names and names != list(self._bound.names):
            raise ValueError(
                f"The saved state of `{self.label}` is about other units ({', '.join(names[:3])} ...) than this "
                "model's."
            )
        self.step, self.prepared, self._saved_names = int(state["step"]), int(state["prepared"]), names or None
        sizes = state.get("sizes")  # files of earlier versions have neither sizes nor slots
        self._saved_sizes = None if sizes is None else sizes.tolist()
        resumed.compare(state.get("slots"), resumed.written(self.slots, self.seed), self.label)

    def origin(self) -> dict[str, Any]:
        """What the selection was made on and with, for a checkpoint beside `state_dict`."""
        sizes = self._made_on()[1]
        return {
            "slots": resumed.written(self.slots, self.seed),
            "sizes": None if sizes is None else torch.tensor(sizes, dtype=torch.int64),
        }

    def describe(self) -> str:
        """The configuration in one line, for comparing ranks."""
        return f"{self.slots!r} seed={self.seed} units={self.bound.n} {self.bound.names}"
