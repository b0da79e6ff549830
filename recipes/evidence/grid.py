"""What the grids have in common: a data folder, a model's folder, and the files of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OnDisk:
    """A grid whose tasks and model are files.

    Args:
        data: The data folder.
        model: Folder of the model and its tokenizer.
        steps: Optimizer steps of a run.
        tasks: Its tasks, with the files ``train`` and ``test`` of each, relative to the data folder.
    """

    data: Path
    model: Path
    steps: int = 150
    tasks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """File of the weights that all cells begin with."""
        return self.model / "model.safetensors"

    def files(self, task: str) -> Sequence[Path]:
        """Training and test rows."""
        return [self.data / self.tasks[task].train, self.data / self.tasks[task].test]
