"""``make demo``: eleven ways to fine-tune one small transformer on real data, offline, and what each of them costs.

A vision transformer that has only seen printed digits is fine-tuned on 181 handwritten ones and tested on 808 others,
by every method and seed in one Hydra multirun of ``apportion-train``. Table, pictures and page go to their own folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from apportion.recipes.presentation import present
from apportion.recipes.sweeps.runs import last_error

METHODS = ("full", "lora", "adalora", "random", "ist", "lisa", "hft", "badam", "entries", "id3", "lift")
"""The files of ``conf/experiment/demo``, in the order of the table."""


@dataclass(frozen=True)
class Run:
    """One run of the multirun: what was asked for and where it writes."""

    experiment: str
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it wrote its results."""
        return (self.folder / "metrics.json").is_file() and (self.folder / "measured.json").is_file()

    def reason(self) -> str:
        """Why it is not done: the last error in its log."""
        log = self.folder / "train.log"
        if not log.is_file():
            return "it was not started"
        return last_error(log) or "it stopped without an error"

    def read(self) -> dict[str, Any]:
        """Its results, as `apportion.comparison.summarise` takes them, with ``timeline`` and ``history``."""
        config = OmegaConf.load(self.folder / ".hydra" / "config.yaml")
        metrics = _load(self.folder / "metrics.json")
        histories = [_load(file) for file in sorted((self.folder / "history").glob("*.json"))]
        return {
            "method": config.method,
            "experiment": self.experiment,
            "seed": config.seed,
            "accuracy": metrics["metrics"]["test/accuracy"],
            "validation_accuracy": metrics["metrics"]["val/accuracy"],
            "steps": metrics["steps"],
            **_load(self.folder / "measured.json"),
            "history": histories[0] if histories else None,
        }


def _load(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def multirun(folder: Path, methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> list[Run]:
    """Runs all methods and seeds as one Hydra multirun in a process of its own, with a progress bar.

    Args:
        folder: Where the runs and their log go.
        methods: Names out of `METHODS`.
        seeds: Seeds of every method.
        overrides: Hydra overrides for all runs.

    Returns:
        The runs, done or not: one that fails does not stop the others.
    """
    pairs = [(method, seed) for method in methods for seed in seeds]
    runs = [Run(method, seed, folder / "runs" / str(job)) for job, (method, seed) in enumerate(pairs)]
    command = [
        *(sys.executable, "-m", "apportion.recipes.train", "--multirun"),
        "experiment=" + ",".join(f"demo/{method}" for method in methods),
        "seed=" + ",".join(map(str, seeds)),
        f"hydra.sweep.dir='{folder / 'runs'}'",
        "hydra.sweep.subdir=${hydra.job.num}",  # its folders are known before it starts
        "+hydra.callbacks.ends._target_=hydra.experimental.callbacks.LogJobReturnCallback",  # logs why a run failed
        *overrides,
    ]
    # The model is too small for a second thread to help, and two threads on a busy machine wait for each other.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    with (folder / "multirun.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            watch(child, runs)
        finally:
            child.terminate()
            child.wait()
    return runs


def watch(child: subprocess.Popen[bytes], runs: Sequence[Run]) -> None:
    """Shows a progress bar until ``child`` ends."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task("starting", total=len(runs))
        while child.poll() is None:
            begun = [run for run in runs if run.folder.exists()]
            if begun:
                last = begun[-1]
                progress.update(bar, completed=len(begun) - 1, description=f"{last.experiment}, seed {last.seed}")
            time.sleep(0.2)
        progress.update(bar, completed=sum(run.done for run in runs), description="trained")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m apportion.recipes.demo", description="Runs the demo.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="where its folder goes (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M", help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3), metavar="N", help="default: 1 2 3")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all runs after --: -- trainer.max_steps=100")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if every run succeeded, else 1."""
    options = parse(arguments)
    console = Console()
    folder = (options.out / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    folder.mkdir(parents=True)
    runs = multirun(folder, options.methods, options.seeds, options.overrides)
    done, failed = [run for run in runs if run.done], [run for run in runs if not run.done]
    if done:
        present([run.read() for run in done], options.overrides, folder, console)
        console.print(f"\npage, pictures, data and runs: {folder}", soft_wrap=True, highlight=False)
    if failed:
        log = folder / "multirun.log"
        said = [f"\n{len(failed)} of {len(runs)} runs failed; all output: {log}"]
        said += [f"{run.experiment}, seed {run.seed}: {run.reason()}" for run in failed]
        if not any(run.folder.exists() for run in runs):  # the command itself was refused
            said += log.read_text(encoding="utf-8").splitlines()[-12:]
        console.print("\n".join(said), style="bold red", soft_wrap=True, markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
