"""Large models on a GPU, method by method: memory, speed, selection, and how near the estimates are.

    python -m apportion.recipes.bench.gpu --device cuda        writes results/gpu/<cell>.json and results/gpu.json

Every cell is a process of its own with a file of its own, so that one that runs out of memory, or is killed, takes none
along, and a run that was broken off goes on where it was: cells that were measured are not measured again, but with
``--again``. Without a CUDA device nothing is run and nothing put in its place. ``--device cpu --size tiny`` runs the
same code on a model of toy size.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from apportion.recipes.bench import gpu_cells, gpu_run, gpu_step, gpu_table
from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.bench.field import hushed
from apportion.recipes.bench.gpu_cells import METHODS, Cell

SHARES = (0.001, 0.01, 0.05)
_KEPT = ("measured", "out of memory", "estimated")

RunCell = Callable[[Cell, str, Path], None]


def cells(size: str) -> list[Cell]:
    """All cells of the benchmark at ``size``: ``full``, or ``tiny``."""
    shape, length = ("tiny", 32) if size == "tiny" else ("llama-2-7b", gpu_cells.LENGTH)
    batches = (1, 2) if size == "tiny" else (1, 8)
    found = [
        Cell(shape, method, share, batch, length, checkpointing)
        for batch, checkpointing in product(batches, (True, False))
        for method in METHODS
        for share in (SHARES if method in ("id3", "lift") else (0.0,))
    ]
    if size == "tiny":
        return [*found, Cell("tiny", "lift", 0.01, 1, length, True, only_estimate=True)]
    large = [Cell("llama-2-13b", method, 0.01, 1, length, True) for method in ("id3", "lift")]
    larger = [Cell("llama-2-70b", method, 0.01, 1, length, True, only_estimate=True) for method in ("id3", "lift")]
    return [*found, *large, *larger, Cell("llama-2-70b", "lisa-layers", 0.0, 1, length, True, only_estimate=True)]


def in_process(cell: Cell, device: str, out: Path) -> None:
    """Measures a cell in a process of its own; if that dies, its file says how."""
    size = "tiny" if cell.shape == "tiny" else "full"
    asked = ["--device", device, "--size", size, "--cell", cell.name, "--out", str(out)]
    command = [sys.executable, "-m", "apportion.recipes.bench.gpu", *asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no word"])[-1][:300]
        _write(
            out,
            cell,
            {
                **_settings(cell),
                "device": device,
                "outcome": "failed",
                "reason": f"ended with {done.returncode}: {last}",
            },
        )


def here(cell: Cell, device: str, out: Path) -> None:
    """Measures a cell in this process."""
    with hushed():
        _write(out, cell, gpu_run.row(cell, device))


def _settings(cell: Cell) -> dict[str, Any]:
    return {**vars(cell), "name": cell.name}


def _file(out: Path, cell: Cell) -> Path:
    return out / "gpu" / f"{cell.name}.json"


def _write(out: Path, cell: Cell, row: dict[str, Any]) -> None:
    _file(out, cell).parent.mkdir(parents=True, exist_ok=True)
    _file(out, cell).write_text(json.dumps(row, indent=2) + "\n")


def known(out: Path, cell: Cell, device: str) -> dict[str, Any] | None:
    """What an earlier run has found for ``cell`` on such a device, if it need not be run again."""
    if not _file(out, cell).is_file():
        return None
    row: dict[str, Any] = json.loads(_file(out, cell).read_text())
    return row if row["outcome"] in _KEPT and row["device"] == device else None


def gathered(asked: Sequence[Cell], device: str, out: Path, run: RunCell, again: bool) -> list[dict[str, Any]]:
    """A row for each cell, of this run or an earlier one."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(asked))
        for cell in asked:
            progress.update(task, description=cell.name)
            if again or known(out, cell, device) is None:
                run(cell, device, out)
            progress.advance(task)
    return [json.loads(_file(out, cell).read_text()) for cell in asked]


def main(arguments: Sequence[str] | None = None, run: RunCell = in_process) -> int:
    """Measures all cells, writes ``gpu.json``, and fails if a target is missed or a cell failed."""
    made = parser("gpu", __doc__)
    made.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="where the models are")
    made.add_argument("--size", default="full", choices=("full", "tiny"), help="of the models")
    made.add_argument("--cell", help="this cell alone, in this process")
    made.add_argument("--only", default="", help="cells whose names hold this")
    made.add_argument("--again", action="store_true", help="measure cells anew that were measured")
    options = made.parse_args(arguments)
    out: Path = options.out
    result: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if options.device == "cuda" and not torch.cuda.is_available():
        result |= {"run": False, "passed": None, "reason": "no CUDA device"}
        return _told(out, result)
    if options.device == "cpu" and options.size == "full":
        made.error("--device cpu takes --size tiny: models of this size are for a GPU")
    found = [cell for cell in cells(options.size) if options.only in cell.name]
    if options.cell:
        here(next(cell for cell in found if cell.name == options.cell), options.device, out)
        return 0
    cuda = options.device == "cuda"
    rows = gathered(found, options.device, out, run, options.again)
    small: dict[str, Any] = {} if cuda else {"shape": (64, 96), "turns": 2, "ways": ("eager", "fused"), "copied": 2**16}
    step = gpu_step.compared(options.device, **small)
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    result |= {"run": True, "device": device, "size": options.size, "cells": rows, "step": step}
    missed = False in gpu_table.targets(result).values()
    result["passed"] = not (missed or any(row["outcome"] == "failed" for row in rows))
    return _told(out, result)


def _told(out: Path, result: dict[str, Any]) -> int:
    write(out, "gpu", result, gpu_table.section(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
