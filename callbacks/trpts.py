"""TR-PTS: a few connections of every neuron, more in layers that matter more to the task. Reconstructed.

F = mean squared gradient of the task's loss
w_l = share of the highest ``share`` of all F that lies in matrix l
C_l = max(1, floor(least w_l / min of the positive w));   every row of matrix l trains its C_l entries of highest F
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant
from apportion.calibrated import Fisher
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_rules import PerRow
from apportion.entry_units import Entries
from apportion.types import When


class TRPTS(SelectiveTuning):
    """Trains the few incoming weights of every neuron that hold the most Fisher information, reconstructed.

    Args:
        share: Fraction of all entries that the matrices are measured by, in (0, 1].
        least: Entries per row where the positive share is smallest.
        batches: Batches to measure on.
        per: ``sample`` squares the gradient of each example by itself, ``batch`` that of each batch's loss.
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
        >>> TRPTS(share=0.1, least=2).slots.rule
        PerRow(share=0.1, least=2)

    Differences:
        Reconstructed: the authors have released no code, and the paper was read in accounts of others only. How many
        samples are measured, one by one or by batch, whether shares are divided by the sizes of layers, how ratios are
        rounded, what layers without a share get, and both defaults are ours. The other half, merging tokens, is no
        part of this. How many entries train follows from the rule: at least one per row.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time; while measuring 4 bytes for each
        candidate.
        Not shown: the paper's scores with this implementation.

    References:
        Luo et al., *TR-PTS: Task-Relevant Parameter and Token Selection for Efficient Tuning*, ICCV 2025,
        https://arxiv.org/abs/2507.22872
    """

    def __init__(
        self,
        share: float = 0.05,
        least: int = 1,
        batches: int = 64,
        per: str = "sample",
        mode: str = "eval",
        train_head: bool = True,
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
            score=Fisher(batches, per, mode),
            budget=Constant(1.0),
            rule=PerRow(share, least),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
