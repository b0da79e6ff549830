"""Ranks and others: layers drawn at the same time, entries of the same factors, several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from alike import assert_equal
from pytorch_lightning.callbacks import ModelCheckpoint
from rank_methods import LORA_CASES, RANK_METHODS, svd_net
from test_contract import Stop
from torch import nn
from toys import Task, adamw, fit, loader, lora_net, tokens, trainable, trainer, two_groups, weights
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
FALLING = (48, 34, 34, 21, 21, 20, 20, 20, 20, 20)  # 20 + 28 (4/5)^3, 20 + 28 (2/5)^3


@dataclass(frozen=True)
class Pair:
    """A selection of layers and one of ranks on one Trainer.

    Attributes:
        layers: Makes the selection of layers.
        adaptive: Makes the selection of ranks.
        selected: Ranks that are in after each of ten optimizer steps.
        net: Makes the model that they train.
        first: Which of the two comes first in the list of callbacks: ``layers`` or ``ranks``.
    """

    layers: Callable[[], SelectiveTuning]
    adaptive: Callable[[], SelectiveTuning] = lambda: AdaLoRA(**OPTIONS)
    selected: tuple[int, ...] = FALLING
    net: Callable[..., nn.Module] = svd_net
    first: str = "layers"

    def make(self, first: str | None = None) -> tuple[list[SelectiveTuning], SelectiveTuning, SelectiveTuning]:
        """Both in order, then each of them."""
        layers, adaptive = self.layers(), self.adaptive()
        return ([layers, adaptive] if (first or self.first) == "layers" else [adaptive, layers]), layers, adaptive


PAIRS: dict[str, Pair] = {
    "lisa + adalora": Pair(lambda: LISA(2, 1)),
    "lisa, keep + adalora": Pair(lambda: LISA(1, 3, state="keep"), first="ranks"),
    "ist + adalora": Pair(lambda: IST(2, probe_interval=2)),
    "rst + adalora": Pair(lambda: RST(2), first="ranks"),
    "rst + adalora over lora": Pair(
        lambda: RST(2), lambda: AdaLoRA(**{**OPTIONS, "target": 10}), (24, 17, 17, 10, 10, 10, 10, 10, 10, 10), lora_net
    ),
}
ORDERS = ("layers", "ranks")


class Still(pl.Callback):
    """Sees to it that adapters of layers that are not drawn keep every bit, except ranks that are put out.

    Attributes:
        counts: Ranks that are in after each optimizer step.
        moved: Adapter tensors that trained, over all steps.
        kept: Adapter tensors at rest that kept every bit.
        cut: Adapter tensors at rest of which ranks were put out.
    """

    def __init__(self, layers: SelectiveTuning, adaptive: SelectiveTuning) -> None:
        self.layers, self.adaptive = layers, adaptive
        self.before: dict[str, torch.Tensor] = {}
        self.frozen: set[str] = set()
        self.counts: list[int] = []
        self.moved = self.kept = self.cut = 0
        self.done = -1
        self.ever: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.done:
            return
        self.done = trainer.global_step
        bound, mask = self.layers.selection.bound, self.layers.selection.mask
        assert mask is not None
        selected = bound.spread(mask)
        assert int(mask.sum()) == self.layers.slots.budget.at(0, None)
        self.frozen = {n for n in dict(bound.covered()) if n not in selected}
        assert all(p.requires_grad == (n not in self.frozen) for n, p in pl_module.named_parameters() if ".lora_" in n)
        self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert all(p.grad is None for n, p in pl_module.named_parameters() if n in self.frozen)
        training = {n for n, p in pl_module.named_parameters() if p.grad is not None}
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert held == {id(p) for n, p in pl_module.named_parameters() if n in training}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.done:
            return
        after, selection = pl_module.state_dict(), self.adaptive.selection
        assert selection.mask is not None
        self.counts.append(int(selection.mask.sum()))
        alive = dict(zip(selection.per_adapter, selection.bound.split(selection.mask), strict=True))  # type: ignore[attr-defined]
        final = selection.state_dict()["final"]
        gate = ".lora_E." if any(".lora_E." in name for name in self.before) else ".lora_B."
        for name, old in self.before.items():
            if ".lora_" not in name:
                assert torch.equal(after[name], old)
                continue
            same = after[name] == old
            if name not in self.frozen:
                self.moved += int(not bool(same.all()))
                continue
            part = next(a for a in alive if name.startswith(a + "."))
            inside = alive[part].view(-1, 1) if ".lora_B." not in name else alive[part].view(1, -1)
            assert bool((same | ((after[name] == 0) & ~inside)).all()), name
            assert bool(same.all()) or gate in name or final
            self.kept += int(bool(same.all()))
            self.cut += int(not bool(same.all()))
        self._policy(trainer, pl_module)

    def _policy(self, trainer: Any, pl_module: Any) -> None:
        """State is where the layers' policy wants it, in the shapes of the tensors as they are now."""
        owner = self.adaptive._owner
        assert owner is not None
        names = {id(p): n for n, p in pl_module.named_parameters()}
        states = {names[id(p)]: s for p, s in trainer.optimizers[0].state.items() if s}
        parked = {names[id(p)]: slot.parked for p, slot in owner.slots.items() if slot.parked}
        trains = {n for n, p in pl_module.named_parameters() if p.requires_grad}
        assert set(states) <= trains
        self.ever |= set(states)
        drops = self.layers.slots.effect.state == "drop"  # type: ignore[attr-defined]
        assert set(parked) == (set() if drops else self.ever - set(states))
        shapes = {n: p.shape for n, p in pl_module.named_parameters()}
        for name, state in [*states.items(), *parked.items()]:
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shapes[name]


TOGETHER: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clip by norm": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "clip by value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
}
WAYS = [(name, setting, None) for name in PAIRS for setting in TOGETHER] + [
    (name, "plain", {"layers": "ranks", "ranks": "layers"}[pair.first]) for name, pair in PAIRS.items()
]


@pytest.mark.parametrize(("name", "setting", "first"), WAYS)
def test_layers_are_drawn_and_ranks_fall_at_the_same_time(name: str, setting: str, first: str | None) -> None:
    pair = PAIRS[name]
    callbacks, layers, adaptive = pair.make(first)
    still = Still(layers, adaptive)
    task = Task(pair.net(), lambda m: adamw(trainable(m)))  # decays
    flags = [p.requires_grad for p in task.parameters()]
    before = weights(task)
    run = fit(task, [*callbacks, still], steps=10, max_epochs=5, limit_train_batches=11, **TOGETHER[setting])
    assert tuple(still.counts) == pair.selected
    assert min(still.moved, still.kept, still.cut) > 0
    assert [p.requires_grad for p in task.parameters()] == flags
    assert {n: w.shape for n, w in weights(task).items()} == {n: w.shape for n, w in before.items()}
    assert sum(ranks_alive(task).values()) == pair.selected[-1]
    assert [id(p) for g in run.optimizers[0].param_groups for p in g["params"]] == [id(p) for p in trainable(task)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


def ranks_alive(task: nn.Module) -> dict[str, int]:
    """Ranks that can act, by the tensor that gates them."""
    state = task.state_dict()
    found = {k: int((v != 0).sum()) for k, v in state.items() if ".lora_E." in k}
    return found or {k: int((v.flatten(1) != 0).any(0).sum()) for k, v in state.items() if ".lora_B." in k}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("name", PAIRS)
def test_both_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    pair = PAIRS[name]

    def train(resume: Path | None) -> dict[str, Any]:
        callbacks, _, _ = pair.make()
        task = Task(pair.net(dropout=0.2), lambda m: adamw(two_groups(m)))
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
    for step in (1, 3, 5, 7):  # warm-up, falling, just before the final choice falls due and after it
        assert_equal(train(tmp_path / f"step={step}.ckpt"), whole, f"{step}")


@pytest.mark.parametrize("name", PAIRS)
def test_both_leave_the_model_as_found_after_an_exception(name: str) -> None:
    pair = PAIRS[name]

    class Late(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:  # ranks have left the memory by now
                raise Stop

    task = Task(pair.net(), lambda m: adamw(trainable(m)))
    flags, shapes = [p.requires_grad for p in task.parameters()], [p.shape for p in task.parameters()]
    callbacks, _, adaptive = pair.make()
    with pytest.raises(Stop):
        fit(task, [*callbacks, Late()], steps=10)
    assert adaptive.selection.state_dict()["final"]
    assert [p.requires_grad for p in task.parameters()] == flags
    assert [p.shape for p in task.parameters()] == shapes
    assert not any(p._post_accumulate_grad_hooks for p in task.parameters())
    assert not any(
        m._state_dict_hooks or m._load_state_dict_pre_hooks for m in task.modules() if "lora" in str(type(m))
    )
    assert "forward" not in vars(task.net.base_model)


@pytest.mark.parametrize("first", ORDERS)
def test_entries_and_ranks_of_the_same_factors_are_refused(first: str) -> None:
    entries = SelectiveTuning(
        Entries(pattern=r".*lora_A.*"), Magnitude(), Constant(0.5), TopK(), Compact(), name="entries"
    )
    callbacks = [entries, AdaLoRA(**OPTIONS)][:: 1 if first == "layers" else -1]
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


def train(kind: str, batch: int, joined: int = 1, wrapper: bool = False, **options: Any) -> dict[str, Any]:
    """One fit of a method or a pair, alone or as a rank; ``joined`` processes' batches in one."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    case = {**RANK_METHODS, **LORA_CASES, **PAIRS}[kind]
    net = case.net(dropout=0.0)
    if isinstance(case, Pair):
        callbacks, _, driver = case.make()
    else:
        driver = case.make(warmup=1, final=4, every=2)
        callbacks = [driver]
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
        run = trainer(callbacks, 10, use_distributed_sampler=False, **{**more, **options})
        run.fit(task, source)
        selection = driver.selection
    return {"weights": {k: v.clone() for k, v in net.state_dict().items()}, "selection": selection.state_dict()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["adalora", "lora"])
@pytest.mark.xdist_group("ranks")
def test_two_processes_choose_and_train_alike(kind: str, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    first, second = ranks(2).run(_ddp, kind, options)
    assert_equal(first, second)
    assert first["selection"]["final"]
    alone = train(kind, 2, joined=2, **options)
    assert torch.equal(first["selection"]["masks"], alone["selection"]["masks"])
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.xdist_group("ranks")
def test_two_processes_with_two_selections_choose_and_train_alike(kind: str) -> None:
    first, second = ranks(2).run(_ddp, kind, {"accumulate_grad_batches": 2})
    assert_equal(first, second)
    assert first["selection"]["final"]
    assert int(first["selection"]["mask"].sum()) == PAIRS[kind].selected[-1]


def _ddp(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(kind, 2, **options)


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
