"""TTC-Tuning: norms first, then a few channels. Reconstructed.

stage 1, ``align_steps`` steps: norms and head train
stage 2: so do the output channels of largest first-order effect on the loss of the aligned model,
         I_c = (1/B) sum_b |sum_j w_cj g_b,cj|      g_b: gradient of batch b, row c of a matrix
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant
from apportion.calibrated import TaylorChannel
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Rows
from apportion.rules import TopK
from apportion.types import When


class TTC(SelectiveTuning):
    """Trains norms and head, and after a while also the channels that then matter most to the task; reconstructed.

    Args:
        amount: Channels that train; a float is a fraction, an int counts them over the whole model.
        align_steps: Optimizer steps of the first stage; 0 for none.
        per: ``tensor`` gives every matrix its share of the channels; ``block`` every layer; ``model`` compares all.
        batches: Batches to measure on, after the first stage.
        mode: ``eval`` turns dropout off while measuring, ``train`` leaves it on.
        train_head: Whether the output head trains whole at every step.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        probe_data: Batches to measure on; None for the start of the training data.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.
        seed: Seed of the order of ``probe_data``.
        name: Tells two of these callbacks on one Trainer apart.

    Raises:
        ValueError: If ``align_steps`` is below 0.

    Example:
        >>> TTC(align_steps=500).slots.select_when
        When(every=1, begin=500, end=501, clock='step')

    Differences:
        Reconstructed from the abstract, which says that norms align the model first and that channels are ranked by a
        Taylor expansion; the authors have released no code. The exact score, the shares and the lengths of the stages
        are ours; the default share is that of a related method by the same first author, 96 of 768 channels. The paper
        adds small modules on the chosen channels; here the rows of the matrices that make them are trained in place,
        without their biases. Norms go on training in the second stage.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time; while measuring 4 bytes for each
        candidate.
        Not shown: the paper's scores with this implementation.

    References:
        Zhao et al., *Revisit Parameter-Efficient Transfer Learning: A Two-Stage Paradigm*, 2023,
        https://arxiv.org/abs/2303.07910
    """

    def __init__(
        self,
        amount: int | float = 0.125,
        align_steps: int = 100,
        per: str = "tensor",
        batches: int = 16,
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
        if align_steps < 0:
            raise ValueError(f"`TTC(align_steps={align_steps!r})` must be at least 0: it counts optimizer steps.")
        super().__init__(
            units=Rows(head=train_head, norm="train", pattern=pattern, exclude=exclude, dense=dense, pool="sum"),
            score=TaylorChannel(batches, mode),
            budget=Constant(amount),
            rule=TopK(per=per),
            effect=Compact(),
            select_when=When(begin=align_steps, end=align_steps + 1),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
