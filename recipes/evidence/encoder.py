"""The encoder's grid: short texts in a few classes, all-MiniLM-L6-v2 under a fresh head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from apportion.recipes.evidence.adapters import adapter
from apportion.recipes.evidence.grid import OnDisk
from apportion.recipes.evidence.methods import Method
from apportion.recipes.evidence.model import TARGETS, PooledClassification
from apportion.recipes.evidence.run import Prepared
from apportion.recipes.evidence.text import TASKS, Splits, Task, batch, bucketed, characters, sliced, splits

BATCH = 16


@dataclass
class EncoderGrid(OnDisk):
    """The grid of the encoder; see `apportion.recipes.evidence.grid.OnDisk`."""

    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)

    name: str = "encoder"
    head: bool = True
    objective: str = "accuracy"

    def reported(self, task: str) -> Sequence[str]:
        """The test rows."""
        return ["test"]

    def facts(self, task: str) -> dict[str, Any]:
        """What a table says beside its figures."""
        found = read(self.tasks[task], self.data)
        sizes = {"train": len(found.train), "dev": len(found.dev), "test": len(found.test)}
        return {"rows": sizes, "majority": found.majority}

    def prepare(self, task: str, method: Method, rate: float, seed: int, splits: Sequence[str]) -> Prepared:
        """A fresh head on the encoder, and batches; only the ``splits`` that are named are tokenized."""
        about = self.tasks[task]
        module = PooledClassification(
            rate,
            path=str(self.model),
            config={"num_labels": len(about.classes), "texts": len(about.texts)},
            peft=adapter(method.adapter, TARGETS) if method.adapter else None,
            schedule="linear",
            warmup=0.1,
        )
        tokenizer, found = load(self.model), read(about, self.data)
        groups = {"train": bucketed(found.train, BATCH, self.steps, seed, characters)}
        groups |= {name: sliced(getattr(found, name), 2 * BATCH, characters) for name in splits}
        made = {name: [batch(rows, tokenizer, about.length) for rows in some] for name, some in groups.items()}
        return Prepared(module, made.pop("train"), made)


@cache
def read(task: Task, data: Path) -> Splits:
    """The rows of a task, read once."""
    return splits(task, data)


@cache
def load(model: Path) -> Any:
    """The tokenizer, read once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model))
