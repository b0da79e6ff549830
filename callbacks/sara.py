"""SaRA: the smallest weights, kept low in rank.

    M = {i: |w_i| < threshold} over all tensors;   from ``progressive_step`` on {i in M: |w_i| < threshold}
    loss += nuclear ||P * M||_*      P: one matrix of the model, drawn anew at every step

Entries that left the set stay where training brought them.
"""

from __future__ import annotations

import math

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_rules import Threshold
from apportion.entry_units import Entries
from apportion.entrywise import Magnitude
from apportion.penalties import Nuclear
from apportion.types import When


def learning_rate(threshold: float) -> float:
    """The authors' rule for the learning rate, fitted on thresholds up to 1e-2: the more entries, the lower.

        lr = 1e-3 exp(-350 threshold)

    Example:
        >>> f"{learning_rate(2e-3):.4e}"
        '4.9659e-04'
    """
    return 1e-3 * math.exp(-350.0 * threshold)


class SaRA(SelectiveTuning):
    """Trains all weights below a size, under a penalty on the rank of what trains, and later those that stayed below.

    Args:
        threshold: Size below which weights train, above 0; `learning_rate` is the authors' rule for what goes with it.
        progressive_step: Optimizer step before which only entries still below the threshold go on; None for never.
        nuclear: Factor of the nuclear norm; 0 for none.
        min_side: Matrices with a shorter side are left out of the penalty.
        kept: Entries that go on ``reset`` their moments at that step, or ``keep`` them.
        train_head: Whether the output head trains whole, as a fresh one must; else its small entries do.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        seed: Seed of the matrices that the penalty draws.
        name: Tells two of these callbacks on one Trainer apart.

    Raises:
        ValueError: If ``threshold`` or ``progressive_step`` is out of its range.

    Example:
        >>> SaRA(threshold=2e-3).slots.rule
        Threshold(above=-0.002, within=True)

    Differences:
        How many entries train follows from the threshold. In the release the penalty never reaches the weights, since
        its gradient ends on a tensor that nothing updates; selected weights are replaced by their sizes; its defaults
        fail at the first step; the step of the second choice is lost; and indices are made again from the weights when
        loading. Here the penalty acts on what trains, signs stay, every step is a step, and indices are saved. The
        paper takes 2500 of 5000 steps and a factor of 5e-3; its code uses 5e-4, the default here, and resets moments,
        while its masked variant keeps them.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time; the penalty takes an SVD of one
        matrix a step.
        Not shown: the paper's figures with this implementation, and models below 100 million parameters, for which the
        authors do not recommend it.

    References:
        Hu, Zhang, Yi, Huang, Wang, Ma, *SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse
        Low-Rank Adaptation*, ICLR 2025, https://arxiv.org/abs/2409.06633. Code: https://github.com/sjtuplayer/SaRA
    """

    def __init__(
        self,
        threshold: float = 2e-3,
        progressive_step: int | None = 2500,
        nuclear: float = 5e-4,
        min_side: int = 65,
        kept: str = "reset",
        train_head: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        if not threshold > 0.0:
            raise ValueError(f"`SaRA(threshold={threshold!r})` must be above 0: smaller weights train.")
        if progressive_step is not None and progressive_step < 1:
            raise ValueError(
                f"`SaRA(progressive_step={progressive_step!r})` must be at least 1, as step 0 makes the first choice; "
                "None for no second."
            )
        head = "train" if train_head else "unit"
        once, twice = When(end=1), When(every=progressive_step or 1, end=(progressive_step or 0) + 1)
        super().__init__(
            units=Entries("unit", head, "unit", "unit", pattern=pattern, exclude=exclude, dense=dense),
            score=Magnitude(reverse=True),
            budget=Constant(1.0),
            rule=Threshold(above=-threshold, within=True),
            effect=Compact(kept=kept, penalty=Nuclear(nuclear, min_side=min_side) if nuclear else None),
            select_when=once if progressive_step is None else twice,
            seed=seed,
            name=name,
        )
