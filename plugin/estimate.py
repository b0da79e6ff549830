"""The memory of a training run before it is run: two steps on fake tensors, which have shapes but no values.

The model is built, trained and selected from by the code that a real run uses; only its tensors are fake, so a model of
70 billion parameters needs no memory. `apportion.memory.Tracker` follows the storages that the run would have had.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion.compact import Gathered
from apportion.fake import FakeRun
from apportion.ledger import Parts
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.scores import Uniform
from apportion.shares import largest_remainder
from apportion.types import When, resolve

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, foreach=False),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, foreach=False),
}
_UNREADABLE = frozenset({"weight", "activation"})
_NEVER = 2**60  # a step that no run reaches
_UNBUDGETED = 0.05  # share of the entries, where a rule selects as many as there are above a threshold
_ROUNDS = 400  # optimizer steps at most until every unit has had its turn and its state


@dataclass(frozen=True)
class Estimate(Parts):
    """Bytes by part at the moment of the peak, and what the figures rest on.

    Attributes:
        parameters: Number of entries in the model.
        trainable: Number of entries that train at one step.
        selected: Names of the units selected in the measured steps.
        assumptions: What was taken for granted, one sentence each.
        seconds: Time that the estimate took.
    """

    parameters: int = 0
    trainable: int = 0
    selected: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak."""
        return int(self.total)


def estimate(
    build: Callable[[], nn.Module],
    batch: Any,
    *,
    method: Any = "full",
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "adamw",
    precision: str = "32-true",
    checkpointing: bool = False,
    steps: int = 2,
) -> Estimate:
    """Peak memory of a training run by part, in bytes, without running it.

        peak = max over the moments of `steps` steps of (weights + gradients + optimizer + activations + temporaries)

    Args:
        build: Makes the model; called where tensors have no values, so it must not read weights from a file.
        batch: One batch, real or fake; only its shapes count.
        method: ``full``, or a method such as ``apportion.callbacks.LISA()``. For adapters, add them in ``build``.
        loss_fn: ``loss_fn(model, batch)``; None for a LightningModule's ``training_step`` or ``model(**batch).loss``.
        optimizer: ``adamw`` (loop), ``adamw-foreach``, ``adamw-fused``, ``sgd``, or a function of a list of parameters.
        precision: ``32-true``, ``bf16-true`` or ``bf16-mixed``, as Lightning has them.
        checkpointing: Whether to turn on the model's own activation checkpointing, in its non-reentrant form.
        steps: Training steps to measure; the second is the first that has optimizer state from its start.

    Raises:
        ValueError: If an option is unknown, or the step reads a value or needs a shape that depends on one.
        TypeError: If ``build`` is not a function that makes a module, or there is no loss.

    Example:
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> estimate(lambda: nn.Linear(1000, 1000), torch.ones(8, 1000), loss_fn=loss).optimizer
        8008008
    """
    start = time.monotonic()
    make = _optimizer(optimizer)
    if steps < 2:
        raise ValueError(f"`estimate(steps={steps})` must be at least 2: the first step has no optimizer state yet.")
    if isinstance(method, str) and method != "full":
        raise ValueError(f"`estimate(method={method!r})` must be 'full' or a method from `apportion.callbacks`.")
    run = FakeRun(build, batch, loss_fn, precision, checkpointing)
    with Tracker(run.model) as tracker:
        used = make([p for p in run.model.parameters() if p.requires_grad])
        if method != "full":
            used = Selective(used, run.model, _drawable(method), probe=run.probe)
            if method.slots.grain == "entry":
                _fill(used, method, run)
            else:
                _visit_all(used)
        tracker.mark("start")
        for _ in range(steps):
            trainable = _trainable(used, run.model)
            selected = _selected(used)
            run.step(used)
        peak = tracker.mark("end")
    return Estimate(
        **{f.name: getattr(peak, f.name) for f in fields(Parts)},
        parameters=sum(p.numel() for p in run.model.parameters()),
        trainable=trainable,
        selected=selected,
        assumptions=_assumptions(optimizer, precision, checkpointing, method),
        seconds=time.monotonic() - start,
    )


def _optimizer(name: str | Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[list[nn.Parameter]], Optimizer]:
    if not isinstance(name, str):
        return name
    if name not in OPTIMIZERS:
        raise ValueError(
            f"`estimate(optimizer={name!r})` must be one of {', '.join(OPTIMIZERS)}, or a function of parameters."
        )
    return OPTIMIZERS[name]


def _drawable(method: Any) -> Any:
    """The method, with equal scores in place of scores that read weights: fake tensors have no values."""
    if method.slots.grain == "entry":  # what is selected is laid out by `_fill`
        idle = copy(method)
        idle.slots = replace(method.slots, select_when=When(begin=_NEVER))
        return idle
    if not method.slots.score.needs & _UNREADABLE:
        return method
    equal = copy(method)
    equal.slots = replace(method.slots, score=Uniform())
    return equal


def _fill(optimizer: Selective, method: Any, run: FakeRun) -> None:
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
        amount: int | float = _UNBUDGETED
    elif hasattr(budget, "counted"):
        amount = budget.counted(bound.n).amount
    else:
        amount = budget.at(_NEVER, _NEVER)
    units = largest_remainder(bound.counts, resolve(amount, bound.n, f"`{budget!r}`"))
    return [count * width for count, width in zip(units, bound.widths, strict=True)]


def _visit_all(optimizer: Selective) -> None:
    """Steps without forward and backward until every unit has had its turn, where state outlives a turn."""
    if getattr(optimizer.method.slots.effect, "state", "drop") == "drop":
        return
    seen = torch.zeros(optimizer.selection.bound.n, dtype=torch.bool)
    for _ in range(_ROUNDS):
        assert optimizer.selection.mask is not None
        seen |= optimizer.selection.mask
        for p in optimizer.owner.training():
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()
        if bool(seen.all()):
            return


def _trainable(optimizer: Optimizer, model: nn.Module) -> int:
    """Entries that the coming step trains."""
    if isinstance(optimizer, Selective):
        return sum(p.numel() for p in optimizer.owner.training())
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _selected(optimizer: Optimizer) -> tuple[str, ...]:
    if not isinstance(optimizer, Selective):
        return ()
    if optimizer.method.slots.grain == "entry":
        return tuple(optimizer.selection.names)
    if optimizer.selection.mask is None:
        return ()
    names = optimizer.selection.names
    return tuple(name for name, chosen in zip(names, optimizer.selection.mask.tolist(), strict=True) if chosen)


def _assumptions(optimizer: Any, precision: str, checkpointing: bool, method: Any) -> tuple[str, ...]:
    said = [
        "bytes that operators ask for: no workspace of kernels, no fragmentation, no CUDA context",
        "scaled_dot_product_attention by a fused kernel that keeps no matrix of pairs; no padding mask",
        f"optimizer {optimizer if isinstance(optimizer, str) else 'as given'}, without gradient scaler or clipping",
    ]
    if optimizer == "adamw":
        said.append(
            "the loop form of AdamW; on CUDA torch takes the foreach form, with more temporaries (adamw-foreach)"
        )
    if precision.endswith("-mixed"):
        said.append("operators cast as autocast on the CPU casts them")
    said.append(
        f"activation checkpointing {'on, non-reentrant' if checkpointing else 'off unless the model does it itself'}"
    )
    if method != "full" and method.slots.grain == "entry":
        if not getattr(method.slots.rule, "budgeted", True):
            said.append(f"{_UNBUDGETED:.0%} of the entries selected, which the values decide")
        said.append("a step on which no entry is selected anew; those of the end of the schedule, spread evenly")
        return tuple(said)
    if method != "full" and method.slots.score.needs & _UNREADABLE:
        said.append(f"equal scores in place of {type(method.slots.score).__name__}, which reads weights")
    if method != "full":
        said.append("every unit has had its turn; state of unselected units as the method's effect says")
    return tuple(said)
