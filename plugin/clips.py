"""Finds code that clips over a model's own parameters, where others step in their place: nothing would be clipped.

Selected entries and full-precision masters have the gradients; the parameters that they stand for have none. Clipping
by the Trainer, or over ``optimizer.param_groups``, reaches them.
"""

from __future__ import annotations

import inspect
import linecache
import re
import warnings
from types import FrameType
from typing import Any

_WHOLE = re.compile(r"^[^#\n]*clip_grad_(?:norm|value)_\([^()]*(?:\([^()]*)?\b(?:named_)?parameters\(", re.MULTILINE)
_HOOKS = ("training_step", "on_before_optimizer_step", "on_after_backward", "configure_gradient_clipping")


def in_module(module: Any, label: str) -> None:
    """Warns if a LightningModule clips the gradients of ``parameters()`` in one of its hooks.

    Args:
        module: The module.
        label: The selection.
    """
    for name in _HOOKS:
        try:
            source = inspect.getsource(getattr(type(module), name))
        except (AttributeError, OSError, TypeError):
            continue
        if _WHOLE.search(source):
            _warn(
                f"`{type(module).__name__}.{name}` clips",
                label,
                "the Trainer's `gradient_clip_val`, `self.clip_gradients(optimizer, ...)`, or the parameters in "
                "`optimizer.param_groups`",
            )


def in_loop(frame: FrameType, label: str) -> None:
    """Warns if the file (or notebook cell) that makes the optimizer clips the gradients of ``parameters()``.

    Args:
        frame: Of the code that makes it.
        label: The selection.
    """
    source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    found = _WHOLE.search(source)
    if found is not None:
        line = source.count("\n", 0, found.start()) + 1
        _warn(
            f"{frame.f_code.co_filename}, line {line}, clips",
            label,
            "`clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], ...)`, if that is this "
            "model",
        )


def _warn(who: str, label: str, way_out: str) -> None:
    warnings.warn(
        f"{who} the gradients of `parameters()`, of which `{label}` has moved those of what it selects to the "
        f"optimizer: nothing would be clipped. Use {way_out}.",
        stacklevel=4,
    )
