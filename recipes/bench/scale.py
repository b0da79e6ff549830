"""How memory, time and selection grow: with the size of the model, and with what is selected of it.

    python -m apportion.recipes.bench.scale        writes results/scale.json

Memory of all sizes is that of fake tensors, which have shapes and storages but no values: the same code asks for the
same bytes, as `tests/test_estimate.py` holds it to. Times are real, on few tokens, medians of turns.

    floor of entries   peak of forward and backward whose gradients are freed as they arrive + 20 bytes an entry
                       (index 4, value 4, gradient 4, moments 8)
    floor of layers    4 bytes for each weight + 12 for each that trains (gradient 4, moments 8), + activations
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from apportion.budgets import Constant
from apportion.callbacks import LISA
from apportion.collector import Collector
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entrywise import D3, RandomEntries
from apportion.estimate import estimate
from apportion.fake import FakeRun
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.bench.entry_bars import UNITS, Size, adamw, backward, trainable
from apportion.recipes.bench.entry_rivals import watched
from apportion.recipes.bench.entry_times import take_turns
from apportion.recipes.bench.field import quiet
from apportion.rules import TopK
from apportion.types import When
from apportion.windows import Window

BAR = 1.03
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured: sizes, shares of the entries, and for each size its tokens and turns in real time."""

    sizes: tuple[Size, ...] = (
        Size("30 M", 512, 1376, 8, tokens=512),
        Size("120 M", 768, 2048, 16, tokens=512),
        Size("500 M", 1280, 3456, 24, tokens=512),
    )
    shares: tuple[float, ...] = (0.001, 0.01, 0.05, 0.2)
    timed: tuple[tuple[int, int, tuple[float, ...]], ...] = (
        (256, 7, (0.001, 0.01, 0.05, 0.2)),
        (128, 5, (0.01,)),
        (64, 3, (0.01,)),
    )


def _batch(size: Size) -> dict[str, Tensor]:
    tokens = torch.zeros(1, size.tokens, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}


def fixed(share: float) -> SelectiveTuning:
    """Random entries, chosen once."""
    return SelectiveTuning(UNITS, RandomEntries(), Constant(share), TopK(), Compact(), select_when=When(end=1))


def entries(size: Size, share: float) -> dict[str, Any]:
    """Bytes by part with ``share`` of the entries selected, against the floor."""
    found = estimate(size.build, _batch(size), method=fixed(share))
    floor = _alone(size) + 20 * found.trainable
    return {
        "model": size.label,
        "parameters": found.parameters,
        "share": share,
        "selected": found.trainable,
        **found.as_dict(),
        "floor": floor,
        "ratio": found.peak / floor,
        "optimizer_floor": 16 * found.trainable,
    }


@cache
def _alone(size: Size) -> int:
    """The peak of forward and backward, with every gradient freed as it arrives."""
    run = FakeRun(size.build, _batch(size))
    for p in trainable(run.model):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Tracker(run.model) as tracker:
        run.backward()
    return tracker.peak.total


def layers(size: Size, method: Any) -> dict[str, Any]:
    """Bytes by part with two layers, or everything, training in AdamW's loop form."""
    found = estimate(lambda: size.build().requires_grad_(True), _batch(size), method=method)
    floor = 4 * found.parameters + 12 * found.trainable
    return {
        "model": size.label,
        "method": "full" if method == "full" else "LISA(2)",
        "parameters": found.parameters,
        "trains": found.trainable,
        **found.as_dict(),
        "floor": floor,
        "ratio": (found.peak - found.activations) / floor,
    }


def step(size: Size, tokens: int, share: float, turns: int) -> dict[str, Any]:
    """Seconds of a step with fixed entries, and its ratio to forward and backward alone."""
    ours, alone = size.build(), size.build()
    for p in trainable(alone):  # as ours: gradients one at a time
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    compact = Selective(adamw(ours), ours, fixed(share))

    def train(batch: Tensor) -> None:
        backward(ours, batch)
        compact.step()
        compact.zero_grad()

    runs: list[Callable[[Tensor], None]] = [train, lambda batch: backward(alone, batch)]
    seconds = take_turns(runs, (batch[:, :tokens] for batch in size.batches()), turns)
    ratios = sorted(a / b for a, b in seconds)
    return {
        "model": size.label,
        "tokens": tokens,
        "share": share,
        "turns": turns,
        "step": statistics.median(a for a, _ in seconds),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def selection(size: Size, tokens: int, share: float) -> dict[str, Any]:
    """Seconds that one choice by gradients takes, beside the forward and backward pass that it needs anyway."""
    model: nn.Module = size.build()
    method = SelectiveTuning(UNITS, D3(), Constant(share), TopK(), Compact(), select_when=When(every=1, end=2))
    optimizer = Selective(adamw(model), model, method)
    for batch in islice(size.batches(), 2):  # the first warms up
        began = time.perf_counter()
        with watched((Collector, "_look"), (Window, "_choose")) as chosen:
            backward(model, batch[:, :tokens])
            passed = time.perf_counter() - began - sum(chosen)
            optimizer.step()
        optimizer.zero_grad()
    n = sum(p.numel() for p in trainable(model))
    return {
        "model": size.label,
        "entries": n,
        "share": share,
        "seconds": sum(chosen),
        "per_million": 1e6 * sum(chosen) / n,
        "to_passes": sum(chosen) / passed,
    }


def measure(plan: Plan, report: Callable[[str], Any]) -> dict[str, Any]:
    """All figures of ``plan``."""
    found: dict[str, Any] = {"entries": [], "layers": [], "step": [], "selection": []}
    for size, (tokens, turns, shares) in zip(plan.sizes, plan.timed, strict=True):
        for share in plan.shares:
            report(f"memory of {share:.1%} of {size.label}")
            found["entries"].append(entries(size, share))
        for method in ("full", LISA(2)):
            found["layers"].append(layers(size, method))
        for share in shares:
            report(f"time of {share:.1%} of {size.label}")
            found["step"].append(step(size, tokens, share, turns))
            found["selection"].append(selection(size, tokens, share))
    return found


def section(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown."""
    lines = [
        "## Growth with the size of the model and with what is selected",
        "",
        "Memory on fake tensors, AdamW, fp32, MiB at the peak. Floor: forward and backward, gradients freed as they "
        "arrive, and 20 bytes an entry. Optimizer: values, indices and moments, 16 bytes an entry.",
        "",
        "| model | selected | weights | gradients | optimizer | its floor | activations | rest | peak | floor "
        "| ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["entries"]:
        keys = ("weights", "gradients", "optimizer", "optimizer_floor", "activations", "temporaries", "peak", "floor")
        cells = " | ".join(f"{row[key] / _MIB:.1f}" for key in keys)
        lines.append(f"| {row['model']} | {row['selected']:,} ({row['share']:.1%}) | {cells} | {row['ratio']:.3f} |")
    lines += [
        "",
        "Layers, with embeddings and head. Floor: 4 bytes a weight, 12 for each that trains. Ratio: of the peak, "
        "activations left out.",
        "",
        "| model | method | trains | weights | gradients | optimizer | activations | rest | peak | floor | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["layers"]:
        parts = ("weights", "gradients", "optimizer", "activations", "temporaries", "peak", "floor")
        cells = " | ".join(f"{row[part] / _MIB:.1f}" for part in parts)
        lines.append(f"| {row['model']} | {row['method']} | {row['trains']:,} | {cells} | {row['ratio']:.4f} |")
    lines += [
        "",
        "Time of a step with fixed entries, beside forward and backward alone (the floor, 1.00); median and range.",
        "",
        "| model | tokens | selected | step, ms | to the floor |",
        "|---|---|---|---|---|",
    ]
    for row in result["step"]:
        spread = f"{row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
        lines.append(f"| {row['model']} | {row['tokens']} | {row['share']:.1%} | {1e3 * row['step']:.0f} | {spread} |")
    lines += [
        "",
        "One choice by gradients (D3 over all matrices and the head).",
        "",
        "| model | candidates | selected | ms | ms per million | of the passes of that step |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["selection"]:
        lines.append(
            f"| {row['model']} | {row['entries']:,} | {row['share']:.1%} | {1e3 * row['seconds']:.0f} "
            f"| {1e3 * row['per_million']:.1f} | {row['to_passes']:.2f} |"
        )
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Measures everything and writes ``scale.json``; fails if entries hold more than the bar allows."""
    made = parser("scale", __doc__)
    out: Path = made.parse_args(arguments).out
    quiet()
    began = time.monotonic()
    with Console(stderr=True).status("") as status:
        found = measure(plan or Plan(), status.update)
    passed = all(row["optimizer"] <= BAR * row["optimizer_floor"] + 4096 for row in found["entries"])
    result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "seconds": round(time.monotonic() - began),
        "passed": passed,
        **found,
    }
    write(out, "scale", result, section(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
