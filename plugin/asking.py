"""What a rule of entries is asked for: units, budget and what is selected now, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from apportion.candidates import Ask, Candidates
from apportion.types import resolve


def asked(
    bound: Candidates,
    budget: Any,
    rule: Any,
    call: str,
    taken: Mapping[int, Tensor] | None = None,
    step: int = 0,
    total: int | None = None,
) -> Ask | None:
    """What ``rule`` is to choose before step ``step``, or None if that is nothing.

    A budget may give counts per tensor (``quotas``), or need the number of units first (``counted``); a rule may add to
    what is selected (``grow``), or mind no budget (``budgeted`` is False). What trains whole and is charged comes off
    the count.

    Args:
        bound: The candidates.
        budget: The budget.
        rule: The rule.
        call: The budget, for errors.
        taken: Sorted indices of the units selected now, by tensor.
        step: Optimizer steps done.
        total: Optimizer steps of the run.

    Raises:
        ValueError: If the budget does not fit the candidates, or does not pay for what it is charged.
    """
    taken = {} if taken is None else taken
    shapes = tuple(p.shape for p in bound.tensors)
    blocks = tuple(unit.block for unit in bound.units)
    if not getattr(rule, "budgeted", True):
        return Ask(bound.counts, shapes, bound.n, taken, None, blocks)
    grows = getattr(rule, "grow", False)
    if hasattr(budget, "quotas"):
        quotas = tuple(budget.quotas(shapes))
        if grows:
            quotas = tuple(max(0, quota - len(taken.get(i, ()))) for i, quota in enumerate(quotas))
        k = sum(quotas)
        return None if grows and k == 0 else Ask(bound.counts, shapes, k, taken, quotas, blocks)
    k = _count(bound, budget, call, step, total)
    if grows:
        k -= sum(map(len, taken.values()))
        if k <= 0:
            return None
    return Ask(bound.counts, shapes, k, taken, None, blocks)


def _count(bound: Candidates, budget: Any, call: str, step: int, total: int | None) -> int:
    """Units that the budget asks for, without what it pays for elsewhere."""
    paid = bound.charged
    if paid and bound.pool is not None:
        raise ValueError(f"{call} of rows cannot pay for single entries: do not charge them (`charge=False`).")
    short = (
        f" entries does not pay for the {paid} that train whole: raise it, freeze them, or do not charge them "
        "(`charge=False`)."
    )
    if hasattr(budget, "counted"):
        budget = budget.counted(bound.n)
        if paid:  # off the count in the end: they train from the start, and the rest grows
            if budget.amount <= paid:
                raise ValueError(f"{call} of {budget.amount}{short}")
            budget, paid = replace(budget, amount=budget.amount - paid), 0
    amount = budget.at(step, total)
    k = amount if isinstance(amount, int) and amount == 0 else resolve(amount, bound.n, call)
    if k < paid:
        raise ValueError(f"{call} of {k}{short}")
    return int(k) - paid
