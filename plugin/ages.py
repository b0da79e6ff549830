"""Adam's bias correction by the age of each entry, where entries join in the middle of a run.

Adam divides its moments by 1 - b^t, with t the steps since the tensor's moments were zero. An entry that joins later
has moments that are zero then, so t is too large for it; a, the steps that it has taken itself, is right:

    w <- (1 - lr wd) w - lr (m / (1 - b1^a)) / (sqrt(v / (1 - b2^a)) + eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


def check(optimizers: list[Optimizer]) -> None:
    """Refuses optimizers without Adam's bias correction.

    Raises:
        ValueError: If one is neither Adam nor AdamW.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Adam):
            raise ValueError(
                f"`Compact(age='entry')` corrects Adam's bias by the steps of each entry, and "
                f"`{type(optimizer).__name__}` has none: use `torch.optim.AdamW` or `Adam`, or age='tensor'."
            )


def younger(age: Tensor, step: Tensor) -> Tensor:
    """Which entries have an age other than the tensor's number of steps: their places, int64.

    Each step adds one to both, so they stay the same until the selection changes: a device need not be asked again.

    Example:
        >>> younger(torch.tensor([3, 1, 3]), torch.tensor(3.0))
        tensor([1])
    """
    return (age != step.to(age.device)).nonzero().flatten()


@torch.no_grad()
def correct(
    w: Tensor, before: Tensor, age: Tensor, young: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """Redoes Adam's last step, in place, for the entries whose age is not the tensor's number of steps.

    Args:
        w: Values after the step, shape (k,).
        before: Values before it, shape (k,).
        age: Steps that each entry has taken, this one included, at least 1, shape (k,).
        young: Places of those entries, see `younger`.
        state: Adam's state of ``w`` after the step.
        group: Its param group.
    """
    if not len(young):
        return
    b1, b2 = group["betas"]
    a = age[young].to(torch.float64)
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    m = state["exp_avg"][young] / (1 - b1**a).to(w.dtype)
    v = second[young] / (1 - b2**a).to(w.dtype)
    # Adam adds the decay to the gradient, which is in its moments already; AdamW decays the value.
    decays = group.get("decoupled_weight_decay", type(group).__name__ == "AdamW")
    shrunk = before[young] * (1 - group["lr"] * group["weight_decay"]) if decays else before[young]
    w[young] = shrunk - group["lr"] * m / (v.sqrt() + group["eps"])
