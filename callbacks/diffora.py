"""DiffoRA: which modules get a low-rank adapter at all.

A gate stands in front of every adapter, and what the loss says about it decides, once:

    y = W_0 x + g c B A x;   d = dL/dg at g = 1, a mean over measurements while all adapters train, for ``warmup`` steps
    then:   the floor(share n) modules of largest |d| keep their adapters (g = 1) and train on; for the others g = 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant, Polynomial
from apportion.driver import SelectiveTuning
from apportion.gates import Gate, GateGradient
from apportion.rules import TopK
from apportion.types import When
from apportion.units import Modules


class DiffoRA(SelectiveTuning):
    """Keeps the adapters of the modules that the loss cares about, and shuts off the others early in the run.

    Put LoRA adapters on all modules that may get one with PEFT first. What lies outside the layers, such as a
    classifier, always trains.

    Args:
        share: Share of the modules that keep their adapter, in (0, 1].
        warmup: Steps in which all adapters train, as the gate of a fresh adapter has no gradient; 0 for adapters that
            are trained already.
        every: Optimizer steps between measurements of the gates in that time; the last is just before the choice.
        batches: Batches of ``probe_data`` for a measurement.
        form: ``magnitude`` scores |d|; ``descent`` scores -d, where training the gates leads in small steps.
        per: ``model`` compares all modules; ``block`` gives every layer its share of them.
        probe_data: Validation batches to measure on; None for the batch of the coming step.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.
        pattern: Regex that the names of the layers must match; None for all.
        exclude: Regex of names of layers or modules that are left out and always train; None for none.
        seed: Seed of the callback's random streams.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> DiffoRA(share=0.25, warmup=50).slots.effect
        Gate(state='drop', master=None)

    Differences:
        Reconstructed: no code was found, and the algorithm was read in summaries. There, gates in [0, 1] are trained on
        validation data in turn with the weights (bi-level optimization) and scale the adapters meanwhile; then the top
        share is kept. Here the gates stay at 1 while they are measured, on ``probe_data``: they are not trained, and
        ``form="descent"`` is the limit of small steps of doing so. The low-rank matrix that the modules left out
        share there is not made: they fall back to the base model. Whether the share is taken of each layer or of the
        model is not known: ``per``. ``warmup``, ``every`` and ``batches`` are ours.
        Not shown: the paper's scores with this implementation.

    References:
        Jiang, Wang, Yuan, *DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection*, 2025,
        https://arxiv.org/abs/2502.08905
    """

    def __init__(
        self,
        share: float = 0.5,
        warmup: int = 100,
        every: int = 10,
        batches: int = 4,
        form: str = "magnitude",
        per: str = "model",
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Modules(pattern=pattern, exclude=exclude),
            score=GateGradient(every, warmup, batches, form),
            budget=Polynomial(1.0, share, begin=warmup - 1, finish=warmup) if warmup else Constant(share),
            rule=TopK(per),
            effect=Gate(),
            select_when=When(every=max(1, warmup), end=warmup + 1),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
