"""How long it takes to go on, and how small what was learned is: checkpoints and delta files.

    python -m apportion.recipes.bench.resume        writes results/resume.json

Resume: from the call of ``Trainer.fit(ckpt_path=...)`` to the end of its first step, with selection and without, in
turns; median and range of the ratios. Delta: the entries that differ from the base, beside a full state dict and beside
LoRA of as many entries.

    delta   4 bytes a value in fp32, and the cheapest of 4 (int32), 2 + 2 / escape (gaps) or 1 / (8 s) bytes (bitmask)
            an entry at density s; twice the values if the base's are kept, so that it can be taken out again
    LoRA    4 r (m + n) bytes for each m x n matrix
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apportion import delta
from apportion.callbacks import LISA, Random
from apportion.optim import Selective
from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.bench.entry_bars import LR, Size, adamw, backward
from apportion.recipes.bench.field import hushed, loss_of, matrices
from apportion.recipes.bench.peers_entries import drawn

BAR = 1.01
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    size: Size = Size("30 M", 512, 1376, 8, tokens=64)  # noqa: RUF009
    turns: int = 5
    steps: int = 3
    rank: int = 4


class _Language(pl.LightningModule):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model = size.build().requires_grad_(True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR)


class _First(pl.Callback):
    """Notes when the first step is done."""

    def __init__(self) -> None:
        self.at = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.at = self.at or time.perf_counter()


def _fit(plan: Plan, method: Callable[[], list[Any]], steps: int, path: str | None = None) -> tuple[Any, float]:
    module, first = _Language(plan.size), _First()
    tokens = [next(plan.size.batches())[0] for _ in range(4 * plan.steps)]
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*method(), first],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(module, DataLoader(tokens, batch_size=1), ckpt_path=path)  # type: ignore[arg-type]
    return trainer, first.at - began


METHODS: dict[str, Callable[[], list[Any]]] = {
    "plain Lightning": lambda: [],
    "LISA(2)": lambda: [LISA(2, interval=2)],
    "1% of the entries": lambda: [Random(0.01, train_head=False)],
}


def resume(plan: Plan) -> list[dict[str, Any]]:
    """Seconds from ``fit`` to the end of its first step, for each method, and bytes of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for i, (name, method) in enumerate(METHODS.items()):
            trainer, _ = _fit(plan, method, plan.steps)
            paths[name] = str(Path(folder, f"{i}.ckpt"))
            trainer.save_checkpoint(paths[name])
        seconds: dict[str, list[float]] = {name: [] for name in METHODS}
        for turn in range(plan.turns + 1):
            for place in range(len(METHODS)):
                name = list(METHODS)[(turn + place) % len(METHODS)]
                once = _fit(plan, METHODS[name], plan.steps + 1, paths[name])[1]
                if turn:
                    seconds[name].append(once)
        sizes = {name: Path(path).stat().st_size for name, path in paths.items()}
    rows = []
    for name, took in seconds.items():
        ratios = sorted(a / b for a, b in zip(took, seconds["plain Lightning"], strict=True))
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(took),
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "checkpoint": sizes[name],
            }
        )
    return rows


def files(plan: Plan) -> dict[str, Any]:
    """Bytes of a delta file, with and without the base's values, of a full state dict, and of LoRA."""
    base, tuned = matrices(plan.size), matrices(plan.size)
    optimizer = Selective(adamw(tuned), tuned, drawn())
    for _, tokens in zip(range(plan.steps), plan.size.batches(), strict=False):
        backward(tuned, tokens)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, old in (("delta", False), ("revertible", True)):
            changes = delta.difference(base, tuned, old_values=old)
            delta.save(changes, Path(folder, f"{name}.safetensors"))
            found[name] = Path(folder, f"{name}.safetensors").stat().st_size
            found[f"{name}_floor"] = sum(change.encoded()[1] for change in changes.changes.values())
        torch.save(tuned.state_dict(), Path(folder, "full.pt"))
        found["full"] = Path(folder, "full.pt").stat().st_size
        names = [name for name, m in tuned.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
        lora = get_peft_model(matrices(plan.size), LoraConfig(r=plan.rank, target_modules=names))
        lora.save_pretrained(folder)
        found["lora"] = Path(folder, "adapter_model.safetensors").stat().st_size
    found["entries"] = sum(change.count for change in changes.changes.values())
    found["lora_entries"] = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    found["encodings"] = sorted({change.encoded()[0] for change in changes.changes.values()})
    return found


def section(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown."""
    f = result["files"]
    lines = [
        "## Going on, and files",
        "",
        f"{result['model']}, AdamW, fp32: from `fit(ckpt_path=...)` to the end of its first step; median and range.",
        "",
        "| | seconds | to plain Lightning | checkpoint, MiB |",
        "|---|---|---|---|",
    ]
    for row in result["resume"]:
        spread = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        lines.append(f"| {row['name']} | {row['seconds']:.2f} | {spread} | {row['checkpoint'] / _MIB:.1f} |")
    lines += [
        "",
        f"{f['entries']:,} entries, written by {', '.join(f['encodings'])}; the floor is what values and indices take.",
        "",
        "| file | MiB | floor, MiB | bytes an entry | of the full state dict |",
        "|---|---|---|---|---|",
    ]
    for label, key in (("delta", "delta"), ("delta that can be taken out", "revertible")):
        lines.append(
            f"| {label} | {f[key] / _MIB:.3f} | {f[f'{key}_floor'] / _MIB:.3f} | {f[key] / f['entries']:.2f} "
            f"| {f[key] / f['full']:.4f} |"
        )
    lines += [
        f"| LoRA of as many entries | {f['lora'] / _MIB:.3f} | {4 * f['lora_entries'] / _MIB:.3f} "
        f"| {f['lora'] / f['lora_entries']:.2f} | {f['lora'] / f['full']:.4f} |",
        f"| full state dict | {f['full'] / _MIB:.1f} | | | 1 |",
        "",
    ]
    return lines


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Measures and writes ``resume.json``; fails if a delta is larger than its floor and 1 %, or 64 KiB of names."""
    made = parser("resume", __doc__)
    out: Path = made.parse_args(arguments).out
    plan = plan or Plan()
    with hushed(), Console(stderr=True).status("") as status:
        status.update("delta files")
        weighed = files(plan)
        status.update("resuming")
        rows = resume(plan)
    passed = all(weighed[key] <= BAR * weighed[f"{key}_floor"] + 2**16 for key in ("delta", "revertible"))
    versions = {
        "torch": torch.__version__,
        "lightning": version("pytorch-lightning"),
        "python": platform.python_version(),
    }
    result = {**versions, "model": plan.size.label, "passed": passed, "resume": rows, "files": weighed}
    write(out, "resume", result, section(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
