"""Runs that are stopped and resumed: what they are made of, and where they were saved."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from toys import Task


class Noisy(Task):  # type: ignore[misc, valid-type]
    """A loss that draws from all global generators: dropout from torch's, a factor from Python's and NumPy's."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss * (0.8 + 0.2 * random.random() + 0.2 * float(np.random.rand()))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def scheduler(opt: torch.optim.Optimizer) -> dict[str, Any]:
    return {"scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.95), "interval": "step"}


def checkpoints(folder: Path) -> ModelCheckpoint:
    """A checkpoint after every optimizer step."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=True)


def at(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"
