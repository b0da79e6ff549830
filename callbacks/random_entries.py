"""Random entries: the bar that every score has to clear.

selected = ``budget`` entries, uniform over the whole model or over each tensor, once, before the first step
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import RandomEntries
from apportion.rules import TopK
from apportion.types import When


class Random(SelectiveTuning):
    """Trains a fixed random set of entries: what a score is worth shows against it, at an equal budget.

    Args:
        budget: Entries that train; an int counts them, a float is a fraction of the candidates.
        per: ``model`` draws from all entries; ``tensor`` and ``block`` give each tensor or layer its share.
        train_head: Whether the output head trains whole at every step.
        embeddings: Token embeddings: ``freeze``, ``train`` (whole) or ``unit`` (their entries are candidates).
        norm: The same for norms.
        bias: The same for other vectors.
        charge: Whether the budget pays for what trains whole.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        seed: Seed of the draw.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> Random(per="tensor").slots.score
        RandomEntries(redraw=False)

    Differences:
        Random masks are one form of the paper below, whose library code gives a matrix of m rows and n columns r (m +
        n) entries, adds them to the weights in every pass, and loses an unseeded mask with a checkpoint of the
        trainer; here they train in place.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time.
        Not shown: the paper's scores with this implementation.

    References:
        Bhardwaj et al., *Sparse High Rank Adapters*, NeurIPS 2024, https://arxiv.org/abs/2406.13175
    """

    def __init__(
        self,
        budget: int | float = 0.005,
        per: str = "model",
        train_head: bool = True,
        embeddings: str | bool = "freeze",
        norm: str | bool = "freeze",
        bias: str | bool = "freeze",
        charge: bool = False,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Entries(
                embeddings, train_head, norm, bias, pattern=pattern, exclude=exclude, dense=dense, charge=charge
            ),
            score=RandomEntries(),
            budget=Constant(budget),
            rule=TopK(per=per),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
        )
