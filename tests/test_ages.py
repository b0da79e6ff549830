"""Ages: Adam's bias correction by the steps of each entry, where entries join in the middle of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from narrow import listed, state_of
from test_compact import Slopes
from torch import Tensor, optim

from apportion.ages import check
from apportion.compact import Gathered
from apportion.effects import Compact
from apportion.optim import Selective

KINDS: dict[str, Callable[..., optim.Optimizer]] = {
    "adamw loop": lambda p, **o: optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False, **o),
    "adamw foreach": lambda p, **o: optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, **o),
    "adamw fused": lambda p, **o: optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True, **o),
    "adamw amsgrad": lambda p, **o: optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True, **o),
    "adamw maximize": lambda p, **o: optim.AdamW(p, lr=1e-2, weight_decay=0.1, maximize=True, **o),
    "adam coupled": lambda p, **o: optim.Adam(p, lr=1e-2, weight_decay=0.1, **o),
    "adamw with a rate in a tensor": lambda p, **o: optim.AdamW(p, lr=torch.tensor(1e-2), weight_decay=0.1, **o),
}


def gradients(steps: int, n: int) -> Tensor:
    """Large ones for some steps, then next to none: second moments rise and fall."""
    grads = torch.randn(steps, n, generator=torch.Generator().manual_seed(2))
    grads[steps // 2 :] *= 1e-3
    return grads


def trained(
    plan: list[Tensor], age: str, make: Callable[..., optim.Optimizer], grads: Tensor, **fate: Any
) -> tuple[Slopes, Selective]:
    """One vector, whose selection follows ``plan``, after the steps of ``grads``."""
    model = Slopes(torch.linspace(-1.0, 1.0, grads.shape[1]))
    effect = Compact(age=age, capture="hook", **fate)
    optimizer = Selective(make(model.parameters()), model, listed([{"weight": mask} for mask in plan], effect))
    for grad in grads:
        model.loss(grad).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def cohorts(make: Callable[..., optim.Optimizer], joins: list[int], grads: Tensor) -> Tensor:
    """What entries come to that each train by themselves, from the step at which they join."""
    start = torch.linspace(-1.0, 1.0, grads.shape[1])
    found = []
    for i, first in enumerate(joins):
        p = torch.nn.Parameter(start[i : i + 1].clone())
        optimizer = make([p])
        for grad in grads[first:]:
            p.grad = grad[i : i + 1].clone()
            optimizer.step()
        found.append(p.detach())
    return torch.cat(found)


@pytest.mark.parametrize("name", KINDS)
def test_every_entry_trains_as_if_its_optimizer_began_when_it_joined(name: str) -> None:
    joins, grads = [0, 0, 3, 9, 3, 15], gradients(20, 6)
    plan = [torch.tensor([first <= step for first in joins]) for step in range(20)]
    model, optimizer = trained(plan, "entry", KINDS[name], grads)
    assert torch.allclose(model.weight, cohorts(KINDS[name], joins, grads), rtol=1e-6, atol=2e-6)
    store = optimizer.owner.narrow(model.weight)
    assert isinstance(store, Gathered)
    assert store.age is not None
    assert store.age.dtype == torch.int32
    assert store.age.tolist() == [20 - first for first in joins]
    other, _ = trained(plan, "tensor", KINDS[name], grads)
    assert not torch.allclose(other.weight, model.weight, rtol=1e-6, atol=1e-4)


def test_entries_of_the_age_of_their_tensor_are_left_as_adam_leaves_them() -> None:
    grads = gradients(10, 8)
    plan = [torch.ones(8) > 0]
    one, _ = trained(plan, "entry", KINDS["adamw foreach"], grads)
    two, _ = trained(plan, "tensor", KINDS["adamw foreach"], grads)
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize(("t", "ratio"), [(1, 1.0), (10, 0.484), (100, 0.976), (1000, 2.5146)])
def test_a_newcomers_first_step_is_the_learning_rate_by_its_own_age_alone(t: int, ratio: float) -> None:
    """By the age of the tensor it is (1 - b1) / sqrt(1 - b2) sqrt(1 - b2^t) / (1 - b1^t) times as long."""
    assert ratio == pytest.approx(0.1 / math.sqrt(1e-3) * math.sqrt(1 - 0.999**t) / (1 - 0.9**t), rel=1e-3)
    grads = torch.ones(t, 2)
    plan = [torch.tensor([True, step == t - 1]) for step in range(t)]

    def adam(params: Any) -> optim.Optimizer:
        return optim.AdamW(params, lr=1e-3, weight_decay=0.0)

    for age, expected in (("tensor", ratio), ("entry", 1.0)):
        model, _ = trained(plan, age, adam, grads)
        assert 1.0 - float(model.weight.detach()[1]) == pytest.approx(expected * 1e-3, rel=2e-3)


def test_an_entry_that_comes_back_is_new_again() -> None:
    grads = torch.ones(6, 2)
    plan = [torch.tensor([True, step not in (3, 4)]) for step in range(6)]
    model, optimizer = trained(plan, "entry", KINDS["adamw foreach"], grads)
    store = optimizer.owner.narrow(model.weight)
    assert isinstance(store, Gathered)
    assert store.age is not None
    assert store.age.tolist() == [6, 1]


def test_a_step_without_a_gradient_ages_nothing() -> None:
    model, optimizer = trained([torch.tensor([True, True])], "entry", KINDS["adamw foreach"], gradients(2, 2))
    before = model.weight.detach().clone()
    optimizer.base.step()
    store = optimizer.owner.narrow(model.weight)
    assert isinstance(store, Gathered)
    assert store.age is not None
    assert store.age.tolist() == [2, 2]
    assert torch.equal(model.weight, before)


def test_ages_are_saved_and_loaded() -> None:
    joins, grads = [0, 2, 5, 1], gradients(10, 4)
    plan = [torch.tensor([first <= step for first in joins]) for step in range(10)]
    whole, _ = trained(plan, "entry", KINDS["adamw foreach"], grads)
    first, saved = trained(plan, "entry", KINDS["adamw foreach"], grads[:6])
    second = Slopes(first.weight.detach())
    method = listed([{"weight": mask} for mask in plan], Compact(age="entry", capture="hook"))
    optimizer = Selective(KINDS["adamw foreach"](second.parameters()), second, method)
    optimizer.load_state_dict(saved.state_dict())
    assert float(state_of(optimizer, second.weight)["step"]) == 6.0
    for grad in grads[6:]:
        second.loss(grad).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(second.weight, whole.weight)


def test_only_adam_has_a_bias_to_correct() -> None:
    p = [torch.nn.Parameter(torch.ones(2))]
    check([optim.Adam(p), optim.AdamW(p)])
    with pytest.raises(ValueError, match=r"`RMSprop` has none: use `torch\.optim\.AdamW` or `Adam`"):
        check([optim.AdamW(p), optim.RMSprop(p)])
