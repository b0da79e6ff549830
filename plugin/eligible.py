"""Which optimizers can work on a changing list of parameters; the others are refused with advice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from apportion import wrapped


def check(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers from which no parameter can be taken out and brought back.

    Raises:
        ValueError: If one steps another that it holds, keeps a list of its own, is fused SGD with momentum, or shares
            parameters with another.
    """
    for optimizer in optimizers:
        wrapped.check_optimizer(optimizer)
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
                "`Freeze(state='keep' or 'offload')` if whole layers are selected, or an optimizer such as AdamW."
            )


def _made_at_construction(state: dict[str, Any]) -> bool:
    return "step" in state and float(state["step"]) == 0.0


def check_entries(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that treat the entries of a matrix otherwise than the same entries as a vector.

    Each is tried on an 8 x 8 matrix of which half the entries have a gradient, and on those entries by themselves:
    after three steps both must have moved, and be equal, bit for bit.

    Raises:
        ValueError: If one fails, moves nothing, or its values differ.
    """
    for optimizer in optimizers:
        wrapped.check_optimizer(optimizer, views=False)  # a trial of a copy would step the one inside, which is no copy
        for group in optimizer.param_groups:
            if not group["params"]:
                continue
            device = group["params"][0].device
            try:
                start, whole, alone, index = _tried(optimizer, group, device)
            except Exception as error:
                raise ValueError(
                    f"`{type(optimizer).__name__}` does not step a vector of entries ({error}), so it cannot train "
                    "single entries of matrices: use an elementwise optimizer such as AdamW or SGD."
                ) from error
            if torch.equal(whole.detach().view(-1), start):
                raise ValueError(
                    f"`{type(optimizer).__name__}` does not move what stands in its param groups (three steps on a "
                    "matrix with gradients changed nothing): it steps a list of its own, so what is selected would not "
                    "train. Use an optimizer that steps its param groups, such as AdamW or SGD."
                )
            if not torch.equal(whole.detach().view(-1)[index], alone.detach()):
                raise ValueError(
                    f"`{type(optimizer).__name__}` gives single entries of a matrix other values when they stand by "
                    "themselves: it is not elementwise (it factors, orthogonalizes or normalizes whole tensors). Use "
                    "an elementwise optimizer such as AdamW or SGD, or select whole layers or matrices."
                )


def _tried(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix before (flat) and after three steps of a copy of ``optimizer``, its chosen entries after the same, and
    their indices.
    """
    size = 64  # half of it fills vector registers: fused kernels on a CPU may round what is left over otherwise
    index = torch.arange(size, device=device).view(-1, 4)[:, [0, 3]].flatten()
    values = torch.linspace(-2.0, 3.0, size, device=device).sin()
    whole = nn.Parameter(values.view(8, 8).clone())
    alone = nn.Parameter(values[index].clone())
    for p, chosen in ((whole, None), (alone, index)):
        trial = _copied(optimizer, {**group, **_visible(group), "params": [p]})
        for step in range(3):
            grad = torch.linspace(1.0, -1.5, size, device=device).add(0.3 * step).cos().pow(3)
            mask = torch.zeros_like(grad)
            mask[index] = 1.0
            p.grad = (grad * mask).view(8, 8) if chosen is None else grad[chosen]
            trial.step()
    return values, whole, alone, index


def _visible(group: dict[str, Any]) -> dict[str, Any]:
    """A learning rate that moves values: under a schedule that warms up it is zero before the first step."""
    rate = group.get("lr")
    if rate is None:
        return {}
    return {"lr": torch.full_like(rate, 1e-2) if isinstance(rate, Tensor) else 1e-2}


def _copied(optimizer: Optimizer, group: dict[str, Any]) -> Optimizer:
    """An optimizer of the same kind and settings over one group, without the hooks of the original.

    Schedulers wrap `step` of one optimizer for good: the copy has to have its class's own.
    """
    trial = copy(optimizer)
    trial.__dict__ = {k: v for k, v in vars(optimizer).items() if not k.startswith("_apportion") and k != "step"}
    trial.param_groups, trial.state = [copy(group)], defaultdict(dict)
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(trial, hooks, type(getattr(optimizer, hooks))())
    return trial
