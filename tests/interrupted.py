"""A run that fails in the middle of a step, and whether it has left the model and the optimizer as it found them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from toys import Task, adamw, two_groups


class Stop(Exception):
    """Raised by the test in the middle of a step."""


class Interrupted(Task):  # type: ignore[misc, valid-type]
    """Fails at its fourth batch, with the gradients of that step there; remembers how it was found."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, self._noted)
        self.flags = [p.requires_grad for p in self.parameters()]

    def _noted(self, module: nn.Module) -> torch.optim.Optimizer:
        self.built = adamw(two_groups(module))
        self.groups = self._groups()
        return self.built

    def _groups(self) -> list[list[int]]:
        return [[id(p) for p in group["params"]] for group in self.built.param_groups]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            loss.backward()
            raise Stop
        return loss

    def assert_left_as_found(self) -> None:
        """Flags, param groups and hooks are those of the beginning."""
        assert [p.requires_grad for p in self.parameters()] == self.flags
        assert self._groups() == self.groups
        assert not self.built._optimizer_step_pre_hooks
        assert not self.built._optimizer_step_post_hooks
        assert not any(p._post_accumulate_grad_hooks for p in self.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
