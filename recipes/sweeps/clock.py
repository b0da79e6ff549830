"""How long a fit has taken, over all attempts that it was made in."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl


class Clock(pl.Callback):
    """Counts the seconds of a fit with its validation; a resumed fit goes on from those of its checkpoint.

    Attributes:
        before: Seconds of the attempts before this one, up to the checkpoint that it goes on from.
    """

    def __init__(self) -> None:
        self.before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """All seconds until now."""
        return self.before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        """Begins to count, from what is counted already."""
        self.before = self.seconds
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Ends to count."""
        self.before = self.seconds
        self._started = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the seconds of the attempts before."""
        self.before = float(state_dict["seconds"])
