"""Data modules of the recipes: what they share, and handwritten digits as images.

Every batch is the dictionary that a transformers model takes. Training batches come from a `StatefulLoader`, so that a
resumed run sees the batches that were left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from apportion.loader import StatefulLoader

Sample = Mapping[str, Tensor]
Collate = Callable[[Sequence[Sample]], dict[str, Tensor]]


class Samples(pl.LightningDataModule):
    """Train, validation and test samples, whatever they are; the data modules below fill them in ``setup``.

    Args:
        batch_size: Samples per batch and rank.
        seed: Of the order of the training samples.
        num_workers: Processes that load training batches.
    """

    def __init__(self, batch_size: int = 32, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`{type(self).__name__}(batch_size={batch_size})` must be at least 1.")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.train: Sequence[Sample] = ()
        self.val: Sequence[Sample] = ()
        self.test: Sequence[Sample] = ()
        self.collate: Collate = stack

    def train_dataloader(self) -> StatefulLoader:
        """Shuffled batches whose order is a function of seed and epoch."""
        return StatefulLoader(
            self.train,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in file order."""
        return self._ordered(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in file order; the validation samples where no test file was given."""
        return self._ordered(self.test or self.val)

    def _ordered(self, samples: Sequence[Sample]) -> DataLoader[Any]:
        # A loader takes its workers' seed from the global random numbers unless it has a generator: evaluation must not
        # change what training draws next.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(samples, batch_size=self.batch_size, collate_fn=self.collate, generator=generator)  # type: ignore[arg-type]


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


def stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stacks samples of equal shapes into one batch."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
