"""Hold: the dense twin, which the compact store equals bit for bit, also while the selection moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrow import ALL, Everything, backward, drawn, index_of, listed, snapshot, state_of, windows
from test_compact import OPTIMIZERS, Slopes, groups
from torch import nn, optim

from apportion.budgets import Constant, Increment
from apportion.compact import Fate
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Hold
from apportion.entrywise import D3, GradientMagnitude
from apportion.hold import Held
from apportion.optim import Selective
from apportion.rules import TopK
from apportion.types import When

FATES = [{"kept": kept, "leaving": leaving} for kept in ("keep", "reset") for leaving in ("keep", "revert")]


def race(
    one: Any, two: Any, name: str = "adamw foreach", steps: int = 14, accumulate: int = 1, micro_batches: int | None = 1
) -> list[int]:
    """Trains two methods side by side, compared bit for bit after every step; how many entries were selected when."""
    models = (Everything(), Everything())
    optimizers = [
        Selective(OPTIMIZERS[name](groups(m)), m, method, micro_batches=micro_batches, total_steps=steps)
        for m, method in zip(models, (one, two), strict=True)
    ]
    counts = []
    for batches in windows(steps, accumulate):
        before = snapshot(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, batches)
            optimizer.step()
            optimizer.zero_grad()
        counts.append(0)
        for (key, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q), key
            index, other = index_of(optimizers[0], p), index_of(optimizers[1], q)
            assert torch.equal(index, other), key
            counts[-1] += len(index)
            compact, dense = state_of(optimizers[0], p), state_of(optimizers[1], q)
            for part in set(compact) & set(dense):
                whole = (
                    dense[part] if dense[part].shape != q.shape or part == "step" else dense[part].reshape(-1)[index]
                )
                assert torch.equal(compact[part], whole.reshape(compact[part].shape)), (key, part)
        assert any(not torch.equal(before[k], v) for k, v in snapshot(models[0]).items())
    return counts


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("name", ["adamw loop", "adamw foreach", "adam coupled", "sgd nesterov", "rmsprop"])
def test_it_equals_the_compact_store_while_the_selection_moves(name: str, fate: dict[str, str]) -> None:
    plan = [drawn(Everything(), 0.4, seed) for seed in (0, 0, 1, 1, 1, 2, 0, 3)]
    race(listed(plan, Compact(**fate, capture="hook")), listed(plan, Hold(**fate)), name)


@pytest.mark.parametrize(("accumulate", "micro_batches"), [(1, 1), (3, 3), (3, None)])
def test_it_equals_the_compact_store_where_gradients_decide(accumulate: int, micro_batches: int | None) -> None:
    def growing(effect: Any) -> SelectiveTuning:
        return SelectiveTuning(ALL, D3(), Increment(100), TopK(grow=True), effect, select_when=When(every=1))

    counts = race(growing(Compact(capture="hook")), growing(Hold()), accumulate=accumulate, micro_batches=micro_batches)
    assert counts == [min(100, (i + 1) * 100 // 14) for i in range(14)]


@pytest.mark.parametrize("fate", FATES)
def test_it_equals_the_compact_store_where_gradients_replace_the_selection(fate: dict[str, str]) -> None:
    def refreshed(effect: Any) -> SelectiveTuning:
        return SelectiveTuning(ALL, GradientMagnitude(), Constant(40), TopK(), effect, select_when=When(every=3))

    assert set(race(refreshed(Compact(**fate, capture="hook")), refreshed(Hold(**fate)))) == {40}


def test_unselected_entries_are_put_back_and_have_no_moments() -> None:
    model = Everything()
    masks = drawn(model)
    optimizer = Selective(OPTIMIZERS["adamw loop"](groups(model)), model, listed([masks], Hold()))
    start = snapshot(model)
    for batches in windows(3):
        backward(model, batches)
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert not p.grad[~masks[name]].any()
            assert p.grad[masks[name]].all() or name == "embed.weight" or not masks[name].any()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p[~masks[name]], start[name][~masks[name]])
        assert bool((p != start[name])[masks[name]].all())
        assert not optimizer.base.state[p]["exp_avg"][~masks[name]].any()
    optimizer.close()
    model.loss(windows(1)[0][0]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_ages_of_single_entries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`Hold\(age='entry'\)` does not exist"):
        Held(nn.Parameter(torch.ones(2)), Fate(age="entry"))


@pytest.mark.parametrize("options", [{"kept": "no"}, {"leaving": "no"}])
def test_unknown_fates_are_refused_at_construction(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be 'keep' or"):
        Hold(**options)


def test_a_saved_value_to_go_back_to_is_taken_up() -> None:
    method = listed([{"weight": torch.tensor([True, False])}], Hold(leaving="revert"))
    model = Slopes(torch.tensor([1.0, 2.0]))
    optimizer = Selective(optim.SGD(model.parameters(), lr=0.1), model, method)
    model.loss(torch.ones(2)).backward()
    optimizer.step()
    other = Slopes(model.weight.detach())
    second = Selective(optim.SGD(other.parameters(), lr=0.1), other, method)
    second.load_state_dict(optimizer.state_dict())
    second.owner.move(second._key, {other.weight: torch.tensor([1])}, {})
    assert other.weight.tolist() == [1.0, 2.0]
