"""Where a task asks for an entry more than the pretrained model relies on it."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_importance(x: Tensor) -> Tensor:
    """How large each entry is among those of its tensor.

        R(x) = sigmoid((|x| - mean |x|) / std |x|)      std without bias, over the entries of the tensor

    Where all entries are of one size, as in a fresh norm or a tensor of one entry, none stands out and R is 1/2; where
    all are 0, R is 0. R is the same for c x as for x.

    Args:
        x: Weights or accumulated gradients, any shape.

    Returns:
        R in [0, 1], fp32, in the shape of ``x``; NaN throughout if an entry is not finite.

    Example:
        >>> relative_importance(torch.tensor([1.0, -2.0, 3.0, -4.0]))
        tensor([0.2383, 0.4044, 0.5956, 0.7617])
        >>> relative_importance(torch.ones(2)), relative_importance(torch.zeros(2))
        (tensor([0.5000, 0.5000]), tensor([0., 0.]))
    """
    sizes = x.float().abs()
    if sizes.numel() == 0:
        return sizes
    low, high = torch.aminmax(sizes)
    if not bool(high.isfinite()):
        return torch.full_like(sizes, torch.nan)
    if bool(low == high):
        return torch.full_like(sizes, 0.5 if bool(high > 0) else 0.0)
    sizes = sizes / high  # squares of small gradients would underflow
    deviation, mean = torch.std_mean(sizes)
    return sizes.sub_(mean).div_(deviation).sigmoid_()


def discrepancy(weight: Tensor, accumulated: Tensor) -> Tensor:
    """By how much the task's call for an entry exceeds its weight in the pretrained model.

        I = R(w),  G = R(A);   raw = G / (I + G) if I < G else 0      R: `relative_importance`

    Where it is not 0 it lies in (1/2, 1].

    Args:
        weight: The pretrained weights.
        accumulated: Sum or mean of gradients with their signs, in the weight's shape.

    Returns:
        The raw score, fp32, in the weight's shape; NaN throughout if an entry of either is not finite.

    Example:
        >>> discrepancy(torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([4.0, -3.0, 2.0, -1.0]))
        tensor([0.7617, 0.5956, 0.0000, 0.0000])

    References:
        Huang et al., *Learn from Downstream and Be Yourself in Multimodal Large Language Models Fine-Tuning*, ICML
        2025, https://arxiv.org/abs/2411.10928. Code: https://github.com/WenkeHuang/SPIDER
    """
    held, asked = relative_importance(weight), relative_importance(accumulated)
    return torch.where(held >= asked, 0.0, asked / (held + asked))


def blend_mask(weight: Tensor, accumulated: Tensor) -> Tensor:
    """The share of its training that each entry keeps; the rest of the way leads back to the pretrained value.

        M = min(1, raw / mean of the raw scores that are not 0)      raw: `discrepancy`

    All 0 if no raw score is above 0.

    Args:
        weight: The pretrained weights.
        accumulated: Sum or mean of gradients with their signs, in the weight's shape.

    Returns:
        M in [0, 1], fp32, in the weight's shape.

    Example:
        >>> blend_mask(torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([4.0, -3.0, 2.0, -1.0]))
        tensor([1.0000, 0.8777, 0.0000, 0.0000])

    References:
        Huang et al., *Learn from Downstream and Be Yourself in Multimodal Large Language Models Fine-Tuning*, ICML
        2025, https://arxiv.org/abs/2411.10928. Code: https://github.com/WenkeHuang/SPIDER
    """
    raw = discrepancy(weight, accumulated)
    above = torch.count_nonzero(raw)
    mean = raw.sum(dtype=torch.float64) / above.clamp(min=1)
    return (raw / mean.where(above > 0, 1.0).float()).clamp_(max=1.0)
