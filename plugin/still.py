"""What scores have in common that do not follow the training."""

from __future__ import annotations

from typing import Any

from apportion.types import State


class Still:
    """A score that no step moves: it reads the weights of the moment when it is asked, or nothing at all."""

    def due(self, step: int) -> bool:
        """Never."""
        del step
        return False

    def update(self, state: State, *seen: Any) -> State:
        """The state as it is."""
        del seen
        return state
