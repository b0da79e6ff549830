"""Scores of whole adapters, from the ranks that are in: for methods in which matrices compete for more ranks.

All ranks of a matrix have its score, those that wait too.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.adapters import Adapter
from apportion.rank_parts import by_rank, held, homes
from apportion.rank_scores import magnitudes
from apportion.rank_units import Triplets
from apportion.still import Still
from apportion.types import State


def _for_ranks(values: Tensor, bound: Triplets) -> Tensor:
    """Values of adapters as those of their ranks, float64, shape (n,), on the CPU."""
    capacities = torch.tensor([adapter.capacity for adapter in bound.adapters])
    return values.double().cpu().repeat_interleave(capacities)


@dataclass(frozen=True)
class MatrixSensitivity:
    """How much the loss would change without an update, smoothed over steps, times its uncertainty.

        S_m = (1 / N_m) sum_i |E_i dL/dE_i|  =  (1 / N_m) sum_i |<dW_i, dL/dW>|         over the ranks that are in
        I = b1 I + (1 - b1) S;   U = b2 U + (1 - b2) |S - I|;   score = I U

    dW_i is what rank i adds to the matrix; without E, the sum is over |<B_i, dL/dB_i>|, which is the same. N_m is the
    number of entries of the matrix, so that its size plays no part. No dense update and no dense gradient is made.

    Args:
        beta1: Decay of the mean, in (0, 1).
        beta2: Decay of the uncertainty, in (0, 1).
        size: ``mean`` divides by the number of entries, ``root`` by its square root.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> MatrixSensitivity(size="root")
        MatrixSensitivity(beta1=0.85, beta2=0.85, size='root')

    References:
        Zhang et al., *IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning*, 2023,
        https://arxiv.org/abs/2308.12043
    """

    beta1: float = 0.85
    beta2: float = 0.85
    size: str = "mean"

    needs: ClassVar[frozenset[str]] = frozenset({"own_grad"})
    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        for key in ("beta1", "beta2"):
            if not 0.0 < getattr(self, key) < 1.0:
                raise ValueError(
                    f"`MatrixSensitivity({key}={getattr(self, key)!r})` must lie in (0, 1): it is a decay."
                )
        if self.size not in ("mean", "root"):
            raise ValueError(f"`MatrixSensitivity(size={self.size!r})` must be 'mean' or 'root'.")

    def init(self, bound: Triplets) -> State:
        """Averages of zero, fp32, one for each adapter."""
        device = bound.adapters[0].a.device
        return {key: torch.zeros(len(bound.adapters), dtype=torch.float32, device=device) for key in ("mean", "doubt")}

    def due(self, step: int) -> bool:
        """After every step."""
        return step > 0

    @torch.no_grad()
    def update(self, state: State, bound: Triplets, params: Collection[nn.Parameter] | None = None) -> State:
        """The averages, moved by one more gradient; adapters without one keep theirs."""
        gates = [adapter.gate for adapter in bound.adapters]
        live = [i for i, (p, _) in enumerate(gates) if p.grad is not None and (params is None or p in params)]
        if not live:
            return state
        grads: Any = [gates[i][0].grad for i in live]
        changes = by_rank([gates[i][0] for i in live], [gates[i][1] for i in live], grads).abs_()
        place = torch.tensor(live, device=changes.device)
        counts = [gates[i][0].shape[gates[i][1]] for i in live]
        sizes = torch.tensor([self._size(bound.adapters[i]) for i in live], device=changes.device)
        now = torch.zeros_like(sizes).index_add_(0, homes(counts).to(changes.device), changes).div_(sizes)
        mean = state["mean"][place].lerp_(now, 1.0 - self.beta1)
        state["mean"][place] = mean
        state["doubt"][place] = state["doubt"][place].lerp_(now.sub_(mean).abs_(), 1.0 - self.beta2)
        return state

    def _size(self, adapter: Adapter) -> float:
        entries = math.prod(adapter.a.shape[1:]) * (adapter.b.numel() // max(1, adapter.b.shape[1]))
        return float(entries) if self.size == "mean" else math.sqrt(entries)

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """Importance of every rank, that of its matrix; float64, shape (n,), on the CPU."""
        return _for_ranks(state["mean"] * state["doubt"], bound)


@torch.no_grad()
def strengths(bound: Triplets, form: str = "rank") -> Tensor:
    """How large the core of each adapter is, fp32; see `NormGrowth`."""
    counts = held(bound)
    sizes = magnitudes(bound)
    squares = torch.zeros(len(counts), dtype=torch.float32, device=sizes.device)
    squares.index_add_(0, homes(counts).to(sizes.device), sizes.square())
    if form == "square":
        return squares
    return squares.sqrt_() / torch.tensor(counts, dtype=torch.float32, device=sizes.device).clamp_(min=1)


@dataclass(frozen=True)
class NormGrowth(Still):
    """How much the core of an update has grown since the last choice.

        rank     q = ||D||_F / r        score = q(t) - q(at the last choice), 0 before the first
        square   q = ||D||_F^2

    D is what stands between orthonormal factors of the update: diag(E) in the SVD form, and diag(||B_i|| ||A_i||) where
    there is no E; r is the number of ranks that are in. A core and its singular values have one norm, so that a dense
    core would score the same. Any growth counts, of whatever use it is; it costs no gradient.

    Args:
        form: ``rank`` or ``square``.

    Raises:
        ValueError: If ``form`` is unknown.

    Example:
        >>> NormGrowth()
        NormGrowth(form='rank')

    References:
        Liang et al., *TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
        Fine-Tuning*, 2025, https://arxiv.org/abs/2501.08008
    """

    form: str = "rank"

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    grain: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if self.form not in ("rank", "square"):
            raise ValueError(f"`NormGrowth(form={self.form!r})` must be 'rank' or 'square'.")

    def init(self, bound: Triplets) -> State:
        """Cores of zero, as those of fresh adapters are."""
        return {"before": torch.zeros(len(bound.adapters), device=bound.adapters[0].a.device)}

    def chosen(self, state: State, bound: Triplets) -> State:
        """What the next choice compares with."""
        del state
        return {"before": strengths(bound, self.form)}

    def scores(self, state: State, bound: Triplets) -> Tensor:
        """Importance of every rank, that of its matrix; float64, shape (n,), on the CPU."""
        return _for_ranks(strengths(bound, self.form) - state["before"], bound)
