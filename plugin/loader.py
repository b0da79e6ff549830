"""A data loader that continues in the middle of an epoch exactly where it stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from apportion.order import Order


class StatefulLoader(DataLoader[Any]):
    """A `DataLoader` with ``state_dict``: a run stopped in mid-epoch goes on with the batches that were left.

    The order is a function of (seed, epoch); the state is the place in it. Neither making an iterator nor drawing from
    it reads the global random numbers. Lightning saves and restores the state by itself; in a loop of your own, save
    ``state_dict()`` beside the model and call ``load_state_dict`` before the first batch. An epoch follows the one
    before by itself, or is named by ``set_epoch``. Ranks share the samples out among themselves, and the state of one
    is that of all: it counts samples over all ranks, so a run may go on with another number of ranks or batch size.

    Random transforms inside worker processes are seeded anew at a resume: those are repeatable, but not continued.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        batch_size: Samples per batch and rank.
        shuffle: Whether to permute the samples anew in every epoch.
        seed: Of the permutations; the same on all ranks.
        drop_last: Whether to drop a last batch that is not full.
        rank: Of this process; None for that of `torch.distributed`, or 0.
        world: Number of ranks; None for that of `torch.distributed`, or 1.
        lengths: Of the samples, to shuffle them so that those of a batch are of about one length; None for any.
        weights: Of the samples, such as their tokens. Each batch, a dictionary, gets a ``weight`` then: the mean weight
            of the batches of its optimizer step over all ranks. A sum of losses divided by it makes every token of the
            step count the same.
        window: Batches of an optimizer step on each rank, as accumulated; it matters with ``weights`` only.
        sampler: Only for Lightning's ``overfit_batches``, which hands in a `SequentialSampler` to switch shuffling off.
        generator: Seeds the worker processes; set anew from (seed, epoch) in every epoch.
        **kwargs: Of `torch.utils.data.DataLoader`: ``num_workers``, ``collate_fn``, ``pin_memory`` ...

    Attributes:
        limit: Batches of an epoch that are drawn at most, as Lightning's ``limit_train_batches``; None for all. With
            ``weights``, the last step of such an epoch has fewer batches.

    Raises:
        TypeError: If ``dataset`` has no length.
        ValueError: If a sampler or batch sampler with an order of its own is handed in.

    Example:
        >>> loader = StatefulLoader(range(6), batch_size=2, shuffle=True, seed=1)
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> state = loader.state_dict()
        >>> again = StatefulLoader(range(6), batch_size=2, shuffle=True, seed=1)
        >>> again.load_state_dict(state)
        >>> [b.tolist() for b in again] == [b.tolist() for b in batches]
        True
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world: int | None = None,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        window: int = 1,
        sampler: object = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse(dataset, sampler, kwargs)
        for name, values in (("lengths", lengths), ("weights", weights)):
            if values is not None and len(values) != len(dataset):
                raise ValueError(f"`StatefulLoader({name}=...)` holds {len(values)} values for {len(dataset)} samples.")
        if window < 1:
            raise ValueError(f"`StatefulLoader(window={window})` must be at least 1: it is a number of batches.")
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.lengths, self.weights, self.window = lengths, weights, window
        self.limit: int | None = None
        self.order = Order(len(dataset), batch_size, shuffle, seed, drop_last, rank, world, lengths)
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=self.order,
            drop_last=drop_last,
            generator=generator or torch.Generator(),
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches that are left of this epoch, or, when none is, those of the next.

        Nothing happens before the first batch is drawn: Lightning makes its iterator before it names the epoch.
        """
        self.order.begin()
        self.generator.manual_seed(self.order.stream)
        means = self._means() if self.weights is not None else itertools.repeat(None)
        for batch, mean in zip(super().__iter__(), means, strict=False):
            self.order.batches += 1
            yield batch if mean is None else {**batch, "weight": mean}

    def _means(self) -> Iterator[float]:
        """For each batch that is left, the mean weight of the batches of its optimizer step."""
        assert self.weights is not None
        drawn = itertools.islice(self.order.all(), self.order.total * self.order.stride)
        weights = [self.weights[i] for i in drawn]
        if self.limit is not None:
            del weights[self.limit * self.order.stride :]
        size = self.window * self.order.stride
        for batch in itertools.count(self.order.batches):
            start = batch // self.window * size
            yield sum(weights[start : start + size]) / (self.window * self.order.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of ``epoch``, unless a restored state stands in the middle of it."""
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: epoch, samples drawn over all ranks, and what the order depends on."""
        return self.order.place()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes where ``state`` says, from the next first batch on.

        Raises:
            ValueError: If the state stands in the middle of an epoch of other data or of another seed.
        """
        self.order.restore(state)


def _refuse(dataset: object, sampler: object, kwargs: dict[str, Any]) -> None:
    """Refuses what would bring an order of its own."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`StatefulLoader({type(dataset).__name__})` needs a data set with `__len__`: a stream keeps its own place."
        )
    if not (sampler is None or isinstance(sampler, SequentialSampler)) or kwargs.pop("batch_sampler", None) is not None:
        raise ValueError(
            "`StatefulLoader(sampler=..., batch_sampler=...)` owns its order: use `shuffle`, `seed`, `rank`, `world`, "
            "or a plain `DataLoader`, as for `Trainer.predict`."
        )
