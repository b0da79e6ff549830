"""One cell of an evidence grid: trains once, counts what trained, measures, and says what it was made with."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from apportion.entry_units import Entries
from apportion.recipes.evidence.adapters import RANK
from apportion.recipes.evidence.cells import Cell, Records
from apportion.recipes.evidence.methods import BY_KEY, Method, Setting
from apportion.recipes.evidence.model import is_head
from apportion.recipes.evidence.text import Batch, digest

VERSIONS = ("torch", "pytorch-lightning", "transformers", "peft", "tokenizers")


@dataclass(frozen=True)
class Prepared:
    """What a grid has ready for a cell.

    Args:
        module: The model to train.
        train: Training batches, one for each step.
        splits: Batches to measure on, by the name of the split.
    """

    module: pl.LightningModule
    train: Sequence[Batch]
    splits: Mapping[str, Sequence[Batch]]


class Grid(Protocol):
    """A model, its tasks and how to read them."""

    name: str
    steps: int
    head: bool
    objective: str
    """Metric of the dev split that the search maximizes; a loss is negated."""

    @property
    def weights(self) -> Path:
        """File of the weights that all cells begin with."""

    def files(self, task: str) -> Sequence[Path]:
        """Files that a task is read from."""

    def prepare(self, task: str, method: Method, rate: float, seed: int, splits: Sequence[str]) -> Prepared:
        """Model and batches of one cell; only the ``splits`` that are named are read."""

    def facts(self, task: str) -> dict[str, Any]:
        """What a table says beside its figures, such as numbers of rows."""

    def reported(self, task: str) -> Sequence[str]:
        """Splits that a reported cell is measured on."""


class Census(pl.Callback):
    """Counts the entries that train, the head apart: at a step, and those that are not what they were in the end.

    Put it before the callback that selects: it looks at the model before that comes and after it has gone.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.head = 0
        self.moved = 0
        self._before: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the weights that the run begins with."""
        self._before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.head = sum(p.numel() for name, p in _heads(pl_module))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Counts what the optimizer is about to move."""
        held = (p for group in optimizer.param_groups for p in group["params"])
        self.counts.append(sum(p.numel() for p in held if p.grad is not None) - self.head)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts what has moved."""
        after = dict(pl_module.named_parameters())
        self.moved = sum(int((p != after[name]).sum()) for name, p in self._before.items() if not is_head(name))
        self._before = {}

    def as_dict(self) -> dict[str, Any]:
        """Numbers for the record."""
        mean = sum(self.counts) / max(1, len(self.counts))
        last = self.counts[-1] if self.counts else 0
        return {"head": self.head, "step_mean": mean, "step_last": last, "moved": self.moved}


def _heads(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if is_head(name) and p.requires_grad]


def run(cell: Cell, grid: Grid, records: Records, about: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one cell and keeps its record; an error is part of the record, not of the process.

    Args:
        cell: The cell.
        grid: Its grid.
        records: Where the record goes.
        about: What is the same for all cells of the process, see `provenance`.
    """
    record: dict[str, Any] = {**about, "started": datetime.now(UTC).isoformat(timespec="seconds"), "error": None}
    began, spent = time.perf_counter(), time.process_time()
    try:
        record |= measure(cell, grid)
    except Exception as error:
        record |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    record |= {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - spent, 2),
    }
    records.put(cell, record)
    return record


def measure(cell: Cell, grid: Grid) -> dict[str, Any]:
    """Trains a cell and measures it: one of the search on the dev split alone, a reported one on what is reported."""
    method = BY_KEY[cell.method]
    pl.seed_everything(1000 + cell.seed, verbose=False)
    ready = grid.prepare(
        cell.task, method, cell.rate, cell.seed, ["dev"] if cell.searches else list(grid.reported(cell.task))
    )
    if method.frozen:
        for name, p in ready.module.named_parameters():
            p.requires_grad_(is_head(name))
    k = budget(ready.module) if method.adapter is None and not method.frozen else 0
    callbacks = [method.make(Setting(k, cell.seed, grid.steps, grid.head))] if method.make else []
    census = Census()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=grid.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[census, *callbacks],
    )
    if any(p.requires_grad for p in ready.module.parameters()):
        trainer.fit(ready.module, _loader(ready.train))
    metrics: dict[str, float | None] = {}
    for split, some in ready.splits.items():
        found = trainer.validate(ready.module, _loader(some), verbose=False)[0]
        metrics |= {f"{split}/{name.partition('/')[2]}": value for name, value in found.items() if name[:4] == "val/"}
    finite = {name: value if math.isfinite(value or 0.0) else None for name, value in metrics.items()}
    told = {"steps": trainer.global_step, "budget": k, "metrics": finite, "trained": census.as_dict()}
    return told | ({"dev_score": _score(finite, grid.objective)} if cell.searches else {})


def _score(metrics: Mapping[str, float | None], objective: str) -> float:
    """The objective, higher is better; a run that diverged is worse than any."""
    value = metrics[f"dev/{objective}"]
    if value is None:
        return -1e9
    return -value if objective == "loss" else value


def budget(model: nn.Module) -> int:
    """Entries that LoRA of rank `RANK` would have on all matrices of the layers.

        k = sum over matrices of (m + n) r

    Args:
        model: The model, without adapters.
    """
    return sum(RANK * sum(p.shape) for unit in Entries().bind(model).units for p in unit.params.values())


def _loader(some: Sequence[Batch]) -> DataLoader[Any]:
    return DataLoader(list(some), batch_size=None)  # type: ignore[arg-type]


@cache
def provenance(root: Path) -> dict[str, Any]:
    """Commit, whether the tree differs from it, versions and machine.

    Args:
        root: A folder in the working tree that the code is from.
    """

    def git(*arguments: str) -> str | None:
        told = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return told.stdout.strip() if told.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def hashes(grid: Grid, task: str) -> dict[str, Any]:
    """Checksums of the files that a task is read from, and of the weights that it begins with."""
    return {"files": {path.name: digest(path) for path in grid.files(task)}, "model": digest(grid.weights)}
