"""Five slots at work on single entries: which are selected now, which are next, and all that a checkpoint holds of it.

A selection is made at one of two places. A score of weights alone, or of a calibration, is worked out before the step,
tensor by tensor. A score of gradients is worked out while the backward pass of the step runs (`apportion.collector`),
and the entries that it chooses move at that very step. In between nothing is done and nothing is kept.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion import sync
from apportion.asking import asked
from apportion.candidates import Ask, Candidates, Chooser, Site
from apportion.selection import Selection
from apportion.stores import Picks, among, index_type, merged
from apportion.types import Bound


@dataclass(frozen=True, eq=False)
class Choice:
    """The entries that train.

    Attributes:
        indices: Sorted flat indices of the selected entries of each candidate tensor.
        picks: Gradients that entries which join in the middle of a step have at that step, by candidate.
    """

    indices: tuple[Tensor, ...]
    picks: Mapping[int, Picks] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class EntryHistory:
    """How many entries of which tensor were selected when.

    Attributes:
        steps: Optimizer steps at which a selection was made, in order.
        counts: Selected entries, int64, shape (h, tensors).
        sizes: Entries of each tensor, int64, shape (tensors,).
        names: Names of the tensors.
    """

    steps: list[int]
    counts: Tensor
    sizes: Tensor
    names: tuple[str, ...]

    @property
    def amounts(self) -> Tensor:
        """Share of each tensor's entries that was selected, float64, shape (h, tensors)."""
        return self.counts.double() / self.sizes.double()


class EntrySelection(Selection):
    """One choice of slots at work on the entries of one model; see `apportion.selection.Selection`.

    Attributes:
        units: Sorted indices of the selected units of each candidate tensor, where the tensor is, int32 if that
            counts them; None before the first selection.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.units: list[Tensor] | None = None
        self._awaits = False
        self._overdue = False
        self._total: int | None = None
        self._counts: list[list[int]] = []
        self._entered = 0
        self._memory: dict[str, dict[str, Tensor]] = {}

    @property
    def bound(self) -> Candidates:
        found = super().bound
        assert isinstance(found, Candidates)
        return found

    def _prepare(self, bound: Bound) -> None:
        """Nothing: scores of entries have no state of all units."""

    @property
    def awaits(self) -> bool:
        """Whether the coming backward pass decides about the selection."""
        return self._awaits

    @property
    def choice(self) -> Choice | None:
        """The entries that train now; none before the first selection."""
        if self._bound is None:
            return None
        tensors = self.bound.tensors
        if self.units is None:
            return Choice(tuple(torch.empty(0, dtype=index_type(p), device=p.device) for p in tensors))
        # The stores share these indices, so they must lie where the stores want them.
        self.units = [u.to(p.device) for u, p in zip(self.units, tensors, strict=True)]
        return Choice(tuple(self.bound.entries(i, u) for i, u in enumerate(self.units)))

    @property
    def history(self) -> Any:
        """How many entries were selected when, over resumes as well."""
        names = self._bound.names if self._bound is not None else tuple(self._saved_names or ())
        sizes = self.bound.sizes if self._bound is not None else torch.empty(0, dtype=torch.int64)
        counts = torch.tensor(self._counts, dtype=torch.int64).reshape(len(self._steps), len(names))
        return EntryHistory(list(self._steps), counts, sizes, names)

    @property
    def needs_probe(self) -> bool:
        """Whether the next selection cannot be made without batches of its own."""
        return "calibration" in self.slots.score.needs and self.units is None

    # When -------------------------------------------------------------------------------------------------------------

    def advance(self, epoch: int = 0, fresh: bool = True, total: int | None = None, probe: Any = None) -> bool:
        """Prepares the next optimizer step; once per step.

        Args:
            epoch: Epochs done; ``fresh`` says whether this is the first step of one.
            fresh: See ``epoch``.
            total: Optimizer steps of the whole run, for budgets that follow it.
            probe: Batches for a calibration.

        Returns:
            Whether a selection was made; if the coming backward pass has to decide, `awaits` is set instead.
        """
        if self.prepared == self.step:
            return False
        self.prepared = self.step
        self._awaits = False
        due = self.slots.select_when.due(self.step, epoch, fresh)
        if not (due or self._overdue):
            return False
        self._overdue = False
        self._total = total
        ask = self._ask()
        if ask is None:
            return False
        if "grad" in self.slots.score.needs:
            self._awaits = True
            return False
        chooser = self.slots.rule.open(ask)
        gathered = self._calibrate(probe)
        with torch.no_grad():
            for i, unit in enumerate(self.bound.units):
                chooser.push(i, self.score(i, gathered.pop(unit.name, None)))
        self._take(chooser)
        return True

    def _calibrate(self, probe: Any) -> dict[str, Tensor]:
        if "calibration" not in self.slots.score.needs:
            return {}
        if probe is None:
            raise ValueError(
                f"`{self.slots.score!r}` needs batches to calibrate on: pass `probe_data=` to the callback, or `probe=`"
                " (a function that returns the loss on the next batch) to the wrapper."
            )
        params = {unit.name: next(iter(unit.params.values())) for unit in self.bound.units}
        gathered: dict[str, Tensor] = probe.gather(params, self.slots.score.term, self.slots.score.calibration)
        return gathered

    def _ask(self) -> Ask | None:
        """What the rule is asked for now, or None if there is nothing to ask."""
        grows = getattr(self.slots.rule, "grow", False)
        return asked(
            self.bound,
            self.slots.budget,
            self.slots.rule,
            f"`{self.slots.budget!r}` of `{self.label}`: a budget",
            {i: u for i, u in enumerate(self.units or ()) if len(u)},
            # A choice that adds has to last until the next one.
            self.step + (self.slots.select_when.every - 1 if grows else 0),
            self._total,
        )

    # What -------------------------------------------------------------------------------------------------------------

    def open(self) -> tuple[Chooser, Any]:
        """The rule at work on the coming backward pass, and its score: ``score(i, grad)``."""
        ask = self._ask()
        assert ask is not None
        return self.slots.rule.open(ask), self.score

    def score(self, i: int, grad: Tensor | None) -> Tensor:
        """Scores of the units of tensor ``i``, shape (counts[i],)."""
        unit, p = self.bound.units[i], self.bound.tensors[i]
        memory = self._memory.setdefault(unit.name, {})
        site = Site(unit.name, i, p.detach(), grad, self.step, self.seed, memory)
        scores = self.bound.pooled(i, self.slots.score.entries(site).float())
        if not memory:
            del self._memory[unit.name]
        return scores

    def settle(self, chooser: Chooser) -> Choice:
        """Ends the backward pass that decided: makes the selection, with the gradients of what has joined."""
        return self._take(chooser)

    def postpone(self) -> None:
        """Gives the decision to the next step, as the gradients of this one are of no use."""
        self._awaits, self._overdue = False, True

    def _take(self, chooser: Chooser) -> Choice:
        chosen, payload = chooser.chosen()
        bound, grows = self.bound, getattr(self.slots.rule, "grow", False)
        self._awaits = False
        picks: dict[int, Picks] = {}
        units: list[Tensor] = []
        self._entered = 0
        for i, p in enumerate(bound.tensors):
            kind = index_type(p)
            new = chosen.get(i, torch.empty(0, dtype=torch.int64, device=p.device))
            if i in payload and len(new):
                picks[i] = Picks(bound.entries(i, new), payload[i].reshape(-1))
            old = self.units[i].to(p.device) if self.units is not None else new[:0].to(kind)
            new = new.to(kind)
            self._entered += len(new) if grows else int((~among(new, old)).count_nonzero())
            units.append(merged(old, new) if grows else new)
        if not getattr(self.slots.rule, "budgeted", True) and not any(map(len, units)):
            self._say_nothing_is_selected()
        if sync.world_size() > 1:
            sync.agree(f"the selection of `{self.label}` at step {self.step}", _digest(chosen))
        self.units = units
        self._steps.append(self.step)
        self._counts.append([len(u) * w for u, w in zip(units, bound.widths, strict=True)])
        choice = self.choice
        assert choice is not None
        return Choice(choice.indices, picks)

    def _say_nothing_is_selected(self) -> None:
        said = f"`{self.slots.rule!r}` of `{self.label}` selected none of {sum(self.bound.counts)} units"
        if self.units is None:
            raise ValueError(f"{said} at its first choice: nothing would train, so lower what a score must exceed.")
        warnings.warn(f"{said} at step {self.step}: from here on nothing of them trains.", stacklevel=2)

    # What is told and kept --------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Shares for the log: selected entries of all, and entries that joined at the last selection."""
        if self.units is None:
            return {"selected_entries": 0.0, "churn": 0.0}
        selected = sum(self._counts[-1])
        units = sum(map(len, self.units))
        return {
            "selected_entries": selected / max(1, int(self.bound.sizes.sum())),
            "churn": self._entered / max(1, units),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as plain data and CPU tensors that load with ``weights_only=True``."""
        names = self._bound.names if self._bound is not None else self._saved_names or ()
        return {
            "step": self.step,
            "prepared": self.prepared,
            "seed": self.seed,
            "names": list(names),
            "units": None if self.units is None else [u.cpu() for u in self.units],
            "awaits": self._awaits,
            "overdue": self._overdue,
            "total": self._total,
            "entered": self._entered,
            "memory": {name: {k: v.cpu() for k, v in kept.items()} for name, kept in self._memory.items()},
            "draws": self.draws.get_state(),
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "counts": torch.tensor(self._counts, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called.

        Raises:
            ValueError: If a model is bound already and its tensors differ from the saved ones.
        """
        self._adopt(state)
        self.units = None if state["units"] is None else list(state["units"])
        self._awaits, self._overdue = bool(state["awaits"]), bool(state["overdue"])
        self._total, self._entered = state["total"], int(state["entered"])
        self._memory = {name: dict(kept) for name, kept in state["memory"].items()}
        self.draws.set_state(state["draws"])
        self._steps = state["steps"].tolist()
        self._counts = state["counts"].tolist()

    def describe(self) -> str:
        """The configuration in one line, for comparing ranks."""
        return f"{self.slots!r} seed={self.seed} tensors={self.bound.names} of {self.bound.counts}"


def _digest(chosen: dict[int, Tensor]) -> str:
    """What ranks compare instead of all indices."""
    digest = hashlib.sha256()
    for i, units in sorted(chosen.items()):
        digest.update(f"{i}:{len(units)}:".encode())
        digest.update(units.cpu().numpy().tobytes())
    return digest.hexdigest()
