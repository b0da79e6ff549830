"""Scores of single entries from one weight and one gradient, or from neither. Higher is more important, always."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apportion.candidates import Site


def gradient_of(score: object, site: Site) -> Tensor:
    """The gradient at ``site`` in fp32; raises `ValueError` with the ``score`` that asked if there is none."""
    if site.grad is None:
        raise ValueError(f"`{score!r}` reads a gradient, and `{site.name}` has none: score it after a backward pass.")
    return site.grad.float()


def stream(site: Site, *keys: int) -> torch.Generator:
    """A CPU generator that only the seed, the place of the tensor and ``keys`` decide about: equal on all ranks."""
    digest = hashlib.sha256(repr((site.seed, site.index, *keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


@dataclass(frozen=True)
class Magnitude:
    """How large a weight is.

        score = |w|;   -|w| if ``reverse``

    Args:
        reverse: Makes the smallest weights the important ones.

    Example:
        >>> Magnitude().entries(Site("w", 0, torch.tensor([0.5, -2.0, 0.0])))
        tensor([0.5000, 2.0000, 0.0000])

    References:
        Liao, Meng, Monz, *Parameter-Efficient Fine-Tuning without Introducing New Latency*, ACL 2023,
        https://arxiv.org/abs/2305.16742 (the smallest ones)
    """

    reverse: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    grain: ClassVar[str] = "entry"

    def entries(self, site: Site) -> Tensor:
        """|w| or -|w|, fp32, in the weight's shape."""
        sizes = site.weight.float().abs()
        return sizes.neg_() if self.reverse else sizes


@dataclass(frozen=True)
class GradientMagnitude:
    """How much the loss changes with a weight.

        score = |g|

    Example:
        >>> GradientMagnitude().entries(Site("w", 0, torch.zeros(2), grad=torch.tensor([0.5, -2.0])))
        tensor([0.5000, 2.0000])

    References:
        Song et al., *Sparse is Enough in Fine-tuning Pre-trained Large Language Models*, ICML 2024,
        https://arxiv.org/abs/2312.11875
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    grain: ClassVar[str] = "entry"

    def entries(self, site: Site) -> Tensor:
        """|g|, fp32, in the weight's shape."""
        return gradient_of(self, site).abs()


@dataclass(frozen=True)
class D3:
    """A large gradient counts for more on a small weight.

        score = |g| / (|w| + eps)^exp

    An exponent of 0 leaves the gradient alone, a large one ranks almost by smallness, a negative one favours large
    weights.

    Args:
        exp: The exponent, in [-8, 8].
        eps: Added to |w|; at least 0, and above 0 if ``exp`` is, since weights of 0 would score infinity.

    Raises:
        ValueError: If an argument is out of its range, or if ``eps^-exp`` is beyond 1e30 and scores could overflow.

    Example:
        >>> weight, grad = torch.tensor([0.5, -0.1, 0.0, 2.0]), torch.tensor([0.1, -0.2, 0.05, -0.4])
        >>> D3(exp=1.0, eps=0.1).entries(Site("w", 0, weight, grad))
        tensor([0.1667, 1.0000, 0.5000, 0.1905])

    References:
        Agarwal et al., *Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models*, TACL 13,
        2025, https://arxiv.org/abs/2408.14470. Code: https://github.com/Aradhye2002/selective-peft-toolkit
    """

    exp: float = 1.0
    eps: float = 1e-3

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "grad"})
    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        if not -8.0 <= self.exp <= 8.0:
            raise ValueError(f"`D3(exp={self.exp!r})` must lie in [-8, 8]: Magnitude(reverse=True) ranks by smallness.")
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"`D3(eps={self.eps!r})` must be at least 0 and finite: it is added to |w|.")
        if self.exp > 0.0 and (self.eps == 0.0 or -self.exp * math.log10(self.eps) > 30.0):
            raise ValueError(
                f"`D3(exp={self.exp!r}, eps={self.eps!r})` gives weights of 0 scores that fp32 cannot hold, and they "
                "would never be selected: raise `eps` until eps^-exp is at most 1e30."
            )

    def entries(self, site: Site) -> Tensor:
        """|g| / (|w| + eps)^exp, fp32, in the weight's shape."""
        divisor = site.weight.float().abs().add_(self.eps).pow_(self.exp)
        return gradient_of(self, site).abs().div_(divisor)


@dataclass(frozen=True)
class Snip:
    """How much the loss would change, to first order, if a weight were 0.

        score = |g w|

    Example:
        >>> Snip().entries(Site("w", 0, torch.tensor([2.0, -3.0]), grad=torch.tensor([0.5, 1.0])))
        tensor([1., 3.])

    References:
        Lee, Ajanthan, Torr, *SNIP: Single-shot Network Pruning based on Connection Sensitivity*, ICLR 2019,
        https://arxiv.org/abs/1810.02340
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "grad"})
    grain: ClassVar[str] = "entry"

    def entries(self, site: Site) -> Tensor:
        """|g w|, fp32, in the weight's shape."""
        return (gradient_of(self, site) * site.weight.float()).abs_()


@dataclass(frozen=True)
class Taylor:
    """The signed first-order effect of an entry, to be pooled over rows with ``abs_sum``.

        score = g w

    Summed over row c of a linear layer a = x W^T + b it is the effect of the channel's part without bias, over all
    tokens t, since dL/dW_cj = sum_t dL/da_tc x_tj:

        sum_j g_cj w_cj = sum_t (a_tc - b_c) dL/da_tc

    so that ``Rows(pool="abs_sum")`` ranks channels by what the loss would lose or win, to first order, without them.
    Entry by entry the sign makes it an order of no use: that is `Snip`. `TaylorChannel` takes the absolute value batch
    by batch, before averaging.

    Example:
        >>> Taylor().entries(Site("w", 0, torch.tensor([[2.0, -3.0]]), grad=torch.tensor([[0.5, 1.0]])))
        tensor([[ 1., -3.]])

    References:
        Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*, ICLR 2017,
        https://arxiv.org/abs/1611.06440
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "grad"})
    grain: ClassVar[str] = "entry"

    def entries(self, site: Site) -> Tensor:
        """g w with its sign, fp32, in the weight's shape."""
        return gradient_of(self, site) * site.weight.float()


@dataclass(frozen=True)
class RandomEntries:
    """Every entry is as likely as any other: the bar for every other score.

        score ~ uniform on [0, 1), in steps of 2^-24

    Drawn tensor by tensor from the seed of the selection and the place of the tensor, so that ranks agree and the
    order of the tensors plays no part. Of equal draws the lower index wins: among N entries about N / 2^24 share the
    draw of the last one selected.

    Args:
        redraw: Whether every optimizer step that asks has a draw of its own; otherwise all have the same.

    Example:
        >>> site = Site("w", 0, torch.zeros(100, 100))
        >>> bool((RandomEntries().entries(site) == RandomEntries().entries(site)).all())
        True
    """

    redraw: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "entry"

    def entries(self, site: Site) -> Tensor:
        """Uniform numbers, fp32, in the weight's shape, on its device."""
        generator = stream(site, site.step) if self.redraw else stream(site)
        return torch.rand(site.weight.shape, generator=generator, dtype=torch.float32).to(site.weight.device)


def wagle(weight: Tensor, forget: Tensor, retain: Tensor, mu: float) -> Tensor:
    """What setting a weight to 0 does to what is to be forgotten, once the others have made up for what is retained.

        score = |(w - g_r / mu) g_f|

    Without a retain gradient it is |w g_f|. The smaller ``mu``, the more it is |g_r g_f| alone: weights that matter to
    both sets. It takes two calibrations, so it is a function for offline use and not a slot.

    Args:
        weight: The weights.
        forget: Mean gradient of the loss on what is to be forgotten, in the weight's shape.
        retain: Mean gradient of the loss on what is to be retained, in the weight's shape.
        mu: Curvature of the retain loss, above 0, the same for all weights.

    Returns:
        Scores, fp32, in the weight's shape.

    Raises:
        ValueError: If ``mu`` is out of its range.

    Example:
        >>> weight, forget, retain = torch.tensor([[2.0, -1.0, 0.5], [1.0, 2.0, -4.0], [0.5, 0.0, 1.0]])
        >>> wagle(weight, forget, retain, mu=1.0)
        tensor([1.5000, 2.0000, 2.0000])

    References:
        Jia et al., *WAGLE: Strategic Weight Attribution for Effective and Modular Unlearning in Large Language Models*,
        NeurIPS 2024, https://arxiv.org/abs/2410.17509. Code: https://github.com/OPTML-Group/WAGLE
    """
    if not mu > 0.0:
        raise ValueError(f"`wagle(mu={mu!r})` must be above 0: it is a curvature that divides the retain gradient.")
    return (weight.float() - retain.float() / mu).mul_(forget.float()).abs_()
