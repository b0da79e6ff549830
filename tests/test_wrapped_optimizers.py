"""Optimizers and models in the hands of wrappers: what would train wrongly without a word is refused with a way out."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import Tensor, nn, optim
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from toys import Net, Task, adamw, fit, moved, tokens, trainable, weights
from workers import ranks

from apportion import wrapped
from apportion.callbacks import HFT, ID3, LIFT, LISA, BAdam, Random
from apportion.effects import check_entries
from apportion.optim import Selective

METHODS: dict[str, Callable[[], Any]] = {
    "lisa": lambda: LISA(active_layers=1, interval=2),
    "badam": lambda: BAdam(interval=2),
    "hft": lambda: HFT(),
    "random": lambda: Random(budget=60),
    "lift": lambda: LIFT(rank=1, lra_rank=2, interval=2),
    "id3": lambda: ID3(budget=60, max_steps=4),
}


def loop(net: Any, optimizer: Any, batches: range, forward: Any = None) -> None:
    for i in batches:
        batch = tokens(4, seed=i)
        logits = (forward or net)(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


# Optimizers around optimizers -----------------------------------------------------------------------------------------


class Lookahead(optim.Optimizer):
    """Shares the groups of the optimizer inside, which has the moments; its own state are slow weights."""

    def __init__(self, inside: optim.Optimizer) -> None:
        super().__init__(inside.param_groups, {})
        self.optimizer, self.param_groups, self.steps = inside, inside.param_groups, 0

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for p in (p for group in self.param_groups for p in group["params"]):
                slow = self.state[p].setdefault("slow", p.detach().clone())
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss


class Bare(optim.Optimizer):
    """As many published wrappers, it never calls the constructor of its base."""

    def __init__(self, inside: optim.Optimizer) -> None:
        self._base_optimizer, self.param_groups, self.defaults = inside, inside.param_groups, inside.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> Any:
        return self._base_optimizer.step(closure)


class Chained(optim.Optimizer):
    """Several optimizers, in whatever holds them."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts
        inside = list(parts.values()) if isinstance(parts, dict) else list(parts)
        super().__init__([dict(group) for part in inside for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        raise AssertionError("never reached")


class Snapshot(optim.Optimizer):
    """Steps the parameters that it was built with, whatever is in its groups."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-2})
        self.mine = params

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.mine:
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-2)


WRAPPERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "Lookahead": lambda params: Lookahead(adamw(params)),
    "Bare": lambda params: Bare(adamw(params)),
    "Chained": lambda params: Chained([adamw(params[:3]), adamw(params[3:])]),
    "Chained by name": lambda params: Chained({"a": adamw(params[:3]), "b": adamw(params[3:])}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_an_optimizer_that_steps_another_is_refused_with_the_one_to_give(kind: str, method: str) -> None:
    words = rf"`{kind.split()[0]}` steps another optimizer.*`AdamW`.*Give the `AdamW` itself"
    task = Task(Net(dropout=0.0), lambda m: WRAPPERS[kind](trainable(m)))
    start = weights(task)
    with pytest.raises(ValueError, match=words):
        fit(task, METHODS[method]())
    with pytest.raises(ValueError, match=words):
        Selective(WRAPPERS[kind](trainable(task)), task, METHODS[method]())
    assert not moved(start, weights(task))
    assert all(p.requires_grad for p in task.parameters())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("method", METHODS)
def test_zero_is_refused_with_the_optimizer_to_give(method: str, one_process: None) -> None:
    def sharded(module: nn.Module) -> optim.Optimizer:
        return ZeroRedundancyOptimizer(trainable(module), optimizer_class=optim.AdamW, lr=1e-2)

    with pytest.raises(ValueError, match=r"`ZeroRedundancyOptimizer` steps another.*the `AdamW` itself, on every"):
        fit(Task(Net(dropout=0.0), sharded), METHODS[method]())


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_and_fabric_take_a_selection_and_do_not_go_into_one(method: str) -> None:
    plain, accelerated, fabricated = (Net(dropout=0.0) for _ in range(3))
    loop(plain, Selective(adamw(trainable(plain)), plain, METHODS[method]()), range(5))

    accelerator, fabric = Accelerator(cpu=True), Fabric(accelerator="cpu")
    around = accelerator.prepare(Selective(adamw(trainable(accelerated)), accelerated, METHODS[method]()))
    loop(accelerated, around, range(5))
    assert not moved(weights(plain), weights(accelerated))
    _, around = fabric.setup(fabricated, Selective(adamw(trainable(fabricated)), fabricated, METHODS[method]()))
    loop(fabricated, around, range(5))
    assert not moved(weights(plain), weights(fabricated))

    net = Net()
    base = adamw(trainable(net))
    prepared, set_up = accelerator.prepare(base), fabric.setup(net, base)[1]
    before = [{**group, "params": list(group["params"])} for group in base.param_groups]
    with pytest.raises(ValueError, match=r"the other way round, `accelerator\.prepare\(model, Selective\(AdamW, "):
        Selective(prepared, net, METHODS[method]())
    with pytest.raises(ValueError, match=r"the other way round, `fabric\.setup\(model, Selective\(AdamW, "):
        Selective(set_up, net, METHODS[method]())
    assert [group["lr"] for group in base.param_groups] == [group["lr"] for group in before]
    for group, found in zip(base.param_groups, before, strict=True):
        assert all(a is b for a, b in zip(group["params"], found["params"], strict=True))


def test_a_trial_of_entries_never_steps_what_a_view_shows() -> None:
    net = Net()
    selective = Selective(adamw(trainable(net)), net, LISA(active_layers=1, interval=1))
    net.loss(tokens(4)).backward()
    start = weights(net)
    wrapped.check_optimizer(selective)  # a view passes where nothing is tried
    with pytest.raises(ValueError, match=r"`Selective` steps another.*second `Selective` around the same `AdamW`"):
        check_entries([selective])
    assert not moved(start, weights(net))
    assert selective.selection.step == 0


def test_an_optimizer_that_steps_a_list_of_its_own_cannot_train_entries() -> None:
    with pytest.raises(ValueError, match="`Snapshot` does not move what stands in its param groups"):
        fit(Task(Net(dropout=0.0), lambda m: Snapshot(trainable(m))), Random(budget=60))


# Models in the hands of wrappers --------------------------------------------------------------------------------------


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("method", ["lisa", "random"])
def test_a_ddp_model_is_refused_with_the_module_to_give(method: str, one_process: None) -> None:
    for options in ({}, {"find_unused_parameters": True, "static_graph": True}):
        net = Net(dropout=0.0)
        model = DistributedDataParallel(net, **options)
        for given in (model, nn.ModuleDict({"inside": model})):
            with pytest.raises(ValueError, match=r"`DistributedDataParallel`.*bare module, `model\.module`"):
                Selective(adamw(trainable(net)), given, METHODS[method]())
    Selective(adamw(trainable(net)), model.module, METHODS[method]()).close()


@pytest.mark.xdist_group("ranks")
def test_a_sharded_model_is_refused(one_process: None) -> None:
    net = Net(dropout=0.0)
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=r"`LISA` was given a model whose parameters FSDP has sharded.*bare module"):
        Selective(adamw(trainable(net)), net, LISA(active_layers=1))


def train_in_ddp(method: str, bare: bool) -> dict[str, Tensor]:
    """A plain loop of a rank, over the bare module or by a wrapper that looks for what has no gradient."""
    net = Net(dropout=0.0)
    model = net if bare else DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = Selective(adamw(trainable(net)), model, METHODS[method]())
    loop(net, optimizer, range(dist.get_rank(), 12, 2), model)
    return weights(net)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("method", METHODS)
def test_both_ways_out_of_ddp_train_the_same(method: str) -> None:
    bare, other = ranks(2).run(train_in_ddp, method, True), ranks(2).run(train_in_ddp, method, False)
    for rank in (0, 1):
        assert not moved(bare[0], bare[rank])
        assert not moved(bare[0], other[rank])
    assert moved(weights(Net()), bare[0])


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_is_not_copied_or_pickled_and_goes_on_by_its_state(method: str, tmp_path: Path) -> None:
    def build() -> tuple[Net, Selective]:
        net = Net(dropout=0.0)
        return net, Selective(adamw(trainable(net)), net, METHODS[method]())

    net, optimizer = build()
    loop(net, optimizer, range(3))
    words = r"`Selective\(\.\.\.\)` of `\w+` cannot be copied or pickled.*load the `state_dict\(\)`"
    for attempt in (
        lambda: copy.copy(optimizer),
        lambda: copy.deepcopy((net, optimizer)),
        lambda: torch.save((net, optimizer), tmp_path / "both.pt"),
    ):
        with pytest.raises(TypeError, match=words):
            attempt()
    twin, other = build()
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loop(net, optimizer, range(3, 7))
    loop(twin, other, range(3, 7))
    assert not moved(weights(net), weights(twin))
