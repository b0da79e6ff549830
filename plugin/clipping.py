"""``self.clip_gradients`` of manual optimization: clips the gradients of what the step has chosen, not those before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Clipping:
    """Stands as ``clip_gradients`` on the precision plugin of a Trainer.

    Args:
        precision: The plugin.
        before: Called before every clipping.

    Example:
        >>> class Plugin:
        ...     def clip_gradients(self, optimizer: str) -> None:
        ...         print("clips", optimizer)
        >>> plugin = Plugin()
        >>> stands = Clipping(plugin, lambda: print("chooses"))
        >>> plugin.clip_gradients("adamw")
        chooses
        clips adamw
        >>> stands.detach()
        >>> plugin.clip_gradients("adamw")
        clips adamw
    """

    def __init__(self, precision: Any, before: Callable[[], None]) -> None:
        self.precision = precision
        clip = precision.clip_gradients

        def clip_chosen(*args: Any, **kwargs: Any) -> Any:
            before()
            return clip(*args, **kwargs)

        precision.clip_gradients = clip_chosen

    def detach(self) -> None:
        """Gives the plugin back its own."""
        vars(self.precision).pop("clip_gradients", None)
