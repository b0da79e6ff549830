"""Units of a plan: what was selected before training, single entries here and adapters there."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion import sync
from apportion.adapt import adapt, matrices
from apportion.budgets import Constant
from apportion.candidates import Candidates, Site
from apportion.categories import parameters
from apportion.discovery import unwrapped
from apportion.entry_units import Entries
from apportion.plan import Plan, select
from apportion.routing import Router
from apportion.rules import TopK
from apportion.types import Unit, resolve

TRIED = 1.6
"""How many entries are looked at for a target, as a multiple of it: single entries cost one each, so fewer do."""


@dataclass(frozen=True)
class Planned:
    """The entries of a plan, which is made before training where there is none yet.

        score all entries once;   the tau best, over all tensors together;   router: adapters where they pay

    A plan with adapters changes the model, so it has to be made before the optimizer: the Lightning callback does that
    in ``setup``. In a loop of your own, call `prepare` first and build the optimizer then.

    Args:
        entries: The candidates, and what trains whole beside them.
        score: How important each entry is, from gradients of a calibration.
        router: Decides between entries and adapters; None for entries alone.
        tau: Best entries to select; an int counts them, a float is a fraction. Or:
        target: Parameters that are to train after routing, as close as it can be met.
        dropout: Of the adapters' inputs.
        path: File of the plan: read if it is there, else written. None keeps the plan in memory alone.
        plan: The plan itself, for the model as it is before any adapter.
        seed: Of what is random, such as the adapters' first values.

    Raises:
        ValueError: If not exactly one of ``tau`` and ``target`` is given.
    """

    entries: Entries
    score: Any
    router: Router | None = None
    tau: int | float | None = None
    target: int | None = None
    dropout: float = 0.0
    path: str | None = None
    plan: Plan | None = None
    seed: int = 0
    _made: dict[str, Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.target is None):
            raise ValueError(f"`Planned(tau={self.tau}, target={self.target})` must have exactly one of the two.")
        if self.target is not None and self.target < 1:
            raise ValueError(f"`Planned(target={self.target})` must be at least 1: it counts parameters.")

    def prepare(self, model: nn.Module, batches: Iterable[Any] | None, loss_fn: Callable[[Any], Tensor] | None) -> Plan:
        """Makes the plan, or reads it, and puts its adapters on ``model``; once, before the optimizer is built.

        Args:
            model: The model, changed in place where the plan has adapters.
            batches: For the score.
            loss_fn: ``loss_fn(batch)``, for the score.
        """
        plan = self._read()
        if plan is None:
            plan = self._make(model, batches, loss_fn)
            if self.path is not None and _rank() == 0:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
                plan.save(self.path)
        plan.check(unwrapped(model))
        if plan.structured:
            plan = adapt(model, plan, dropout=self.dropout, seed=self.seed)
        self._made["plan"] = plan
        return plan

    def _read(self) -> Plan | None:
        if self.plan is not None:
            return self.plan
        there = self.path is not None and os.path.exists(self.path)
        sync.agree(f"whether there is a plan at {self.path}", str(there))
        return Plan.load(self.path) if there and self.path is not None else None

    def _make(self, model: nn.Module, batches: Any, loss_fn: Any) -> Plan:
        bound = self.entries.bind(model)
        if self.tau is not None:
            tau = resolve(self.tau, bound.n, f"`Planned(tau={self.tau!r})`: a budget")
        else:
            assert self.target is not None
            tau = min(bound.n, math.ceil(TRIED * self.target))
        chosen = replace(self.entries, charge=False)
        plan = select(
            model,
            chosen,
            self.score,
            Constant(tau),
            TopK(),
            batches=batches,
            loss_fn=loss_fn,
            seed=self.seed,
            keep_scores=self.target is not None,
        )
        router = self.router or Router(alpha=1e-12)  # never turns
        return router.allocate(plan, matrices(model) if self.router else {}, self.target)

    def bind(self, model: nn.Module) -> Candidates:
        """The tensors of which the plan selects entries.

        Raises:
            ValueError: If there is no plan yet, or it does not fit the model.
        """
        plan = self._made.get("plan")
        if plan is None:
            raise ValueError(
                "`Planned` has no plan yet: the callback makes it in `setup`, when the model is there; in a loop of "
                "your own call `method.slots.units.prepare(model, batches, loss_fn)` before you build the optimizer."
            )
        plan.check(unwrapped(model))
        named = {name: p for name, p in parameters(unwrapped(model), "").items() if p.requires_grad}
        units = tuple(
            Unit(name, {name: p}, model, category="weight", group="tensor")
            for name, p in named.items()
            if name in plan.indices
        )
        whole = {name: p for name, p in named.items() if name in plan.dense}
        rest = {name: p for name, p in named.items() if name not in plan.indices and name not in whole}
        return Candidates(units, whole, rest)

    def indices(self, name: str) -> Tensor:
        """The selected entries of the tensor ``name``."""
        return self._made["plan"].indices[name]


@dataclass(frozen=True)
class InPlan:
    """1 for the entries of a plan, 0 for all others.

    Args:
        units: What knows the plan.
    """

    units: Planned

    needs: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "entry"

    def entries(self, site: Site) -> Tensor:
        """Ones and zeros, fp32, in the weight's shape."""
        flat = torch.zeros(site.weight.numel(), dtype=torch.float32, device=site.weight.device)
        flat[self.units.indices(site.name).long().to(flat.device)] = 1.0
        return flat.view(site.weight.shape)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if sync.world_size() > 1 else 0
