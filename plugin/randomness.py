"""Random number states of this process, as plain data that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """States of the Python, NumPy, PyTorch and CUDA generators, loadable with ``weights_only=True``."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore(states: dict[str, Any]) -> None:
    """Puts back what `capture` returned; CUDA generators that are not there are left out."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(
        states.get("cuda", [])[: torch.cuda.device_count() if torch.cuda.is_available() else 0]
    ):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs a block with the global generators seeded, and puts their states back.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(())
        >>> with seeded(3):
        ...     second = torch.rand(())
        >>> bool(first == second)
        True
    """
    states = capture()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        restore(states)
