"""Full-precision masters: small updates are not lost, and copies exist only for what trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from toys import Task, adamw, fit, trainable
from witness import Witness

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.master import Master, full_precision_copy
from apportion.owner import Owner
from apportion.rules import Sample
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


def half(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((4,), value, dtype=torch.bfloat16))


def tuned(p: nn.Parameter, master: str | None, **options: Any) -> tuple[torch.optim.Optimizer, Owner]:
    optimizer = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0, **options)
    owner = Owner([optimizer])
    owner.claim("a", {"p": p}, "keep", master)
    owner.select("a", [p])
    return optimizer, owner


def push(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        (p.float() * 1.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        p.grad = None


@pytest.mark.parametrize("value", [2.0**-5 * (1 + 2**-7), 1.0, -0.5])
def test_small_updates_are_lost_without_a_master_and_arrive_with_one(value: float) -> None:
    without, with_master = half(value), half(value)
    push(without, tuned(without, None)[0], 40)
    push(with_master, tuned(with_master, "fp32")[0], 40)
    assert torch.equal(without, half(value))
    assert (with_master != half(value)).all()
    assert with_master.dtype == torch.bfloat16


def test_the_weight_is_the_rounded_master_of_an_fp32_run() -> None:
    p, exact = half(0.5), nn.Parameter(torch.full((4,), 0.5))
    push(p, tuned(p, "fp32")[0], 7)
    push(exact, torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0), 7)
    assert torch.equal(p, exact.bfloat16())


def test_micro_batches_are_summed_in_full_precision_and_halves_freed() -> None:
    p = half(1.0)
    master = Master(p, full_precision_copy(p))
    for scale in [256.0] + 256 * [0.5]:  # in bf16, 256 + 0.5 is 256
        (p * scale).sum().backward()
        assert p.grad is None
    assert torch.equal(master.leaf.grad, torch.full((4,), 384.0))
    master.close()
    p.sum().backward()
    assert p.grad is not None


def test_masters_exist_only_for_half_precision_weights_that_train() -> None:
    p, q, full = half(1.0), half(1.0), nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p, q, full])
    owner = Owner([optimizer])
    owner.claim("a", {"p": p, "q": q, "full": full}, "drop", "fp32")
    owner.select("a", [p, full])
    assert owner.slots[p].master is not None
    assert owner.slots[q].master is None
    assert owner.slots[full].master is None
    assert [id(x) for x in optimizer.param_groups[0]["params"]] == [id(owner.leaf(p)), id(full)]
    owner.select("a", [q])
    assert owner.slots[p].master is None
    assert owner.slots[q].master is not None
    owner.release("a")
    assert [id(x) for x in optimizer.param_groups[0]["params"]] == [id(p), id(q), id(full)]
    assert not p._post_accumulate_grad_hooks
    assert not q._post_accumulate_grad_hooks


@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_a_parked_master_comes_back_with_its_low_bits(policy: str) -> None:
    p, q = half(1.0), half(1.0)
    optimizer = torch.optim.AdamW([p, q], lr=1e-4, weight_decay=0.0)
    owner = Owner([optimizer])
    owner.claim("a", {"p": p, "q": q}, policy, "fp32")
    owner.select("a", [p])
    push(p, optimizer, 3)
    value = owner.leaf(p).detach().clone()
    assert not torch.equal(value, p.float())
    owner.select("a", [q])
    owner.select("a", [p])
    assert torch.equal(owner.leaf(p), value)


@pytest.mark.parametrize("parked", [False, True])
def test_a_master_survives_a_checkpoint(parked: bool) -> None:
    def build() -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer, Owner]:
        p, q = half(1.0), half(1.0)
        optimizer = torch.optim.AdamW([p, q], lr=1e-4, weight_decay=0.0)
        owner = Owner([optimizer])
        owner.claim("a", {"p": p, "q": q}, "keep", "fp32")
        owner.select("a", [p])
        return p, q, optimizer, owner

    p, q, optimizer, owner = build()
    push(p, optimizer, 3)
    value = owner.leaf(p).detach().clone()
    if parked:
        owner.select("a", [q])
    saved = copy.deepcopy(optimizer.state_dict())
    saved_after_the_run = None
    owner.release("a", final=True)
    saved_after_the_run = copy.deepcopy(optimizer.state_dict())
    for state in (saved, saved_after_the_run):
        p, q, optimizer, owner = build()
        if parked:
            owner.select("a", [q])
        optimizer.load_state_dict(state)
        owner.select("a", [p])
        assert torch.equal(owner.leaf(p), value)
        assert optimizer.state[owner.leaf(p)]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bf16_true_fit_moves_what_is_selected_and_nothing_else(accumulate: int) -> None:
    driver = SelectiveTuning(
        Layers(), Uniform(), Constant(2), Sample(), Freeze(master="fp32"), select_when=When(every=2)
    )
    witness = Witness(driver)
    task = Task(optimizer=lambda m: adamw(trainable(m)))
    run = fit(task, [driver, witness], precision="bf16-true", accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    witness.check()
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}
    assert [id(p) for g in run.optimizers[0].param_groups for p in g["params"]] == [id(p) for p in task.parameters()]
