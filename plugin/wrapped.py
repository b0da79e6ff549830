"""What stands around an optimizer or a model and would keep a selection from it: found, and refused with advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from apportion.classes import kinds

_VIEWS = ("Selective", "LightningOptimizer")
"""Wrappers that have no state or param groups of their own."""

_ADVICE = {
    "AcceleratedOptimizer": "Wrap the other way round, `accelerator.prepare(model, Selective({inner}, ...))`.",
    "_FabricOptimizer": "Wrap the other way round, `fabric.setup(model, Selective({inner}, ...))`.",
    "Selective": "Put a second `Selective` around the same `{inner}`, or make both selections callbacks.",
    "ZeroRedundancyOptimizer": "Give the `{inner}` itself, on every process: its state is that of what is selected.",
}

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def inner(optimizer: Optimizer) -> Optimizer | None:
    """The first optimizer that ``optimizer`` holds, by itself or in a list or dictionary; None if it holds none.

    Args:
        optimizer: Any torch optimizer.

    Example:
        >>> from torch.optim import SGD
        >>> inner(SGD(nn.Linear(2, 2).parameters())) is None
        True
    """
    held = (o for value in vars(optimizer).values() for o in _optimizers(value))
    return next((o for o in held if o is not optimizer), None)


def _optimizers(value: Any) -> Iterator[Optimizer]:
    if isinstance(value, (list, tuple)):
        values = value
    else:
        values = list(value.values()) if isinstance(value, Mapping) else [value]
    yield from (v for v in values if isinstance(v, Optimizer))


def check_optimizer(optimizer: Optimizer, views: bool = True) -> None:
    """Refuses an optimizer that steps another one, whose state and param groups a selection would not reach.

    Args:
        optimizer: The optimizer.
        views: Whether `Selective` and Lightning's wrapper pass, which show the state of the one inside as theirs.

    Raises:
        ValueError: If it holds another optimizer.
    """
    found = inner(optimizer)
    names = kinds(optimizer)
    if found is None or (views and names & set(_VIEWS)):
        return
    name = type(found).__name__
    advice = next((text for kind, text in _ADVICE.items() if kind in names), "Give the `{inner}` itself.")
    raise ValueError(
        f"`{type(optimizer).__name__}` steps another optimizer that it holds, `{name}`: what a selection takes out of "
        "the param groups, and the state that it drops, moves or keeps, would not be those of the step. "
        + advice.format(inner=name)
    )


def check_model(model: nn.Module, label: str) -> None:
    """Refuses a model in the hands of a wrapper that fixes what trains.

    Args:
        model: The model that `Selective` is given.
        label: The selection.

    Raises:
        ValueError: If it is or holds a DistributedDataParallel that waits for the gradients of all parameters, or is
            sharded.
    """
    for module in model.modules():
        names = kinds(module)
        if names & set(_SHARDED):
            raise ValueError(
                f"`Selective(..., model)` of `{label}` was given a model whose parameters FSDP has sharded or packed "
                "into flat tensors, which cannot be selected from: use the bare module, of which memory follows the "
                "selection. `Selective` averages gradients over the processes."
            )
        if "DistributedDataParallel" not in names:
            continue
        if getattr(module, "static_graph", False) or not getattr(module, "find_unused_parameters", False):
            raise ValueError(
                f"`Selective(..., model)` of `{label}` was given a `DistributedDataParallel`, which waits for "
                "gradients of what is not selected, too. `Selective` averages gradients over the processes itself: "
                "give it the bare module, `model.module`, and call that in the loop; or wrap by "
                "`DistributedDataParallel(..., find_unused_parameters=True)`, without `static_graph`, which sends the "
                "gradients of the whole model."
            )
