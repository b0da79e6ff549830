"""ID3: incremental unmasking by gradient and magnitude, D3.

A few entries more train at every step; those that train already go on:

    H = |g| / (|w| + eps)^exp          over the entries that do not train yet
    Lambda_t = Lambda_(t-1) + the u_t highest of H over the whole model,   sum of u_t over T steps = budget

``exp`` of 0 leaves the gradient alone, above 0 favours small weights, below 0 large ones.
"""

from __future__ import annotations

from apportion.budgets import Constant, Increment
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import D3
from apportion.rules import TopK
from apportion.types import Budget, When


class ID3(SelectiveTuning):
    """Trains a set of entries that grows from step to step by those with a large gradient on a small weight.

    Args:
        budget: Entries that train in the end; an int counts them, a float is a fraction of the candidates.
        exp: Exponent of the weight's size, in [-8, 8].
        eps: Added to the weight's size, above 0 if ``exp`` is.
        schedule: ``increment`` grows; ``static`` chooses all at the first step; ``repeat`` chooses all anew.
        form: Of the growth: ``even`` over the steps, or ``front``, what the division leaves to the first ones.
        every: Optimizer steps between choices; growth takes as many entries at once as it missed.
        max_steps: Steps to grow in; None for those of the run.
        age: Steps that Adam's bias correction counts: those of the ``tensor``, or of each ``entry``.
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

    Raises:
        ValueError: If ``schedule`` is unknown.

    Example:
        >>> ID3(budget=320_000, max_steps=1000).slots.budget
        Increment(amount=320000, form='even', finish=1000)

    Differences:
        Every tensor is a candidate in the release 0.2, ``embeddings="unit", norm="unit", bias="unit"``; in 0.4 a head
        that trains whole is paid for, ``charge=True``. Here a choice has exactly its count, also with equal scores;
        budgets below the number of steps work; growth ends with the schedule; decay never reaches other entries; and a
        choice follows the gradients of its own step. The release gives remainders to the first steps, ``form="front"``,
        and counts the optimizer's steps for newcomers, ``age="tensor"``: their first step is up to 3.2 times the
        learning rate. ``every`` and ages of entries are ours. The default budget is 0.2 % of the candidates; those of
        the paper are 103 and 320 thousand of 184 million parameters. ``eps`` is that of the release's examples; its
        class has 1e-8, and the paper's sweep found 0.1 to 1 best, not significantly.
        With AdamW 20 bytes for each selected entry, 24 with ages of entries, and one dense gradient at a time; all of
        them at steps that choose, if several micro-batches make a step.
        Not shown: the paper's scores with this implementation.

    References:
        Agarwal, Ramesh, Sengupta, Chakraborty, *Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large
        Language Models*, TACL 13, 2025, https://arxiv.org/abs/2408.14470.
        Code: https://github.com/Aradhye2002/selective-peft-toolkit
    """

    def __init__(
        self,
        budget: int | float = 0.002,
        exp: float = 1.0,
        eps: float = 1e-3,
        schedule: str = "increment",
        form: str = "even",
        every: int = 1,
        max_steps: int | None = None,
        age: str = "tensor",
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
        if schedule not in ("increment", "static", "repeat"):
            raise ValueError(f"`ID3(schedule={schedule!r})` must be 'increment', 'static' or 'repeat'.")
        grows = schedule == "increment"
        amount: Budget = Increment(budget, form, max_steps) if grows else Constant(budget)
        super().__init__(
            units=Entries(
                embeddings, train_head, norm, bias, pattern=pattern, exclude=exclude, dense=dense, charge=charge
            ),
            score=D3(exp, eps),
            budget=amount,
            rule=TopK(grow=grows),
            effect=Compact(age=age),
            select_when=When(end=1) if schedule == "static" else When(every=every),
            seed=seed,
            name=name,
        )
