"""RST: random sparse tuning, the baseline of importance-aware sparse tuning.

S ~ uniform over the sets of floor(active N) of the N layers, at every step; their adapters train, the others rest
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Sample
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


class RST(SelectiveTuning):
    """Trains the adapters of a few random layers at a time; what lies outside layers stays as it is.

    Args:
        active: Layers that train at a step; a float is a fraction, an int counts them.
        every: Optimizer steps between draws.
        state: Optimizer state of adapters that are put back: ``offload``, ``keep`` or ``drop``.
        pattern: Regex that the names of the layers must match; None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the draws; the draws equal those of `IST` with ``rate=0`` and the same seed.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> RST(active=0.25).slots.rule
        Sample(weights='score', floor=0.0)

    Differences:
        The released scripts have a flag for it, but the code is not among the files; it follows the text. The optimizer
        state of resting adapters is moved away here; ``state="keep"`` leaves it where it is.
        Not shown: the paper's accuracies with this implementation.

    References:
        Yao et al., *Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
        Fine-tuning of Large Language Models*, Findings of EMNLP 2024, https://arxiv.org/abs/2410.11772
    """

    def __init__(
        self,
        active: int | float = 0.25,
        every: int = 1,
        state: str = "offload",
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Layers(pattern=pattern, exclude=exclude),
            score=Uniform(),
            budget=Constant(active),
            rule=Sample(),
            effect=Freeze(state=state),
            select_when=When(every=every),
            seed=seed,
            name=name,
        )
