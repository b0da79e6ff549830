"""Jobs of a sweep: each has a folder named after its config, is done once, and goes on where it was stopped.

The folder of a job under ``-m`` is its identity, a hash of its resolved config, so that a sweep that is launched again
into the same ``hydra.sweep.dir`` finds what it has done already, also after seeds or methods were added to it, and an
edited config has a folder of its own. ``job.json`` marks a folder as begun, with the data files that were there then;
``metrics.json`` as done; ``failure.json`` holds the error of a job that failed.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from apportion.recipes.sweeps.identity import identity
from apportion.recipes.sweeps.inputs import changed, inputs
from apportion.recipes.sweeps.objective import directed, settled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """How far the job of a folder has come.

    Attributes:
        done: Whether it wrote its results.
        objective: What it returned, NaN if that was no finite number; of a job that is done.
        checkpoint: Where it goes on, if it was begun and left a whole checkpoint.
    """

    done: bool = False
    objective: float = math.nan
    checkpoint: Path | None = None


def standing(
    folder: Path, job: str, checkpoints: Path | None = None, data: Mapping[str, str] | None = None
) -> Standing:
    """Reads how far a job has come.

    Args:
        folder: The run folder.
        job: Identity of the job that is about to run there.
        checkpoints: Where it keeps its checkpoints; None if it keeps none.
        data: The data files of the job, by `inputs.inputs`; None to take them as they are.

    Raises:
        ValueError: If the folder belongs to another job, or to the same job with other data.
    """
    told = read(folder / "job.json")
    begun = told.get("job")
    if begun is None:
        return Standing()
    if begun != job:
        raise ValueError(
            f"{folder} holds the results of a job with another config: `hydra.sweep.subdir` gives two jobs of "
            f"`hydra.sweep.dir={folder.parent}` one folder. Leave `hydra.sweep.subdir` alone, so that every config has "
            "a folder of its own, or give another `hydra.sweep.dir`."
        )
    if new := changed(told.get("data", {}), data or {}) if "data" in told else []:
        raise ValueError(
            f"{folder} was begun with other data: {', '.join(new)} is not what it was then. Put the data back, give "
            "another `hydra.sweep.dir`, or delete the folder to run its job anew."
        )
    results = read(folder / "metrics.json")
    if "objective" in results:
        objective = results["objective"]
        return Standing(True, math.nan if objective is None else float(objective))
    last = checkpoints / "last.ckpt" if checkpoints else None
    return Standing(checkpoint=last if last and zipfile.is_zipfile(last) else None)  # one cut short is none


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, or none that is whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def run(train: Callable[[DictConfig], float], cfg: DictConfig) -> float:
    """Runs one job, unless it is done already.

    Args:
        train: From the config to the objective; it writes ``metrics.json`` last.
        cfg: The composed config. Under ``-m``, ``on_failure`` says whether an error ends the job (``raise``) or becomes
            the worst objective (``continue``).

    Returns:
        The objective. A sweeper with a direction gets the worst infinity in the place of NaN, which Optuna refuses.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode != RunMode.MULTIRUN:
        with told(folder):
            return train(cfg)
    direction = directed(hydra.sweeper, cfg.get("objective") or "")
    go_on = persistent(cfg.get("on_failure", "raise"))
    job, data = identity(cfg), inputs(cfg)
    with claimed(folder):
        found = standing(folder, job, _checkpoints(cfg), data)
        if found.done:
            log.info("%s is done already: the objective is %s", folder, found.objective)
            return settled(found.objective, direction)
        begin(folder, job, data)
        if found.checkpoint is not None:
            log.info("%s goes on from %s", folder, found.checkpoint)
            cfg.ckpt_path = str(found.checkpoint)
            keep_logs(folder)
        try:
            with told(folder):
                return settled(train(cfg), direction)
        except Exception:
            if not go_on:
                raise
            log.exception("%s failed, and the sweep goes on", folder)
            return settled(math.nan, direction)


def _checkpoints(cfg: DictConfig) -> Path | None:
    folder = OmegaConf.select(cfg, "checkpoint.dirpath")
    return Path(folder) if folder else None


def persistent(on_failure: Any) -> bool:
    """Whether a sweep gets an objective from a job that failed.

    Raises:
        ValueError: If ``on_failure`` is neither ``raise`` nor ``continue``.
    """
    if on_failure not in ("raise", "continue"):
        raise ValueError(f"`on_failure={on_failure}` must be `raise` or `continue`.")
    return bool(on_failure == "continue")


def _writes() -> bool:
    """Whether this process is the first rank, which writes for all."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def begin(folder: Path, job: str, data: Mapping[str, str]) -> None:
    """Marks a folder as that of ``job`` on ``data``, without an error of an earlier attempt."""
    if _writes():
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "job.json.new"
        whole.write_text(json.dumps({"job": job, "data": dict(data)}) + "\n", encoding="utf-8")
        whole.replace(folder / "job.json")
        (folder / "failure.json").unlink(missing_ok=True)


def keep_logs(folder: Path) -> None:
    """Puts aside the folder in which a CSV logger has written so far: it would start its file again."""
    if _writes():
        for place in {file.parent for file in folder.rglob("metrics.csv")} - {folder}:
            if not place.suffix:
                place.rename(place.with_name(f"{place.name}.{len(list(place.parent.glob(f'{place.name}.*')))}"))


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Writes an error that passes through to ``failure.json``, which there is only after an error."""
    try:
        yield
        if _writes():
            (folder / "failure.json").unlink(missing_ok=True)
    except Exception as error:
        if _writes():
            said = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "failure.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        raise


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps a second process from running the same job: it waits, and then finds it done.

    Sweepers ask for one config more than once. The claim ends with the process that holds it, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if not _writes():  # the ranks of a job share its folder
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s is being run by another process: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s): two processes could run it at once", folder, error)
        yield
