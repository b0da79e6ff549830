"""IncreLoRA: incremental parameter allocation for low-rank adapters.

Every matrix starts with one rank. At every choice the matrices whose updates matter most are given more, until the
budget is spent; a matrix may get any rank up to the one that its adapter was built with:

    S_m = (1 / N_m) sum_i |<dW_i, dL/dW>|      score = I U,   I and U averages of S and of its deviation
    every ``every`` steps: the ``matrices`` with the highest scores are given ``add`` ranks each
"""

from __future__ import annotations

from apportion.driver import SelectiveTuning
from apportion.grow import Grow
from apportion.matrix_scores import MatrixSensitivity
from apportion.orthogonality import Orthogonality
from apportion.rank_growth import Rounds
from apportion.rank_rules import BestMatrices
from apportion.rank_units import Ranks


class IncreLoRA(SelectiveTuning):
    """Gives ranks to the matrices that need them, a few at a time, from one rank each to a budget.

    Put adapters on the model with PEFT first, of the largest rank that a matrix may get: ``AdaLoraConfig(init_r=16,
    total_step=1, ...)`` for the paper's form, or LoRA and DoRA, with Lora's alpha chosen for that rank.

    Args:
        target_rank: Ranks per matrix in the end, on average; None for ``target``.
        target: Ranks in the end; an int counts them over all matrices, a float is a fraction of those built.
        start: Ranks of every matrix at first.
        matrices: Matrices that grow at a choice.
        add: Ranks that each of them is given.
        warmup: Steps before the first choice; an int counts steps, a float is a fraction of the run.
        every: Optimizer steps between choices.
        ramp: Steps in which the learning rate of new ranks rises to its full value; None for ``every``, 0 for none.
        beta1: Decay of the averages of the sensitivity, in (0, 1).
        beta2: Decay of the averages of its deviation, in (0, 1).
        size: What a sensitivity is divided by: ``mean``, the matrix's entries (paper), or ``root`` of them (code).
        orthogonality: Weight of the penalty that keeps A's rows and B's columns orthonormal, at least 0.
        form: Of the penalty: ``norms`` as in the released codes, or ``squares``.
        adapter: Name of the adapter; None for the one that trains.
        pattern: Regex that the names of the adapted layers must match; all ranks of the others train. None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the callback's random streams; this method draws nothing.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> IncreLoRA(target_rank=8, matrices=22, add=4, warmup=500, every=500).slots.rule
        BestMatrices(add=4)

    Differences:
        The paper averages |dW * dL/dW| over the entries of the dense update, and so makes it and its gradient for every
        matrix; here the products are summed per rank before their size is taken, which the factors tell. The two agree
        for one rank whose products have one sign, and are not the same in general. The released code divides by the
        root of the number of entries, which favours large matrices; that is ``size="root"``.
        The scale of an adapter is that of its largest rank for good. The paper's alpha / rank shrinks what was learned
        to r / (r + add) of it whenever ranks come in, one half from 1 to 2: choose alpha accordingly.
        Ranks come in with a singular value of 0, the paper's with 1e-5; nothing that waits is trained. The paper trains
        one reserve of ranks per matrix ahead, almost by the penalty alone, and then gives it the restarted warm-up that
        ``ramp`` is; here ranks wait as PEFT has made them.
        The budget is met exactly: the released code counts matrices and adds ranks, 600 for 576. As there, the first
        choice is at the first step after the warm-up that ``every`` divides. Ties go to the lower index; there all that
        are equal grow. Choices are made after a step, with its gradient; there before it. Runs resume from any step.
        Not shown: the paper's scores with this implementation. Its text was read in a digest, its tables were not.

    References:
        Zhang et al., *IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning*, 2023,
        https://arxiv.org/abs/2308.12043. Code: https://github.com/FeiyuZhang98/IncreLoRA
    """

    def __init__(
        self,
        target_rank: float | None = None,
        target: int | float = 0.5,
        start: int = 1,
        matrices: int = 4,
        add: int = 1,
        warmup: int | float = 100,
        every: int = 100,
        ramp: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        size: str = "mean",
        orthogonality: float = 0.1,
        form: str = "norms",
        adapter: str | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Ranks(adapter, pattern, exclude),
            score=MatrixSensitivity(beta1, beta2, size),
            budget=Rounds(target, target_rank, start, matrices, add, warmup, every),
            rule=BestMatrices(add),
            effect=Grow(every if ramp is None else ramp, Orthogonality(orthogonality, form)),
            seed=seed,
            name=name,
        )
