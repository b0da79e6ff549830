"""LIFT: principal weights.

In every matrix the entries train that are largest in its low-rank part, looked for anew every ``interval`` steps:

    W_r = the best approximation of W (m x n) of rank ``lra_rank``
    selected = the k entries of largest |W_r|,   k = min((m + n) rank, m n)
    entries that stay keep their moments, entering ones start at zero, leaving ones keep their value
"""

from __future__ import annotations

from apportion.budgets import Constant, RankEquivalent
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.principal import Principal
from apportion.rules import TopK
from apportion.types import Budget, When


class LIFT(SelectiveTuning):
    """Trains the principal weights of every matrix, as many as a low-rank adapter of it would have entries.

    Args:
        rank: Rank of the adapter of equal size, which fixes the count for each matrix.
        lra_rank: Rank of the approximation; None for ``rank``.
        interval: Optimizer steps between refreshes.
        amount: In place of ``rank``, entries that train; an int counts them, a float is a fraction, the same in all
            matrices. Then ``lra_rank`` alone is the rank of the approximation.
        exact: Whether to take an SVD of every matrix, instead of a basis that is turned towards it.
        warm: Whether to remember the bases between refreshes, which then take one filter step instead of six: 8 bytes
            times the rank for each row or column, whichever are fewer.
        block: Side of tiles that are chosen together; None for single entries.
        leaving: Entries that leave ``keep`` their trained value, or ``revert`` to the one they entered with.
        age: Steps that Adam's bias correction counts: those of the ``tensor``, or of each ``entry``.
        train_head: Whether the output head trains whole at every step, as a fresh one must.
        train_embeddings: Whether the token embeddings train whole at every step.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        seed: Seed of the bases to begin with.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> LIFT(rank=32, lra_rank=16).slots.budget, LIFT(rank=32, lra_rank=16).slots.score.rank
        (RankEquivalent(rank=32), 16)

    Differences:
        Under its own settings the released code takes the *smallest* entries of the approximation since July 2025; here
        the largest, as in the paper. It takes a full SVD at every refresh (``exact=True``), candidates are linear maps
        only (here convolutions as well), moments are as rough as the weights, and there are no full-precision copies,
        so that large bf16 weights do not move; decay has no effect on selected entries, which it has here. Head and
        embeddings train whole in it unless told otherwise; here they train if told so. The union of all selections
        moves from its pretrained values: ``leaving="revert"``, which is ours, keeps the difference as small as one.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time, at a refresh one matrix and its
        approximation in fp32.
        Not shown: the paper's scores with this implementation.

    References:
        Liu et al., *LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
        Supervised Fine-Tuning*, ICML 2025, https://arxiv.org/abs/2506.00772. Code: https://github.com/zihanghliu/LIFT
    """

    def __init__(
        self,
        rank: int = 128,
        lra_rank: int | None = None,
        interval: int = 200,
        amount: int | float | None = None,
        exact: bool = False,
        warm: bool = False,
        block: int | None = None,
        leaving: str = "keep",
        age: str = "tensor",
        train_head: bool = False,
        train_embeddings: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        budget: Budget = RankEquivalent(rank) if amount is None else Constant(amount)
        super().__init__(
            units=Entries(train_embeddings, train_head, pattern=pattern, exclude=exclude, dense=dense),
            score=Principal(rank if lra_rank is None else lra_rank, exact, warm=warm, block=block),
            budget=budget,
            rule=TopK(per="tensor"),
            effect=Compact(leaving=leaving, age=age),
            select_when=When(every=interval),
            seed=seed,
            name=name,
        )
