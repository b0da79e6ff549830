"""Ranks and others: layers drawn at the same time, entries of the same factors, several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from rank_methods import LORA_CASES, RANK_METHODS, svd_net
from test_ddp import assert_equal
from toys import Task, adamw, fit, loader, tokens, trainable, trainer, two_groups, weights
from workers import ranks

from apportion.budgets import Constant
from apportion.callbacks import IST, LISA, RST, AdaLoRA
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import Magnitude
from apportion.loader import StatefulLoader
from apportion.optim import Selective
from apportion.rules import TopK

# Two selections on one run
# --------------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"target": 20, "warmup": 1, "final": 4, "every": 2}
LAYERS: dict[str, Callable[[], SelectiveTuning]] = {
    "lisa": lambda: LISA(2, 1),
    "lisa, keep": lambda: LISA(1, 3, state="keep"),
    "ist": lambda: IST(2, probe_interval=2),
    "rst": lambda: RST(2),
}
ORDERS = {"layers first": 1, "ranks first": -1}


class Still(pl.Callback):
    """Sees to it that adapters of layers that are not drawn keep every bit, except ranks that are put out."""

    def __init__(self, layers: SelectiveTuning, adaptive: SelectiveTuning) -> None:
        self.layers, self.adaptive = layers, adaptive
        self.before: dict[str, torch.Tensor] = {}
        self.frozen: set[str] = set()
        self.steps = self.moved = self.kept = self.cut = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        bound, mask = self.layers.selection.bound, self.layers.selection.mask
        assert mask is not None
        selected = bound.spread(mask)
        assert int(mask.sum()) == self.layers.slots.budget.at(0, None)
        self.frozen = {n for n in dict(bound.covered()) if n not in selected}
        assert all(p.requires_grad == (n not in self.frozen) for n, p in pl_module.named_parameters() if ".lora_" in n)
        self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert all(p.grad is None for n, p in pl_module.named_parameters() if n in self.frozen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps += 1
        after, selection = pl_module.state_dict(), self.adaptive.selection
        assert selection.mask is not None
        alive = dict(zip(selection.per_adapter, selection.bound.split(selection.mask), strict=True))  # type: ignore[attr-defined]
        final = selection.state_dict()["final"]
        for name, old in self.before.items():
            if ".lora_" not in name:
                continue
            same = after[name] == old
            if name not in self.frozen:
                self.moved += int(not bool(same.all()))
                continue
            part = next(a for a in alive if name.startswith(a + "."))
            inside = alive[part].view(-1, 1) if ".lora_B." not in name else alive[part].view(1, -1)
            assert bool((same | ((after[name] == 0) & ~inside)).all()), name
            assert bool(same.all()) or ".lora_E." in name or final
            self.kept += int(bool(same.all()))
            self.cut += int(not bool(same.all()))
        state = trainer.optimizers[0].state_dict()["state"]
        assert {v.shape for s in state.values() for k, v in s.items() if k == "exp_avg"} <= {
            v.shape for v in self.before.values()
        }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_drawn_and_ranks_fall_at_the_same_time(name: str, order: str) -> None:
    layers, adaptive = LAYERS[name](), AdaLoRA(**OPTIONS)
    still = Still(layers, adaptive)
    task = Task(svd_net())
    flags = [p.requires_grad for p in task.parameters()]
    before = weights(task)
    counts: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert adaptive.selection.mask is not None
            counts.append(int(adaptive.selection.mask.sum()))

    fit(task, [*[layers, adaptive][:: ORDERS[order]], still, Count()], steps=10, max_epochs=5)
    assert counts == [48, 34, 34, 21, 21, 20, 20, 20, 20, 20]  # 20 + 28 (4/5)^3, 20 + 28 (2/5)^3
    assert still.steps == 10
    assert min(still.moved, still.kept, still.cut) > 0
    assert [p.requires_grad for p in task.parameters()] == flags
    assert {n: w.shape for n, w in weights(task).items()} == {n: w.shape for n, w in before.items()}
    assert sum(int((p != 0).sum()) for n, p in task.named_parameters() if ".lora_E." in n) == 20


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_both_resume_bit_for_bit(name: str, order: str, tmp_path: Path) -> None:
    def train(resume: Path | None) -> dict[str, Any]:
        callbacks: list[Any] = [LAYERS[name](), AdaLoRA(**OPTIONS)][:: ORDERS[order]]
        task = Task(svd_net(dropout=0.2), lambda m: adamw(two_groups(m)))
        saver = [] if resume else [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)]
        options: dict[str, Any] = {} if resume else {"enable_checkpointing": True}
        where = None if resume is None else str(resume)
        run = fit(task, [*callbacks, *saver], 10, loader(8), where, 11 if resume is None else 77, **options)
        return {
            "weights": task.state_dict(),
            "optimizer": run.optimizers[0].state_dict()["state"],
            **{c.label: c.selection.state_dict() for c in callbacks},
        }

    whole = train(None)
    for step in (1, 3, 4, 5, 6, 8):
        assert_equal(train(tmp_path / f"step={step}.ckpt"), whole, f"{step}")


@pytest.mark.parametrize("order", ORDERS)
def test_entries_and_ranks_of_the_same_factors_are_refused(order: str) -> None:
    entries = SelectiveTuning(
        Entries(pattern=r".*lora_A.*"), Magnitude(), Constant(0.5), TopK(), Compact(), name="entries"
    )
    callbacks = [entries, AdaLoRA(**OPTIONS)][:: ORDERS[order]]
    task = Task(svd_net())
    before = weights(task)
    with pytest.raises(ValueError, match=r"both select entries or ranks of .*lora_A|selects entries of .*lora_A"):
        fit(task, callbacks)
    assert all(torch.equal(w, before[n]) for n, w in weights(task).items())
    assert "forward" not in vars(task.net.base_model)


def test_two_budgets_over_the_same_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both select entries or ranks of .*lora_A.*give each parameter to one"):
        fit(Task(svd_net()), [AdaLoRA(**OPTIONS, name="a"), AdaLoRA(**OPTIONS, name="b")])
    halves = {"a": {"pattern": r".*self_attn.*"}, "b": {"exclude": r".*self_attn.*"}}
    drivers = [AdaLoRA(**{**OPTIONS, "target": 5}, name=k, **v) for k, v in halves.items()]
    task = Task(svd_net())
    fit(task, drivers, steps=10)
    alive = {n: int((p != 0).sum()) for n, p in task.named_parameters() if ".lora_E." in n}
    assert sum(v for n, v in alive.items() if "self_attn" in n) == sum(alive.values()) / 2 == 5


# Several processes
# --------------------------------------------------------------------------------------------------------------------


def train(
    kind: str, batch: int, joined: int = 1, wrapper: bool = False, pair: bool = False, **options: Any
) -> dict[str, Any]:
    """One fit, alone or as a rank; ``joined`` processes' batches in one."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    case = {**RANK_METHODS, **LORA_CASES}[kind]
    net = case.net(dropout=0.0)
    driver = case.make(warmup=1, final=4, every=2)
    source = StatefulLoader(tokens(12 * joined * world), batch_size=batch * joined, shuffle=True, seed=5)  # type: ignore[arg-type]
    if wrapper:
        optimizer = Selective(torch.optim.AdamW(trainable(net), eps=1e-3), net, driver, total_steps=10)
        data = tokens(20 * joined * world)
        for t in range(10):
            rows = data[t * 2 * joined * world : (t + 1) * 2 * joined * world]
            share = rows if world == 1 else rows[dist.get_rank() :: world]
            net.loss(share).backward()  # type: ignore[operator]
            optimizer.step()
            optimizer.zero_grad()
        selection = optimizer.selection
        optimizer.close()
    else:
        more = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
        task = Task(net, lambda m: torch.optim.AdamW(trainable(m), lr=1e-2, eps=1e-3))
        others = [RST(0.5)] if pair else []
        run = trainer([driver, *others], 10, use_distributed_sampler=False, **{**more, **options})
        run.fit(task, source)
        selection = driver.selection
    return {"weights": {k: v.clone() for k, v in net.state_dict().items()}, "selection": selection.state_dict()}


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["adalora", "lora"])
@pytest.mark.xdist_group("ranks")
def test_two_processes_choose_and_train_alike(kind: str, accumulate: int, pair: bool) -> None:
    options = {"accumulate_grad_batches": accumulate}
    first, second = ranks(2).run(_ddp, kind, pair, options)
    assert_equal(first, second)
    assert first["selection"]["final"]
    if not pair:
        alone = train(kind, 2, joined=2, **options)
        assert torch.equal(first["selection"]["masks"], alone["selection"]["masks"])
        for name, value in alone["weights"].items():
            torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)


def _ddp(kind: str, pair: bool, options: dict[str, Any]) -> dict[str, Any]:
    return train(kind, 2, pair=pair, **options)


@pytest.mark.xdist_group("ranks")
def test_two_processes_with_the_wrapper_choose_and_train_alike() -> None:
    first, second = ranks(2).run(_wrapped)
    assert_equal(first, second)
    alone = train("adalora", 2, joined=2, wrapper=True)
    assert torch.equal(first["selection"]["masks"], alone["selection"]["masks"])


def _wrapped() -> dict[str, Any]:
    return train("adalora", 2, wrapper=True)


@pytest.mark.xdist_group("ranks")
def test_processes_with_clocks_of_their_own_follow_the_first() -> None:
    first, second = ranks(2).run(_timed)
    assert_equal(first, second)
    assert first["selection"]["progress"] == 0.6  # of the first process, whose fifth step ends at 60 of 100 seconds
    assert first["selection"]["steps"].tolist() == [0, 1, 2, 3, 4, 5]


def _timed() -> dict[str, Any]:
    from pytorch_lightning.callbacks import Timer

    class Clock(Timer):
        def time_elapsed(self, stage: Any = "train") -> float:
            return min(100.0, 12.0 * self.calls) + 30.0 * dist.get_rank()

        calls = 0

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            trainer.should_stop = self.calls == 10

    torch.manual_seed(0)
    driver = AdaLoRA(target=20, warmup=0.1, final=0.4, every=1)
    clock = Clock({"seconds": 100})
    task = Task(svd_net(dropout=0.0))
    run = trainer([clock, driver], -1, max_epochs=-1, strategy="ddp", devices=2)
    run.fit(task, StatefulLoader(tokens(80), batch_size=2))  # type: ignore[arg-type]
    return {"weights": weights(task), "selection": driver.selection.state_dict()}
