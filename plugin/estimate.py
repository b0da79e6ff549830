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

from apportion.estimate_entries import UNBUDGETED, fill, idle
from apportion.estimate_ranks import Moment, arrive, valueless
from apportion.fake import FakeRun
from apportion.ledger import Parts
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.rank_selection import NOMINAL
from apportion.scores import Uniform

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, foreach=False),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, foreach=False),
}
_UNREADABLE = frozenset({"weight", "activation"})
_ROUNDS = 400  # optimizer steps at most until every unit has had its turn and its state


@dataclass(frozen=True)
class Estimate(Parts):
    """Bytes by part at the moment of the peak, and what the figures rest on.

    Attributes:
        parameters: Number of entries in the model.
        trainable: Number of entries that train at one step.
        selected: Names of the units selected in the measured steps; of ranks, none.
        assumptions: What was taken for granted, one sentence each.
        seconds: Time that the estimate took.
        moment: Of a budget of ranks: what is in memory of them in the measured steps.
    """

    parameters: int = 0
    trainable: int = 0
    selected: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    seconds: float = 0.0
    moment: Moment | None = None

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
    done: int = 0,
    total: int = NOMINAL,
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
        done: Optimizer steps done before those, for methods whose budget of ranks follows the run.
        total: Optimizer steps of the run, for the same methods.

    Raises:
        ValueError: If an option is unknown, ``done`` lies outside the run, or the step reads a value or needs a shape
            that depends on one.
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
    if not 0 <= done <= total:
        raise ValueError(f"`estimate(done={done}, total={total})`: `done` must lie in [0, {total}], steps of the run.")
    if isinstance(method, str) and method != "full":
        raise ValueError(f"`estimate(method={method!r})` must be 'full' or a method from `apportion.callbacks`.")
    run = FakeRun(build, batch, loss_fn, precision, checkpointing)
    moment = None
    with Tracker(run.model) as tracker:
        used = make([p for p in run.model.parameters() if p.requires_grad])
        if method != "full":
            used = Selective(used, run.model, _drawable(method, run), probe=run.probe, total_steps=total)
            if method.slots.grain == "entry":
                fill(used, method, run)
            elif method.slots.grain == "rank":
                moment = arrive(used, done, total)
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
        moment=moment,
    )


def _optimizer(name: str | Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[list[nn.Parameter]], Optimizer]:
    if not isinstance(name, str):
        return name
    if name not in OPTIMIZERS:
        raise ValueError(
            f"`estimate(optimizer={name!r})` must be one of {', '.join(OPTIMIZERS)}, or a function of parameters."
        )
    return OPTIMIZERS[name]


def _drawable(method: Any, run: FakeRun) -> Any:
    """The method, with equal scores in place of scores that read weights: fake tensors have no values."""
    if method.slots.grain == "rank":
        return valueless(method, run.fake)
    if method.slots.grain == "entry":
        return idle(method)
    if not method.slots.score.needs & _UNREADABLE:
        return method
    equal = copy(method)
    equal.slots = replace(method.slots, score=Uniform())
    return equal


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
    if optimizer.selection.mask is None or optimizer.method.slots.grain == "rank":
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
            said.append(f"{UNBUDGETED:.0%} of the entries selected, which the values decide")
        said.append("a step on which no entry is selected anew; those of the end of the schedule, spread evenly")
        return tuple(said)
    if method != "full" and method.slots.grain == "rank":
        said.append("ranks spread evenly over matrices, which the values decide")
        said.append("ranks scored in pieces, as on a CPU; an accelerator takes all tensors of a shape at once")
        return tuple(said)
    if method != "full" and method.slots.score.needs & _UNREADABLE:
        said.append(f"equal scores in place of {type(method.slots.score).__name__}, which reads weights")
    if method != "full":
        said.append("every unit has had its turn; state of unselected units as the method's effect says")
    return tuple(said)
