"""The slots run once, before training: what they choose is a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from apportion import randomness, sync
from apportion.asking import asked
from apportion.calibrate import gather
from apportion.candidates import Candidates, Site
from apportion.plan_file import Plan

__all__ = ["Plan", "select"]


def select(
    model: nn.Module,
    units: Any,
    score: Any,
    budget: Any,
    rule: Any,
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    memory: MutableMapping[str, dict[str, Tensor]] | None = None,
    keep_scores: bool = False,
    progress: bool = False,
) -> Plan:
    """Runs the slots once, without training: which entries would be selected at step 0.

    The model is left as it was; see `apportion.calibrate.gather`. Gradients are averaged over ``batches`` and ranks, so
    that all ranks get the same plan; what is random follows ``seed`` alone.

    Args:
        model: Where to choose.
        units: ``bind(model)`` gives `Candidates`: ``Entries`` or ``Rows``.
        score: How important each entry is. One that needs a ``grad`` gets the mean gradient over all ``batches``, in
            eval mode; one that needs a ``calibration`` says itself how many batches, and what of them.
        budget: How many units; None for a rule that asks for no budget.
        rule: Scores and budget to a choice.
        batches: For scores of gradients.
        loss_fn: ``loss_fn(batch)``, for scores of gradients.
        seed: Of all that is random.
        memory: What the score remembers, by parameter name; written into.
        keep_scores: Whether the plan keeps the scores of what was selected, as `apportion.routing.allocate` needs them
            to meet a budget.
        progress: Whether to draw a progress bar over the batches.

    Raises:
        TypeError: If ``units`` finds no entries or rows.
        ValueError: If batches are needed and missing, or the budget does not fit.

    Example:
        >>> import torch
        >>> from apportion.budgets import Constant
        >>> from apportion.entry_units import Entries
        >>> from apportion.entrywise import Magnitude
        >>> from apportion.rules import TopK
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -3.0], [0.5, 2.0]]))
        >>> select(model, Entries(), Magnitude(), Constant(2), TopK()).indices
        {'0.weight': tensor([1, 3], dtype=torch.int32)}
    """
    bound = units.bind(model)
    if not isinstance(bound, Candidates):
        raise TypeError(f"`select(units={units!r})` finds no entries to choose from: use `Entries` or `Rows`.")
    if budget is None and getattr(rule, "budgeted", True):
        raise ValueError(f"`select(budget=None)` leaves `{rule!r}` without a number: give it a budget.")
    ask = asked(bound, budget, rule, f"`{budget!r}`: a budget")
    if ask is None or ask.k == 0:
        raise ValueError(
            f"`{budget!r}` has nothing left after the {bound.charged} entries that train whole: raise it, or do not "
            "charge them."
        )
    chooser = rule.open(ask)
    with randomness.seeded(seed):
        gathered = _gradients(model, bound, score, batches, loss_fn, progress)
        for i, scores in _scored(bound, score, gathered, seed, {} if memory is None else memory):
            chooser.push(i, scores, scores if keep_scores else None)
    chosen, kept = chooser.chosen()
    names, widths = _names(bound), bound.widths
    indices = {names[i]: bound.entries(i, found.long()).cpu() for i, found in chosen.items()}
    counts = {"units": bound.n, "selected": sum(map(len, chosen.values())), "charged": bound.charged}
    calibration = getattr(score, "calibration", None)
    plan = Plan(
        indices,
        {name: tuple(p.shape) for name, p in (*zip(names, bound.tensors, strict=True), *bound.always.items())},
        dense=tuple(bound.always),
        config={k: repr(v) for k, v in {"units": units, "score": score, "budget": budget, "rule": rule}.items()}
        | {"seed": seed, "calibration": calibration and repr(calibration), "counts": counts},
        scores={names[i]: found.repeat_interleave(widths[i]).cpu() for i, found in kept.items()},
    )
    if sync.world_size() > 1:
        sync.agree("the plan", _digest(plan))
    return plan


def _names(bound: Candidates) -> tuple[str, ...]:
    return tuple(next(iter(unit.params)) for unit in bound.units)


def _gradients(
    model: nn.Module, bound: Candidates, score: Any, batches: Any, loss_fn: Any, progress: bool
) -> dict[str, Tensor]:
    """What the score sees of gradients, by name; empty if it needs none."""
    needs = score.needs & {"grad", "calibration"}
    if not needs:
        return {}
    if batches is None or loss_fn is None:
        raise ValueError(f"`{score!r}` reads gradients: give `select(..., batches=..., loss_fn=...)`.")
    params = dict(zip(_names(bound), bound.tensors, strict=True))
    if "calibration" in needs:
        return gather(model, loss_fn, batches, params, score.term, score.calibration, progress=progress)
    return gather(model, loss_fn, batches, params, lambda grad, weight: grad, None, progress=progress)


def _scored(
    bound: Candidates,
    score: Any,
    gathered: dict[str, Tensor],
    seed: int,
    memory: MutableMapping[str, dict[str, Tensor]],
) -> Iterator[tuple[int, Tensor]]:
    """Scores of the units of each tensor, one tensor at a time; what was gathered is given up on the way."""
    for i, (name, p) in enumerate(zip(_names(bound), bound.tensors, strict=True)):
        held: dict[str, Tensor] = dict(memory.get(name, {}))
        scores = score.entries(Site(name, i, p.detach(), gathered.pop(name, None), 0, seed, held))
        if scores.shape != p.shape:
            raise ValueError(f"`{score!r}` gave {tuple(scores.shape)} for {name} of {tuple(p.shape)}.")
        if held:
            memory[name] = held
        yield i, bound.pooled(i, scores.float())


def _digest(plan: Plan) -> str:
    """What ranks compare."""
    digest = hashlib.sha256(repr((plan.shapes, plan.dense, plan.config)).encode())
    for name, index in plan.indices.items():
        digest.update(name.encode() + index.numpy().tobytes())
    return digest.hexdigest()
