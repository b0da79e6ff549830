"""Does choosing beat chance? Every method beside random choice of the same unit, at equal budget, on real text.

    python -m apportion.recipes.evidence run    --grid encoder --data DATA     runs what is missing, cell by cell
    python -m apportion.recipes.evidence status --grid encoder                 what is there
    python -m apportion.recipes.evidence pretrain --data DATA                  makes the decoder, as `run` would
    python -m apportion.recipes.evidence tables                                makes all tables and pictures from cells
    python -m apportion.recipes.evidence cards                                 writes what they say into the cards

A run can be stopped and started again, on several cores with ``--workers``: a cell is one file, see `cells`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from apportion.recipes.evidence import cells as evidence_cells
from apportion.recipes.evidence.cells import Records
from apportion.recipes.evidence.methods import METHODS, Method

GRIDS = ("encoder", "decoder")
OUT = Path("results/evidence")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m apportion.recipes.evidence", description=(__doc__ or "").split("\n")[0]
    )
    made.add_argument("command", choices=("run", "status", "tables", "cards", "pretrain"))
    made.add_argument("--grid", choices=GRIDS, default="encoder", help="which model (default: %(default)s)")
    made.add_argument("--tasks", nargs="+", help="tasks, the most telling first (default: all of the grid)")
    made.add_argument("--methods", nargs="+", choices=[m.key for m in METHODS], help="methods (default: all)")
    made.add_argument(
        "--seeds", nargs="+", type=int, default=list(evidence_cells.SEEDS), help="seeds that are reported"
    )
    made.add_argument("--every-rate", action="store_true", help="run the seeds at every rate of the search")
    made.add_argument("--data", type=Path, help="folder that holds trec/, sst2/, rte/, mrpc/ and so on")
    made.add_argument(
        "--model", type=Path, help="folder of the model (default: the one that the grid fetches or makes)"
    )
    made.add_argument("--out", type=Path, default=OUT, help="folder of all results (default: %(default)s)")
    made.add_argument("--steps", type=int, help="optimizer steps of a run (default: the grid's)")
    made.add_argument("--workers", type=int, default=1, help="processes of one thread each (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=float("inf"), help="no cell is begun after that long")
    return made.parse_args(arguments)


def grid_of(options: argparse.Namespace) -> Any:
    """The grid that the command line names, with its model at hand."""
    if options.data is None:
        raise SystemExit("`run` needs `--data`: the folder that holds the public data sets.")
    steps = {"steps": options.steps} if options.steps else {}
    if options.grid == "encoder":
        from apportion.recipes.evidence.encoder import EncoderGrid
        from apportion.recipes.evidence.model import fetch

        return EncoderGrid(options.data, options.model or fetch(), **steps)
    from apportion.recipes.evidence.decoder import DecoderGrid
    from apportion.recipes.evidence.pretrain import pretrained

    return DecoderGrid(options.data, options.model or pretrained(options.data), **steps)


def methods_of(options: argparse.Namespace) -> list[Method]:
    """The methods that the command line names and that the grid can have."""
    named = options.methods or [m.key for m in METHODS]
    return [m for m in METHODS if m.key in named and options.grid in m.grids]


def work(grid: Any, records: Records, tasks: Sequence[str], methods: Sequence[Method], options: Any) -> int:
    """Runs cell after cell until none is left or the time is up; returns how many it ran."""
    from apportion.recipes.evidence.run import hashes, provenance, run

    ends = time.monotonic() + 60.0 * options.minutes
    console, done, busy = Console(soft_wrap=True), 0, set()
    about = {
        task: {**provenance(Path(__file__).resolve().parent), **hashes(grid, task), "facts": grid.facts(task)}
        for task in tasks
    }
    while time.monotonic() < ends:
        cells = evidence_cells.pending(records, grid.name, tasks, methods, options.seeds, options.every_rate)
        cell = next((c for c in cells if c not in busy), None)
        if cell is None:
            break
        with records.claim(cell) as ours:
            if not ours:  # another process has it in hand; what follows from it may be open later
                busy.add(cell)
                continue
            record = run(cell, grid, records, about[cell.task])
        busy, done = set(), done + 1
        told = record["error"] or {name: round(v, 4) for name, v in record["metrics"].items() if v is not None}
        console.print(f"{cell.file} {record['cpu_seconds']:.0f} s {told}", highlight=False, markup=False)
    return done


def spawn(arguments: Sequence[str], workers: int) -> int:
    """The same command in several processes of one thread; fails if one of them fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "apportion.recipes.evidence", *arguments, "--workers", "1"]
    children = [subprocess.Popen(command, env=environment) for _ in range(workers)]
    try:
        return max(child.wait() for child in children)
    finally:
        for child in children:
            child.terminate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a grid, tells what is there, or makes the tables."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    records = Records(options.out)
    if options.command == "tables":
        from apportion.recipes.evidence.page import publish

        publish(options.out)
        return 0
    if options.command == "cards":
        from apportion.recipes.evidence.cards import write

        write(records, Path("recipes"))
        return 0
    if options.command == "status":
        from apportion.recipes.evidence.tables import status

        Console(soft_wrap=True).print(status(options.out, options.grid))
        return 0
    if options.command == "pretrain":
        options.grid = "decoder"
    grid = grid_of(options)  # also fetches the model once, before several processes want it
    if options.command == "pretrain":
        return 0
    if options.workers > 1:
        return spawn(given, options.workers)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work(grid, records, options.tasks or list(grid.tasks), methods_of(options), options)
    return 0
