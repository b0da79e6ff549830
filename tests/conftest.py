"""What all tests share: no network, one thread, seeded random numbers, quiet Trainers."""

from __future__ import annotations

import os

# Before anything imports transformers or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import logging
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import pytorch_lightning as pl
import torch

torch.set_num_threads(1)
# A busy machine must not fail a test: no deadline. The same examples in every run, so that a failure can be repeated.
hypothesis.settings.register_profile("apportion", deadline=None, derandomize=True)
hypothesis.settings.load_profile("apportion")
for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)

_connect = socket.socket.connect


def _connect_here(self: socket.socket, address: Any) -> None:
    """Connects to this machine only."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"a test asked for {address}: tests run without a network")
    _connect(self, address)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fails a test that reaches for another machine."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _connect_here)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """No process group of this process, which Lightning leaves behind, is there in the next test."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Makes CPU Trainers that draw no bars and write nothing unless told to."""

    def make(**kwargs: Any) -> pl.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**(quiet | kwargs))

    return make
