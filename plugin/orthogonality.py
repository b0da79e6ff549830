"""The penalty that keeps the factors of an adapter orthonormal, as a gradient that is added before the step.

    norms     R = (1 / 2n) sum_k ||A_k A_k' - I||_F + ||B_k' B_k - I||_F           (the released codes)
    squares   R = sum_k ||A_k A_k' - I||_F^2 + ||B_k' B_k - I||_F^2                (the paper)

Added to the gradients and not to the loss, it acts whatever the model returns, once per step, and is no part of the
training or validation loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters import Adapter
from apportion.rank_stacks import pieces


@dataclass(frozen=True)
class Orthogonality:
    """The orthogonality penalty on the factors of all adapters.

    Args:
        weight: Factor of the penalty, at least 0; 0 computes nothing.
        form: ``norms``, the mean of Frobenius norms over the 2n factors, to which published weights such as 0.1 belong,
            or ``squares``, the sum of their squares.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> value, gradient = penalty([torch.tensor([[2.0, 0.0]])], 0, "squares", 1)
        >>> value.item(), gradient
        (9.0, tensor([[[24.,  0.]]]))

    References:
        Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, ICLR 2023,
        https://arxiv.org/abs/2303.10512
    """

    weight: float = 0.1
    form: str = "norms"

    def __post_init__(self) -> None:
        if not self.weight >= 0.0:
            raise ValueError(f"`Orthogonality(weight={self.weight!r})` must be at least 0: it is the factor of a norm.")
        if self.form not in ("norms", "squares"):
            raise ValueError(f"`Orthogonality(form={self.form!r})` must be 'norms' or 'squares'.")

    @torch.no_grad()
    def add(self, adapters: Sequence[Adapter], scale: float = 1.0) -> Tensor:
        """Adds the penalty's gradient to that of every factor that trains and returns its value, weighted.

        Args:
            adapters: The adapters.
            scale: The loss scale in the gradients.
        """
        groups: dict[object, list[nn.Parameter]] = {}
        for adapter in adapters if self.weight else ():
            for p, dim in ((adapter.a, 0), (adapter.b, 1)):
                if p.requires_grad and p.numel():
                    groups.setdefault((dim, p.shape, p.dtype, p.device), []).append(p)
        values = []
        for (dim, *_), params in groups.items():  # type: ignore[misc]
            for piece in pieces(params):
                part = params[piece]
                flat = part if part[0].ndim == 2 else [p.flatten(1) for p in part]
                value, slopes = penalty(flat, dim, self.form, 2 * len(adapters))
                _add(part, slopes, self.weight * scale)
                values.append(value)
        return self.weight * torch.stack(values).sum() if values else torch.zeros(())


def _add(params: Sequence[nn.Parameter], slopes: Tensor, factor: float) -> None:
    """Adds ``factor`` times the slopes, shape (k, ...), to the gradients of k tensors."""
    parts = slopes.to(params[0].dtype).view(-1, *params[0].shape).unbind(0)
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads: Any = [p.grad for p in params]
    torch._foreach_add_(grads, parts, alpha=factor)


def penalty(factors: Sequence[Tensor], dim: int, form: str, count: int) -> tuple[Tensor, Tensor]:
    """The penalty of factors of one shape, without its weight, and its gradient.

    Args:
        factors: k matrices.
        dim: Whether their ranks are their rows, 0, or columns, 1.
        form: ``norms`` or ``squares``.
        count: Factors that the mean of ``norms`` is taken over.

    Returns:
        A scalar, and the gradient in fp32, shape (k, ...).
    """
    side = torch.stack(list(factors)).float()
    gap = side @ side.mT if dim == 0 else side.mT @ side
    gap.diagonal(dim1=1, dim2=2).sub_(1.0)
    if form == "squares":
        value, slope = gap.square().sum(), gap.mul_(4.0)
    else:
        norms = torch.linalg.vector_norm(gap, dim=(1, 2))
        value, slope = norms.sum() / count, gap.mul_((2.0 / (count * norms.clamp_min(1e-12)))[:, None, None])
    return value, slope @ side if dim == 0 else side @ slope
