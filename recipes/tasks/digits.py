"""Handwritten digits as images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apportion.recipes.tasks.data import Samples


class DigitsData(Samples):
    """Scikit-learn's 1797 handwritten digits, 8 x 8 pixels, as images: real data without a network.

    Args:
        size: Side of the square images; digits are enlarged to it without smoothing.
        channels: 1, or 3 for models that expect colour.
        shift: Applied once to all images, float in [-1, 1], shape (n, channels, size, size); makes a task of its own.
        classes: Digits to keep, renumbered from 0 in this order; None for all ten.
        holdout: Fraction of the samples in each of validation and test.
        split_seed: Of the split; kept apart from ``seed`` so that seeds are compared on one split.
        batch_size: Samples per batch and rank.
        seed: Of the order of the training samples.
        num_workers: Processes that load training batches.

    Raises:
        ValueError: If ``channels`` is not 1 or 3, ``size`` is no multiple of 8, or ``holdout`` is not in (0, 0.5).
    """

    def __init__(
        self,
        size: int = 8,
        channels: int = 1,
        shift: Callable[[Tensor], Tensor] | None = None,
        classes: Sequence[int] | None = None,
        holdout: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if channels not in (1, 3):
            raise ValueError(f"`DigitsData(channels={channels})` must be 1 or 3.")
        if size < 8 or size % 8:
            raise ValueError(f"`DigitsData(size={size})` must be a multiple of 8, the side of the scanned digits.")
        if not 0.0 < holdout < 0.5:
            raise ValueError(f"`DigitsData(holdout={holdout})` must lie in (0, 0.5): it is taken twice.")
        self.size, self.channels, self.shift, self.classes = size, channels, shift, classes
        self.holdout, self.split_seed = holdout, split_seed

    def setup(self, stage: str) -> None:
        """Reads, shifts and splits the digits."""
        images, labels = self._read()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        held = int(self.holdout * len(labels))
        samples = [{"pixel_values": images[i], "labels": labels[i]} for i in order.tolist()]
        self.test, self.val, self.train = samples[:held], samples[held : 2 * held], samples[2 * held :]

    def _read(self) -> tuple[Tensor, Tensor]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError('`DigitsData` needs scikit-learn: `pip install "apportion[demo]"`.') from error
        raw = load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8.0 - 1.0  # 16 grey levels to [-1, 1]
        factor = self.size // 8
        images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3).repeat(1, self.channels, 1, 1)
        labels = torch.tensor(raw.target, dtype=torch.int64)
        if self.classes is not None:
            kept = torch.tensor(list(self.classes))
            chosen = torch.isin(labels, kept)
            images, labels = images[chosen], (labels[chosen][:, None] == kept).int().argmax(1)
        return (self.shift(images) if self.shift else images), labels
