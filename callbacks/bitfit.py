r"""BitFit: biases only.

    selected = every entry of the vectors called bias, those of norms included, for the whole run

What counts as a bias is said by the names of parameters: a vector with ``bias`` in the last part of its name, such as
``bias``, ``in_proj_bias`` or ``bias_ih_l0``. The scales of norms, and vectors that scale a layer, are none.
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import Magnitude
from apportion.rules import TopK
from apportion.types import When


class BitFit(SelectiveTuning):
    r"""Trains all biases, and the head.

    Args:
        norm: Norms: ``bias`` trains their biases, ``train`` scales and biases, ``freeze`` none.
        train_head: Whether the output head trains whole at every step.
        pattern: Regex that says which vectors are biases; ``(query|fc1)\.bias`` takes those of some modules only.
        exclude: Regex of names that are none; None for none.
        dense: Regex of names that train whole at every step, matrices too; None for none.
        seed: Seed of the selection; nothing is drawn here.
        name: Tells two of these callbacks on one Trainer apart.

    Raises:
        ValueError: If ``norm`` is unknown.

    Example:
        >>> import torch
        >>> BitFit().slots.units.bind(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))).names
        ('0.bias', '1.bias')

    Differences:
        The implementation beside ID3 takes every vector for a bias, scales of norms included: ``norm="train"`` is
        close to it. A model without biases, as most large language models now are, has nothing to select, which is an
        error.
        With AdamW 20 bytes for each bias; no matrix but the head's has a gradient after the backward pass.
        Not shown: the paper's scores with this implementation.

    References:
        Ben Zaken, Goldberg, Ravfogel, *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
        Language-models*, ACL 2022, https://arxiv.org/abs/2106.10199
    """

    def __init__(
        self,
        norm: str = "bias",
        train_head: bool = True,
        pattern: str = r"\w*bias\w*",
        exclude: str | None = None,
        dense: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        if norm not in ("bias", "train", "freeze"):
            raise ValueError(f"`BitFit(norm={norm!r})` must be 'bias', 'train' or 'freeze'.")
        super().__init__(
            units=Entries(
                head=train_head,
                norm="unit" if norm == "bias" else norm,
                bias="unit",
                matrices="freeze",
                pattern=pattern,
                exclude=exclude,
                dense=dense,
            ),
            score=Magnitude(),
            budget=Constant(1.0),
            rule=TopK(),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
        )
