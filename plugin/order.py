"""The order in which the samples of an epoch are drawn, and a place in it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.utils.data.distributed import DistributedSampler

_POOL = 50  # steps whose samples are sorted together


def by_length(order: Sequence[int], lengths: Sequence[int], stride: int, generator: torch.Generator) -> list[int]:
    """The same samples, so that those drawn together are of about one length, and lengths come in no order.

    Pools of 50 strides are sorted each by length; then whole strides change places, and a rest stays the last.

    Args:
        order: A permutation of the samples.
        lengths: Of each sample.
        stride: Samples that all ranks draw at once.
        generator: Draws the places.

    Example:
        >>> by_length([0, 1, 2, 3, 4], [9, 1, 8, 2, 5], stride=2, generator=torch.Generator().manual_seed(1))
        [4, 2, 1, 3, 0]
    """
    pool = _POOL * stride
    near = [
        i for start in range(0, len(order), pool) for i in sorted(order[start : start + pool], key=lengths.__getitem__)
    ]
    whole = len(near) // stride
    places = torch.randperm(whole, generator=generator).tolist()
    return [i for place in places for i in near[place * stride : (place + 1) * stride]] + near[whole * stride :]


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
        lengths: Of the samples, to shuffle them so that those of a batch are of about one length; None for any.

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
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.length = length
        self.lengths = lengths
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
    def total(self) -> int:
        """Batches of the epoch on each rank."""
        batches = len(self) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    @property
    def sorted(self) -> bool:
        """Whether samples are drawn by length, so that the order depends on the stride."""
        return self.shuffle and self.lengths is not None

    @property
    def finished(self) -> bool:
        """Whether the epoch has no batch left."""
        return self.batches >= self.total

    @property
    def stream(self) -> int:
        """Seed of this epoch's generator; 32 bits, which is all that torch's CPU generator reads."""
        return (self.seed * 0x9E3779B1 + self.epoch) % 2**32

    def __len__(self) -> int:
        share = self.length / self.num_replicas
        return math.floor(share) if self.drop_last else math.ceil(share)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.all(), self.batches * self.stride + self.rank, None, self.num_replicas)

    def all(self) -> Iterator[int]:
        """The samples of the epoch over all ranks, a stride after the other."""
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.stream)
            order = torch.randperm(self.length, generator=generator).tolist()
            if self.lengths is not None:
                order = by_length(order, self.lengths, self.stride, generator)
        return itertools.islice(itertools.cycle(order), len(self) * self.num_replicas)

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
        place = {"epoch": self.epoch, "drawn": drawn, "length": self.length, "seed": self.seed}
        return place | ({"stride": self.stride} if self.sorted else {})

    def restore(self, place: dict[str, int]) -> None:
        """Goes to ``place``, which may come from another number of ranks or another batch size."""
        finished = place["drawn"] >= place["length"]
        if place["drawn"] and not finished:
            self._check(place)
        self.epoch = place["epoch"]
        self.batches = self.total if finished else place["drawn"] // self.stride
        self._restored = True

    def _check(self, place: dict[str, int]) -> None:
        for key, ours in (("length", self.length), ("seed", self.seed)):
            if place[key] != ours:
                raise ValueError(
                    f"`StatefulLoader` has {key} {ours}, but the saved state stands in the middle of an epoch of {key} "
                    f"{place[key]}: give the same data and seed, or resume from a checkpoint at the end of an epoch."
                )
        stride = self.stride if self.sorted else None
        if place.get("stride") != stride:
            raise ValueError(
                f"`StatefulLoader` draws {_sizes(stride)}, but the saved state stands in the middle of an epoch of "
                f"{_sizes(place.get('stride'))}: the order by length depends on it. Give the same `lengths`, batch "
                "size and number of ranks, or resume from a checkpoint at the end of an epoch."
            )
        if again := place["drawn"] % self.stride:
            warnings.warn(
                f"{place['drawn']} samples of the epoch were drawn, which is no multiple of the {self.stride} that all "
                f"ranks now draw at once: the last {again} are seen again.",
                stacklevel=4,
            )


def _sizes(stride: int | None) -> str:
    return "samples of any length together" if stride is None else f"{stride} samples of about one length together"
