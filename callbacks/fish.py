"""FISH Mask: the entries with the most Fisher information about the task.

F_i = (1/N) sum over N samples of (d log p(y | x) / d w_i)^2      before the first step, with the labels y
selected = the entries of highest F over the whole model;   the head trains whole and the budget pays for it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant
from apportion.calibrated import Fisher
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.rules import TopK
from apportion.types import When


class FISH(SelectiveTuning):
    """Trains a fixed set of entries, those with the largest mean squared gradients over some samples.

    Args:
        budget: Entries that train, the head's included if it is charged; an int counts them, a float is a fraction of
            the candidates.
        batches: Batches to measure on.
        per: ``sample`` squares the gradient of each example by itself, ``batch`` that of each batch's loss.
        mode: ``eval`` turns dropout off while measuring, ``train`` leaves it on.
        train_head: Whether the output head trains whole at every step.
        embeddings: Token embeddings: ``freeze``, ``train`` (whole) or ``unit`` (their entries are candidates).
        norm: The same for norms.
        bias: The same for other vectors.
        charge: Whether the budget pays for what trains whole.
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole at every step; None for none.
        probe_data: Batches to measure on; None for the start of the training data.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.
        seed: Seed of the order of ``probe_data``.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> FISH(batches=64).slots.score
        Fisher(batches=64, per='sample', mode='eval')

    Differences:
        The paper also has a form that takes the expectation over the classes that the model predicts; here it is that
        with the labels. The released code keeps 0.005 of all parameters for GLUE, measured on 1024 samples, and holds
        masks, gradients and moments of all of them. Here a fraction is of the candidates, and as many samples as are in
        ``batches``.
        With AdamW 20 bytes for each selected entry and one dense gradient at a time; while measuring 4 bytes for each
        candidate.
        Not shown: the paper's scores with this implementation.

    References:
        Sung, Nair, Raffel, *Training Neural Networks with Fixed Sparse Masks*, NeurIPS 2021,
        https://arxiv.org/abs/2111.09839. Code: https://github.com/varunnair18/FISH
    """

    def __init__(
        self,
        budget: int | float = 0.005,
        batches: int = 64,
        per: str = "sample",
        mode: str = "eval",
        train_head: bool = True,
        embeddings: str | bool = "unit",
        norm: str | bool = "unit",
        bias: str | bool = "unit",
        charge: bool = True,
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Entries(
                embeddings, train_head, norm, bias, pattern=pattern, exclude=exclude, dense=dense, charge=charge
            ),
            score=Fisher(batches, per, mode),
            budget=Constant(budget),
            rule=TopK(),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
