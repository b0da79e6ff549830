"""Scores as shares of what is at least as important in the same tensor, so that tensors compare without quotas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.candidates import Calibration, EntryScore, Site
from apportion.entrywise import Magnitude


@dataclass(frozen=True)
class Lamp:
    """Each score over the sum of those of its tensor that are not smaller.

        score(u) = u^p / sum of v^p over the entries v >= u of the same tensor

    Inside a tensor the order stays. Between tensors the scale no longer counts, and a tensor's largest entry, if no
    other equals it, scores 1: selected over the whole model, no tensor is left out while there are as many entries to
    select as tensors. Of t equal largest ones each scores 1/t. It needs what ``of`` needs, and is calibrated as it is.

    Args:
        of: The score that is normalised, of at least 0 everywhere.
        power: The exponent p, above 0: 2 for magnitudes, 1 for what is a square already, as `Fisher` is.

    Raises:
        ValueError: If an argument is out of its range, or if a score below 0 is met.

    Example:
        >>> Lamp().entries(Site("w", 0, torch.tensor([0.1, -0.2])))
        tensor([0.2000, 1.0000])

    References:
        Lee et al., *Layer-adaptive Sparsity for the Magnitude-based Pruning*, ICLR 2021,
        https://arxiv.org/abs/2010.07611
    """

    of: EntryScore = field(default_factory=Magnitude)
    power: float = 2.0

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        if getattr(self.of, "grain", None) != "entry":
            raise ValueError(f"`Lamp(of={self.of!r})` must be a score of entries, such as Magnitude().")
        if not 0.0 < self.power <= 4.0:
            raise ValueError(f"`Lamp(power={self.power!r})` must lie in (0, 4]: 2 squares the scores, 1 leaves them.")
        object.__setattr__(self, "needs", self.of.needs)

    @property
    def calibration(self) -> Calibration:
        """The calibration of the score that is normalised; there is none if that has none."""
        of: Any = self.of
        calibration: Calibration = of.calibration
        return calibration

    def term(self, grad: Tensor, weight: Tensor) -> Tensor:
        """What one gradient contributes to the score that is normalised."""
        of: Any = self.of
        term: Tensor = of.term(grad, weight)
        return term

    def entries(self, site: Site) -> Tensor:
        """Shares in [0, 1], fp32, in the weight's shape."""
        return lamp(self.of.entries(site), self.power)


def lamp(scores: Tensor, power: float = 2.0) -> Tensor:
    """Each score over the sum of those that are not smaller, in one tensor.

        out_i = u_i^p / sum over {j: u_j >= u_i} of u_j^p;   0 for u_i = 0

    Equal scores get equal shares. Sums are taken in fp64, largest first. Scores that are not finite become NaN and
    count in no sum.

    Args:
        scores: At least 0, any shape.
        power: The exponent p.

    Returns:
        Shares in [0, 1], fp32, in the shape of ``scores``.

    Raises:
        ValueError: If a score is below 0, where squares would turn the order round.

    Example:
        >>> lamp(torch.tensor([1.0, 2.0, 3.0])) * torch.tensor([14.0, 13.0, 1.0])
        tensor([1., 4., 1.])
    """
    flat = scores.reshape(-1).float()
    if bool((flat < 0).any()):
        raise ValueError(
            f"`lamp` met a score of {float(flat[flat < 0][0]):.3g}: shares need scores of at least 0, and neither a "
            "signed nor a reversed one."
        )
    finite = flat.isfinite()
    values, order = torch.where(finite, flat, 0.0).sort(descending=True)
    powers = values.double().pow_(power)
    # The last of a run of equal values has the sum over all that are not smaller.
    last = torch.searchsorted(-values, -values, right=True).sub_(1)
    shares = torch.where(powers > 0, powers / powers.cumsum(0)[last], 0.0)
    out = torch.empty_like(flat)
    out[order] = shares.float()
    return torch.where(finite, out, torch.nan).reshape(scores.shape)
