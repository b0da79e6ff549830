"""The memory bars: what LISA and IST hold at the peak, against what they cannot do without, on fake tensors.

    python -m apportion.recipes.bench.memory        writes results/memory.json

LISA, Llama-2-7B, bf16, 1 x 1024 tokens, non-reentrant checkpointing: ten switches, with the peak of the steps before
each, of the optimizer step that holds it, and of the steps after it. The floor of a set is the same tracker on a plain
torch loop that has only ever trained that set. An interval is two steps here, not twenty: the second step after a
switch is the first that has all its optimizer state, and further ones repeat it.

IST on LoRA: optimizer state on the device and off it over forty optimizer steps, against plain LoRA. On fake tensors a
move to the CPU is seen as done at once: what a transfer holds twice while it lasts (at most what one switch moves) is
not in the figure.
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch.optim import Optimizer

from apportion.callbacks import IST, LISA
from apportion.fake import FakeRun
from apportion.ledger import Parts
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.shapes import Shape, config_of

_GIB, _MIB = 2**30, 2**20
_SWITCHES, _INTERVAL = 10, 2
_TURNS = 40  # optimizer steps of IST; a layer of which a quarter train has its turn by then, but for 1 in 100,000


def _run(lora_rank: int = 0) -> FakeRun:
    shape = Shape(config_of("llama-2-7b"), lora_rank)
    return FakeRun(shape.build, shape.batch(1, 1024), precision="bf16-true", checkpointing=True)


def _adamw(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, foreach=False)


def lisa(report: Any) -> dict[str, Any]:
    """Peaks around ten switches of LISA, with the floors of the sets before and after each."""
    run = _run()
    optimizer = Selective(_adamw(run.model.parameters()), run.model, LISA(active_layers=2, interval=_INTERVAL))
    before: list[Parts] = []
    at: list[Parts] = []
    sets: list[frozenset[str]] = []
    with Tracker(run.model, optimizer) as tracker:
        for window in range(_SWITCHES + 1):
            report(f"LISA, set {window + 1} of {_SWITCHES + 1}")
            sets.append(_training(run))
            tracker.mark("window")
            for last in [False] * (_INTERVAL - 1) + [True]:
                run.backward()
                if last:
                    before.append(
                        tracker.mark("before")
                    )  # with the first steps of the window: they come after a switch
                optimizer.step()
                optimizer.zero_grad()
            at.append(tracker.mark("at"))
    floors = {}
    for i, names in enumerate(dict.fromkeys(sets), 1):
        report(f"floor {i} of {len(set(sets))}")
        floors[names] = _floor(names)
    switches = []
    for i in range(_SWITCHES):
        old, new = floors[sets[i]], floors[sets[i + 1]]
        ratios = {
            "before": before[i].total / old.total,
            "at": at[i].total / min(old.total, new.total),
            "after": before[i + 1].total / new.total,
        }
        peak = max((before[i], at[i], before[i + 1]), key=lambda parts: parts.total)
        floor = {"floor_before": old.total, "floor_after": new.total}
        switches.append({"switch": i + 1, **{k: round(v, 5) for k, v in ratios.items()}, **floor, **peak.as_dict()})
    worst = max(max(s["before"], s["at"], s["after"]) for s in switches)
    return {"worst": worst, "bar": 1.03, "passed": worst <= 1.03, "switches": switches}


def _training(run: FakeRun) -> frozenset[str]:
    return frozenset(name for name, p in run.model.named_parameters() if p.requires_grad)


def _floor(names: frozenset[str]) -> Parts:
    """The peak of a plain loop that has only ever trained the parameters called ``names``."""
    run = _run()
    for name, p in run.model.named_parameters():
        p.requires_grad_(name in names)
    optimizer = _adamw(p for p in run.model.parameters() if p.requires_grad)
    with Tracker(run.model) as tracker:
        for _ in range(_INTERVAL):
            run.step(optimizer)
    return tracker.peak


def ist(report: Any) -> dict[str, Any]:
    """Optimizer state of IST on LoRA of rank 32, on the device and off it, against LoRA's."""
    report("LoRA")
    plain = _run(lora_rank=32)
    with Tracker(plain.model) as tracker:
        optimizer: Optimizer = _adamw(p for p in plain.model.parameters() if p.requires_grad)
        for _ in range(2):
            plain.step(optimizer)
    full, lora = tracker.now.optimizer, tracker.peak
    run = _run(lora_rank=32)
    selective = Selective(
        _adamw(p for p in run.model.parameters() if p.requires_grad), run.model, IST(), probe=run.probe
    )
    with Tracker(run.model, selective) as tracker:
        for turn in range(_TURNS):
            report(f"IST, step {turn + 1} of {_TURNS}")
            if turn >= _TURNS - 2:  # the state is what it is without forward and backward, which the last steps have
                tracker.mark("whole step")
                run.step(selective)
                continue
            for p in selective.owner.training():
                p.grad = torch.empty_like(p)
            selective.step()
            selective.zero_grad()
        peak = tracker.mark("end")
    highest = tracker.highest.optimizer
    return {
        "lora_state": full,
        "on_device_at_most": highest,
        "share": highest / full,
        "bar": 0.25,
        "passed": highest <= 0.25 * full,
        "offloaded": tracker.now.offloaded,
        "ist_peak": peak.as_dict(),
        "lora_peak": lora.as_dict(),
    }


def section(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown."""
    first, second = result["lisa"], result["ist"]
    lines = [
        "## Memory of layers",
        "",
        f"`python -m apportion.recipes.bench.memory`, {result['cpu_seconds']} s of one core, torch {result['torch']}, "
        f"transformers {result['transformers']}. Fake tensors; Llama-2-7B, bf16, 1 x 1024, checkpointing.",
        "",
        "### LISA(active_layers=2) against the floor of its set",
        "",
        "| switch | step before | at the switch | step after | highest peak, GiB | floor before / after, GiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['switch']} | {s['before']:.4f} | {s['at']:.4f} | {s['after']:.4f} | {s['peak'] / _GIB:.2f} "
        f"| {s['floor_before'] / _GIB:.2f} / {s['floor_after'] / _GIB:.2f} |"
        for s in first["switches"]
    ]
    lines += [
        "",
        f"Worst {first['worst']:.4f} of the floor; the bar is {first['bar']}.",
        "",
        "### IST on LoRA of rank 32: optimizer state",
        "",
        "| | MiB | share of LoRA's |",
        "|---|---|---|",
    ]
    for label, size in (
        ("LoRA", second["lora_state"]),
        ("IST, on the device at most", second["on_device_at_most"]),
        ("IST, offloaded at the end", second["offloaded"]),
    ):
        lines.append(f"| {label} | {size / _MIB:.1f} | {size / second['lora_state']:.3f} |")
    peaks = f"{second['lora_peak']['peak'] / _GIB:.2f} GiB, IST {second['ist_peak']['peak'] / _GIB:.2f} GiB"
    lines += ["", f"Peak of a step: LoRA {peaks}. The bar is 0.25 of LoRA's state on the device.", ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both bars, writes ``memory.json``, and fails if a bar is missed."""
    made = parser("memory", __doc__)
    out: Path = made.parse_args(arguments).out
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    start = time.monotonic()
    with Console(stderr=True).status("") as status:
        bars = {"lisa": lisa(status.update), "ist": ist(status.update)}
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - start),
        "cpu_seconds": round(time.process_time()),
        **bars,
    }
    write(out, "memory", result, section(result))
    return 0 if result["lisa"]["passed"] and result["ist"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
