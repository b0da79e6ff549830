"""Gates: one number in front of each low-rank adapter, and what the loss says about it.

    y = W_0 x + g c B A x        g = 1 is the adapter as it is, g = 0 the base model
    dL/dg = <dL/dy, c B A x> = sum_ij B_ij dL/dB_ij        at g = 1, as the output is linear in g B

No parameter is added: the gradient of a gate is read off that of B, and a gate is shut by setting B to zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.candidates import Calibration
from apportion.effects import Freeze
from apportion.owner import Owner
from apportion.types import Bound, State, Unit, View

_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?B\.")


def gates(unit: Unit) -> dict[str, nn.Parameter]:
    """What the gate of ``unit`` multiplies, by name: B of its adapter, with a bias if B has one.

    Raises:
        ValueError: If it has none.
    """
    found = {name: p for name, p in unit.params.items() if _FACTOR.search(name)}
    if not found:
        raise ValueError(
            f"The unit {unit.name} has no low-rank adapter that trains, so there is nothing to put a gate before: it "
            f"holds {', '.join(list(unit.params)[:3])}. Leave it out by `exclude=`, or use LoRA, DoRA or AdaLoRA "
            "adapters of PEFT."
        )
    return found


def product(grad: Tensor, weight: Tensor) -> Tensor:
    """What each entry of B adds to the gradient of its gate: g B, fp32."""
    return grad.float() * weight.float()


@dataclass(frozen=True)
class GateGradient:
    """What the loss would lose or gain, to first order, by a gate in front of each adapter.

        d_p = dL_p/dg = sum_ij B_ij dL_p/dB_ij             at measurement p, the mean over its batches
        magnitude   score = mean_p |d_p|
        descent     score = -mean_p d_p

    Shutting gate i changes the loss by -d_i to first order. ``descent`` is where gradient descent on the gates leads
    while its steps are small: g_i - 1 = -rate sum_p d_p. Give the probe validation data for a loss that the weights are
    not trained on; without, the batch of the coming step is measured on. Dropout is off. Under DoRA the gate scales B,
    with the norm of the weight as a constant, as PEFT has it.

    Args:
        every: Optimizer steps between measurements, counted back from ``last``, or from 0 on if that is None.
        last: Optimizer step before which the last measurement is made; 0 makes one, before the first step; None goes
            on.
        batches: Batches of a measurement on data of the probe's own.
        form: ``magnitude`` or ``descent``.

    Raises:
        ValueError: If an argument is out of its range; at a measurement, if a unit has no adapter, or no gate matters
            because all B are zero, as they are in fresh adapters.

    Example:
        >>> [step for step in range(99) if GateGradient(every=10, last=25).due(step)]
        [5, 15, 25]

    References:
        Jiang et al., *DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection*, 2025,
        https://arxiv.org/abs/2502.08905 (gates)
    """

    every: int = 10
    last: int | None = None
    batches: int = 4
    form: str = "magnitude"

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    def __post_init__(self) -> None:
        for key in ("every", "batches"):
            if getattr(self, key) < 1:
                raise ValueError(f"`GateGradient({key}={getattr(self, key)!r})` must be at least 1.")
        if self.last is not None and self.last < 0:
            raise ValueError(f"`GateGradient(last={self.last!r})` must be at least 0: it is an optimizer step.")
        if self.form not in ("magnitude", "descent"):
            raise ValueError(f"`GateGradient(form={self.form!r})` must be 'magnitude' or 'descent'.")

    def init(self, n: int) -> State:
        """No measurement yet: zeros, shape (n,), and their number."""
        return {"sum": torch.zeros(n, dtype=torch.float64), "count": torch.zeros((), dtype=torch.int64)}

    def due(self, step: int) -> bool:
        """Every ``every`` steps up to ``last``; before the first step only if it is the last."""
        if self.last is None:
            return step > 0 and step % self.every == 0
        return (0 < step <= self.last or step == self.last) and (self.last - step) % self.every == 0

    def check(self, bound: Bound) -> None:
        """Looks for the adapters of all units, so that what would fail at a measurement fails at the start.

        Raises:
            ValueError: If a unit has no adapter.
        """
        for unit in bound.units:
            gates(unit)

    def update(self, state: State, view: View) -> State:
        """One more measurement."""
        probe: Any = view.probe
        if probe is None:
            raise ValueError(f"`{self!r}` needs a probe: pass probe batches and a probe loss.")
        held = [gates(unit) for unit in view.bound.units]
        every = {name: p for row in held for name, p in row.items()}
        gathered = probe.gather(every, product, Calibration(self.batches), present=True)
        found = torch.tensor([sum(float(gathered[k].double().sum()) for k in row) for row in held], dtype=torch.float64)
        if not bool(found.any()):
            raise ValueError(
                f"`{self!r}` found every gate without a gradient before step {view.step}: B is zero in fresh adapters, "
                "and then no gate matters. Train for some steps first (`warmup`)."
            )
        value = found.abs() if self.form == "magnitude" else -found
        return {"sum": state["sum"] + value, "count": state["count"] + 1}

    def read(self, state: State) -> Tensor:
        """The mean over the measurements, float64, shape (n,)."""
        return state["sum"] / state["count"].clamp(min=1)


@dataclass(frozen=True)
class Gate(Freeze):
    """Trains the selected adapters and shuts the gates of the others: they add nothing, and do not train.

        selected:     g = 1;  A, B <- step(A, B, gradients, state)
        unselected:   g = 0;  B <- 0 when it is left out, then as with `Freeze`: no gradient, state, step or decay

    An adapter that is selected again starts with B = 0, as a fresh one does.

    Args:
        state: As for `Freeze`.
        master: As for `Freeze`.

    Raises:
        ValueError: If ``state`` or ``master`` is unknown.

    Example:
        >>> Gate()
        Gate(state='drop', master=None)
    """

    @torch.no_grad()
    def apply(self, owner: Owner, key: str, bound: Bound, mask: Tensor) -> None:
        """Makes ``mask`` (bool, shape (n,)) the set that trains, and the only one that adds anything."""
        super().apply(owner, key, bound, mask)
        for unit, selected in zip(bound.units, mask.tolist(), strict=True):
            if not selected:
                for p in gates(unit).values():
                    p.zero_()
