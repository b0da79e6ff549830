"""Feeds a rule with the gradients of one optimizer step, tensor by tensor, each at the moment it is final.

A gradient is final after the last micro-batch of the step, averaged over ranks. Once it has been looked at, the
selected entries are taken out of it and it is freed, so that there is one dense gradient at a time; the gradients of
entries that the rule may choose travel with it, since they shall move at this very step.

With several ranks the tensors are looked at in one fixed order, last one first, as backward passes run: each is
averaged whole, which is exact and costs one dense exchange, at steps with such a selection and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apportion import sync
from apportion.candidates import Candidates, Chooser
from apportion.stores import Narrow


class Collector:
    """Looks at the gradients of one step.

    Args:
        bound: The candidate tensors.
        stores: Their stores, in the same order; one that another selection holds frozen has no gradient.
        score: ``score(i, grad)`` gives the scores of the units of tensor ``i``, shape (counts[i],).
        chooser: The rule at work.
        passes: Looks at a gradient as it arrives for the ``passes``-th time while `final` is set; None lets all of them
            stay until `flush`, for steps of which nobody knows where the last micro-batch is.
        scale: The loss scale in the gradients; None if there may be one that nobody has told of, and nothing is scaled.
        complete: Called by the backward pass that has brought the last gradient, on one rank; not where a tensor gets
            none, and not without ``passes``.

    Attributes:
        final: Whether the present micro-batch is the last of the step.
        overflown: Whether a gradient was not finite where there is, or may be, a loss scale.
        again: Takes over, instead of an error, when gradients come again: the step that they were for was skipped.
        had: Whether there was a gradient, by tensor; on any rank, once `flush` has looked at all.
        blank: Whether there was no gradient at all, on any rank; known when it is flushed.
        exchanged: Bytes handed to the process group, by this rank.
    """

    def __init__(
        self,
        bound: Candidates,
        stores: Sequence[Narrow],
        score: Callable[[int, Tensor], Tensor],
        chooser: Chooser,
        passes: int | None = 1,
        scale: float | None = 1.0,
        complete: Callable[[], None] | None = None,
    ) -> None:
        self.bound, self.stores, self.score, self.chooser = bound, stores, score, chooser
        self.passes, self.scale, self.complete = passes, scale, complete
        self.final = False
        self.overflown = self.blank = False
        self.again: Callable[[], None] | None = None
        self.exchanged = 0
        self._ranks = sync.world_size()
        self._arrived: set[int] = set()
        self._awaited = sum(p.requires_grad for p in bound.tensors)
        self.had = [False] * len(stores)
        self._times = [0] * len(stores)
        self._order = list(range(len(stores)))[::-1]
        self._next = 0
        self._aside: dict[int, Tensor | None] = {}
        # Optimizers take turns under manual optimization alone, where nobody announces how many passes there are.
        self._guards = [] if passes is not None else [self._guard(i) for i in range(len(stores))]
        for i, store in enumerate(stores):
            store.watch = partial(self._see, i)

    @property
    def through(self) -> bool:
        """Whether each tensor that has a gradient at all has had it from every backward pass announced."""
        return self._ranks == 1 and self.passes is not None and set(self._times) - {0} == {self.passes}

    def _see(self, i: int, p: nn.Parameter) -> bool:
        """Whether the gradient of tensor ``i`` is seen to; True as long as it has to stay."""
        if not self.stores[i].leaf.requires_grad:  # another optimizer's turn
            p.grad = self._aside.pop(i, None)
            return True
        if self.again is not None:
            self.again()
            watch = self.stores[i].watch
            return watch is not None and watch(p)
        if self.passes is None or not self.final:
            return True
        self._times[i] += 1
        if self._times[i] < self.passes:
            return True
        if i in self._arrived:
            raise RuntimeError(
                f"{self.bound.names[i]} got more gradient after the selection had looked at it. The usual reasons: "
                "reentrant activation checkpointing of a weight that is used twice (pass use_reentrant=False), or more "
                "backward passes to a step than were announced (pass `micro_batches=` to `Selective`)."
            )
        self._arrived.add(i)
        if self._ranks == 1:
            self._look(i)
            if self.complete is not None and len(self._arrived) == self._awaited:
                self.complete()
            return True
        while self._next < len(self._order) and self._order[self._next] in self._arrived:
            self._look(self._order[self._next])
            self._next += 1
        return True

    def _guard(self, i: int) -> Any:
        """Keeps what stays of the gradient of tensor ``i`` apart from one that comes in another optimizer's turn.

        Lightning's `toggle_optimizer` freezes the leaf, but not the tensor, whose gradients autograd goes on summing.
        """
        p, store = self.bound.tensors[i], self.stores[i]
        if store.leaf is p or not p.requires_grad:
            return None

        def part(grad: Tensor) -> None:
            if not store.leaf.requires_grad:
                self._aside[i], p.grad = p.grad, None

        return p.register_hook(part)

    def flush(self) -> None:
        """Looks at what is left, and stops looking."""
        self.look_at_rest()
        self.leave()

    def look_at_rest(self) -> None:
        """Looks at what is left: tensors whose gradient has stayed, and those that got none."""
        if self._ranks == 1:
            for i in self._order:
                if i not in self._arrived:
                    self._look(i)
        else:
            while self._next < len(self._order):
                self._look(self._order[self._next])
                self._next += 1
        self.had = (sync.mean(torch.tensor([float(had) for had in self.had])) > 0.0).tolist()
        self.blank = not any(self.had)
        for store, there in zip(self.stores, self.had, strict=True):
            if not there:  # nor may its entries have a gradient of zero: decay would move them
                store.leaf.grad = None

    def leave(self) -> None:
        """Stops looking; the stores go on alone."""
        for store in self.stores:
            store.watch = None
        for guard in self._guards:
            if guard is not None:
                guard.remove()
        self._guards = []

    @torch.no_grad()
    def _look(self, i: int) -> None:
        p, store = self.bound.tensors[i], self.stores[i]
        self._arrived.add(i)
        self.had[i] = p.grad is not None
        if p.grad is None and not p.requires_grad and self._ranks == 1:
            return  # another selection holds it frozen
        grad = p.grad if p.grad is not None else torch.zeros_like(p)
        if self._ranks > 1:
            grad = grad.contiguous().div_(self._ranks)
            dist.all_reduce(grad)
            self.exchanged += grad.numel() * grad.element_size()
            p.grad = grad
        if not p.requires_grad:
            p.grad = None
            return
        if self.scale != 1.0:
            self.overflown = self.overflown or not _finite(grad)
        unscaled = grad if self.scale in (None, 1.0) else grad / self.scale
        self.chooser.push(i, self.score(i, unscaled), grad.reshape(self.bound.counts[i], self.bound.widths[i]))
        store.collect(p)


def _finite(grad: Tensor) -> bool:
    """Whether all of ``grad`` is finite: by its extremes, in one pass without a mask, which NaN comes through."""
    return grad.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(grad))
