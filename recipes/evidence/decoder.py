"""The decoder's grid: what fine-tuning gains on new text, and what it forgets of the text it was pre-trained on."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from apportion.recipes.evidence.adapters import adapter
from apportion.recipes.evidence.grid import OnDisk
from apportion.recipes.evidence.methods import Method
from apportion.recipes.evidence.pretrain import END, HELD_OUT, held_out
from apportion.recipes.evidence.run import Prepared
from apportion.recipes.evidence.sources import located
from apportion.recipes.evidence.text import SPLIT_SEED, Batch, bucketed, lines, sliced
from apportion.recipes.tasks.module import CausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Last parts of the names of the matrices of a Llama layer."""

Pair = tuple[str, str]
Tokens = tuple[tuple[int, ...], int]
"""Tokens of a prompt and its answer, and how many are the prompt's."""


@dataclass(frozen=True)
class Task:
    """Prompts and answers of a data folder; the loss is taken on the answers.

    Args:
        title: Its name in tables.
        train: File of the training rows, of which a dev split is carved out for the search.
        test: File of the rows that are reported.
        read: From a path to prompts and answers.
        size: Rows of a training step.
        length: Longest prompt with its answer, in tokens; longer ones are left out.
        most: Rows in the dev split and in the test split.
    """

    title: str
    train: str
    test: str
    read: Callable[[Path], list[Pair]]
    size: int = 8
    length: int = 256
    most: int = 200


def arithmetic(path: Path) -> list[Pair]:
    """GSM8K's questions and worked answers."""
    return [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in lines(path)]


def descriptions(path: Path) -> list[Pair]:
    """E2E's meaning representations and descriptions; most have several."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(f"{row['mr']}\n=>", f" {row['ref']}") for row in csv.DictReader(file)]


def instructions(path: Path) -> list[Pair]:
    """Instructions with their answers: Alpaca's rows of a ``.json`` file, or Self-Instruct's of a ``.jsonl`` one."""
    rows = lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    found = []
    for row in rows:
        for instance in row.get("instances", [row]):
            given = f"\nInput: {instance['input']}" if instance["input"] else ""
            found.append((f"Instruction: {row['instruction']}{given}\nAnswer:", f" {instance['output']}"))
    return found


TASKS: dict[str, Task] = {
    "e2e": Task("E2E", "e2e/devset.csv", "e2e/testset_w_refs.csv", descriptions),
    "gsm8k": Task("GSM8K", "gsm8k/train.jsonl", "gsm8k/test.jsonl", arithmetic, size=4),
    "instructions": Task(
        "instructions",
        "llamafactory_demo/alpaca_en_demo.json",
        "self_instruct/user_oriented_instructions.jsonl",
        instructions,
        size=4,
    ),
}


@dataclass
class DecoderGrid(OnDisk):
    """The grid of the decoder; see `apportion.recipes.evidence.grid.OnDisk`."""

    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)

    name: str = "decoder"
    head: bool = False
    objective: str = "loss"

    def files(self, task: str) -> Sequence[Path]:
        """Training and test rows, and the text that shows what is forgotten."""
        return [*super().files(task), self.data / HELD_OUT]

    def reported(self, task: str) -> Sequence[str]:
        """The test rows, and the text that the model was never trained on but is of a kind that it knows."""
        return ["test", "held_out"]

    def facts(self, task: str) -> dict[str, Any]:
        """What a table says beside its figures."""
        found = rows(self.tasks[task], self.data, self.model)
        pretraining = json.loads((self.model / "pretrain.json").read_text(encoding="utf-8"))
        return {"rows": {name: len(some) for name, some in found.items()}, "pretraining": pretraining}

    def prepare(self, task: str, method: Method, rate: float, seed: int, splits: Sequence[str]) -> Prepared:
        """The pre-trained model and batches; of the measured rows only the ``splits`` that are named are batched."""
        about = self.tasks[task]
        optimizer: Any = partial(torch.optim.AdamW, lr=rate, weight_decay=0.01, fused=True)
        module = CausalLM(
            path=str(self.model),
            peft=adapter(method.adapter, TARGETS) if method.adapter else None,
            optimizer=optimizer,
            schedule="linear",
            warmup=0.1,
        )
        found = rows(about, self.data, self.model)
        train = [batch(some) for some in bucketed(found["train"], about.size, self.steps, seed, width)]
        measured: dict[str, list[Batch]] = {
            name: held_out(self.data, load(self.model))
            if name == "held_out"
            else [batch(some) for some in sliced(found[name], 16, width)]
            for name in splits
        }
        return Prepared(module, train, measured)


def width(row: Tokens) -> int:
    """Tokens of a row."""
    return len(row[0])


def batch(rows: Sequence[Tokens]) -> Batch:
    """One batch, padded on the right; the loss leaves out prompts and padding. Shapes: (n, longest)."""
    longest = max(width(row) for row in rows)
    inputs: Tensor = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(inputs, -100)
    for at, (tokens, prompt) in enumerate(rows):
        inputs[at, : len(tokens)] = torch.tensor(tokens)
        labels[at, prompt : len(tokens)] = inputs[at, prompt : len(tokens)]
    return {"input_ids": inputs, "labels": labels}


@cache
def rows(task: Task, data: Path, model: Path) -> dict[str, list[Tokens]]:
    """Training, dev and test rows of a task as tokens, read once; no prompt is in two of them."""
    tokenizer = load(model)
    end = tokenizer.token_to_id(END)
    assert end is not None  # the tokenizer is our own

    def tokens(pairs: Sequence[Pair]) -> list[Tokens]:
        made = []
        for prompt, answer in pairs:
            before, after = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
            made.append(((*before, *after, end), len(before)))
        return [row for row in made if width(row) <= task.length]

    test = task.read(located(data, task.test))
    held = {prompt for prompt, _ in test}
    train = [pair for pair in task.read(located(data, task.train)) if pair[0] not in held]
    draw = random.Random(SPLIT_SEED)
    prompts = sorted({prompt for prompt, _ in train})
    dev = set(draw.sample(prompts, min(task.most, len(prompts) // 4)))
    return {
        "train": tokens([pair for pair in train if pair[0] not in dev]),
        "dev": tokens(draw.sample([pair for pair in train if pair[0] in dev], len(dev))),
        "test": tokens(draw.sample(test, min(task.most, len(test)))),
    }


@cache
def load(model: Path) -> Tokenizer:
    """The tokenizer, read once."""
    return Tokenizer.from_file(str(model / "tokenizer.json"))
