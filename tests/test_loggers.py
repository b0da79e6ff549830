"""Loggers that a run can have: each writes its files into the run folder, and several do so at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from apportion.recipes.sweeps.runs import read
from apportion.recipes.train import train

SMALL = [
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "checkpoint=null",
]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Trains two steps in this process, and gives the run folder."""

    def go(*overrides: str) -> Path:
        with initialize_config_module("apportion.conf", version_base="1.3"):
            cfg = compose("train", overrides=[*SMALL, *overrides], return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(tmp_path)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            cfg.pop("hydra")
        train(cfg)
        return tmp_path

    yield go
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def test_the_default_is_a_csv_that_the_report_reads(run: Callable[..., Path]) -> None:
    curves = read(run(), "a").curves
    assert [step for step, _ in curves["train/loss"]] == [0, 1]
    assert "val/accuracy" in curves


def test_tensorboard_writes_its_events(run: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run("logger=tensorboard") / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]


def test_wandb_works_offline_beside_the_csv(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run("logger=[csv,wandb]", "logger.wandb.offline=true")
    wandb.finish()
    (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in written.read_bytes()
    assert "train/loss" in read(folder, "a").curves


def test_no_logger_writes_nothing(run: Callable[..., Path]) -> None:
    assert sorted(file.name for file in run("logger=none").iterdir()) == ["metrics.json"]
