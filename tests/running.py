"""`apportion-train` in this process."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from apportion.recipes.train import train


def composed(*overrides: str) -> DictConfig:
    """The config of `apportion-train`, as the training script gets it."""
    with initialize_config_module("apportion.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def trained(folder: Path, *overrides: str) -> float:
    """Runs `train` into ``folder`` as the command line would."""
    with initialize_config_module("apportion.conf", version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, f"hydra.run.dir={folder}"], return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            cfg.pop("hydra")
        try:
            return train(cfg)
        finally:
            HydraConfig.instance().cfg = None
            GlobalHydra.instance().clear()
