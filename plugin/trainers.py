"""What a Trainer tells of its run before a selection goes to work on it."""

from __future__ import annotations

from typing import Any

from apportion import checks
from apportion.classes import kinds
from apportion.owner import Owner
from apportion.selection import Selection


def wraps(trainer: Any) -> bool:
    """Whether DistributedDataParallel wraps the module, as it does with one process, too."""
    return "DDPStrategy" in kinds(trainer.strategy)


def length(trainer: Any) -> int | None:
    """Optimizer steps of the whole run, or None if it has no such end."""
    steps = trainer.estimated_stepping_batches
    if steps in (float("inf"), -1):
        return None
    several = 1 if trainer.lightning_module.automatic_optimization else max(1, len(trainer.optimizers))
    # Lightning counts the steps of each optimizer towards `max_steps`, but a selection those of all of them as one.
    return int(steps) if trainer.max_steps == -1 else min(int(steps), trainer.max_steps // several)


def finders(trainer: Any, selection: Selection, probes: bool, kind: type) -> None:
    """Sees to it that finders of learning rate or batch size, which train in their `on_fit_start`, meet a selection.

    Args:
        trainer: The Trainer; where it has finders, callbacks of our kind are put before all others.
        selection: The selection.
        probes: Whether it has batches to probe with.
        kind: The class of our callbacks.

    Raises:
        ValueError: If a finder would train before there is a selection.
    """
    found = checks.finders(trainer)
    if not found:
        return
    ours = [c for c in trainer.callbacks if isinstance(c, kind)]
    trainer.callbacks = ours + [c for c in trainer.callbacks if c not in ours]
    if selection.count:
        return
    label, finder = selection.label, type(found[0]).__name__
    if "grad" in selection.slots.score.needs:
        raise ValueError(
            f"`{label}` makes its first selection from the gradients of the first step, but `{finder}` trains before "
            "that, and would train nothing of it: leave it out."
        )
    if selection.needs_probe and not probes:
        raise ValueError(
            f"`{label}` probes the first training batch to make its first selection, but `{finder}` trains before "
            "that, and would train everything: give `probe_data`."
        )


def same_optimizers(trainer: Any, owner: Owner, label: str) -> None:
    """Refuses optimizers that were built in the middle of a fit: they hold parameters, and not what is selected.

    Raises:
        RuntimeError: If the Trainer's optimizers are not the owner's.
    """
    if trainer.optimizers != owner.optimizers:
        raise RuntimeError(
            f"`{label}` selects what the optimizers train that the fit began with, and the Trainer has others now "
            f"({len(trainer.optimizers)}): what is selected would stop moving. Do not call `strategy.setup_optimizers` "
            "or replace `trainer.optimizers` during a fit: change the param groups, clear `optimizer.state`, or start "
            "another `fit`."
        )
