"""What ranks agree on, piece by piece: averages, comparisons, gradients, and a DDP wrapper that keeps still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workers import RanksFailed, ranks

from apportion import sync

pytestmark = pytest.mark.xdist_group("ranks")


# One process ----------------------------------------------------------------------------------------------------------


def test_one_process_exchanges_nothing() -> None:
    value = torch.tensor([1.0, 2.0])
    assert sync.world_size() == 1
    assert sync.mean(value) is value
    assert sync.gather("mine") == ["mine"]
    sync.agree("anything", "at all")
    sync.broadcast([value])
    reducer, p = sync.Reducer(), nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    reducer.reduce([p])
    assert torch.equal(p.grad, torch.full((2,), 3.0))
    assert reducer.bytes == 0


def test_ddp_is_told_to_leave_all_but_the_smallest_trainable_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 9))
    model[2].requires_grad_(False)
    assert set(sync.IgnoredNames(model)) == {"0.weight", "0.bias", "1.weight"}


def test_names_to_ignore_are_worked_out_when_they_are_asked_for() -> None:
    model = nn.Sequential()
    names = sync.IgnoredNames(model)
    assert list(names) == []
    model.append(nn.Linear(2, 2))
    assert list(names) == ["0.weight"]


def test_a_tied_parameter_is_ignored_under_all_its_names() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.LayerNorm(3))
    model[1].weight = model[0].weight
    assert {"0.weight", "1.weight"} <= set(sync.IgnoredNames(model))


# Averages and comparisons ---------------------------------------------------------------------------------------------


def average(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mine = torch.tensor([1.0, float(dist.get_rank())], dtype=dtype)
    return sync.mean(mine), mine


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_is_the_same_on_all_ranks_and_leaves_its_argument(size: int, dtype: torch.dtype) -> None:
    for rank, (mean, mine) in enumerate(ranks(size).run(average, dtype)):
        assert torch.equal(mean, torch.tensor([1.0, (size - 1) / 2], dtype=dtype))
        assert torch.equal(mine, torch.tensor([1.0, float(rank)], dtype=dtype))


def compare(values: list[str]) -> None:
    sync.agree("the test", values[dist.get_rank()])


@pytest.mark.parametrize("size", [2, 3])
def test_equal_values_agree(size: int) -> None:
    ranks(size).run(compare, ["same"] * size)


@pytest.mark.parametrize("values", [["a", "b"], ["a", "b", "b"], ["b", "b", "a"], ["b", "a", "b"]])
def test_one_differing_value_is_an_error_on_all_ranks(values: list[str]) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks(len(values)).run(compare, values)
    for error, value in zip(failed.value.errors, values, strict=True):
        assert error is not None
        assert f"Ranks disagree on the test; this rank has {value}." in error


def collect() -> list[Any]:
    return sync.gather({"rank": dist.get_rank()})


def test_what_is_gathered_comes_in_rank_order() -> None:
    assert ranks(3).run(collect) == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def spread() -> list[Tensor]:
    values = [torch.full((2,), float(dist.get_rank())), torch.full((1,), 7 + dist.get_rank())]
    sync.broadcast(values)
    return values


def test_a_broadcast_gives_rank_0s_values() -> None:
    for first, second in ranks(3).run(spread):
        assert torch.equal(first, torch.zeros(2))
        assert torch.equal(second, torch.tensor([7]))


# Gradients ------------------------------------------------------------------------------------------------------------


def gradients(rank: int, dtypes: list[torch.dtype]) -> list[nn.Parameter]:
    """Ten tensors: some without a gradient on this rank, one without one on any."""
    generator = torch.Generator().manual_seed(rank)
    params = []
    for i in range(10):
        p = nn.Parameter(torch.zeros(i + 1, 2, dtype=dtypes[i % len(dtypes)]))
        value = torch.randn(p.shape, generator=generator).to(p.dtype)
        if i != 3 and (i + rank) % 3 != 0:
            p.grad = value
        params.append(p)
    return params


def reduce(bucket: int, dtypes: list[torch.dtype]) -> tuple[list[Tensor | None], int, list[bool]]:
    params = gradients(dist.get_rank(), dtypes)
    kept = [p.grad for p in params]
    reducer = sync.Reducer(bucket)
    reducer.reduce(params)
    in_place = [a is None or a is p.grad for a, p in zip(kept, params, strict=True)]
    return [p.grad for p in params], reducer.bytes, in_place


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bucket", [1, 64, 2**20])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.float64, torch.float32]])
def test_gradients_are_averaged_whatever_the_buckets(size: int, bucket: int, dtypes: list[torch.dtype]) -> None:
    everyone = [gradients(rank, dtypes) for rank in range(size)]
    results = ranks(size).run(reduce, bucket, dtypes)
    for grads, counted, in_place in results:
        assert all(in_place)
        for i, grad in enumerate(grads):
            each = [params[i].grad for params in everyone]
            if all(g is None for g in each):
                assert grad is None
                continue
            expected = sum(g for g in each if g is not None) / size
            assert grad is not None
            assert grad.dtype == everyone[0][i].dtype
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
        numbers = sum((p.numel() + 1) * p.element_size() for p in everyone[0])  # one flag rides along with each
        assert counted == numbers
    for i, grad in enumerate(results[0][0]):
        for grads, _, _ in results[1:]:
            other = grads[i]
            assert (grad is None) == (other is None)
            assert grad is None or (other is not None and torch.equal(grad, other))


def reduce_large() -> Tensor | None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    p.grad = torch.full((3,), 60000.0, dtype=torch.float16)
    sync.Reducer().reduce([p])
    return p.grad


def test_a_sum_of_half_precision_gradients_does_not_overflow() -> None:
    for grad in ranks(3).run(reduce_large):
        torch.testing.assert_close(grad, torch.full((3,), 60000.0, dtype=torch.float16))


def reduce_overflow() -> Tensor | None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, float("inf") if dist.get_rank() == 1 else 2.0, 3.0])
    sync.Reducer().reduce([p])
    return p.grad


def test_an_overflow_on_one_rank_is_seen_by_all() -> None:
    for grad in ranks(2).run(reduce_overflow):
        assert grad.isinf().tolist() == [False, True, False]


# The wrapper ----------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A linear layer and a buffer that counts on each rank in its own way."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.count.clone()
        self.count += 1 + dist.get_rank()
        return self.linear(x)


def run_wrapper(batches: int, window: int) -> dict[str, Any]:
    model = Recorder()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float(dist.get_rank()))
    model._ddp_params_and_buffers_to_ignore = sync.IgnoredNames(model)
    wrapper = DistributedDataParallel(model)
    sync.take_over(wrapper, list(model.parameters()))
    start = [p.detach().clone() for p in model.parameters()]
    seen = []
    for batch in range(batches):
        sync.hold_back(wrapper, fresh=batch % window == 0)
        wrapper(torch.full((1, 2), 1.0 + dist.get_rank())).sum().backward()
        seen.append(float(model.seen))
        wrapper.require_backward_grad_sync = True  # as Lightning leaves it after a batch of manual optimization
    return {"start": start, "seen": seen, "grad": model.linear.weight.grad}


def test_a_wrapper_that_was_taken_over_reduces_nothing_and_starts_from_rank_0() -> None:
    for rank, found in enumerate(ranks(2).run(run_wrapper, 3, 1)):
        assert all(not p.any() for p in found["start"])
        assert torch.equal(found["grad"], torch.full((2, 2), 3.0 * (1 + rank)))


def test_a_wrapper_that_was_taken_over_synchronises_buffers_at_the_start_of_each_window() -> None:
    first, second = ranks(2).run(run_wrapper, 4, 1)
    assert first["seen"] == second["seen"] == [0.0, 1.0, 2.0, 3.0]
    first, second = ranks(2).run(run_wrapper, 4, 2)
    assert first["seen"] == [0.0, 1.0, 2.0, 3.0]
    assert second["seen"] == [0.0, 2.0, 2.0, 4.0]


# The pool itself ------------------------------------------------------------------------------------------------------


def misbehave(how: str) -> int:
    if dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("rank 1")
        if how == "wait":
            dist.barrier()  # for one that never comes
    return dist.get_rank()


@pytest.mark.parametrize(("how", "words"), [("raise", "KeyError: 'rank 1'"), ("wait", "TimeoutError")])
def test_a_rank_that_fails_or_waits_for_ever_ends_the_pool_and_the_next_task_has_a_new_one(
    how: str, words: str
) -> None:
    pool = ranks(2)
    with pytest.raises(RanksFailed) as failed:
        pool.run(misbehave, how, timeout=3.0)
    assert failed.value.errors[0] is None
    assert str(failed.value.errors[1]).startswith(words)
    assert not pool.alive
    assert ranks(2).run(misbehave, "not at all") == [0, 1]
