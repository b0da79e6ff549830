"""What a step with single entries takes, beside masked-dense training and others, and how gradients are best got."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from apportion.budgets import Constant
from apportion.compact import Fate, Gathered
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entrywise import RandomEntries
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.recipes.bench.entry_bars import DECAY, LR, UNITS, Size, adamw, backward, candidates, trainable
from apportion.rules import TopK
from apportion.sampled import Dots
from apportion.tiled import Tiles, layer_of, layout
from apportion.types import When

WAYS = ("hook", "tiled", "sampled")
_NAMES: dict[type, str] = {type(None): "hook", Tiles: "tiled", Dots: "sampled"}


def step_time(size: Size, share: float, turns: int, fused: bool) -> dict[str, Any]:
    """A step with a static selection against masked-dense AdamW, and against forward and backward alone.

    Masked-dense training multiplies gradients by a mask and puts what decay has moved back after the step; ``lean``
    lets the optimizer decay nothing and multiplies decay by the mask instead.
    """
    ours, dense, thin, alone = (size.build() for _ in range(4))
    options = {"fused": True} if fused else {}
    method = SelectiveTuning(UNITS, RandomEntries(), Constant(share), TopK(), Compact(), select_when=When(end=1))
    compact = Selective(adamw(ours, **options), ours, method)
    masks = _masks(compact)
    masked, lean = adamw(dense, **options), adamw(thin, weight_decay=0.0, **options)

    def train_compact(tokens: Tensor) -> None:
        backward(ours, tokens)
        compact.step()
        compact.zero_grad()

    @torch.no_grad()
    def step_masked() -> None:
        before = [p.detach().clone() for p in trainable(dense)]
        for p, mask in zip(trainable(dense), masks, strict=True):
            p.grad.mul_(mask)  # type: ignore[union-attr]
        masked.step()
        for p, mask, old in zip(trainable(dense), masks, before, strict=True):
            p.copy_(torch.where(mask, p, old))

    def train_masked(tokens: Tensor) -> None:
        backward(dense, tokens)
        step_masked()
        masked.zero_grad()

    @torch.no_grad()
    def step_lean() -> None:
        for p, mask in zip(trainable(thin), floats, strict=True):
            p.grad.mul_(mask)  # type: ignore[union-attr]
            p.addcmul_(p, mask, value=-LR * DECAY)
        lean.step()

    def train_lean(tokens: Tensor) -> None:
        backward(thin, tokens)
        step_lean()
        lean.zero_grad()

    def run_alone(tokens: Tensor) -> None:
        backward(alone, tokens)
        alone.zero_grad()

    floats = [mask.float() for mask in masks]
    seconds = take_turns((train_compact, train_masked, train_lean, run_alone), size.batches(), turns)
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    ratios = [statistics.median(turn[0] / turn[i] for turn in seconds) for i in (1, 2, 3)]
    return {
        "optimizer": "AdamW, fused" if fused else "AdamW",
        "share": share,
        "tokens": size.tokens,
        "turns": turns,
        **dict(zip(("compact", "masked", "lean", "alone"), medians, strict=True)),
        **dict(zip(("to_masked", "to_lean", "to_alone"), ratios, strict=True)),
        "same_weights": all(
            torch.allclose(p, other, rtol=0.0, atol=0.1 * LR)  # a gradient of rounding errors alone moves by the rate
            for model in (dense, thin)
            for p, other in zip(ours.parameters(), model.parameters(), strict=True)
        ),
    }


def capture(shape: tuple[int, int], share: float, rows: bool, tokens: int, turns: int, threads: int) -> dict[str, Any]:
    """Forward and backward of one linear layer, with each way to get its gradients: times and temporaries.

    Args:
        shape: Of the weight.
        share: Share of the entries that are selected.
        rows: Whether whole rows are selected.
        tokens: Rows of the input.
        turns: Turns that the medians are over.
        threads: Threads of the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape[1], generator=generator).requires_grad_()
    gy = torch.randn(tokens, shape[0], generator=generator)
    mask = torch.rand((shape[0], 1) if rows else shape, generator=generator) < share
    index = mask.expand(shape).flatten().nonzero().flatten()
    layers: dict[str, nn.Linear] = {way: nn.Linear(shape[1], shape[0], bias=False) for way in WAYS}
    stores = {}
    for way, layer in layers.items():
        weight = next(layer.parameters())
        stores[way] = Gathered(weight, Fate(), None, layer_of(way, layer, weight), way)
        stores[way].move(weight, index, {})

    def run(way: str) -> None:
        layers[way](x).backward(gy)
        stores[way].leaf.grad = x.grad = None

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = take_turns([lambda _, way=way: run(way) for way in WAYS], repeat(x), turns)  # type: ignore[misc]
    finally:
        torch.set_num_threads(before)
    found: dict[str, Any] = {}
    for i, way in enumerate(WAYS):
        with Tracker(layers[way]) as tracker:
            run(way)
        found[way] = {
            "seconds": statistics.median(turn[i] for turn in seconds),
            "to_hook": statistics.median(turn[i] / turn[0] for turn in seconds),
            "temporaries": tracker.highest.temporaries,
        }
    auto = _NAMES[type(layout("auto", index, shape, torch.float32))]
    return {
        "shape": list(shape),
        "share": share,
        "rows": rows,
        "threads": threads,
        "tokens": tokens,
        "auto": auto,
        **found,
    }


def _masks(optimizer: Selective) -> list[Tensor]:
    """What is selected as bool masks, one for each trainable tensor in the optimizer's order."""
    masks = []
    for p in candidates(optimizer).tensors:
        mask = torch.zeros(p.numel(), dtype=torch.bool)
        mask[optimizer.owner.narrow(p).index.long()] = True
        masks.append(mask.view(p.shape))
    return masks


def take_turns(
    runs: Sequence[Callable[[Tensor], None]], batches: Iterator[Tensor], turns: int
) -> list[tuple[float, ...]]:
    """Seconds of each of ``runs``, turn by turn, after one turn to warm up; who begins changes."""
    measured = []
    for turn in range(turns + 1):
        tokens, seconds = next(batches), [0.0] * len(runs)
        for place in range(len(runs)):
            which = (turn + place) % len(runs)
            began = time.perf_counter()
            runs[which](tokens)
            seconds[which] = time.perf_counter() - began
        measured.append(tuple(seconds))
    return measured[1:]
