"""Module.zero_grad: reaches the gradients of what stands in the optimizer for a module's parameters, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ZeroGrad:
    """Stands as ``zero_grad`` on a module, while selected entries or fp32 masters step in place of its parameters.

    A gradient that `torch.nn.Module.zero_grad` did not find would be added to that of the next step, and nobody told.

    Args:
        module: The module.
        clear: Frees the other gradients, or sets them to zero; takes ``set_to_none``.

    Example:
        >>> layer, told = nn.Linear(1, 1), []
        >>> stands = ZeroGrad(layer, told.append)
        >>> layer.zero_grad(set_to_none=False)
        >>> told
        [False]
        >>> stands.detach()
    """

    def __init__(self, module: nn.Module, clear: Callable[[bool], Any]) -> None:
        self.module, self.clear, self.done = module, clear, False
        self.before: Callable[[bool], Any] = module.zero_grad
        module.zero_grad = self  # type: ignore[method-assign]

    def __call__(self, set_to_none: bool = True) -> None:
        self.clear(set_to_none)  # first: it may look at what the module has
        self.before(set_to_none)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, or a saved one, has its class's own."""
        return getattr, (self.module, "zero_grad")

    def detach(self) -> None:
        """Gives the module back what it had; one that others stand above goes with the last of them."""
        self.done, self.clear = True, lambda set_to_none: None
        if vars(self.module).get("zero_grad") is not self:
            return
        below = self.before
        while isinstance(below, ZeroGrad) and below.done:
            below = below.before
        del self.module.zero_grad
        if isinstance(below, ZeroGrad):
            self.module.zero_grad = below
