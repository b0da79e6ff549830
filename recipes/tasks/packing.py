"""Several short sequences in one row, each blind to the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apportion.probe import quiet
from apportion.recipes.tasks.data import Sample
from apportion.recipes.tasks.tokens import IGNORED


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences share a row: the longest first, each into the first row that has room for it.

    Args:
        lengths: Of the sequences, in tokens, at most ``capacity``.
        capacity: Tokens of a row.

    Returns:
        The sequences of each row in their order; rows in the order of their first sequence.

    Example:
        >>> pack([5, 2, 6, 3, 4], capacity=8)
        [[0, 3], [1, 2], [4]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    first = 0  # rows before it have no room for the shortest
    shortest = min(lengths, default=0)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        while first < len(room) and room[first] < shortest:
            first += 1
        at = next((r for r in range(first, len(room)) if room[r] >= lengths[i]), len(room))
        if at == len(room):
            rows.append([])
            room.append(capacity)
        rows[at].append(i)
        room[at] -= lengths[i]
    return sorted(sorted(row) for row in rows)


def join(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """One row of several samples: positions begin anew with each, and nothing predicts the first token of the next.

    Example:
        >>> one, two = ({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6], [7, 8, 9]))
        >>> for key, values in join([one, two]).items():
        ...     print(key, values.tolist())
        input_ids [5, 6, 7, 8, 9]
        labels [-100, 6, -100, 8, 9]
        position_ids [0, 1, 0, 1, 2]
    """
    labels = [sample["labels"].clone() for sample in samples]
    for part in labels:
        part[0] = IGNORED
    return {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(part)) for part in labels]),
    }


def check(model: Any, forward: Callable[..., Any]) -> None:
    """Refuses a model that looks from one sequence of a row into another.

    Two rows are compared, whose second sequences are equal and whose first ones differ: the logits of the second must
    not differ by one bit.

    Args:
        model: A causal language model of transformers, with or without adapters.
        forward: ``forward(input_ids=..., position_ids=...)`` gives its output as in training.

    Raises:
        ValueError: If the model takes no positions, or looks past the beginning of a sequence.
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    advice = "Use `data.packing=false data.bucket=true`, which pads little as well."
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(f"`data.packing=true`: {type(base).__name__} takes no `position_ids`. {advice}")
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    rows = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 3], [6, 9, 3, 8, 7, 8, 9, 3]], device=device)
    with quiet(model):
        one, two = (forward(input_ids=row[None], position_ids=positions).logits[0, 4:] for row in rows)
    if not torch.equal(one, two):
        raise ValueError(
            f"`data.packing=true`: {type(base).__name__} looks from one sequence of a row into the one before (logits "
            f"differ by {float((one - two).abs().max()):.2g}). {advice}"
        )
