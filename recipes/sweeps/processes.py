"""What the processes of one run must agree on before they train."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from apportion import sync
from apportion.recipes.sweeps.identity import identity
from apportion.recipes.sweeps.objective import directed


def guard(trainer: pl.Trainer, objective: str, cfg: DictConfig) -> None:
    """Makes sure that all processes of a run train the same config, and that a sweeper wants the best of it.

    Args:
        trainer: The Trainer of the run; it gets a `SameConfig`.
        objective: The metric that the run returns.
        cfg: The composed config.

    Raises:
        ValueError: If a sweeper would look for the worst objective, or if Lightning would start the other processes of
            a sweep's job: it repeats the command line, so that each of them would run the whole sweep, with trials of
            its own where a sweeper draws them.
    """
    swept = HydraConfig.get().mode == RunMode.MULTIRUN
    if swept:
        directed(HydraConfig.get().sweeper, objective)
    launcher = trainer.strategy.launcher
    starts = type(launcher).__name__ == "_SubprocessScriptLauncher" and getattr(launcher, "num_processes", 1) > 1
    outside = starts and launcher.cluster_environment.creates_processes_externally  # type: ignore[union-attr]
    if swept and starts and not outside:
        raise ValueError(
            f"`trainer.devices={trainer.num_devices}` under `-m`: Lightning starts the other processes with the "
            "command line of this one, and each would run a sweep of its own. Start one job per group of processes: "
            "`torchrun --nproc-per-node N -m apportion.recipes.train -m ...` runs all ranks side by side through the "
            "sweep, `launch=slurm` gives every job tasks of its own; or use `trainer.devices=1`."
        )
    trainer.callbacks.insert(0, SameConfig(identity(cfg), HydraConfig.get().overrides.task))  # type: ignore[attr-defined]


class SameConfig(pl.Callback):
    """Compares the config of all ranks before the first step.

    Args:
        job: Identity of the config.
        overrides: What this process was asked for, for the error.

    Raises:
        RuntimeError: In ``setup``, on every rank, if any two ranks differ.
    """

    def __init__(self, job: str, overrides: Any) -> None:
        self.job, self.overrides = job, [str(override) for override in overrides]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compares."""
        sync.agree(f"the config (here the overrides are {' '.join(self.overrides) or 'none'})", self.job)
