"""Module.zero_grad: reaches the gradients of what stands in the optimizer for a module's parameters, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class ZeroGrad:
    """Stands as ``zero_grad`` on a module, while selected entries or fp32 masters step in place of its parameters.

    A gradient that `torch.nn.Module.zero_grad` did not find would be added to that of the next step, and nobody told.
    Modules inside of it, and wrappers made around it, have methods of their own, which know nothing of this.

    Args:
        module: The module.
        clear: Frees the other gradients of a module, or sets them to zero; takes the module and ``set_to_none``.

    Example:
        >>> layer, told = nn.Linear(1, 1), []
        >>> stands = ZeroGrad(layer, lambda module, set_to_none: told.append(set_to_none))
        >>> layer.zero_grad(set_to_none=False)
        >>> told
        [False]
        >>> stands.detach()
    """

    def __init__(self, module: nn.Module, clear: Callable[[nn.Module, bool], Any]) -> None:
        self.module, self.clear, self.done = module, clear, False
        self.before: Any = vars(module).get("zero_grad")  # what stood there: another of these, or of its user's own
        vars(module)["zero_grad"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.done:  # first: it may look at what the module has
            self.clear(self.module, kwargs.get("set_to_none", args[0] if args else True))
        return (self.before or partial(type(self.module).zero_grad, self.module))(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A deep copy of the module, or a saved one, has its class's own."""
        return getattr, (self.module, "zero_grad")

    def detach(self) -> None:
        """Gives the module back what it had; one that others stand above goes with the last of them."""
        self.done = True
        if vars(self.module).get("zero_grad") is not self:
            return
        below = self.before
        while isinstance(below, ZeroGrad) and below.done:
            below = below.before
        del vars(self.module)["zero_grad"]
        if below is not None:
            vars(self.module)["zero_grad"] = below
