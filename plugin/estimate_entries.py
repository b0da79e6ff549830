"""Selections of entries on tensors without values: as many in every tensor as the budget ends with, spread evenly."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from apportion.compact import Gathered
from apportion.effects import Blend
from apportion.entry_rules import PerRow
from apportion.fake import FakeRun
from apportion.optim import Selective
from apportion.shares import largest_remainder
from apportion.types import When, resolve

UNBUDGETED = 0.05
"""Share of the entries, where a rule selects as many as there are above a threshold."""

_NEVER = 2**60  # a step that no run reaches


def idle(method: Any) -> Any:
    """The method, selecting nothing by itself; what is selected is laid out by `fill`.

    Raises:
        ValueError: If what it costs depends on values.
    """
    slots, reason = method.slots, ""
    if hasattr(slots.units, "prepare"):
        reason = "makes a plan of adapters and entries from gradients, before the model is what it trains"
    elif isinstance(slots.effect, Blend):
        reason = "reads, after every step, how far the weights have moved"
    elif isinstance(slots.rule, PerRow):
        reason = "gives every row as many entries as scores say, between one and all"
    if reason:
        raise ValueError(
            f"`{method.label}` {reason}: on tensors that have no values nothing can be told. Track a few steps of the "
            "real run, `apportion.memory.Tracker`."
        )
    made = copy(method)
    made.slots = replace(slots, select_when=When(begin=_NEVER))
    return made


def fill(optimizer: Selective, method: Any, run: FakeRun) -> None:
    """Gives every store its share of the entries that the budget ends with, in proportion to its size."""
    bound: Any = optimizer.selection.bound
    counts = _entries(method, bound)
    for p, count in zip(bound.tensors, counts, strict=True):
        store = optimizer.owner.narrow(p)
        if store.leaf is p:
            continue
        with run.fake:
            store.index = torch.empty(count, dtype=store.index.dtype)
            store.leaf = nn.Parameter(torch.empty(count, dtype=store.leaf.dtype))
            if isinstance(store, Gathered):
                store.age = None if store.age is None else torch.empty(count, dtype=store.age.dtype)
                store.origin = None if store.origin is None else torch.empty(count, dtype=p.dtype)
    optimizer.owner.write_groups()


def _entries(method: Any, bound: Any) -> list[int]:
    """Entries of each tensor that the method selects in the end."""
    budget = method.slots.budget
    if hasattr(budget, "quotas"):
        return list(budget.quotas([p.shape for p in bound.tensors]))
    if not getattr(method.slots.rule, "budgeted", True):
        amount: int | float = UNBUDGETED
    elif hasattr(budget, "counted"):
        amount = budget.counted(bound.n).amount
    else:
        amount = budget.at(_NEVER, _NEVER)
    units = largest_remainder(bound.counts, resolve(amount, bound.n, f"`{budget!r}`"))
    return [count * width for count, width in zip(units, bound.widths, strict=True)]
