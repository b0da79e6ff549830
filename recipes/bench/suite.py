"""Runs the benchmark and writes its figures: ``python -m apportion.recipes.bench [--device cuda] [--only peers,ddp]``.

Every part is a program of its own, ``python -m apportion.recipes.bench.<part>``, with a JSON file in results/. One that
fails is reported with the last thing it said, and the others run all the same. From all files that are there comes one
page, results/bench.md; with ``--device cuda`` all of it is in results/cuda. Times are shares within one run, medians of
several; memory is counted in bytes and is the same in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from apportion.recipes.bench.table import page

ON_CPU = ("memory", "overhead", "entries", "ranks", "scale", "peers", "ddp", "resume")
ON_CUDA = ("gpu", "ddp", "ranks")
PARTS = (*ON_CPU, "gpu")
_AWARE = ("gpu", "ddp", "ranks")  # take --device
NO_DEVICE = "no CUDA device"

Run = Callable[[str, list[str]], tuple[int, str]]


def in_process(part: str, arguments: list[str]) -> tuple[int, str]:
    """Runs a part in a process of its own: its exit status, and all that it said."""
    command = [sys.executable, "-m", f"apportion.recipes.bench.{part}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def measured(part: str, device: str, out: Path, run: Run) -> dict[str, Any]:
    """What became of a part: ``passed``, ``MISSED`` (a bar), ``failed`` or ``not run``, why, and its seconds."""
    if part == "gpu" and device != "cuda":
        return {"outcome": "not run", "reason": "asked for with --device cuda", "seconds": 0}
    if device == "cuda" and not torch.cuda.is_available():
        return {"outcome": "not run", "reason": NO_DEVICE, "seconds": 0}
    written = out / f"{part}.json"
    written.unlink(missing_ok=True)  # figures of another run are not those of this one
    began = time.monotonic()
    status, said = run(part, ["--out", str(out), *(["--device", device] if part in _AWARE else [])])
    seconds = round(time.monotonic() - began)
    if not written.is_file():
        last = (said.strip().splitlines() or [f"ended with {status}"])[-1]
        return {"outcome": "failed", "reason": last[:300], "seconds": seconds}
    passed = json.loads(written.read_text()).get("passed")
    missed = False in passed.values() if isinstance(passed, dict) else passed is False
    return {"outcome": "MISSED" if missed or status else "passed", "reason": "", "seconds": seconds}


def machine() -> str:
    """Cores, memory and devices."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores ({platform.machine()}), {gib:.0f} GiB, {', '.join(gpus) or 'no GPU'}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m apportion.recipes.bench", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what is measured")
    made.add_argument("--only", default="", help=f"parts to run, with commas: {', '.join(PARTS)}")
    made.add_argument("--out", type=Path, help="folder for figures and page: results, or results/cuda")
    return made


def main(arguments: Sequence[str] | None = None, run: Run = in_process) -> int:
    """Runs the parts, writes ``bench.json`` and ``bench.md``; 1 if a bar is missed or a part fails.

    Args:
        arguments: Command line; parts that are not asked for keep what an earlier run has found.
        run: Runs a part, for tests.
    """
    options = parser().parse_args(arguments)
    asked = [name.strip() for name in options.only.split(",") if name.strip()]
    wrong = [name for name in asked if name not in PARTS]
    if wrong:
        parser().error(f"--only {wrong[0]}: there is no such part; there are {', '.join(PARTS)}")
    parts = asked or list(ON_CUDA if options.device == "cuda" else PARTS)
    out: Path = options.out or Path("results", *(["cuda"] if options.device == "cuda" else []))
    out.mkdir(parents=True, exist_ok=True)
    known = _before(out)
    given = sys.argv[1:] if arguments is None else arguments
    suite: dict[str, Any] = {
        "command": " ".join(["python -m apportion.recipes.bench", *given]),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parts": known,
    }
    bar = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*bar, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(parts))
        for part in parts:
            progress.update(task, description=part)
            found = measured(part, options.device, out, run)
            known[part] = found
            (out / "bench.json").write_text(json.dumps(suite, indent=2) + "\n")
            progress.advance(task)
            why = f": {found['reason']}" if found["reason"] else ""
            progress.console.print(f"{part}: {found['outcome']}{why} ({found['seconds']} s)", highlight=False)
    (out / "bench.md").write_text(page(out))
    Console().print(f"{out / 'bench.md'}", highlight=False)
    return 1 if any(known[part]["outcome"] in ("MISSED", "failed") for part in parts) else 0


def _before(out: Path) -> dict[str, Any]:
    path = out / "bench.json"
    parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.is_file() else {}
    return {name: parts[name] for name in PARTS if name in parts}
