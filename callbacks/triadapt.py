"""TriAdaptLoRA: growing the ranks of the adapters whose cores grow fastest.

Every matrix starts with one rank. At every choice those whose core D has grown most since the last one are given more;
how many of them follows the part of the run that is over and the ranks that are still missing:

    q_m = ||D_m||_F / r_m      score_m = q_m(t) - q_m(at the last choice)
    p = (t - t_i) / (T - t_i)     linear: floor((target - ranks) p) matrices;   exponential: floor(exp(p ln(...)))
"""

from __future__ import annotations

from apportion.driver import SelectiveTuning
from apportion.grow import Grow
from apportion.matrix_scores import NormGrowth
from apportion.orthogonality import Orthogonality
from apportion.rank_growth import Gap
from apportion.rank_rules import BestMatrices
from apportion.rank_units import Ranks


class TriAdaptLoRA(SelectiveTuning):
    """Gives ranks to the matrices whose updates grow fastest, more of them the later it is. Reconstructed.

    Put adapters on the model with PEFT first, of the largest rank that a matrix may get: ``AdaLoraConfig(init_r=16,
    total_step=1, ...)``, whose singular values are the core, or LoRA and DoRA.

    Args:
        target_rank: Ranks per matrix in the end, on average; None for ``target``.
        target: Ranks in the end; an int counts them over all matrices, a float is a fraction of those built.
        start: Ranks of every matrix at first.
        add: Ranks that a growing matrix is given.
        growth: Matrices that grow at a choice: ``linear`` or ``exponential``.
        warmup: Steps before the first choice; an int counts steps, a float is a fraction of the run.
        every: Optimizer steps between choices.
        norm: ``rank`` divides the norm of a core by its rank, ``square`` squares it instead.
        orthogonality: Weight of the penalty that keeps A's rows and B's columns orthonormal, at least 0.
        form: Of the penalty: ``norms``, their mean, or ``squares``, the sum of their squares.
        adapter: Name of the adapter; None for the one that trains.
        pattern: Regex that the names of the adapted layers must match; all ranks of the others train. None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the callback's random streams; this method draws nothing.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> TriAdaptLoRA(target_rank=2).slots.score
        NormGrowth(form='rank')

    Differences:
        Reconstructed from accounts of the paper and from a tuner that its first author has published elsewhere. There D
        is a square core of two triangles, W = W_0 + c B D A; PEFT's adapters hold its diagonal, E, or none: LoRA's is
        taken to be diag(||B_i|| ||A_i||). The triangles add parameters, but no update that B A cannot be. Norms of D
        count the diagonal twice there, as both triangles have one.
        The published score divides the norm by the rank; an account of the paper squares it and does not divide
        (``norm="square"``). Some variants of the tuner start with B and the core at zero, where every gradient is zero
        for ever: such adapters are refused. In others a new rank changes the function, as its B is random or its part
        of the core couples it with old ones; here it comes in with E, or B's column, at zero.
        The scale of an adapter is that of its largest rank for good: alpha / rank would shrink what was learned to
        r / (r + add) of it. The budget is met exactly, ties go to the lower index, and runs resume from any step.
        The score rewards any growth of norms, of whatever use it is. The paper's settings for its tasks are not known
        to us; the tuner's default lets matrices grow at every step, ours at every hundredth.
        Not shown: the paper's scores with this implementation.

    References:
        Liang et al., *TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
        Fine-Tuning*, 2025, https://arxiv.org/abs/2501.08008
    """

    def __init__(
        self,
        target_rank: float | None = None,
        target: int | float = 0.5,
        start: int = 1,
        add: int = 1,
        growth: str = "linear",
        warmup: int | float = 0.0,
        every: int = 100,
        norm: str = "rank",
        orthogonality: float = 0.5,
        form: str = "norms",
        adapter: str | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Ranks(adapter, pattern, exclude),
            score=NormGrowth(norm),
            budget=Gap(target, target_rank, start, add, growth, warmup, every),
            rule=BestMatrices(add),
            effect=Grow(0, Orthogonality(orthogonality, form)),
            seed=seed,
            name=name,
        )
