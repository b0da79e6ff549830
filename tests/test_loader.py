"""The stateful loader: what is left after a stop is what comes after a resume."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, SequentialSampler

from apportion.loader import StatefulLoader

MakeTrainer = Callable[..., pl.Trainer]
LENGTHS = [7 * i % 20 for i in range(20)]


def loader(n: int = 20, **kwargs: Any) -> StatefulLoader:
    return StatefulLoader(list(range(n)), **({"batch_size": 3, "shuffle": True, "seed": 7} | kwargs))


def stream(source: StatefulLoader) -> Iterator[list[int]]:
    """Batches of one epoch after the other, without end."""
    while True:
        yield from (batch.tolist() for batch in source)


def take(source: StatefulLoader, count: int) -> list[list[int]]:
    return [batch for _, batch in zip(range(count), stream(source), strict=False)]


@pytest.mark.parametrize("stop", range(16))
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"drop_last": True}, {"shuffle": False}, {"rank": 1, "world": 2}, {"lengths": LENGTHS}],
    ids=["plain", "dropped", "ordered", "rank", "lengths"],
)
def test_the_batches_left_and_the_next_epochs_follow_a_resume(stop: int, kwargs: dict[str, Any]) -> None:
    expected = take(loader(**kwargs), 24)
    stopped = loader(**kwargs)
    assert take(stopped, stop) == expected[:stop]
    resumed = loader(**kwargs)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 24 - stop) == expected[stop:]


def test_worker_processes_give_the_same_batches_after_a_resume() -> None:
    expected = take(loader(), 12)
    stopped = loader(num_workers=1)
    assert take(stopped, 9) == expected[:9]  # the worker is further on than what was drawn
    resumed = loader(num_workers=1)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 3) == expected[9:]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    world=st.integers(1, 4),
    batch=st.integers(1, 5),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_ranks_share_every_epoch_out_among_themselves(n: int, world: int, batch: int, seed: int, epoch: int) -> None:
    shards = []
    for rank in range(world):
        source = loader(n, batch_size=batch, seed=seed, rank=rank, world=world)
        source.set_epoch(epoch)
        shards.append([sample for drawn in source for sample in drawn.tolist()])
    assert len({len(shard) for shard in shards}) == 1
    seen = Counter(sample for shard in shards for sample in shard)
    assert set(seen) == set(range(n))
    assert sum(seen.values()) == -(-n // world) * world  # each once, and as few twice as make the shards equal


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = {
        tuple(map(tuple, take(loader(seed=seed), 21)[first : first + 7])) for seed in range(3) for first in (0, 7, 14)
    }
    assert len(orders) == 9


def test_global_random_numbers_are_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = take(loader(), 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert take(loader(), 10) == first


def test_a_new_iterator_starts_the_epoch_again_unless_a_state_was_restored() -> None:
    source = loader()
    expected = take(source, 2)
    assert take(source, 2) == expected
    source.load_state_dict(source.state_dict())
    assert take(source, 2) != expected


def test_a_resume_may_use_another_number_of_ranks() -> None:
    pair = [loader(48, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    drawn = [sample for source in pair for batch in take(source, 3) for sample in batch]
    assert pair[0].state_dict() == pair[1].state_dict()
    single = loader(48, batch_size=4)
    single.load_state_dict(pair[0].state_dict())
    left = [sample for batch in single for sample in batch.tolist()]
    assert sorted(drawn + left) == list(range(48))


def test_a_place_between_two_batches_of_the_new_size_warns_and_loses_nothing() -> None:
    stopped = loader(24, batch_size=4)
    drawn = [sample for batch in take(stopped, 3) for sample in batch]
    resumed = loader(24, batch_size=5)
    with pytest.warns(UserWarning, match="the last 2 are seen again"):
        resumed.load_state_dict(stopped.state_dict())
    left = [sample for batch in resumed for sample in batch.tolist()]
    assert set(drawn + left) == set(range(24))
    assert len(set(drawn) & set(left)) == 2


@pytest.mark.parametrize(("other", "word"), [({"n": 21}, "length 21"), ({"seed": 8}, "seed 8")], ids=["data", "seed"])
def test_other_data_or_another_seed_cannot_continue_an_epoch(other: dict[str, Any], word: str) -> None:
    stopped = loader()
    take(stopped, 2)
    with pytest.raises(ValueError, match=word):
        loader(**other).load_state_dict(stopped.state_dict())
    take(stopped, 7)
    loader(**other).load_state_dict(stopped.state_dict())  # at the end of an epoch nothing is left to continue


@pytest.mark.parametrize("world", [1, 2])
def test_samples_of_about_one_length_are_drawn_together_in_no_order_of_lengths(world: int) -> None:
    lengths = [37 * i % 1000 for i in range(1000)]
    shards = []
    for rank in range(world):
        source = loader(1000, batch_size=4, lengths=lengths, rank=rank, world=world)
        shards.append(take(source, 2 * 1000 // 4 // world))
    half = len(shards[0]) // 2
    for epoch in (slice(half), slice(half, None)):
        drawn = sorted(sample for shard in shards for batch in shard[epoch] for sample in batch)
        assert drawn == list(range(1000))
    spans = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in shards[0]]
    assert sum(spans) / len(spans) < 25 * world  # 600 for four of a thousand at random
    means = torch.tensor([sum(lengths[i] for i in batch) / len(batch) for batch in shards[0]])
    assert abs(float(torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1])) < 0.3
    assert shards[0][:half] != shards[0][half:]


def test_the_batch_that_is_not_full_stays_the_last_among_lengths() -> None:
    sizes = [len(batch) for batch in take(loader(20, lengths=LENGTHS), 14)]
    assert sizes == [3, 3, 3, 3, 3, 3, 2] * 2


def test_an_order_by_length_continues_with_the_same_stride_only() -> None:
    stopped = loader(lengths=LENGTHS)
    take(stopped, 2)
    for other in ({"lengths": LENGTHS, "batch_size": 4}, {"lengths": LENGTHS, "world": 2, "rank": 0}, {}):
        with pytest.raises(ValueError, match="the order by length depends on it"):
            loader(**other).load_state_dict(stopped.state_dict())
    take(stopped, 7)
    loader(batch_size=4).load_state_dict(stopped.state_dict())  # at the end of an epoch nothing is left to continue


@pytest.mark.parametrize("world", [1, 2])
def test_every_batch_is_told_the_mean_weight_of_its_optimizer_step(world: int) -> None:
    data = [{"i": torch.tensor(i)} for i in range(22)]
    weights = [1.0 + i for i in range(22)]

    def drawn(rank: int, skip: int = 0) -> list[dict[str, Any]]:
        source = StatefulLoader(data, 2, True, seed=3, rank=rank, world=world, weights=weights, window=3)
        source.load_state_dict(source.state_dict() | {"drawn": skip * 2 * world})
        return list(source)

    ranks = [drawn(rank) for rank in range(world)]
    count = len(ranks[0])
    assert count == -(-22 // (2 * world))
    for first in range(0, count, 3):
        step = [batch for rank in ranks for batch in rank[first : first + 3]]
        total = sum(weights[i] for batch in step for i in batch["i"].tolist())
        assert {batch["weight"] for batch in step} == {total / (3 * world)}
    assert [batch["weight"] for batch in drawn(0, skip=4)] == [batch["weight"] for batch in ranks[0][4:]]


def test_the_last_step_of_a_shortened_epoch_is_told_its_own_weight() -> None:
    data = [{"i": torch.tensor(i)} for i in range(22)]
    source = StatefulLoader(data, 2, weights=[1.0 + i for i in range(22)], window=3)
    source.limit = 5
    told = [batch["weight"] for batch in itertools.islice(source, 5)]
    assert told == [sum(range(1, 7)) / 3] * 3 + [sum(range(7, 11)) / 3] * 2


def test_lengths_weights_and_windows_that_cannot_be_are_refused() -> None:
    for wrong in ({"lengths": [1]}, {"weights": [1.0] * 21}):
        with pytest.raises(ValueError, match="values for 20 samples"):
            loader(**wrong)
    with pytest.raises(ValueError, match="window=0"):
        loader(window=0)


def test_an_order_of_ones_own_is_refused() -> None:
    data = list(range(4))
    with pytest.raises(ValueError, match="owns its order"):
        StatefulLoader(data, sampler=RandomSampler(data))
    with pytest.raises(ValueError, match="owns its order"):
        StatefulLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False))

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(TypeError, match="Stream"):
        StatefulLoader(Stream())


def test_a_loader_pickles_with_its_place() -> None:
    expected = take(loader(), 8)
    source = loader()
    take(source, 3)
    copy = pickle.loads(pickle.dumps(source))
    copy.load_state_dict(copy.state_dict())
    assert take(copy, 5) == expected[3:8]


class Recorder(pl.LightningModule):
    """Trains one number and writes down the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.tolist())
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def saver(folder: Path, every: int | None) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize("validate", [False, True], ids=["plain", "validated"])
@pytest.mark.parametrize(("limit", "stop"), [(None, s) for s in (1, 4, 7, 9, 14, 16)] + [(4, s) for s in (1, 4, 6, 8)])
def test_a_resumed_trainer_sees_exactly_the_batches_left(
    tmp_path: Path, quiet_trainer: MakeTrainer, stop: int, validate: bool, limit: int | None
) -> None:
    settings = {"max_epochs": 3, "limit_train_batches": limit or 1.0}
    val = loader(6, shuffle=False) if validate else None
    whole = Recorder()
    quiet_trainer(**settings, enable_checkpointing=True, callbacks=[saver(tmp_path, 1)]).fit(whole, loader(), val)
    resumed = Recorder()
    quiet_trainer(**settings).fit(resumed, loader(), val, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.weight, whole.weight)


def test_a_trainer_resumed_at_the_end_of_an_epoch_goes_on_with_the_next(
    tmp_path: Path, quiet_trainer: MakeTrainer
) -> None:
    whole = Recorder()
    quiet_trainer(max_epochs=3).fit(whole, loader())
    cut = Recorder()
    quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saver(tmp_path, None)]).fit(cut, loader())
    resumed = Recorder()
    quiet_trainer(max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "step=14.ckpt")
    assert cut.seen + resumed.seen == whole.seen


def test_the_state_is_in_the_checkpoint_and_loads_with_weights_only(tmp_path: Path, quiet_trainer: MakeTrainer) -> None:
    quiet_trainer(max_steps=3, enable_checkpointing=True, callbacks=[saver(tmp_path, 1)]).fit(Recorder(), loader())
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    state = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state == [{"epoch": 0, "drawn": 6, "length": 20, "seed": 7}]


def test_a_second_trainer_starts_again_at_its_first_epoch(quiet_trainer: MakeTrainer) -> None:
    source = loader()
    first, second = Recorder(), Recorder()
    quiet_trainer(max_steps=10).fit(first, source)
    quiet_trainer(max_steps=10).fit(second, source)
    assert second.seen == first.seen


def test_overfit_batches_switches_shuffling_off(quiet_trainer: MakeTrainer) -> None:
    module = Recorder()
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        quiet_trainer(max_epochs=2, overfit_batches=2).fit(module, loader())
    assert module.seen == [[0, 1, 2], [3, 4, 5]] * 2


def test_lightning_leaves_the_loader_alone_among_several_ranks(
    tmp_path: Path, quiet_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = quiet_trainer(max_epochs=1)
    source = loader()
    connector = trainer._accelerator_connector
    monkeypatch.setattr(type(connector), "is_distributed", property(lambda self: True))
    assert trainer._data_connector._prepare_dataloader(source, shuffle=True, mode=None) is source  # type: ignore[arg-type]
