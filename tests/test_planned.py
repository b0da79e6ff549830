"""SPT: a plan that is made before training, with adapters where they pay, and trained like any other selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from toys import Net, Task, adamw, fit, loader, moved, trainable, weights

from apportion.callbacks import SPT
from apportion.plan import Plan


def task(**options: Any) -> Task:
    return Task(Net(**options), lambda m: adamw(trainable(m)))


def spt(**options: Any) -> SPT:
    return SPT(**{"target": 200, "rank": 1, "alpha": 4.0, "batches": 2, **options})


def plan_of(driver: SPT) -> Plan:
    return driver.slots.units._made["plan"]


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_what_the_plan_says_trains_and_nothing_else(kind: str) -> None:
    driver, module = spt(kind=kind), task(dropout=0.0)
    seen: dict[str, torch.Tensor] = {}

    class Before(type(driver).__mro__[2]):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            seen.update(weights(pl_module))

    fit(module, [driver, Before()], steps=3)
    plan, after = plan_of(driver), weights(module)
    assert plan.structured
    assert plan.indices
    adapters = {name for name in plan.dense if "lm_head" not in name}
    assert moved(seen, after) == {*plan.indices, *plan.dense}
    assert adapters
    for name, index in plan.indices.items():
        changed = (seen[name] != after[name]).flatten().nonzero().flatten()
        assert changed.tolist() == index.tolist()


def test_the_total_comes_as_close_to_the_target_as_routing_lets_it() -> None:
    driver, module = spt(), task()
    head = sum(p.numel() for name, p in module.named_parameters() if "lm_head" in name)
    fit(module, [driver], steps=1)
    # An adapter of rank 1 costs 16 or 24 here, a jump of at most 18 beyond the entries it replaces.
    assert abs(plan_of(driver).count - head - 200) <= 18


def test_the_model_computes_the_same_before_the_first_step() -> None:
    module, plain = task(dropout=0.0), task(dropout=0.0)
    ids = next(iter(loader()))[:, :-1]
    outputs: list[torch.Tensor] = []

    class First(spt().__class__.__mro__[2]):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                outputs.append(pl_module.net(ids))

    fit(module, [spt(), First()], steps=1)
    with torch.no_grad():
        assert torch.equal(outputs[0], plain.net(ids))


def test_a_saved_plan_is_used_again_without_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "spt.safetensors"
    first = spt(plan=str(path))
    fit(task(), [first], steps=1)
    asked: list[Any] = []
    second = spt(plan=str(path), probe_loss=lambda module, batch: asked.append(batch))
    fit(task(), [second], steps=1)
    assert not asked
    assert plan_of(first).structured == plan_of(second).structured
    assert all(torch.equal(index, plan_of(second).indices[name]) for name, index in plan_of(first).indices.items())


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_a_resumed_run_makes_the_same_plan_and_ends_where_the_whole_one_does(tmp_path: Path, kind: str) -> None:
    whole, rest = task(), task()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(whole, [spt(kind=kind), saved], steps=6, enable_checkpointing=True)
    fit(rest, [spt(kind=kind)], steps=6, resume=tmp_path / "step=3.ckpt")
    assert not moved(weights(whole), weights(rest))


def test_another_plan_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    run = fit(task(), [spt()], steps=2)
    run.save_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises((ValueError, RuntimeError)):
        fit(task(), [spt(target=60)], steps=4, resume=tmp_path / "cut.ckpt")


def test_without_adapters_it_is_a_plain_selection_of_tau_entries() -> None:
    driver, module = spt(target=None, tau=100, structured=False), task()
    fit(module, [driver], steps=2)
    assert not plan_of(driver).structured
    assert driver.history.counts.sum() == 100


def test_a_loop_of_ones_own_has_to_prepare_first() -> None:
    from apportion import Selective

    model = Net()
    with pytest.raises(ValueError, match=r"`Planned` has no plan yet.*prepare"):
        Selective(adamw(model.parameters()), model, spt())


def test_exactly_one_of_target_and_tau_is_given() -> None:
    for options in ({"target": None}, {"target": 5, "tau": 5}):
        with pytest.raises(ValueError, match="exactly one"):
            spt(**options)
