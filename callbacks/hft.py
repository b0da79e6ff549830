"""HFT: half fine-tuning.

A random half of the matrices trains for a whole round (one stage or one task), spread evenly; the other half keeps
what the base model knows:

    per layer: 2 of {q, k, v, o};  2 of {up, gate, down} in a random half of the layers, 1 in the others;  1 of 2 norms
    embedding, head and final norm train
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Balanced
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Modules


class HFT(SelectiveTuning):
    """Trains a random half of the matrices, balanced over layers and over attention, feed-forward part and norms.

    Args:
        amount: Share of the matrices that train; a float is a fraction, an int counts them.
        by: ``count`` balances matrices; ``size`` also their entries, which differ under grouped-query attention.
        redraw: ``round`` draws once, before the first step; ``epoch`` at every epoch.
        round: Number of the round, at least 0; each has a draw of its own from the same seed.
        train_embeddings: Whether the token embedding trains.
        train_head: Whether the output head trains.
        train_norm: Whether the norm before the head trains.
        state: Optimizer state of matrices that are put back by a redraw: ``drop``, ``keep`` or ``offload``.
        master: ``fp32`` for full-precision copies of selected half-precision weights; None for none.
        pattern: Regex that the names of the matrices must match; None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the draws.
        name: Tells two of these callbacks on one Trainer apart.

    Raises:
        ValueError: If ``redraw`` is unknown or ``round`` below 0.

    Example:
        >>> HFT(round=0).seed == HFT(round=1).seed, HFT().slots.rule
        (False, Balanced(by='count'))

    Differences:
        No official code was found. The paper draws by category and fixes the share at one half; other shares round at
        random so that the total is spent exactly. For an odd number of layers the total is truncated. Projections fused
        into one matrix are one unit. ``by="size"`` and ``redraw="epoch"`` are ours.
        Not shown: the paper's scores with this implementation.

    References:
        Hui et al., *HFT: Half Fine-Tuning for Large Language Models*, ACL 2025, https://arxiv.org/abs/2404.18466
    """

    def __init__(
        self,
        amount: int | float = 0.5,
        by: str = "count",
        redraw: str = "round",
        round: int = 0,
        train_embeddings: bool = True,
        train_head: bool = True,
        train_norm: bool = True,
        state: str = "drop",
        master: str | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        if redraw not in ("round", "epoch"):
            raise ValueError(f"`HFT(redraw={redraw!r})` must be 'round' or 'epoch'.")
        if round < 0:
            raise ValueError(f"`HFT(round={round})` must be at least 0: it counts rounds.")
        super().__init__(
            units=Modules(train_embeddings, train_head, train_norm, pattern, exclude),
            score=Uniform(),
            budget=Constant(amount),
            rule=Balanced(by=by),
            effect=Freeze(state=state, master=master),
            select_when=When(end=1) if redraw == "round" else When(clock="epoch"),
            seed=(seed or 0) + 1_000_003 * round,  # far apart: seeds 0, 1, 2 of one round are not those of the next
            name=name,
        )
