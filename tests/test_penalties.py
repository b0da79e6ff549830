"""Penalties: a gradient that is added to that of the selected entries, and reaches the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow import listed
from torch import Tensor, nn, optim

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import Magnitude
from apportion.optim import Selective
from apportion.penalties import Nuclear, Penalty, nuclear_gradient
from apportion.rules import TopK
from apportion.types import When


def test_the_gradient_is_that_of_least_norm() -> None:
    gradient, norm = nuclear_gradient(torch.diag(torch.tensor([3.0, -2.0])))
    assert torch.allclose(gradient, torch.diag(torch.tensor([1.0, -1.0])), atol=1e-6)
    assert norm == pytest.approx(5.0)
    gradient, norm = nuclear_gradient(torch.ones(2, 2))  # of rank 1: no part of the null space
    assert torch.allclose(gradient, torch.full((2, 2), 0.5), atol=1e-6)
    assert norm == pytest.approx(2.0)
    gradient, norm = nuclear_gradient(torch.zeros(3, 2))
    assert not gradient.any()
    assert norm == 0.0


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_the_gradient_is_the_derivative_of_the_norm(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    direction = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    gradient, norm = nuclear_gradient(matrix)
    step = 1e-6
    ahead, behind = (torch.linalg.matrix_norm(matrix + s * direction, "nuc") for s in (step, -step))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), abs=1e-3)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, "nuc")))


SIDE = 8


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIDE, SIDE, bias=False), nn.Linear(SIDE, 3, bias=False)).to(dtype)


def masks() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"0.weight": torch.rand(SIDE, SIDE) < 0.5, "1.weight": torch.rand(3, SIDE) < 0.5}


def stepped(penalty: Penalty | None, steps: int = 1, net: nn.Sequential | None = None, **options: Any) -> nn.Sequential:
    """Plain gradient descent, so that what is added to the gradient is what is added to the weights."""
    net = model() if net is None else net
    method = listed([masks()], Compact(penalty=penalty, capture="hook"))
    optimizer = Selective(optim.SGD(net.parameters(), lr=1.0), net, method, **options)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for _ in range(options.get("micro_batches", 1)):
            (net(torch.randn(4, SIDE, generator=generator)).square().mean() * 1e-2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def test_it_adds_its_gradient_at_the_selected_entries_and_nowhere_else() -> None:
    mask = masks()["0.weight"]
    before = model()[0].weight.detach()
    expected = 0.25 * nuclear_gradient(before * mask)[0] * mask
    assert expected.abs().max() > 0.05
    plain, fined = stepped(None), stepped(Nuclear(weight=0.25, min_side=SIDE))
    difference = plain[0].weight.detach() - fined[0].weight.detach()
    assert torch.allclose(difference, expected, atol=1e-6)
    assert torch.equal(fined[0].weight[~mask], before[~mask])
    assert torch.equal(fined[1].weight, plain[1].weight)  # too narrow for it


def test_it_is_added_once_a_step_whatever_the_micro_batches() -> None:
    mask = masks()["0.weight"]
    expected = 0.25 * nuclear_gradient(model()[0].weight.detach() * mask)[0] * mask
    options = {"micro_batches": 3}
    plain, fined = stepped(None, **options), stepped(Nuclear(weight=0.25, min_side=SIDE), **options)
    assert torch.allclose(plain[0].weight - fined[0].weight, expected, atol=1e-6)


def test_it_makes_what_is_selected_of_lower_norm() -> None:
    mask = masks()["0.weight"]

    def norm(net: nn.Sequential) -> float:
        return nuclear_gradient(net[0].weight.detach() * mask)[1]

    plain, fined = stepped(None, steps=20), stepped(Nuclear(weight=0.02, min_side=SIDE), steps=20)
    assert norm(fined) < 0.8 * norm(plain)


def test_its_period_counts_optimizer_steps() -> None:
    seen = []
    net = model()
    method = listed([masks()], Compact(penalty=Nuclear(weight=0.1, every=3, min_side=SIDE)))
    optimizer = Selective(optim.SGD(net.parameters(), lr=1e-2), net, method)
    for _ in range(7):
        net(torch.ones(1, SIDE)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer._stage.penalty > 0.0)
    assert seen == [True, False, False, True, False, False, True]


def test_it_takes_the_digits_of_the_masters_and_the_scale_of_the_loss() -> None:
    net = model(torch.bfloat16)
    mask = masks()["0.weight"]
    optimizer = Selective(optim.SGD(net.parameters(), lr=1.0), net, listed([masks()]))
    store = optimizer.owner.narrow(net[0].weight)
    with torch.no_grad():
        store.leaf.add_(1e-4)
    store.leaf.grad = torch.zeros_like(store.leaf)
    dense = torch.zeros(SIDE, SIDE)
    dense[mask] = store.leaf.detach()
    penalty = Nuclear(weight=0.5, min_side=SIDE)
    value = penalty.add([net[0].weight], [store], torch.Generator(), step=0, scale=8.0)
    gradient, norm = nuclear_gradient(dense)
    assert value == pytest.approx(0.5 * norm)
    assert torch.allclose(store.leaf.grad, 4.0 * gradient[mask], atol=1e-6)
    assert isinstance(penalty, Penalty)


def test_one_matrix_of_those_that_are_wide_enough_is_drawn_each_time() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)], nn.Conv2d(4, 4, 1), nn.Linear(4, 2))
    method = SelectiveTuning(
        Entries(), Magnitude(), Constant(1.0), TopK(), Compact(capture="hook"), select_when=When(end=1)
    )
    optimizer = Selective(optim.SGD(net.parameters(), lr=1.0), net, method)
    tensors = optimizer.selection.bound.tensors
    stores = [optimizer.owner.narrow(p) for p in tensors]
    generator, drawn = torch.Generator().manual_seed(0), set()
    for step in range(20):
        for store in stores:
            store.leaf.grad = torch.zeros_like(store.leaf)
        Nuclear(weight=1.0, min_side=4).add(tensors, stores, generator, step)
        hit = [i for i, store in enumerate(stores) if store.leaf.grad is not None and store.leaf.grad.any()]
        assert len(hit) == 1
        drawn.update(hit)
    assert drawn == {0, 1, 2}


def test_no_weight_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert Nuclear(weight=0.0, min_side=1).add([nn.Parameter(torch.ones(3, 3))], [], generator, 0) == 0.0
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, r"`Nuclear\(weight=-1.0\)` must be at least 0"),
        ({"weight": float("nan")}, r"`Nuclear\(weight=nan\)` must be at least 0"),
        ({"every": 0}, r"`Nuclear\(every=0, min_side=65\)` must both be at least 1"),
        ({"min_side": 0}, r"`Nuclear\(every=1, min_side=0\)` must both be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nuclear(**options)
