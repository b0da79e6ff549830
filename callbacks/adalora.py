"""AdaLoRA: adaptive budget allocation for low-rank adapters.

Every update is a sum of rank-1 parts with a singular value each, W = W_0 + c B diag(E) A. All parts of all matrices
compete for one budget, which falls along a cubic curve:

    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji),   s = I U,   I and U averages of |w g| and of its deviation
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3        between warm-up and final phase
    E_i <- 0 unless S_i is among the b(t) largest, every ``every`` steps; for good when the final phase begins
"""

from __future__ import annotations

from apportion.driver import SelectiveTuning
from apportion.orthogonality import Orthogonality
from apportion.prune import Prune
from apportion.rank_budgets import Decay
from apportion.rank_units import Ranks
from apportion.rules import TopK
from apportion.sensitivity import Sensitivity


class AdaLoRA(SelectiveTuning):
    """Gives the ranks of adapters to the matrices that need them, under one budget that falls during the run.

    Put adapters on the model with PEFT first: ``AdaLoraConfig(init_r=12, total_step=1, ...)`` for the paper's form, or
    LoRA and DoRA, whose ranks are pairs of a row and a column. Nothing has to be called in the training loop, and the
    length of the run is the Trainer's: ``total_step``, ``target_r`` and the like of PEFT's configuration play no part.

    Args:
        target_rank: Ranks per matrix in the end, on average; None for ``target``.
        target: Ranks in the end; an int counts them over all matrices, a float is a fraction of them.
        warmup: Steps with all ranks at first; an int counts steps, a float is a fraction of the run.
        final: Steps with the final ranks, in the same way.
        every: Optimizer steps between choices while the budget falls.
        beta1: Decay of the averages of the sensitivity, in (0, 1).
        beta2: Decay of the averages of its deviation, in (0, 1).
        orthogonality: Weight of the penalty that keeps A's rows and B's columns orthonormal, at least 0.
        form: Of the penalty: ``norms`` as in the released codes, or ``squares`` as in the paper.
        shrink: Whether ranks leave the memory when they are out for good, and their gradients and optimizer state too.
        adapter: Name of the adapter; None for the one that trains.
        pattern: Regex that the names of the adapted layers must match; all ranks of the others train. None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the callback's random streams; this method draws nothing.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> AdaLoRA(target_rank=4, warmup=500).slots.budget
        Decay(target=0.5, mean_rank=4, warmup=500, final=0.48, power=3.0, every=10)

    Differences:
        The schedule as the paper prints it exceeds the first budget: the released codes measure progress from the end
        of the warm-up, and so do we. Its phases are fractions of the run by default, near the middle of the paper's
        settings, as is half of the ranks. PEFT's copy needs the number of steps in advance and never reaches
        its target if that is too high; here a run that stops early makes its final choice at once and says so.
        The paper's penalty is a sum of squares, that of the released codes a mean of norms, to which published weights
        such as 0.1 belong: 331 times smaller for 72 matrices of rank 12. PEFT adds it in the forward pass, only for
        some task types, in validation too; here its gradient is added once per step and its value logged.
        The paper scores with the weights before the step, the codes and we with those after it. Scores are in fp32.
        At ties the codes put out all that are equal to the last one; here exactly the budget is in, lower index first.
        The scale of an adapter is that of its first rank for good, as in the codes. They keep all ranks in memory to
        the end; here tensors, gradients and moments shrink at the final choice, while checkpoints keep the shapes that
        PEFT loads, zeros for what is gone, and the penalty sees what is left. Ranks that are out before go on training
        with their moments, and may come back, as in the codes.
        Not shown: the paper's scores with this implementation.

    References:
        Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, ICLR 2023,
        https://arxiv.org/abs/2303.10512. Code: https://github.com/QingruZhang/AdaLoRA
    """

    def __init__(
        self,
        target_rank: float | None = None,
        target: int | float = 0.5,
        warmup: int | float = 0.12,
        final: int | float = 0.48,
        every: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.1,
        form: str = "norms",
        shrink: bool = True,
        adapter: str | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Ranks(adapter, pattern, exclude),
            score=Sensitivity(beta1, beta2),
            budget=Decay(target, target_rank, warmup, final, every=every),
            rule=TopK(),
            effect=Prune(shrink, Orthogonality(orthogonality, form)),
            seed=seed,
            name=name,
        )
