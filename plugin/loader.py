"""A data loader that continues in the middle of an epoch exactly where it stopped."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


class Order(DistributedSampler[int]):
    """The order of one epoch's samples on one rank, a function of (seed, epoch) and nothing else, and a place in it.

        order = randperm(length; seed, epoch)[rank::world], without the first ``batches * batch_size``

    It is a `DistributedSampler` so that Lightning leaves it where it is, but it reads rank and world size when it is
    asked, not when it is made: loaders are often made before the processes know each other.

    Args:
        length: Number of samples of the data set.
        batch_size: Samples per batch and rank.
        shuffle: Whether to permute them anew in every epoch.
        seed: Of the permutations.
        drop_last: Whether to drop samples that do not fill a batch on every rank, instead of repeating the first ones.
        rank: Of this process; None for that of `torch.distributed`, or 0.
        world: Number of ranks; None for that of `torch.distributed`, or 1.

    Example:
        >>> [list(Order(5, batch_size=2, shuffle=False, rank=rank, world=2)) for rank in (0, 1)]
        [[0, 2, 4], [1, 3, 0]]
    """

    def __init__(
        self,
        length: int,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.batches = 0
        self._restored = False
        self._rank, self._world = rank, world

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Rank of this process."""
        if self._rank is not None:
            return self._rank
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of ranks."""
        if self._world is not None:
            return self._world
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def stride(self) -> int:
        """Samples that all ranks draw at once."""
        return self.batch_size * self.num_replicas

    @property
    def finished(self) -> bool:
        """Whether the epoch has no batch left."""
        total = len(self) / self.batch_size
        return self.batches >= (math.floor(total) if self.drop_last else math.ceil(total))

    @property
    def stream(self) -> int:
        """Seed of this epoch's generator; 32 bits, which is all that torch's CPU generator reads."""
        return (self.seed * 0x9E3779B1 + self.epoch) % 2**32

    def __len__(self) -> int:
        share = self.length / self.num_replicas
        return math.floor(share) if self.drop_last else math.ceil(share)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.stream)).tolist()
        else:
            order = list(range(self.length))
        total = len(self) * self.num_replicas
        padded = itertools.islice(itertools.cycle(order), total)
        return itertools.islice(padded, self.batches * self.stride + self.rank, None, self.num_replicas)

    def begin(self) -> None:
        """Settles where the next iteration starts: at the restored place, or at the start of this epoch or the next."""
        if self.finished:
            self.epoch += 1
            self.batches = 0
        elif not self._restored:
            self.batches = 0
        self._restored = False

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of ``epoch``, unless a restored place stands in the middle of it."""
        if self._restored and epoch == self.epoch and not self.finished:
            return
        self.epoch = epoch
        self.batches = 0
        self._restored = False

    def place(self) -> dict[str, int]:
        """Epoch, samples drawn over all ranks, and what the order depends on."""
        drawn = self.length if self.finished else self.batches * self.stride
        return {"epoch": self.epoch, "drawn": drawn, "length": self.length, "seed": self.seed}

    def restore(self, place: dict[str, int]) -> None:
        """Goes to ``place``, which may come from another number of ranks or another batch size."""
        finished = place["drawn"] >= place["length"]
        if place["drawn"] and not finished:
            self._check(place)
        self.epoch = place["epoch"]
        self.batches = math.ceil(len(self) / self.batch_size) if finished else place["drawn"] // self.stride
        self._restored = True

    def _check(self, place: dict[str, int]) -> None:
        for key, ours in (("length", self.length), ("seed", self.seed)):
            if place[key] != ours:
                raise ValueError(
                    f"`StatefulLoader` has {key} {ours}, but the saved state stands in the middle of an epoch of {key} "
                    f"{place[key]}: give the same data and seed, or resume from a checkpoint at the end of an epoch."
                )
        if again := place["drawn"] % self.stride:
            warnings.warn(
                f"{place['drawn']} samples of the epoch were drawn, which is no multiple of the {self.stride} that all "
                f"ranks now draw at once: the last {again} are seen again.",
                stacklevel=4,
            )


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
        sampler: Only for Lightning's ``overfit_batches``, which hands in a `SequentialSampler` to switch shuffling off.
        generator: Seeds the worker processes; set anew from (seed, epoch) in every epoch.
        **kwargs: Of `torch.utils.data.DataLoader`: ``num_workers``, ``collate_fn``, ``pin_memory`` ...

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
        sampler: object = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse(dataset, sampler, kwargs)
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.order = Order(len(dataset), batch_size, shuffle, seed, drop_last, rank, world)
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
        for batch in super().__iter__():
            self.order.batches += 1
            yield batch

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
