"""Finds transformers' Trainer at work over a selection whose gradients its clipping does not reach.

It clips ``model.parameters()`` by default, in a file that is not its user's, so that nothing tells of it where the
optimizer is made. It is seen at the first step, on the stack.
"""

from __future__ import annotations

import warnings
from types import FrameType
from typing import Any


def in_stack(frame: FrameType | None, label: str) -> None:
    """Warns if a transformers Trainer that clips gradients is among the callers.

    Args:
        frame: Of the code that steps the optimizer.
        label: The selection.
    """
    while frame is not None:
        # Only there: to read a frame's variables keeps them alive as long as the frame, in Pythons before 3.13.
        inside = str(frame.f_globals.get("__name__")).startswith("transformers.")
        trainer = frame.f_locals.get("self") if inside else None
        if _is_trainer(trainer):
            limit = getattr(getattr(trainer, "args", None), "max_grad_norm", None) or 0.0
            if limit > 0.0 and not _clips_itself(trainer):
                warnings.warn(
                    f"`{type(trainer).__name__}` of transformers clips the gradients of `model.parameters()` at "
                    f"`max_grad_norm={limit}`, of which `{label}` has moved those of what it selects to the optimizer: "
                    "nothing of them would be clipped. Pass `TrainingArguments(max_grad_norm=0.0)`, and clip the "
                    "parameters in `optimizer.param_groups` in `on_pre_optimizer_step` of a `TrainerCallback`.",
                    stacklevel=2,
                )
            return
        frame = frame.f_back


def _is_trainer(thing: Any) -> bool:
    """Told by name, as transformers need not be installed."""
    return any(k.__name__ == "Trainer" and k.__module__.startswith("transformers.") for k in type(thing).__mro__)


def _clips_itself(trainer: Any) -> bool:
    """Whether a subclass clips in its own way."""
    method = getattr(type(trainer), "_clip_grad_norm", None)
    return method is not None and not str(method.__module__).startswith("transformers.")
