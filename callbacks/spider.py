"""SPIDER: train where the task asks for an entry more than the pretrained model relies on it.

I = R(w_0),  G = R(A);   raw = G / (I + G) if I < G else 0      R: relative size in its tensor, A: sum of gradients
soft:   A <- A + g,   M = min(1, raw / mean of the raw above 0),   w <- (1 - M) w_0 + M w      after every step
hard:   A measured before the first step;   selected = in every tensor the entries of highest raw
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant
from apportion.calibrated import Discrepancy
from apportion.driver import SelectiveTuning
from apportion.effects import Blend, Compact
from apportion.entry_units import Entries, Rows
from apportion.entrywise import Magnitude
from apportion.rules import TopK
from apportion.types import When


class SPIDER(SelectiveTuning):
    """Trains all candidates and draws each entry back to its pretrained value as far as the task does not ask for it.

    Args:
        norm: Whether norms are candidates.
        bias: Whether other vectors are candidates.
        train_head: Whether the output head trains whole, without being drawn back, as a fresh one must.
        pattern: Regex that the names of candidates must match, such as that of the last layers; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole, without being drawn back; None for none.
        seed: Seed of the selection; nothing is drawn here.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> SPIDER(pattern=r"layers\\.(2[89]|3[01])").slots.effect
        Blend()

    Differences:
        Formula and order follow the released code; the paper's body could not be read. What requires a gradient is a
        candidate there, a projector and the last layers: give ``pattern``. There the pretrained values are taken anew
        after a resume and sums of gradients are lost; here both are saved. Tensors of equal entries, whose deviation is
        0, freeze there and have a relative size of 1/2 here. Gradients are summed after clipping.
        It saves no memory: what full training costs, a copy of the candidates, and 4 bytes for each of their entries.
        Not shown: the paper's figures with this implementation.

    References:
        Huang et al., *Learn from Downstream and Be Yourself in Multimodal Large Language Models Fine-Tuning*, ICML
        2025, https://arxiv.org/abs/2411.10928. Code: https://github.com/WenkeHuang/SPIDER
    """

    def __init__(
        self,
        norm: bool = True,
        bias: bool = True,
        train_head: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            # Rows, and all of them, as the effect asks for no selection: lists of indices stay short.
            units=Rows(
                head=train_head,
                norm="unit" if norm else "freeze",
                bias="unit" if bias else "freeze",
                pattern=pattern,
                exclude=exclude,
                dense=dense,
            ),
            score=Magnitude(),
            budget=Constant(1.0),
            rule=TopK(),
            effect=Blend(),
            select_when=When(end=1),
            seed=seed,
            name=name,
        )


class SPIDERHard(SelectiveTuning):
    """Trains a fixed set of entries, those that the task asks for most above what the pretrained model relies on.

    Args:
        amount: Entries that train; a float is a fraction, an int counts them and is shared out by size.
        batches: Batches to measure on.
        mode: ``eval`` turns dropout off while measuring, ``train`` leaves it on.
        train_head: Whether the output head trains whole at every step.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        probe_data: Batches to measure on; None for the start of the training data.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.
        seed: Seed of the order of ``probe_data``.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> SPIDERHard(amount=0.1).slots.score
        Discrepancy(batches=16, mode='eval')

    Differences:
        Ours throughout but for the score: the method of the paper, `SPIDER`, blends anew after every step and selects
        nothing. The score there sums gradients of training; here those of some batches before it. The default share is
        about that of entries that the soft form leaves unblended where weights and gradients are independent and
        normal.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time; while measuring 4 bytes for each
        candidate.
        Not shown: any score of the paper, and that this form keeps what the soft one keeps.

    References:
        Huang et al., *Learn from Downstream and Be Yourself in Multimodal Large Language Models Fine-Tuning*, ICML
        2025, https://arxiv.org/abs/2411.10928
    """

    def __init__(
        self,
        amount: int | float = 0.2,
        batches: int = 16,
        mode: str = "eval",
        train_head: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Entries(head=train_head, pattern=pattern, exclude=exclude, dense=dense),
            score=Discrepancy(batches, mode),
            budget=Constant(amount),
            rule=TopK(per="tensor"),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
