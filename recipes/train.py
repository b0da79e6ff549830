"""``apportion-train``: fine-tunes one transformers model as its Hydra config says.

The run folder keeps ``.hydra/config.yaml``, ``metrics.json``, one ``history/<callback>.json`` per selection, the
logger's files and ``checkpoints/``. The return value is the objective of a sweep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from apportion.recipes.sweeps import sweep
from apportion.recipes.sweeps.clock import Clock
from apportion.recipes.sweeps.processes import guard
from apportion.recipes.tasks.smoke import smoke


def train(cfg: DictConfig) -> float:
    """Trains, validates and tests once, and writes what came out into the run folder.

    Args:
        cfg: The composed config of ``conf/train.yaml``.

    Returns:
        The metric named by ``cfg.objective``, or the model's own.

    Raises:
        ValueError: If a callback's config has no ``_target_``, or the objective was not logged.
    """
    cfg = smoke(cfg) if cfg.get("smoke") else cfg
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    folder = Path(HydraConfig.get().runtime.output_dir)
    data = instantiate(cfg.data, _convert_="all")
    module = instantiate(cfg.model, _convert_="all")
    callbacks = pieces(cfg.get("callbacks"), "callbacks")
    saver = pieces({"checkpoint": cfg.checkpoint} if cfg.get("checkpoint") else None, "checkpoint")
    loggers = pieces(cfg.get("logger"), "logger")
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*callbacks.values(), *saver.values()],
        logger=list(loggers.values()) or False,
        enable_checkpointing=bool(saver),
        _convert_="all",
    )
    named = cfg.objective or module.objective
    guard(trainer, named, cfg)
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    clock = Clock()
    trainer.callbacks += [clock, Logged(named)]  # type: ignore[attr-defined]
    clock.start()
    trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path)
    clock.stop()
    metrics = evaluate(trainer, module, data, cfg.test)
    if trainer.is_global_zero:
        for name, callback in callbacks.items():
            save_history(folder / "history" / f"{name}.json", callback)
        # Last: a sweep takes the job for done as soon as this file is whole, and has its objective.
        about = {"recipe": cfg.get("recipe"), "smoke": bool(cfg.get("smoke"))}
        reached = {"objective": metrics[named]} if named in metrics else {}
        write(
            folder / "metrics.json", {"metrics": metrics, **reached, **about, **facts(trainer, module, clock.seconds)}
        )
        show(metrics, folder)
    return score(metrics, named)


def evaluate(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, test: bool
) -> dict[str, float]:
    """Metrics of the weights of the last step: the fit may have ended between two validations."""
    metrics = dict(trainer.callback_metrics)
    trainer.validate(module, datamodule=data, verbose=False)
    metrics |= trainer.callback_metrics
    if test:
        trainer.test(module, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
    return {name: value.item() for name, value in metrics.items()}


def pieces(config: Mapping[str, Any] | None, group: str) -> dict[str, Any]:
    """Makes every entry of a group of callbacks or loggers; entries set to null are left out.

    Args:
        config: Names to configs with a ``_target_``.
        group: Name of the group, for the error.

    Raises:
        ValueError: If an entry has no ``_target_``.
    """
    made: dict[str, Any] = {}
    for name, entry in (config or {}).items():
        if entry is None:
            continue
        if not isinstance(entry, Mapping | DictConfig) or "_target_" not in entry:
            raise ValueError(
                f"`{group}.{name}` has no `_target_`: a file of the group `{group}` holds one top key with a node "
                "under it, such as `lisa: {_target_: apportion.callbacks.LISA}`."
            )
        made[name] = instantiate(entry, _convert_="all")
    return made


def score(metrics: Mapping[str, Any], objective: str) -> float:
    """The objective among the metrics.

    Raises:
        ValueError: If no such metric was logged.
    """
    if objective not in metrics:
        raise ValueError(f"`objective={objective}` was not logged; choose one of {sorted(metrics)}.")
    return float(metrics[objective])


class Logged(pl.Callback):
    """Ends a run whose objective is none of what validation logs, at the first validation.

    Args:
        objective: The metric that the run is to return; one that only the test logs is not known before.
    """

    def __init__(self, objective: str) -> None:
        self.objective = objective

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks for it; the check before the first step is a validation too."""
        if self.objective.startswith("val/") and trainer.state.fn == "fit":
            score(trainer.callback_metrics, self.objective)


def facts(trainer: pl.Trainer, module: nn.Module, seconds: float) -> dict[str, Any]:
    """Counts and times that belong beside the metrics; ``seconds`` is all attempts of the fit with its validation."""
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(seconds, 3),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "trainable": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    }


def save_history(path: Path, callback: Any) -> None:
    """Writes which units were selected from which step on, for callbacks that select."""
    history = getattr(callback, "history", None)
    if history is None:
        return
    if hasattr(history, "counts"):  # of entries: how many of each tensor
        chosen = {"counts": history.counts.tolist(), "sizes": history.sizes.tolist()}
    else:
        chosen = {"masks": history.masks.int().tolist()}
    units = type(callback.slots.units).__name__.lower() if hasattr(callback, "slots") else None
    write(path, {"units": units, "names": list(history.names), "steps": list(history.steps), **chosen})


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that every reader accepts: what is not a finite number becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(metrics: Mapping[str, float], folder: Path) -> None:
    """Prints the metrics and the folder."""
    table = Table("metric", "value")
    for name in sorted(metrics):
        if name.endswith("/majority"):
            continue
        value, usual = f"{metrics[name]:.4g}", metrics.get(name.replace("/accuracy", "/majority"))
        told = f" (always the most frequent class: {usual:.4g})" if name.endswith("/accuracy") and usual else ""
        table.add_row(name, value + told)
    console = Console()
    console.print(table)
    console.print(f"run folder: {folder}", soft_wrap=True)


def job(cfg: DictConfig) -> float:
    """`train` as a job of a sweep, which is done once and goes on where it was stopped."""
    return sweep.run(train, cfg)


def _since_1_4() -> bool:
    major, minor = hydra.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (1, 4)


# Hydra 1.4 warns when a version base is given; 1.3 changes the working directory when none is.
main = hydra.main(
    config_path="pkg://apportion.conf", config_name="train", **({} if _since_1_4() else {"version_base": "1.3"})
)(job)


if __name__ == "__main__":
    main()
