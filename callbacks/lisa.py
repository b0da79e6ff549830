"""LISA: layerwise importance sampled AdamW.

Embedding, head and final norm always train. Of the layers only a few train at a time, drawn anew every ``interval``
steps:

    S ~ uniform over the sets of ``active_layers`` of the N layers,   at steps 0, interval, 2 interval, ...
    layers in S take the optimizer's steps, with moments that start at zero; the others do not move
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Cycle, Sample
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


class LISA(SelectiveTuning):
    """Trains a few random layers at a time, and embedding, head and final norm always.

    Args:
        active_layers: Layers that train at a time; an int counts them, a float is a fraction.
        interval: Optimizer steps between draws.
        train_embeddings: Whether the token embedding always trains. Then every backward pass runs down to it, and at
            8B parameters embedding and head are most of what trains: turn them off to save memory.
        train_head: Whether the output head always trains. Tied to the embedding, it is one tensor with it.
        train_norm: Whether the norm before the head always trains.
        state: Optimizer state of layers that are put back: ``drop``, ``keep`` or ``offload``.
        master: ``fp32`` for full-precision copies of selected half-precision weights; None for none.
        without_replacement: Whether every layer has its turn before one has it again.
        pattern: Regex that the names of the layers must match; None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the draws.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> LISA(active_layers=2, interval=20).slots.budget
        Constant(amount=2)

    Differences:
        In the paper's runs every interval was a process of its own, so moments started at zero: ``state="drop"``. The
        released LMFlow code never clears them: ``state="keep"``. Both draw uniformly; the weight norms that motivate
        the method are not computed by either (`OwLore` has them as a score). The final norm always trains in the code
        without being named in the paper's algorithm: ``train_norm``. Draws without replacement over a pass are ours.
        Not shown: the paper's figures with this implementation, and that layers drawn unevenly do better than evenly.

    References:
        Pan et al., *LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning*, NeurIPS
        2024, https://arxiv.org/abs/2403.17919. Code: https://github.com/OptimalScale/LMFlow
    """

    def __init__(
        self,
        active_layers: int | float = 2,
        interval: int = 20,
        train_embeddings: bool = True,
        train_head: bool = True,
        train_norm: bool = True,
        state: str = "drop",
        master: str | None = None,
        without_replacement: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Layers(train_embeddings, train_head, train_norm, pattern, exclude),
            score=Uniform(),
            budget=Constant(active_layers),
            rule=Cycle("shuffled") if without_replacement else Sample(),
            effect=Freeze(state=state, master=master),
            select_when=When(every=interval),
            seed=seed,
            name=name,
        )
