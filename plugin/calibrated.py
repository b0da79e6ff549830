"""Scores of entries from gradients that a calibration gathers before training. Higher is more important, always.

Each says with ``term`` what one gradient contributes; the mean of the terms is what ``entries`` reads as ``site.grad``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apportion.candidates import Calibration, Site
from apportion.discrepancy import discrepancy


def gathered(score: object, site: Site) -> Tensor:
    """The mean of the terms at ``site`` in fp32; raises `ValueError` with the ``score`` that asked if there is none."""
    if site.grad is None:
        raise ValueError(f"`{score!r}` reads what a calibration gathers, and `{site.name}` has none: calibrate first.")
    return site.grad.float()


class _Gathered:
    """What these scores have in common: the batches, and the mean of what each of them contributes."""

    batches: int
    mode: str
    per: str = "batch"

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        _ = self.calibration

    @property
    def calibration(self) -> Calibration:
        """The batches, one gradient for each, or for each of their samples."""
        try:
            return Calibration(self.batches, self.per, self.mode)
        except ValueError as error:  # quote the call that was made
            raise ValueError(str(error).replace("`Calibration(", f"`{type(self).__name__}(")) from None

    def term(self, grad: Tensor, weight: Tensor) -> Tensor:
        """g with its sign, fp32."""
        del weight
        return grad.float()

    def entries(self, site: Site) -> Tensor:
        """The mean of the terms, fp32, in the weight's shape."""
        return gathered(self, site)


@dataclass(frozen=True)
class Fisher(_Gathered):
    """The mean squared gradient: the diagonal of the empirical Fisher information, by batch or by sample.

        score = (1/B) sum_b g_b^2      g_b: gradient of the loss of batch, or sample, b

    The two are different quantities: gradients of 1 and 3 give 5 by sample, and 4 as one batch of two. Batches are
    one pass each, samples one pass for each example. Scores from different batch sizes compare by rank only.

    Args:
        batches: Batches to go through.
        per: ``batch`` squares the gradient of each batch's loss; ``sample`` that of each example by itself.
        mode: ``eval`` turns dropout off, ``train`` leaves it on.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> score, weight = Fisher(per="sample"), torch.zeros(1)
        >>> terms = [score.term(torch.tensor([g]), weight) for g in (1.0, 3.0)]
        >>> score.entries(Site("w", 0, weight, grad=sum(terms) / 2))
        tensor([5.])

    References:
        Sung, Nair, Raffel, *Training Neural Networks with Fixed Sparse Masks*, NeurIPS 2021,
        https://arxiv.org/abs/2111.09839 (by sample). He et al., *Sensitivity-Aware Visual Parameter-Efficient
        Fine-Tuning*, ICCV 2023, https://arxiv.org/abs/2303.08566 (by batch, in train mode)
    """

    batches: int = 16
    per: str = "batch"
    mode: str = "eval"

    def term(self, grad: Tensor, weight: Tensor) -> Tensor:
        """g^2, fp32."""
        del weight
        return grad.float().square()


@dataclass(frozen=True)
class MeanGradient(_Gathered):
    """The size of the gradient over several batches, whose signs may cancel.

        score = |(1/B) sum_b g_b|;   |w (1/B) sum_b g_b| if ``times_weight``

    Args:
        batches: Batches to go through.
        mode: ``eval`` turns dropout off, ``train`` leaves it on.
        times_weight: Whether to multiply with the weight, as `Snip` does.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> MeanGradient(times_weight=True).entries(Site("w", 0, torch.tensor([2.0]), grad=torch.tensor([-3.0])))
        tensor([6.])

    References:
        Song et al., *Sparse is Enough in Fine-tuning Pre-trained Large Language Models*, ICML 2024,
        https://arxiv.org/abs/2312.11875 (one batch). Bhardwaj et al., *Sparse High Rank Adapters*, NeurIPS 2024,
        https://arxiv.org/abs/2406.13175 (with and without the weight)
    """

    batches: int = 16
    mode: str = "eval"
    times_weight: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"calibration", "weight"})

    def entries(self, site: Site) -> Tensor:
        """|mean g| or |w mean g|, fp32, in the weight's shape."""
        mean = gathered(self, site)
        return (mean * site.weight.float()).abs_() if self.times_weight else mean.abs()


@dataclass(frozen=True)
class Discrepancy(_Gathered):
    """By how much the task's call for an entry exceeds its weight in the pretrained model.

        score = discrepancy(w, (1/B) sum_b g_b)      in 0 and (1/2, 1]

    About half of all entries score 0: they are told apart by their index alone, so ask for fewer than half. The paper
    below gathers gradients while it trains and blends instead of selecting (`blend_mask`); this is the score of its
    first steps, measured before any, to be used with a hard selection.

    Args:
        batches: Batches to go through.
        mode: ``eval`` turns dropout off, ``train`` leaves it on.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> weight, mean = torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([4.0, -3.0, 2.0, -1.0])
        >>> Discrepancy().entries(Site("w", 0, weight, grad=mean))
        tensor([0.7617, 0.5956, 0.0000, 0.0000])

    References:
        Huang et al., *Learn from Downstream and Be Yourself in Multimodal Large Language Models Fine-Tuning*, ICML
        2025, https://arxiv.org/abs/2411.10928. Code: https://github.com/WenkeHuang/SPIDER
    """

    batches: int = 16
    mode: str = "eval"

    needs: ClassVar[frozenset[str]] = frozenset({"calibration", "weight"})

    def entries(self, site: Site) -> Tensor:
        """The raw score, fp32, in the weight's shape; the scale of the gradients plays no part."""
        return discrepancy(site.weight, gathered(self, site))


@dataclass(frozen=True)
class TaylorChannel(_Gathered):
    """What the loss would lose or win, to first order, without an output channel: the mean of its size over batches.

        I_c = (1/B) sum_b |sum_j w_cj g_b,cj| = (1/B) sum_b |sum_t a_tc dL_b/da_tc|      for a = x W^T, bias left out
        score_cj = I_c / (entries of row c)

    The absolute value stands outside the sum over tokens t and inside the mean over batches, so it cannot be taken by
    pooling afterwards. Each entry gets an equal part of its row: ``Rows(pool="sum")`` adds them up to I_c again. Rows
    are the first dimension, as they are in `Linear` and convolutions; a bias or a norm has rows of one entry.

    Args:
        batches: Batches to go through.
        mode: ``eval`` turns dropout off, ``train`` leaves it on.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> x, outer = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> TaylorChannel().term(grad=outer.T @ x, weight=torch.eye(2)).sum(1)
        tensor([4., 2.])

    References:
        Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*, ICLR 2017,
        https://arxiv.org/abs/1611.06440. Zhao et al., *Revisit Parameter-Efficient Transfer Learning: A Two-Stage
        Paradigm*, 2023, https://arxiv.org/abs/2303.07910 (an importance of this kind; its exact form is not published)
    """

    batches: int = 16
    mode: str = "eval"

    def term(self, grad: Tensor, weight: Tensor) -> Tensor:
        """|sum of g w over the row| / (entries of the row), the same for all of its entries, fp32."""
        effects = (grad.float() * weight.float()).reshape(weight.shape[0] if weight.ndim else 1, -1)
        return (
            effects.sum(1, keepdim=True)
            .abs_()
            .div_(effects.shape[1])
            .expand_as(effects)
            .contiguous()
            .reshape(weight.shape)
        )
