"""Which optimizers can work on a changing list of parameters; the others are refused with advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import SGD, Optimizer


def check(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers from which no parameter can be taken out and brought back.

    Raises:
        ValueError: If one keeps a list of its own, is fused SGD with momentum, or shares parameters with another.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "_params"):
            raise ValueError(
                f"`{type(optimizer).__name__}` keeps its own list of parameters from the start, so nothing can be "
                "taken out of it or brought back: use an optimizer with one state per parameter, such as AdamW, SGD, "
                "Adafactor or Muon."
            )
        if isinstance(optimizer, SGD) and any(g["fused"] and g["momentum"] for g in optimizer.param_groups):
            raise ValueError(
                "`SGD(fused=True)` with momentum cannot step parameters that come back together with those that "
                "stayed: use `foreach=True`, or leave `fused` out."
            )
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    if len(held) > len(set(held)):
        raise ValueError(
            f"{len(held) - len(set(held))} parameters are held by more than one optimizer, each with state of its own "
            "for them: give every parameter to one optimizer."
        )


def check_state(optimizers: Sequence[Optimizer], policy: str) -> None:
    """Refuses to drop the state of optimizers that make it only once.

    Args:
        optimizers: The optimizers, before their first step.
        policy: ``drop``, ``keep`` or ``offload``.

    Raises:
        ValueError: If state would be dropped that is never made again.
    """
    for optimizer in optimizers:
        if policy == "drop" and any(_made_at_construction(state) for state in optimizer.state.values()):
            raise ValueError(
                f"`{type(optimizer).__name__}` makes its state once, at construction, so it cannot be dropped: use "
                "`Freeze(state='keep' or 'offload')`, or an optimizer such as AdamW."
            )


def _made_at_construction(state: dict[str, Any]) -> bool:
    return "step" in state and float(state["step"]) == 0.0
