"""Metrics that torchmetrics does not have as they are needed here, and what keeps all of them exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix


class Kept(nn.ModuleDict):
    """Metrics whose counts and sums stay in the precision that they began with.

    A model that is converted to 16 bits takes its metrics along, and a sum in bfloat16 stops to grow after a few
    hundred batches.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> nn.ModuleDict({"metrics": Kept({"loss": MeanMetric()})}).to(torch.bfloat16)["metrics"]["loss"].dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)


class Majority(Metric):
    """Share of the most frequent class: the accuracy of who always says the same.

    Args:
        classes: Number of classes.

    Example:
        >>> majority = Majority(3)
        >>> majority.update(torch.tensor([2, 0, 2]))
        >>> majority.update(torch.tensor([2]))
        >>> majority.compute()
        tensor(0.7500)
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(classes), dist_reduce_fx="sum")

    def update(self, labels: Tensor) -> None:
        """Counts labels. Shape: (n,)."""
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The share."""
        return self.counts.max() / self.counts.sum()


class Matthews(MulticlassConfusionMatrix):
    """Matthews' correlation between what was chosen and what is right.

        (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))

    with s samples, c of them right, p_k of them chosen and t_k of them being class k. It is 0 where one class alone was
    chosen, or is right; the one of torchmetrics is not, for two classes.

    Args:
        classes: Number of classes.

    Example:
        >>> matthews = Matthews(2)
        >>> matthews.update(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 0]))
        >>> matthews.compute()
        tensor(0.)
        >>> matthews.update(torch.tensor([0]), torch.tensor([0]))
        >>> matthews.compute()
        tensor(0.5774)

    References:
        Gorodkin, *Comparing two K-category assignments by a K-category correlation coefficient*, Computational Biology
        and Chemistry, 2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes)

    def compute(self) -> Tensor:
        """The correlation, in [-1, 1]."""
        counts = self.confmat.double()
        right, chosen, all_of = counts.sum(1), counts.sum(0), counts.sum()
        spread = (all_of**2 - chosen @ chosen) * (all_of**2 - right @ right)
        found = (counts.trace() * all_of - chosen @ right) / spread.sqrt()
        return torch.where(spread > 0, found, 0.0).float()
