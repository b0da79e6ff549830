"""The settings that every method is held to, for layers and for entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.plugins import MixedPrecision
from toys import adamw, trainable


def two_optimizers(module: Any) -> list[torch.optim.Optimizer]:
    return [adamw(trainable(module)[::2]), adamw(trainable(module)[1::2])]


def overflow() -> MixedPrecision:
    """A real scaler whose first step overflows: the scale comes down to 2^8 in one go."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-112)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulation": lambda: {"accumulate_grad_batches": 3},
    "clip by norm": lambda: {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "clip by value": lambda: {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [overflow()]},
    "two groups": dict,
    "manual": dict,
    "two optimizers": dict,
}
