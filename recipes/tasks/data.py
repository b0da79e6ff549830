"""Data modules of the recipes: what they share.

Every batch is the dictionary that a transformers model takes. Training batches come from a `StatefulLoader`, so that a
resumed run sees the batches that were left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from apportion.loader import StatefulLoader
from apportion.recipes.tasks import fits
from apportion.recipes.tasks.columns import BadRow
from apportion.recipes.tasks.formats import Row
from apportion.recipes.tasks.source import SPLITS, Source, Split

Sample = Mapping[str, Any]
"""Tensors by the names under which a model takes them; what is no tensor stays with the metrics."""
Collate = Callable[[Sequence[Sample]], dict[str, Any]]
_SHOWN = 5  # bad rows


class Samples(pl.LightningDataModule):
    """Train, validation and test samples, whatever they are; the data modules below fill them in ``setup``.

    Args:
        batch_size: Samples per batch and rank.
        seed: Of the order of the training samples.
        num_workers: Processes that load training batches.
        bucket: Whether a batch holds samples of about one length.
    """

    def __init__(self, batch_size: int = 32, seed: int = 0, num_workers: int = 0, bucket: bool = False) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`{type(self).__name__}(batch_size={batch_size})` must be at least 1.")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.bucket = bucket
        self.train: Sequence[Sample] = ()
        self.val: Sequence[Sample] = ()
        self.test: Sequence[Sample] = ()
        self.collate: Collate = stack

    def train_dataloader(self) -> StatefulLoader:
        """Shuffled batches whose order is a function of seed and epoch.

        Where a step of the optimizer takes several batches, each is told the mean number of tokens that count in them.
        """
        window, world = (self.trainer.accumulate_grad_batches, self.trainer.world_size) if self.trainer else (1, 1)
        counts = [self.tokens(sample) for sample in self.train] if window * world > 1 else []
        self._refuse_windows_that_change()
        loader = StatefulLoader(
            self.train,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            lengths=[self.extent(sample) for sample in self.train] if self.bucket else None,
            weights=[count for count in counts if count is not None] or None,
            window=window,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        if self.trainer:
            limit = self.trainer.limit_train_batches
            loader.limit = int(limit if isinstance(limit, int) else len(loader) * limit)
        return loader

    def _refuse_windows_that_change(self) -> None:
        """Refuses a number of batches to a step that changes while the tokens of a step are to count the same."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        if any(hasattr(one, "scheduling") for one in callbacks) and self.train and self.tokens(self.train[0]):
            raise ValueError(
                "`GradientAccumulationScheduler`: the batches of a step are told how many tokens they have together, "
                "for a number of batches that stays the same. Use `trainer.accumulate_grad_batches`."
            )

    def tokens(self, sample: Sample) -> int | None:
        """Tokens that the loss of a sample is the mean of; None where each sample counts the same."""
        return None

    def extent(self, sample: Sample) -> int:
        """What ``bucket`` sorts by: the number of tokens."""
        return len(sample["input_ids"])

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in the order of the file; samples of like length together, with ``bucket``."""
        return self._ordered(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in the same order; the validation samples where no test file was given."""
        return self._ordered(self.test or self.val)  # one without samples is refused at set-up

    def _ordered(self, samples: Sequence[Sample]) -> DataLoader[Any]:
        # A loader takes its workers' seed from the global random numbers unless it has a generator: evaluation must not
        # change what training draws next.
        generator = torch.Generator().manual_seed(self.seed)
        if self.bucket:
            samples = self._bucketed(samples)
        return DataLoader(samples, batch_size=self.batch_size, collate_fn=self.collate, generator=generator)  # type: ignore[arg-type]

    def _bucketed(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples of like length side by side, batch by batch in an order that says nothing of their length.

        A Trainer may be told to look at the first batches only.
        """
        by_extent = sorted(samples, key=self.extent)
        whole = len(by_extent) // self.batch_size
        order = torch.randperm(whole, generator=torch.Generator().manual_seed(self.seed)).tolist()
        batches = [by_extent[i * self.batch_size : (i + 1) * self.batch_size] for i in (*order, whole)]
        return [sample for batch in batches for sample in batch]


class RowData(Samples):
    """Samples made from rows, each of which is checked: bad ones are counted, and the first few are shown.

    A data module of a task says in ``prepare`` what it needs once, in ``samples`` what a row becomes, and in
    ``arrange`` what is done with all samples of a split.

    Args:
        train: Split on the hub, file, or list of rows, as in `apportion.recipes.tasks.source.Source`.
        val: The same for validation; None to hold training samples out.
        test: The same for the test; None to test on the validation samples.
        batch_size: Samples per batch and rank.
        bucket: Whether a batch holds samples of about one length.
        seed: Of the order of the training samples.
        num_workers: Processes that load training batches.
        bad_rows: Rows of a split that may be left out with a warning; more of them are an error.
        reader: The kind of source.
        **source: Of `source.Source`: ``path``, ``name``, ``columns``, ``holdout``, ``limit`` ...

    Raises:
        FileNotFoundError: If a file is missing, at set-up.
        ValueError: If there are bad rows, or none, at set-up.
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        batch_size: int = 32,
        bucket: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        bad_rows: int = 0,
        reader: type[Source] = Source,
        **source: Any,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, bucket)
        self.bad_rows = bad_rows
        self.source = reader(train, val, test, **source)

    def setup(self, stage: str) -> None:
        """Reads, checks and prepares all splits, once."""
        if self.train:
            return
        rows = self.source.read()
        self.prepare()
        self.train, self.val, self.test = (self._made(split, rows[split]) for split in SPLITS)

    def prepare(self) -> None:
        """Loads what samples are made with, such as a tokenizer."""

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The samples of a row.

        Raises:
            BadRow: If the row cannot be used.
        """
        raise NotImplementedError

    def arrange(self, samples: list[Sample], split: str) -> list[Sample]:
        """The samples of a split as they are drawn."""
        return samples

    def model_setting(self, name: str) -> int | None:
        """A number of the configuration of the model that is being trained; None if there is none yet."""
        found: int | None = getattr(getattr(self._model(), "config", None), name, None)
        return found

    def _model(self) -> Any:
        """The transformers model that is being trained; None if there is none yet."""
        module = self.trainer.lightning_module if self.trainer else None
        return getattr(module, "model", None)

    def _made(self, split: str, rows: Sequence[Row]) -> list[Sample]:
        made: list[Sample] = []
        wrong: list[str] = []
        for row in rows:
            try:
                made.extend(self.samples(row, split))
            except BadRow as error:
                wrong.append(f"{row.place} {error}")
        where = self.source.where(split)
        if wrong:
            more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
            told = "\n  ".join([f"{where}: {len(wrong)} of {len(rows)} rows are bad.", *wrong[:_SHOWN], *more])
            if len(wrong) == len(rows):
                raise ValueError(f"{told}\nNone is left: name other columns or another file.")
            if len(wrong) > self.bad_rows:
                raise ValueError(f"{told}\nCorrect them, or leave them out: `data.bad_rows={len(wrong)}`.")
            warnings.warn(f"{told}\nThey are left out.", stacklevel=2)
        made = self.arrange(made, split)
        if not made and (rows or split == "train" or isinstance(getattr(self.source, split), str)):
            raise ValueError(f"{where}: none of {len(rows)} rows gives a sample.")
        if (model := self._model()) is not None:
            fits.check(model, made, where)
        return made


def stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stacks samples of equal shapes into one batch."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
