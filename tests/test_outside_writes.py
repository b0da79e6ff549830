"""What others do to weights, gradients and checkpoints between our steps is neither undone nor mixed up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from narrow import Everything, drawn, listed, state_of, windows
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from toys import QUIET, WIDTH, Net, Task, adamw, fit, moved, tokens, trainable, weights

from apportion.budgets import Constant
from apportion.callbacks import LIFT, LISA, SIFT, SPIDER, BAdam, BitFit, PaFI, Random
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Freeze
from apportion.entry_units import Entries
from apportion.entrywise import GradientMagnitude
from apportion.master import Master, full_precision_copy
from apportion.optim import Selective
from apportion.owner import Owner
from apportion.rules import Sample, TopK
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers

HALF = torch.bfloat16


def masters() -> SelectiveTuning:
    """All linear layers train, through full-precision copies if they are of half precision."""
    units = Layers(pattern=r"\w+\.[02]")
    return SelectiveTuning(units, Uniform(), Constant(1.0), Sample(), Freeze(master="fp32"), select_when=When(end=1))


# Checkpoints of other entries -----------------------------------------------------------------------------------------


class Saved(pl.Callback):
    """A checkpoint after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
        if run.global_step == 2:
            run.save_checkpoint(self.path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    "first", [Random(0.1, "tensor"), LIFT(amount=0.1, lra_rank=2, train_head=True)], ids=["drawn", "lift"]
)
def test_state_of_as_many_other_entries_is_refused(first: Any, precision: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(Task(), [copy.deepcopy(first), Saved(path)], 3, precision=precision)
    other = Random(0.1, "tensor", seed=1, name="other")
    with pytest.raises(ValueError, match=r"load the selection that was saved with it .*, or the weights alone"):
        fit(Task(), [other], 4, resume=path, precision=precision)
    assert fit(Task(), [copy.deepcopy(first)], 4, resume=path, precision=precision).global_step == 4


def plain(mask_seed: int, steps: int, dtype: torch.dtype = HALF) -> tuple[Everything, Selective]:
    """A plain loop that has done some steps with entries that are drawn with ``mask_seed``, half of every tensor."""
    net = Everything(dtype=dtype)
    masks = {
        name: (ranks := torch.rand(p.shape, generator=torch.Generator().manual_seed(mask_seed))) >= ranks.median()
        for name, p in net.named_parameters()
    }
    optimizer = Selective(adamw(net.parameters()), net, listed([masks]))
    for (batch,) in windows(steps):
        net.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def test_state_is_of_the_entries_and_not_of_their_number() -> None:
    _, optimizer = plain(0, 2)
    saved = {k: v for k, v in optimizer.state_dict().items() if k != "selection"}
    _, other = plain(1, 0)
    stores = [[store.index for store in map(o.owner.narrow, o.selection.bound.tensors)] for o in (optimizer, other)]
    assert [len(index) for index in stores[0]] == [len(index) for index in stores[1]]
    with pytest.raises(ValueError, match="for other entries of a tensor of shape"):
        other.load_state_dict(saved)


def test_a_file_that_does_not_tell_of_which_entries_it_is_loads_as_before() -> None:
    net, optimizer = plain(0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["entries"].values():
        assert isinstance(state.pop("index"), str)
    again, other = plain(0, 0)
    again.load_state_dict(net.state_dict())
    other.load_state_dict(saved)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(state_of(other, q)["exp_avg"], state_of(optimizer, p)["exp_avg"])
        assert torch.equal(other.owner.leaf(q), optimizer.owner.leaf(p))


def test_before_the_first_step_there_is_nothing_to_mix_up() -> None:
    _, optimizer = plain(0, 0, torch.float32)
    _, other = plain(1, 0, torch.float32)
    other.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k != "selection"})


# Optimizers that take turns -------------------------------------------------------------------------------------------


class Duel(pl.LightningModule):
    """Two networks, each frozen while the other one trains, as for adversarial training.

    ``real`` freezes the weights themselves, where Lightning freezes what stands in the param groups.
    """

    def __init__(self, accumulate: int, together: bool, real: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate, self.together, self.real = accumulate, together, real
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nets = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
        self.maker, self.judge = nets

    def turn(self, optimizer: Any, net: nn.Module, other: nn.Module) -> None:
        if self.real:
            net.requires_grad_(True)
            other.requires_grad_(False)
        else:
            self.toggle_optimizer(optimizer)

    def over(self, optimizer: Any) -> None:
        if self.real:
            self.requires_grad_(True)
        else:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        of_maker, of_judge = self.optimizers()
        due = (batch_idx + 1) % self.accumulate == 0

        def step(optimizer: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()

        self.turn(of_maker, self.maker, self.judge)
        self.manual_backward(-self.judge(self.maker(batch)).mean())
        if due and not self.together:
            step(of_maker)
        self.over(of_maker)
        self.turn(of_judge, self.judge, self.maker)
        self.manual_backward((self.judge(self.maker(batch).detach()) - self.judge(batch)).square().mean())
        if due and not self.together:
            step(of_judge)
        self.over(of_judge)
        if due and self.together:
            step(of_maker)
            step(of_judge)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=0.05) for net in (self.maker, self.judge)]


def duel(callback: Any, accumulate: int, together: bool, real: bool = False, **options: Any) -> dict[str, Tensor]:
    module = Duel(accumulate, together, real)
    batches = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(2)).split(2)
    run = pl.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [callback] if callback else [], **options})
    run.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return weights(module)


ALL = Entries(embeddings="unit", head="unit", norm="unit", bias="unit")


def everything(capture: str) -> SelectiveTuning:
    return SelectiveTuning(
        ALL, Random().slots.score, Constant(1.0), TopK(), Compact(capture=capture), select_when=When(end=1)
    )


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("capture", ["hook", "tiled"])
def test_entries_train_in_turn(capture: str, accumulate: int, together: bool) -> None:
    """Everything selected is plain training."""
    found = duel(everything(capture), accumulate, together)
    expected = duel(None, accumulate, together)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5 if capture == "tiled" else 0, atol=0)
    assert len(moved(weights(Duel(1, False)), found)) == len(found)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_masters_train_in_turn(accumulate: int, together: bool) -> None:
    found = duel(masters(), accumulate, together, precision="bf16-true")
    assert not moved(found, duel(masters(), accumulate, together, real=True, precision="bf16-true"))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_that_decide_are_those_of_the_own_turn(accumulate: int) -> None:
    """They stay until the step, through the turns of the other optimizer."""
    method = SelectiveTuning(
        ALL, GradientMagnitude(), Constant(1.0), TopK(), Compact(capture="hook"), select_when=When(end=1)
    )
    assert not moved(duel(method, accumulate, True), duel(None, accumulate, True))


# Weights that others write --------------------------------------------------------------------------------------------


def one(p: nn.Parameter) -> tuple[torch.optim.Optimizer, Owner]:
    optimizer = torch.optim.SGD([p], lr=2.0**-12)
    owner = Owner([optimizer])
    owner.claim("a", {"p": p}, "keep", "fp32")
    owner.select("a", [p])
    return optimizer, owner


def push(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        p.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("turned", [False, True])
def test_a_master_takes_up_what_others_write_and_keeps_the_rest_of_its_digits(turned: bool) -> None:
    value = torch.ones(3, 4, dtype=HALF)
    p = nn.Parameter(value.t() if turned else value)
    optimizer, owner = one(p)
    push(p, optimizer, 3)
    lost = 1 - 3 * 2.0**-12  # too little for bf16
    assert (p == 1).all()
    with torch.no_grad():
        p[1, 2] = 5
    push(p, optimizer)
    expected = torch.full(p.shape, lost)
    expected[1, 2] = 5
    assert torch.equal(owner.leaf(p), expected - 2.0**-12)
    p.data = torch.full_like(p, 7)
    push(p, optimizer)
    assert torch.equal(owner.leaf(p), torch.full(p.shape, 7 - 2.0**-12))


def test_a_large_master_is_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.master._PIECE", 5)
    p = nn.Parameter(torch.ones(4, 3, dtype=HALF))
    optimizer, owner = one(p)
    push(p, optimizer)
    with torch.no_grad():
        p.view(-1)[[0, 7, 11]] = 3
    push(p, optimizer)
    expected = torch.full((12,), 1 - 2 * 2.0**-12)
    expected[[0, 7, 11]] = 3 - 2.0**-12
    assert torch.equal(owner.leaf(p).view(-1), expected)


def test_ordinary_steps_compare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*args: Any, **options: Any) -> Any:
        raise AssertionError("a step looked at values")

    p = nn.Parameter(torch.ones(4, dtype=HALF))
    optimizer, _ = one(p)
    net, entries = plain(0, 1)
    push(p, optimizer)
    monkeypatch.setattr(torch, "where", told)
    push(p, optimizer, 2)
    net.loss(windows(1)[0][0]).backward()
    entries.step()


def test_a_parked_master_takes_up_what_was_written_meanwhile() -> None:
    p, q = (nn.Parameter(torch.ones(4, dtype=HALF)) for _ in range(2))
    optimizer = torch.optim.SGD([p, q], lr=2.0**-12)
    owner = Owner([optimizer])
    owner.claim("a", {"p": p, "q": q}, "keep", "fp32")
    owner.select("a", [p])
    push(p, optimizer)
    owner.select("a", [q])
    with torch.no_grad():
        p[0] = 3
    owner.select("a", [p])
    push(p, optimizer)
    assert torch.equal(owner.leaf(p), torch.tensor([3.0, 1 - 2.0**-12, 1 - 2.0**-12, 1 - 2.0**-12]) - 2.0**-12)


def test_a_checkpoint_of_written_weights_does_not_bring_masters_from_before_back() -> None:
    """As at the end of weight averaging: it is saved before another step has been taken."""
    for name in METHODS:
        net, optimizer = looped(name)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1)
        saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        net, optimizer = looped(name)
        net.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        go(net, optimizer)
        near(net, saved[0])


METHODS = {
    "layers": lambda: LISA(active_layers=2, interval=100, master="fp32"),
    "blocks": lambda: BAdam(interval=100),
    "entries": lambda: Random(0.5),
    "biases": lambda: BitFit(),
}


def looped(name: str, dtype: torch.dtype = HALF) -> tuple[Net, Selective]:
    """A plain loop that has done three steps at a small learning rate."""
    net = Net(dropout=0.0).to(dtype)
    optimizer = Selective(adamw(net.parameters(), lr=1e-3, weight_decay=0.0), net, METHODS[name]())
    for step in range(3):
        go(net, optimizer, step)
    return net, optimizer


def go(net: Net, optimizer: Selective, step: int = 9) -> None:
    net.loss(tokens(4, seed=step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def near(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """The weights are these but for some steps at a small learning rate."""
    for key, p in module.named_parameters():
        assert torch.allclose(p.float(), weights[key].float(), rtol=2**-8, atol=4e-3), key


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", METHODS)
def test_weights_loaded_between_steps_stay_loaded(name: str, dtype: torch.dtype) -> None:
    net, optimizer = looped(name, dtype)
    good = {k: v + 1 for k, v in net.state_dict().items()}
    net.load_state_dict(good)
    go(net, optimizer)
    near(net, good)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("name", METHODS)
def test_weights_loaded_in_hooks_of_the_module_stay_loaded(name: str, hook: str, precision: str) -> None:
    task = Task(net=Net(dropout=0.0), optimizer=lambda m: adamw(trainable(m), lr=1e-3))
    good = {k: v + 1 for k, v in task.state_dict().items()}
    setattr(task, hook, lambda: (task.load_state_dict(good), None)[1])
    fit(task, [METHODS[name]()], 2, precision=precision)
    near(task, good)


@pytest.mark.parametrize("name", METHODS)
def test_averaged_weights_are_kept_through_the_epoch_of_batch_norms(name: str) -> None:
    kept: dict[str, Tensor] = {}

    class Last(pl.Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if run.current_epoch == 3 and batch_idx == 0:
                kept.update(weights(module))

    task = Task(net=Net(dropout=0.0, batch_norm=True), optimizer=lambda m: adamw(trainable(m), lr=5e-2))
    averaged = StochasticWeightAveraging(5e-2, swa_epoch_start=1)
    fit(task, [METHODS[name](), averaged, Last()], -1, max_epochs=3, limit_train_batches=4, precision="bf16-true")
    assert kept
    assert not moved(kept, weights(task))


@pytest.mark.parametrize("exchange", [False, True])
def test_entries_go_back_to_weights_that_were_loaded_after_the_first_choice(exchange: bool) -> None:
    net = Everything()
    masks = [drawn(net, seed=0), drawn(net, seed=1)]
    optimizer = Selective(adamw(net.parameters()), net, listed(masks, Compact(leaving="revert", capture="hook")))
    with torch.no_grad():
        for p in net.parameters():
            if exchange:
                p.data = p.data + 1
            else:
                p.add_(1)
    loaded = weights(net)
    net.loss(windows(1)[0][0]).backward()
    optimizer.step()
    for name, p in net.named_parameters():  # the step is over, and the second choice made
        assert torch.equal(p[~masks[1][name]], loaded[name][~masks[1][name]]), name


# Gradients that were there before -------------------------------------------------------------------------------------


BEFORE = {
    "entries": (lambda: Random(0.5), torch.float32),
    "biases": (lambda: BitFit(), torch.float32),
    "principal": (lambda: LIFT(rank=1, lra_rank=2), torch.float32),
    "entries by gradients": (lambda: SIFT(0.2), torch.float32),
    "blocks": (lambda: BAdam(interval=100), HALF),
}


@pytest.mark.parametrize("name", BEFORE)
def test_gradients_of_a_step_before_are_not_added_to_the_first(name: str) -> None:
    make, dtype = BEFORE[name]

    def run(clean: bool) -> dict[str, Tensor]:
        net = Net(dropout=0.0).to(dtype)
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        net.loss(tokens(4)).backward()
        base.step()
        if clean:
            base.zero_grad()
        optimizer = Selective(base, net, make())
        held = {p for p, slot in optimizer.owner.slots.items() if slot.leaf is not p}
        assert all(p.grad is None for p in held)
        assert held
        optimizer.zero_grad()
        net.loss(tokens(4, seed=7)).backward()
        optimizer.step()
        return weights(net)

    assert not moved(run(True), run(False))


def test_a_master_frees_what_is_left_of_a_step_before() -> None:
    p = nn.Parameter(torch.ones(4, dtype=HALF))
    p.sum().backward()
    Master(p, full_precision_copy(p))
    assert p.grad is None


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_spider_draws_back_to_what_hooks_of_the_module_have_loaded(hook: str) -> None:
    task = Task(net=Net(dropout=0.0), optimizer=lambda m: adamw(trainable(m), lr=1e-3))
    good = {key: value + 1 for key, value in task.state_dict().items()}

    def load() -> None:
        task.load_state_dict(good)

    setattr(task, hook, load)
    fit(task, [SPIDER()], 2)
    for key, parameter in task.named_parameters():
        assert torch.allclose(parameter, good[key], rtol=0.0, atol=4e-3), key


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("make", [lambda: LIFT(2, interval=2), lambda: PaFI(60)], ids=["lift", "pafi"])
def test_weights_that_were_chosen_by_must_be_those_that_are_trained(make: Any, hook: str) -> None:
    task = Task(net=Net(dropout=0.0), optimizer=lambda m: adamw(trainable(m), lr=1e-3))
    good = {key: value + 1 for key, value in task.state_dict().items()}

    def load() -> None:
        task.load_state_dict(good)

    setattr(task, hook, load)
    with pytest.raises(RuntimeError, match=r"has chosen by weights that were replaced .* load them in `__init__`"):
        fit(task, [make()], 2)
    fit(task, [Random(60)], 2)  # does not read them


def test_weights_that_are_put_aside_and_back_are_the_same() -> None:
    task = Task(net=Net(dropout=0.0))

    def swap() -> None:
        kept = {key: value.clone() for key, value in task.state_dict().items()}
        task.load_state_dict({key: value + 1 for key, value in kept.items()})
        task.load_state_dict(kept)

    task.on_train_start = swap  # type: ignore[method-assign]
    fit(task, [LIFT(2, interval=2)], 3)
    fit(Task(net=Net(dropout=0.0)), [LIFT(2, interval=2)], 3, precision="64-true")
