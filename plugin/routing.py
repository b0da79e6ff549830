"""Routing: where a matrix collects many selected entries, an adapter takes their place at a known cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from apportion.plan_file import KINDS, Plan


def lora_cost(d_in: int, d_out: int, rank: int) -> int:
    """Parameters of a LoRA pair on a matrix: r (d_in + d_out).

    Example:
        >>> lora_cost(768, 768, 8), lora_cost(2, 2, 1)
        (12288, 4)
    """
    return rank * (d_in + d_out)


def adapter_cost(d_in: int, d_out: int, rank: int) -> int:
    """Parameters of a bottleneck behind a matrix, with biases: 2 r d_out + r + d_out; ``d_in`` plays no part.

    Example:
        >>> adapter_cost(768, 768, 8), adapter_cost(768, 3072, 8)
        (13064, 52232)
    """
    del d_in
    return 2 * rank * d_out + rank + d_out


COSTS: dict[str, Callable[[int, int, int], int]] = {"lora": lora_cost, "adapter": adapter_cost}


@dataclass(frozen=True)
class Routing:
    """What becomes of each tensor that holds selected entries.

    Attributes:
        structured: Matrices that get an adapter instead, by parameter name.
        dense: Vectors that train whole.
        sparse: Tensors that keep their selected entries, with the number of these.
        charged: Parameters that train, all in all.
    """

    structured: tuple[str, ...]
    dense: tuple[str, ...]
    sparse: Mapping[str, int]
    charged: int


@dataclass(frozen=True)
class Router:
    """Decides, tensor by tensor, between single entries and a structure that costs a fixed number of parameters.

        matrix with c selected entries:   an adapter iff c >= cost / alpha,   else the c entries
        vector of d entries:              whole iff c >= d / beta,            else the c entries   (if ``vectors``)
        charged = sum of cost, d or c

    With more entries selected, no tensor goes back to single ones. The total jumps up where a tensor turns, so that not
    every total can be met; for alpha or beta below 1 it jumps down.

    Args:
        rank: Rank of the LoRA pair, or features of the bottleneck.
        alpha: How readily matrices turn; 1 turns them when the adapter costs no more than the entries.
        beta: How readily vectors turn.
        kind: ``lora`` or ``adapter``.
        vectors: Whether vectors turn at all.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> router = Router(rank=1, alpha=2.0)
        >>> router.route({"a": 2, "b": 1}, {"a": (2, 2), "b": (2, 2)})
        Routing(structured=('a',), dense=(), sparse={'b': 1}, charged=5)

    Differences:
        The paper turns a matrix at a preset number of entries. The released code turns it at cost / alpha with alpha
        10, and vectors at d / beta with beta 5, behind a switch; both are arguments here, and the defaults are the cost
        itself and no vectors. The code counts single entries of norms that it never trains; here they train.

    References:
        He et al., *Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning*, ICCV 2023,
        https://arxiv.org/abs/2303.08566. Code: https://github.com/ziplab/SPT
    """

    rank: int = 8
    alpha: float = 1.0
    beta: float = 5.0
    kind: str = "lora"
    vectors: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`Router(rank={self.rank})` must be at least 1.")
        for key in ("alpha", "beta"):
            value = getattr(self, key)
            if not 0.0 < value < math.inf:
                raise ValueError(f"`Router({key}={value!r})` must be above 0 and finite: it divides a cost.")
        if self.kind not in KINDS:
            raise ValueError(f"`Router(kind={self.kind!r})` must be 'lora' or 'adapter'.")

    def cost(self, shape: Sequence[int]) -> int:
        """Parameters of the adapter of a matrix of ``shape`` (d_out, d_in)."""
        d_out, d_in = shape
        return COSTS[self.kind](d_in, d_out, self.rank)

    def route(
        self, counts: Mapping[str, int], shapes: Mapping[str, Sequence[int]], matrices: Collection[str] | None = None
    ) -> Routing:
        """Decides about each tensor.

        Args:
            counts: Selected entries by parameter name.
            shapes: Shapes by parameter name, matrices as (d_out, d_in).
            matrices: Names of those that can have an adapter; None for all of two dimensions.
        """
        structured, dense, sparse, charged = [], [], {}, 0
        for name, count in counts.items():
            shape, size = shapes[name], math.prod(shapes[name])
            if not 0 <= count <= size:
                raise ValueError(f"`Router.route(counts=...)`: {count} of {name} must lie in [0, {size}].")
            can_turn = len(shape) == 2 and (matrices is None or name in matrices)
            if can_turn and count >= self.cost(shape) / self.alpha:
                structured.append(name)
                charged += self.cost(shape)
            elif self.vectors and len(shape) == 1 and count > 0 and count >= size / self.beta:
                dense.append(name)
                charged += size
            elif count > 0:
                sparse[name] = count
                charged += count
        return Routing(tuple(structured), tuple(dense), sparse, charged)

    def fit_budget(
        self,
        ranked: Tensor,
        shapes: Mapping[str, Sequence[int]],
        target: int,
        taus: Sequence[int],
        matrices: Collection[str] | None = None,
        extra: int = 0,
    ) -> tuple[int, Routing]:
        """The number of best entries whose total, once routed, comes closest to ``target``; of equals the last.

        Args:
            ranked: Place in ``shapes`` of the tensor that each entry lies in, the most important entry first, int64.
            shapes: Shapes by parameter name, matrices as (d_out, d_in).
            target: Parameters that are to train, all in all.
            taus: Numbers of entries to try, rising.
            matrices: See `route`.
            extra: Parameters that train besides and count.

        Raises:
            ValueError: If ``taus`` does not rise, or asks for more entries than there are.

        Example:
            >>> ranked = torch.tensor([0, 1, 0, 0])
            >>> Router(rank=1, alpha=2.0).fit_budget(ranked, {"a": (2, 2), "b": (3, 1)}, target=5, taus=[1, 2, 3, 4])
            (4, Routing(structured=('a',), dense=(), sparse={'b': 1}, charged=5))
        """
        names = tuple(shapes)
        if not taus or taus[0] < 1 or taus[-1] > len(ranked) or list(taus) != sorted(set(taus)):
            raise ValueError(f"`fit_budget(taus={list(taus)!r:.60})` must rise strictly inside [1, {len(ranked)}].")
        best: tuple[int, Routing] | None = None
        counts = torch.zeros(len(names), dtype=torch.int64)
        for start, tau in zip((0, *taus), taus, strict=False):
            counts += torch.bincount(ranked[start:tau], minlength=len(names))
            routing = self.route(dict(zip(names, counts.tolist(), strict=True)), shapes, matrices)
            if best is None or abs(routing.charged + extra - target) <= abs(best[1].charged + extra - target):
                best = tau, routing
        assert best is not None
        return best

    def allocate(
        self, plan: Plan, matrices: Mapping[str, Sequence[int]], target: int | None = None, steps: int = 79
    ) -> Plan:
        """The plan with adapters instead of entries where they pay.

        Args:
            plan: Entries selected over all tensors together; with scores if there is a ``target``.
            matrices: Shapes (d_out, d_in) of the weights that can have an adapter, by parameter name: what
                `apportion.adapt.matrices` finds in a model.
            target: Parameters that are to train, all in all, together with what the budget paid for already; None
                routes all entries of the plan.
            steps: Numbers of entries to try for a target: so many equal parts of the plan's.

        Raises:
            ValueError: If there is a target and the plan has no scores.
        """
        shapes = {name: matrices.get(name, shape) for name, shape in plan.shapes.items()}
        extra = int(plan.config.get("counts", {}).get("charged", 0))
        lengths = [len(plan.indices.get(name, ())) for name in shapes]
        order = torch.arange(sum(lengths))
        if target is None:
            tau, routing = len(order), self.route(dict(zip(shapes, lengths, strict=True)), shapes, matrices)
        else:
            order = _importance(plan, f"Router.allocate(target={target})")
            home = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            taus = sorted({-(-len(order) * (j + 1) // steps) for j in range(steps)})
            tau, routing = self.fit_budget(home[order], shapes, target, taus, matrices, extra)
        best = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:tau], True).split(lengths)
        kept = {name: part for name, part in zip(shapes, best, strict=True) if name in routing.sparse}
        told = asdict(self) | {"tau": tau, "target": target, "charged": routing.charged + extra}
        return Plan(
            {name: plan.indices[name][part] for name, part in kept.items()},
            plan.shapes,
            {name.removesuffix(".weight"): self.kind for name in routing.structured},
            (*plan.dense, *routing.dense),
            plan.config | {"routing": told},
            {name: plan.scores[name][part] for name, part in kept.items() if name in plan.scores},
        )


def _importance(plan: Plan, call: str) -> Tensor:
    """Places of all selected entries, in the order of the plan, the most important one first."""
    if plan.scores.keys() != plan.indices.keys() or not plan.indices:
        raise ValueError(
            f"`{call}` tries the best entries of the plan, which has no scores: make it by `select(..., "
            "keep_scores=True)`."
        )
    scores = torch.cat([plan.scores[name] for name in plan.indices])
    known = torch.where(scores.isfinite(), scores, -math.inf)  # what is no number comes last
    return torch.argsort(known, descending=True, stable=True)
