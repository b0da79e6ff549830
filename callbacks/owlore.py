"""OwLore: outlier-weighed layerwise sampling.

LISA with layers drawn by how many outliers they hold, measured once before training:

    D_l = share of A = |W| ||X|| in layer l above ``threshold`` times the mean of A
    S: ``active_layers`` layers without replacement, P(l) in proportion to D_l,   every ``interval`` steps
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Sample
from apportion.scores import Outlier, Uniform, WeightNorm
from apportion.types import Score, When
from apportion.units import Layers


class OwLore(SelectiveTuning):
    """Trains a few layers at a time, those with many outliers more often, and embedding, head and final norm always.

    Args:
        active_layers: Layers that train at a time; an int counts them, a float is a fraction.
        interval: Optimizer steps between draws.
        score: What the draw follows: ``outlier``, ``norm`` (mean weight norm) or ``uniform``.
        threshold: How many times the mean an outlier has.
        batches: Probe batches that outliers are measured on.
        floor: Share of the uniform draw that is mixed in, in [0, 1); a layer without outliers is never drawn at 0.
        train_embeddings: Whether the token embedding always trains.
        train_head: Whether the output head always trains.
        train_norm: Whether the norm before the head always trains.
        state: Optimizer state of layers that are put back: ``drop``, ``keep`` or ``offload``.
        master: ``fp32`` for full-precision copies of selected half-precision weights; None for none.
        probe_data: Batches to measure on; None for the first training batch.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.
        pattern: Regex that the names of the layers must match; None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the draws.
        name: Tells two of these callbacks on one Trainer apart.

    Raises:
        ValueError: If ``score`` is unknown.

    Example:
        >>> OwLore(threshold=7.0).slots.score
        Outlier(threshold=7.0, batches=1)

    Differences:
        Its other half, low-rank gradients (GaLore, rank 256), is an optimizer and no part of this: give the Trainer
        one. The release reads scores from a file made beforehand; here they are measured on the model at hand. It never
        clears the moments of layers that are put back: ``state="keep"``. Its reversed mode gives the top layer
        probability 0 and is left out. ``floor`` is ours, and so is the default
        of ``threshold``: the release's file of scores has 13 in its name.
        Not shown: the paper's scores with this implementation.

    References:
        Li, Yin, Gao, Liu, *OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
        Fine-tuning*, 2024, https://arxiv.org/abs/2405.18380. Code: https://github.com/pixeli99/OwLore
    """

    def __init__(
        self,
        active_layers: int | float = 5,
        interval: int = 50,
        score: str = "outlier",
        threshold: float = 5.0,
        batches: int = 1,
        floor: float = 0.0,
        train_embeddings: bool = True,
        train_head: bool = True,
        train_norm: bool = True,
        state: str = "drop",
        master: str | None = None,
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        scores: dict[str, Score] = {"outlier": Outlier(threshold, batches), "norm": WeightNorm(), "uniform": Uniform()}
        if score not in scores:
            raise ValueError(f"`OwLore(score={score!r})` must be 'outlier', 'norm' or 'uniform'.")
        super().__init__(
            units=Layers(train_embeddings, train_head, train_norm, pattern, exclude),
            score=scores[score],
            budget=Constant(active_layers),
            rule=Sample(floor=floor),
            effect=Freeze(state=state, master=master),
            select_when=When(every=interval),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
