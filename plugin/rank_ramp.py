"""A warm-up of their own for ranks that come in during a run.

    w <- w + f (w' - w),   f = min(1, (a + 1) / steps)      after a step from w to w' of a rank that is a steps old

An update of SGD, Adam or AdamW, decay included, is proportional to the learning rate: this is a warm-up of it from
1 / steps to its full value, for single rows of a tensor whose other rows keep theirs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from apportion.rank_selection import RankSelection


class Ramp:
    """Holds back the steps of young ranks.

    Args:
        steps: Length of the warm-up in optimizer steps; 0 and 1 hold nothing back.
        selection: Knows which ranks came in when.
    """

    def __init__(self, steps: int, selection: RankSelection) -> None:
        self.steps, self.selection = steps, selection
        self._known: Tensor | None = None  # steps of entry that the runs were made of
        self._runs: list[tuple[int, int, int, int]] = []
        self._held: list[tuple[nn.Parameter, Tensor, Tensor, float]] = []

    def _young(self) -> list[tuple[int, int, int, float]]:
        """Runs of ranks that came in together and are young: adapter, first rank, how many, and their factor."""
        selection = self.selection
        if self._known is not selection.entered:
            self._known, self._runs = selection.entered, []
            for i, entered in enumerate(selection.bound.split(selection.entered)):
                begin = 0
                for step, length in zip(*entered.unique_consecutive(return_counts=True), strict=True):
                    if int(step) > 0:  # those of the start have the warm-up of the run
                        self._runs.append((i, begin, int(length), int(step)))
                    begin += int(length)
        ages = [(selection.step - run[3] + 1) / max(1, self.steps) for run in self._runs]
        return [(*run[:3], age) for run, age in zip(self._runs, ages, strict=True) if age < 1.0]

    @torch.no_grad()
    def before(self) -> None:
        """Before a step: keeps what young ranks are."""
        self._held = []
        young = self._young() if self.steps > 1 else []
        for i, begin, length, factor in young:
            for p, dim in self.selection.bound.adapters[i].tensors():
                view = p.detach().narrow(dim, begin, length)
                self._held.append((p, view, view, factor))
        olds: Any = torch._foreach_mul([view for _, view, _, _ in self._held], 1.0) if self._held else ()
        self._held = [(p, view, old, f) for (p, view, _, f), old in zip(self._held, olds, strict=True)]

    @torch.no_grad()
    def after(self, params: Collection[nn.Parameter] | None) -> None:
        """After a step of ``params``, all if None: takes back a part of it."""
        held = [one for one in self._held if params is None or one[0] in params]
        if not held:
            return
        self._held = [one for one in self._held if params is not None and one[0] not in params]
        views, olds = [one[1] for one in held], [one[2] for one in held]
        torch._foreach_sub_(views, olds)
        torch._foreach_mul_(views, [one[3] for one in held])
        torch._foreach_add_(views, olds)
