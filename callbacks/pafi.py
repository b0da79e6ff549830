"""PaFI: the smallest pretrained weights, whatever the task.

selected = the ``budget`` entries of smallest |w_0| over the whole model, once, before the first step
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import Magnitude
from apportion.rules import TopK
from apportion.types import When


class PaFI(SelectiveTuning):
    """Trains the entries with the smallest pretrained weights; the choice needs no data and is the same for all tasks.

    Args:
        budget: Entries that train; an int counts them, a float is a fraction of the candidates.
        train_head: Whether the output head trains whole at every step.
        embeddings: Token embeddings: ``freeze``, ``train`` (whole) or ``unit`` (their entries are candidates).
        norm: The same for norms.
        bias: The same for other vectors.
        charge: Whether the budget pays for what trains whole.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        seed: Seed of the selection; nothing is drawn here.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> PaFI(budget=100_000).slots.score
        Magnitude(reverse=True)

    Differences:
        Which tensors the paper leaves out could not be verified. An implementation beside ID3 takes all tensors of the
        optimizer, where biases and heads that start at 0 are chosen first: ``embeddings="unit", norm="unit",
        bias="unit"`` here, with the head apart.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time.
        Not shown: the paper's scores with this implementation.

    References:
        Liao, Meng, Monz, *Parameter-Efficient Fine-Tuning without Introducing New Latency*, ACL 2023,
        https://arxiv.org/abs/2305.16742
    """

    def __init__(
        self,
        budget: int | float = 0.005,
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
            score=Magnitude(reverse=True),
            budget=Constant(budget),
            rule=TopK(),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
        )
