"""Memory of a running training by part: weights, gradients, optimizer state, activations, temporaries.

Every storage belongs to one part from its birth to its death. Views share a storage and count once:

    weights       storages of the model's parameters and buffers
    gradients     storages of ``.grad``, of the model's parameters and of fp32 masters
    optimizer     tensors of the optimizer's state, and parameters that it has but the model has not (fp32 masters)
    activations   born outside backward (or recomputed within it), alive when backward runs, dead two steps later
    temporaries   all the rest: what dies before backward, what backward itself makes, workspace of the optimizer
    offloaded     state that was moved off the device; not counted in the peak

What a storage is often shows only later (a tensor of the forward pass is an activation once backward meets it, a result
of backward is a gradient once it stands in ``.grad``), so births and deaths go to a log, and sums by part are made from
the log after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from apportion.ledger import GRADIENTS, OFFLOADED, OPTIMIZER, WEIGHTS, Ledger, Parts, Point
from apportion.storages import Storages, allocates, tensors_in


class Tracker(TorchDispatchMode):
    """Follows every storage of a training run and says at each moment how many bytes each part holds.

        bytes(part, t) = sum of the sizes of the storages of that part alive at t        [bytes]
        peak           = max over t of the sum over all parts but ``offloaded``          [bytes]

    It sees what PyTorch operators allocate, on real and on fake tensors, under autocast, activation checkpointing and
    in backward. It does not see workspace inside a kernel, buffers of communication libraries, the rounding of a
    caching allocator, nor tensors that existed before and belong neither to the model nor to an optimizer (a data set
    in memory). A gradient that is freed again inside backward counts as temporary. On CUDA
    ``torch.cuda.max_memory_allocated`` gives the total. Code under ``torch.compile`` runs uncompiled inside.

    Any `torch.optim.Optimizer` that steps inside is found by itself; name it only if it holds state already.

    Args:
        model: Module whose parameters and buffers are the weights.
        optimizer: Optimizer, or several, that may hold state already.
        device: Device type to follow; None takes that of the model's first parameter.

    Example:
        >>> model = nn.Linear(64, 64)
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> with Tracker(model, adamw) as tracker:
        ...     for step in range(2):
        ...         model(torch.ones(2, 64)).sum().backward()
        ...         adamw.step()
        ...         adamw.zero_grad()
        ...         after = tracker.mark(f"step {step}")
        >>> tracker.peak.weights, tracker.peak.gradients, tracker.now.optimizer
        (16640, 16640, 33288)
    """

    def __init__(
        self, model: nn.Module | None = None, optimizer: Optimizer | Sequence[Optimizer] = (), device: str | None = None
    ) -> None:
        super().__init__()
        self.marks: list[tuple[int, str]] = []
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._ledger = Ledger()
        self._storages = Storages(self._ledger, device)
        self._place = (False, True)  # (inside backward, gradients enabled)
        self._backwards = False  # whether a backward has run since the last optimizer step
        self._handles: list[RemovableHandle] = []
        if model is not None:
            self.watch(model)
        for one in [optimizer] if isinstance(optimizer, Optimizer) else optimizer:
            self.watch(one)

    def watch(self, thing: nn.Module | Optimizer) -> None:
        """Adds a model or an optimizer to what is told apart.

        Raises:
            TypeError: If ``thing`` is neither.
        """
        if isinstance(thing, nn.Module):
            self._models.append(thing)
        elif not isinstance(thing, Optimizer):
            raise TypeError(f"`Tracker.watch({type(thing).__name__})` takes a module or an optimizer.")
        elif not any(thing is known for known in self._optimizers):
            self._optimizers.append(thing)
        self._sync()

    @property
    def entered(self) -> bool:
        """Whether the tracker follows what happens now."""
        return bool(self._handles)

    @property
    def now(self) -> Parts:
        """Bytes by part at this moment."""
        return Parts(*self._summed().now)

    @property
    def peak(self) -> Parts:
        """Bytes by part at the moment when most was on the device."""
        return Parts(*self._summed().peak)

    @property
    def highest(self) -> Parts:
        """The most bytes that each part ever had, each at a moment of its own; their sum is no peak."""
        return Parts(*self._summed().highest)

    @property
    def timeline(self) -> list[Point]:
        """Bytes by part over the run: the highest point of each small stretch of births and deaths."""
        return list(self._summed().timeline)

    def mark(self, label: str) -> Parts:
        """Sets a mark in the timeline and returns the peak since the mark before."""
        now = self.now
        self.marks.append((self._ledger.event, label))
        peak = Parts(*self._ledger.peak_since_mark)
        self._ledger.peak_since_mark = list(astuple(now))
        return peak

    def _summed(self) -> Ledger:
        self._sync()
        self._ledger.fold()
        return self._ledger

    def __enter__(self) -> Self:
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._sync()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._summed()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = (torch._C._current_graph_task_id() >= 0, torch.is_grad_enabled())
        if place != self._place:
            self._move(place)
        out = func(*args, **(kwargs or {}))
        if allocates(func):
            for tensor in tensors_in(out):
                self._storages.see(tensor, in_backward=place == (True, False))
        return out

    def _move(self, place: tuple[bool, bool]) -> None:
        before, self._place = self._place, place
        if place == (True, False):  # backward meets what the forward pass, or a recomputation, has left
            self._storages.cross()
            self._backwards = True
        if place[0] != before[0] or place == (False, True):
            self._sync()

    def _sync(self) -> None:
        if self._storages.device is None:
            first = next((p for model in self._models for p in model.parameters()), None)
            self._storages.device = "cpu" if first is None else first.device.type
        for model in self._models:
            for tensor in [*model.parameters(), *model.buffers()]:
                self._storages.claim(tensor, WEIGHTS)
        for p in [p for model in self._models for p in model.parameters()]:
            if p.grad is not None:
                self._storages.claim(p.grad, GRADIENTS)
        for owner in {id(o): o for o in (getattr(o, "_apportion_owner", None) for o in self._optimizers) if o}.values():
            for tensor in owner.offloaded():  # before what has come back, or both would seem to be there for a moment
                self._storages.claim(tensor, OFFLOADED)
            for tensor in owner.beside():
                self._storages.claim(tensor, OPTIMIZER)
        for optimizer in self._optimizers:
            for p in [p for group in optimizer.param_groups for p in group["params"]]:
                self._storages.claim(
                    p, OPTIMIZER if self._models else WEIGHTS
                )  # the first claim wins: these are masters
                if p.grad is not None:
                    self._storages.claim(p.grad, GRADIENTS)
            for tensor in tensors_in(list(optimizer.state.values())):
                self._storages.claim(tensor, OPTIMIZER)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not any(optimizer is known for known in self._optimizers):
            self.watch(optimizer)
        self._sync()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._sync()
        self._ledger.fold(step=self._backwards)
        self._backwards = False
