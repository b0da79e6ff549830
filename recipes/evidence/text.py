"""Real text for the encoder's evidence: public files, a dev split out of the training rows, batches of like length."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from apportion.recipes.evidence.sources import located

Batch = dict[str, Tensor]
Row = tuple[tuple[str, ...], int]
R = TypeVar("R")

POOL = 32
"""Batches whose rows are sorted by length together: short rows meet short rows, and an epoch is still shuffled."""


@dataclass(frozen=True)
class Task:
    """One labelled data set of a data folder.

    Args:
        title: Its name in tables.
        train: File of the training rows, of which `DEV` are carved out for the search; relative to the data folder.
        test: File of the rows that are reported.
        texts: Names of the columns with the one or two texts.
        label: Name of the column with the class.
        classes: The classes as they are written in the files, in order.
        length: Longest text in tokens; longer ones are cut.
    """

    title: str
    train: str
    test: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    length: int = 64


TASKS: dict[str, Task] = {
    "trec": Task("TREC", "trec/train.jsonl", "trec/test.jsonl", ("sentence",), "label", tuple("012345")),
    "sst2": Task("SST-2", "sst2/train.tsv", "sst2/test.tsv", ("sentence",), "label", ("0", "1")),
    "mrpc": Task(
        "MRPC",
        "mrpc/msr_paraphrase_train.txt",
        "mrpc/msr_paraphrase_test.txt",
        ("#1 String", "#2 String"),
        "Quality",
        ("0", "1"),
    ),
    "rte": Task(
        "RTE",
        "rte/train.jsonl",
        "rte/dev.jsonl",
        ("sentence_1", "sentence_2"),
        "label",
        ("entailment", "not_entailment"),
        length=128,
    ),
}

DEV = 500
"""Rows of the dev split."""

SPLIT_SEED = 0
"""Of the dev split; kept apart from the runs' seeds, so that all are searched on one split."""


@dataclass(frozen=True)
class Splits:
    """The rows of a task.

    Args:
        train: Without doubles, and without texts that the test rows hold.
        dev: Carved from the training rows; for the search alone.
        test: As in the file.
    """

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def majority(self) -> float:
        """Accuracy on the test rows of the class that is commonest in the training rows."""
        commonest = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == commonest for _, label in self.test) / len(self.test)


def lines(path: Path) -> list[Any]:
    """Rows of a ``.jsonl`` file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read(path: Path) -> list[Mapping[str, str]]:
    """Rows of a ``.jsonl`` file, or of a tab-separated one with a header."""
    if path.suffix == ".jsonl":
        return lines(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def rows(task: Task, file: str, data: Path) -> list[Row]:
    """Texts and class numbers of one file.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If a row has no such column or class.
    """
    path = located(data, file)
    found: list[Row] = []
    for number, row in enumerate(read(path), 1):
        if row.get(task.label) not in task.classes:
            raise ValueError(f"Row {number} of {path}: {task.label}={row.get(task.label)!r} is not in {task.classes}.")
        found.append((tuple(row[name].strip() for name in task.texts), task.classes.index(row[task.label])))
    return found


def splits(task: Task, data: Path, dev: int = DEV) -> Splits:
    """The rows of a task, split; a function of the files alone.

    Args:
        task: The task.
        data: The data folder.
        dev: Rows of the dev split; at most a quarter of the training rows are taken.
    """
    test = rows(task, task.test, data)
    seen = {texts for texts, _ in test}
    train: list[Row] = []
    for row in rows(task, task.train, data):
        if row[0] not in seen:
            seen.add(row[0])
            train.append(row)
    random.Random(SPLIT_SEED).shuffle(train)
    held = min(dev, len(train) // 4)
    return Splits(tuple(train[held:]), tuple(train[:held]), tuple(test))


def bucketed(rows: Sequence[R], size: int, steps: int, seed: int, width: Callable[[R], int]) -> list[list[R]]:
    """The rows of each training step: of like width, in random order. Padding costs little, and every epoch is new.

    Args:
        rows: Training rows.
        size: Rows of a step; those that are left at the end of a pool are fewer.
        steps: Optimizer steps.
        seed: Of the order.
        width: How long a row is, in any unit.
    """
    draw = random.Random(seed)
    made: list[list[R]] = []
    while len(made) < steps:
        order = draw.sample(list(rows), len(rows))
        for start in range(0, len(order), POOL * size):
            pool = sorted(order[start : start + POOL * size], key=width)
            some = [pool[i : i + size] for i in range(0, len(pool), size)]
            draw.shuffle(some)
            made += some
    return made[:steps]


def sliced(rows: Sequence[R], size: int, width: Callable[[R], int]) -> list[list[R]]:
    """All rows by width, ``size`` at a time."""
    by_width = sorted(rows, key=width)
    return [by_width[i : i + size] for i in range(0, len(rows), size)]


def batch(rows: Sequence[Row], tokenizer: Any, length: int) -> Batch:
    """One batch: tokens, shape (n, longest); of n pairs (2n, longest), all first texts before all second ones.

    Args:
        rows: Texts and classes.
        tokenizer: Makes tokens of texts.
        length: Longest text in tokens.
    """
    texts = [text for place in zip(*(texts for texts, _ in rows), strict=True) for text in place]
    encoded = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def characters(row: Row) -> int:
    """How long the texts of a row are together."""
    return sum(len(text) for text in row[0])
