"""SIFT: the largest gradients of the first batch.

selected = in every tensor the same share of entries, those of largest |g| at the first step, for the whole run
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import GradientMagnitude
from apportion.rules import TopK
from apportion.types import When


class SIFT(SelectiveTuning):
    """Trains a fixed set of entries: in every matrix those whose gradient is largest at the first step.

    Args:
        amount: Entries that train; a float is a fraction, an int counts them and is shared out by size.
        train_head: Whether the output head trains whole at every step.
        train_embeddings: Whether the token embeddings train whole at every step.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        seed: Seed of the selection; nothing is drawn here.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> SIFT(amount=0.01).slots.rule
        TopK(per='tensor', grow=False)

    Differences:
        The released code counts floor(rate n) + 1 entries of each tensor; here shares are rounded so that the total is
        spent exactly. There, the first batch is spent on the choice without training on it, weights change in the
        middle of the next backward pass, the last update is never made, and decay acts on increments that are zero, so
        that nothing decays; here the first batch trains, and steps, decay and schedules are the optimizer's.
        Micro-batches of the first step count as one batch. Its modules are a list; here ``pattern``.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time; at the first step all of them, if
        several micro-batches make a step.
        Not shown: the paper's scores with this implementation.

    References:
        Song et al., *Sparse is Enough in Fine-tuning Pre-trained Large Language Models*, ICML 2024,
        https://arxiv.org/abs/2312.11875. Code: https://github.com/song-wx/SIFT
    """

    def __init__(
        self,
        amount: int | float = 0.01,
        train_head: bool = True,
        train_embeddings: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Entries(train_embeddings, train_head, pattern=pattern, exclude=exclude, dense=dense),
            score=GradientMagnitude(),
            budget=Constant(amount),
            rule=TopK(per="tensor"),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
        )
