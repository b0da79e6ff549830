"""A callback that stands behind ours and sees what really happens to every parameter at every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch
import pytorch_lightning
from toys import moved, named, weights


@dataclass
class Step:
    """One optimizer step as seen from outside.

    Attributes:
        counts: Units that each selection marks as selected, in the order of the callbacks.
        chosen: Parameters that may move: selected by every selection that covers them.
        moved: Parameters that did.
        leaked: Unselected parameters with a gradient at the optimizer's step.
        held: Parameters that stand in the param groups.
        state: Parameters with state in an optimizer.
        shapes: Number of parameters in each param group of each optimizer.
    """

    counts: list[int]
    chosen: set[str]
    moved: set[str] = field(default_factory=set)
    leaked: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    state: set[str] = field(default_factory=set)
    shapes: list[list[int]] = field(default_factory=list)


class Witness(pytorch_lightning.Callback, lightning.pytorch.Callback):  # type: ignore[misc]
    """Watches the selections ``drivers``, which stand before it in the list of callbacks."""

    def __init__(self, *drivers: Any) -> None:
        self.drivers = drivers
        self.steps: list[Step] = []
        self.present: Step | None = None
        self.mixed: list[int] = []

    def _chosen(self, module: Any) -> set[str]:
        names = {name for name, p in named(module).items() if self.trainable[name]}
        for driver in self.drivers:
            bound, mask = driver.selection.bound, driver.selection.mask
            covered = dict(bound.covered())
            selected = bound.spread(mask) if mask is not None else covered
            names -= set(covered) - set(selected)
        return names

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Ours have frozen by now; what they froze counts as trainable.
        covered = {name for driver in self.drivers for name, _ in driver.selection.bound.covered()}
        self.trainable = {name: p.requires_grad or name in covered for name, p in named(pl_module).items()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        chosen = self._chosen(pl_module)
        trains = {name for name, p in named(pl_module).items() if p.requires_grad}
        assert trains == chosen, f"requires_grad: {trains ^ chosen}"
        if self.present is None:
            counts = [0 if d.selection.mask is None else int(d.selection.mask.sum()) for d in self.drivers]
            self.present, self.before = Step(counts, chosen), weights(pl_module)
            self.done = trainer.global_step
        elif chosen != self.present.chosen:
            self.mixed.append(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert self.present is not None
        params = named(pl_module)
        self.present.leaked |= {n for n in set(params) - self.present.chosen if params[n].grad is not None}
        self.present.held = self._names(
            params, [p for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        )
        self.present.shapes = [[len(g["params"]) for g in o.param_groups] for o in trainer.optimizers]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.done:
            return
        assert self.present is not None
        self.present.moved = moved(self.before, weights(pl_module))
        params = named(pl_module)
        self.present.state = self._names(params, [p for o in trainer.optimizers for p, s in o.state.items() if s])
        self.steps.append(self.present)
        self.present = None

    def _names(self, params: dict[str, Any], tensors: list[Any]) -> set[str]:
        ids = {id(p): name for name, p in params.items()}
        for driver in self.drivers:
            if driver._owner is not None:
                ids.update({id(driver._owner.leaf(p)): ids[id(p)] for p in driver._owner.slots if id(p) in ids})
        return {ids[id(t)] for t in tensors}

    def check(self, still: int = 0) -> None:
        """Selected is trained, unselected does not move by one bit; ``still`` steps (overflows) move nothing."""
        assert self.steps, "no optimizer step was seen"
        assert not self.mixed, f"two selections in the window of steps {self.mixed}"
        resting = 0
        for i, step in enumerate(self.steps):
            assert not step.leaked, f"step {i}: gradients of unselected parameters {step.leaked}"
            assert not step.moved - step.chosen, f"step {i}: unselected parameters moved: {step.moved - step.chosen}"
            if not step.moved:
                resting += 1
                continue
            assert step.moved == step.chosen, f"step {i}: selected parameters did not move: {step.chosen - step.moved}"
            assert step.held == step.chosen, f"step {i}: param groups differ by {step.held ^ step.chosen}"
        assert resting == still, f"{resting} steps moved nothing, expected {still}"
