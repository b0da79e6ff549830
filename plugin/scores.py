"""Scores that look at weights and activations: how important each unit is. Higher is more important, always."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.still import Still
from apportion.types import State, View


@dataclass(frozen=True)
class Uniform(Still):
    """Every unit is as important as any other.

    Example:
        >>> score = Uniform()
        >>> score.read(score.init(3))
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, n: int) -> State:
        """Ones, shape (n,)."""
        return {"score": torch.ones(n, dtype=torch.float64)}

    def read(self, state: State) -> Tensor:
        """Ones, float64, shape (n,)."""
        return state["score"]


@dataclass(frozen=True)
class WeightNorm:
    """The mean L2 norm of a unit's parameters.

        score = (1 / P) sum_p ||theta_p||_2      over the P parameters of the unit; 1 / score if ``reverse``

    It reads the parameters that may train: all weights of a layer in full fine-tuning, the adapters under PEFT.

    Args:
        every: Period of the measurement in optimizer steps, from step 0 on; None measures once, before the first step.
        reverse: Makes units of small norm the important ones.

    Raises:
        ValueError: If ``every`` is below 1.

    Example:
        >>> from apportion.types import Bound, Unit
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> bound = Bound((Unit("linear", dict(linear.named_parameters()), linear),))
        >>> score = WeightNorm()
        >>> score.read(score.update(score.init(1), View(0, bound, torch.Generator())))
        tensor([5.], dtype=torch.float64)
    """

    every: int | None = None
    reverse: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"`WeightNorm(every={self.every})` must be at least 1, or None to measure once.")

    def init(self, n: int) -> State:
        """Ones, shape (n,)."""
        return {"score": torch.ones(n, dtype=torch.float64)}

    def due(self, step: int) -> bool:
        """At step 0, then every ``every`` steps."""
        return step == 0 if self.every is None else step % self.every == 0

    @torch.no_grad()
    def update(self, state: State, view: View) -> State:
        """The norms of the weights as they are now."""
        del state
        norms = [[_norm(p) for p in unit.params.values()] for unit in view.bound.units]
        return {"score": torch.tensor([sum(row) / max(1, len(row)) for row in norms], dtype=torch.float64)}

    def read(self, state: State) -> Tensor:
        """Mean norms, or their reciprocals, float64, shape (n,)."""
        return 1.0 / state["score"] if self.reverse else state["score"]


def _norm(parameter: Tensor) -> float:
    dtype = torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype
    rows = parameter.reshape(-1, parameter.shape[-1] if parameter.ndim else 1)
    # Row by row, then in double precision: one long single-precision sum loses digits.
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).cpu().double()))


@dataclass(frozen=True)
class Outlier:
    """The share of weights that stand out once weighted by the inputs they meet.

        A_ij = |W_ij| ||X_j||_2;   score = #{(i, j): A_ij > threshold mean(A)} / #{(i, j)}

    where W (out x in) runs over the `Linear` and `Conv1D` matrices inside the unit, base weights and not adapters,
    X_j is input j over all tokens of the probe batches, and the mean is taken matrix by matrix. Measured once,
    before the first step. Norms, convolutions and experts stored as one tensor are not looked at; a unit without a
    matrix scores 0.

    Args:
        threshold: How many times the mean an outlier has, above 0.
        batches: Probe batches to take the inputs from.

    Raises:
        ValueError: If an argument is out of its range, or at the measurement if no matrix was met.

    Example:
        >>> outlier_count(torch.tensor([[1.0, 1.0], [1.0, 9.0]]), torch.tensor([1.0, 1.0]), threshold=2.0)
        1

    References:
        Yin et al., *Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
        Sparsity*, ICML 2024, https://arxiv.org/abs/2310.05175
    """

    threshold: float = 5.0
    batches: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "activation"})

    def __post_init__(self) -> None:
        if not self.threshold > 0.0:
            raise ValueError(f"`Outlier(threshold={self.threshold!r})` must be above 0: it is a multiple of the mean.")
        if self.batches < 1:
            raise ValueError(f"`Outlier(batches={self.batches})` must be at least 1: inputs come from probe batches.")

    def init(self, n: int) -> State:
        """Ones, shape (n,)."""
        return {"score": torch.ones(n, dtype=torch.float64)}

    def due(self, step: int) -> bool:
        """At step 0."""
        return step == 0

    @torch.no_grad()
    def update(self, state: State, view: View) -> State:
        """Runs the probe batches through the model and counts."""
        del state
        if view.probe is None:
            raise ValueError(f"`{self!r}` needs a probe to see activations: pass probe batches and a probe loss.")
        matrices = [list(_matrices(unit.module)) for unit in view.bound.units]
        distinct = list(dict.fromkeys(m for row in matrices for m in row))
        with square_sums(distinct) as sums:
            for _ in range(self.batches):
                view.probe.refresh()
                view.probe.loss()
        # One exchange for all, with zeros where this rank met nothing (an expert without a token), keeps ranks in step.
        widths = [_oriented(m).shape[1] for m in distinct]
        met = [sums.get(m, torch.zeros(w)).cpu().double() for m, w in zip(distinct, widths, strict=True)]
        if not met or not any(bool(x.any()) for x in met):
            raise ValueError(
                f"`{self!r}` met no input of a `Linear` or `Conv1D` inside the {view.bound.n} units, such as "
                f"{view.bound.names[0]}: use WeightNorm(), or units with dense matrices that the probe loss runs "
                "through."
            )
        parts = torch.split(view.mean(torch.cat(met)), widths)
        counts = {m: self._count(m, part) for m, part in zip(distinct, parts, strict=True) if bool(part.any())}
        entries = [sum(_oriented(m).numel() for m in row if m in counts) for row in matrices]
        outliers = [sum(counts.get(m, 0) for m in row) for row in matrices]
        return {
            "score": torch.tensor([o / max(1, e) for o, e in zip(outliers, entries, strict=True)], dtype=torch.float64)
        }

    def _count(self, matrix: nn.Module, squares: Tensor) -> int:
        weight = _oriented(matrix)
        return outlier_count(weight, squares.sqrt().to(weight.device, torch.float32), self.threshold)

    def read(self, state: State) -> Tensor:
        """Shares of outliers, float64, shape (n,)."""
        return state["score"]


def outlier_count(weight: Tensor, norms: Tensor, threshold: float, chunk: int = 2**22) -> int:
    """Counts the entries of A = |W| * norms that are above ``threshold`` times its mean, ``chunk`` entries at a time.

    Args:
        weight: Shape (out, in).
        norms: L2 norm of each input, shape (in,).
        threshold: How many times the mean.
        chunk: Bound on the entries of A that exist at once, at least one row.
    """
    rows = max(1, chunk // max(1, weight.shape[1]))
    parts = torch.split(weight, rows)
    total = sum(float((part.abs().to(norms.dtype) * norms).sum(1).cpu().double().sum()) for part in parts)
    cut = threshold * total / max(1, weight.numel())
    return sum(int((part.abs().to(norms.dtype) * norms > cut).sum()) for part in parts)


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    """The dense matrices inside ``module``; of an adapted layer only the base layer."""
    if hasattr(module, "base_layer") and hasattr(module, "disable_adapters"):
        base: Any = module.base_layer
        yield from _matrices(base)
    elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        yield module
    else:
        for child in module.children():
            yield from _matrices(child)


def _oriented(matrix: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight: Any = matrix.weight
    weight = weight.detach() if isinstance(matrix, nn.Linear) else weight.detach().T
    expected = getattr(matrix, "in_features", None)
    if weight.ndim != 2 or (expected is not None and weight.shape[1] != expected):
        raise ValueError(
            f"`Outlier` reads dense matrices, but a `{type(matrix).__name__}` holds its weight as "
            f"{tuple(weight.shape)} (quantized?): use WeightNorm() or Uniform()."
        )
    dense: Tensor = weight
    return dense


@contextmanager
def square_sums(matrices: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Gathers, while it is open, sum_t X_tj^2 of the inputs of each module, float32, shape (in,)."""
    sums: dict[nn.Module, Tensor] = {}

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = args[0] if args else kwargs["input" if isinstance(module, nn.Linear) else "x"]
        squares = entered.detach().float().square().reshape(-1, entered.shape[-1]).sum(0)
        sums[module] = sums[module] + squares if module in sums else squares

    handles = [m.register_forward_pre_hook(gather, with_kwargs=True) for m in matrices]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
