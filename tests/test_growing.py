"""Ranks that come in during a fit: nothing jumps, what waits keeps every bit and costs nothing that it must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from alike import assert_equal
from peft import LoraConfig, PeftModel, get_peft_model
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from rank_methods import CASES, fresh_net, svd_net
from test_ranks import SETTINGS, Watch, gates, task_for
from test_ranks_files import logits
from torch import Tensor, nn
from toys import ManualTask, Net, Task, adamw, fit, loader, tokens, trainable, trainer, two_groups, weights
from workers import ranks

from apportion.adapters import find
from apportion.callbacks import IST, LISA, IncreLoRA, TriAdaptLoRA
from apportion.driver import SelectiveTuning
from apportion.grow import Grow
from apportion.loader import StatefulLoader
from apportion.lora_export import to_lora
from apportion.matrix_scores import MatrixSensitivity, NormGrowth
from apportion.optim import Selective
from apportion.prune import Prune
from apportion.rank_budgets import Decay, Fixed
from apportion.rank_growth import Gap, Growth, Rounds
from apportion.rank_piecewise import Piecewise
from apportion.rank_rules import Above, BestMatrices
from apportion.rank_scores import RankGradient, RankMagnitude
from apportion.rank_selection import RankSelection
from apportion.rank_units import Ranks
from apportion.rules import TopK
from apportion.sensitivity import Sensitivity

GROWING = [name for name, case in CASES.items() if case.grows]
OPTIONS: dict[str, Any] = {"target": 20, "matrices": 2, "add": 2, "warmup": 1, "every": 2}


def selection_of(driver: SelectiveTuning) -> RankSelection:
    assert isinstance(driver.selection, RankSelection)
    return driver.selection


def waiting(driver: SelectiveTuning) -> dict[str, Tensor]:
    """Ranks that are not in, by adapted layer."""
    selection = selection_of(driver)
    assert selection.mask is not None
    return {a.name: ~m for a, m in zip(selection.bound.adapters, selection.bound.split(selection.mask), strict=True)}


def parts(state: dict[str, Tensor], name: str, out: Tensor) -> dict[str, Tensor]:
    """What belongs to some ranks of an adapted layer, in the shapes of a state dict."""
    found = {}
    for key, value in state.items():
        if key.startswith(name + ".lora_") and "magnitude" not in key:
            found[key] = value.index_select(1 if ".lora_B." in key else 0, out.nonzero().flatten())
    assert found
    return found


# The function
# --------------------------------------------------------------------------------------------------------------------


class Before(pl.Callback):
    """What the model computes before the selection of a step is made, and how many ranks are in."""

    def __init__(self, driver: SelectiveTuning) -> None:
        self.driver = driver

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert self.driver.selection.mask is not None
        self.count, self.logits = int(self.driver.selection.mask.sum()), logits(pl_module.net)


class After(pl.Callback):
    """Compares with what it computes after."""

    def __init__(self, before: Before) -> None:
        self.before = before
        self.grown: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert self.before.driver.selection.mask is not None
        more = int(self.before.driver.selection.mask.sum()) - self.before.count
        torch.testing.assert_close(logits(pl_module.net), self.before.logits, rtol=0, atol=1e-6 if more else 0)
        if more:
            self.grown.append(more)


@pytest.mark.parametrize("name", GROWING)
def test_a_rank_that_comes_in_changes_nothing_at_once(name: str) -> None:
    case = CASES[name]
    driver = case.make()
    before = Before(driver)
    after = After(before)
    net = case.net()
    plain = logits(net)
    fit(Task(net), [before, driver, after], steps=8)
    assert sum(after.grown) == 20 - 12
    assert (logits(net) - plain).abs().max() > 1e-2  # they have learned


@pytest.mark.parametrize("kind", ["svd", "lora", "dora"])
def test_adapters_that_wait_compute_what_the_model_without_them_does(kind: str) -> None:
    net = fresh_net(kind)
    expected = logits(net)
    driver = IncreLoRA(**OPTIONS)
    optimizer = Selective(adamw(trainable(net)), net, driver, total_steps=8)
    torch.testing.assert_close(logits(net), expected, rtol=0, atol=1e-6)
    assert sum(part.a.shape[0] for part in find(net)) == 12
    for part in optimizer.owner.opened[optimizer._key].shrunk:  # what waits beside: rows of A, and B where E gates it
        adapter = part.adapter
        widths = [adapter.a[0].numel()] + [adapter.b[:, 0].numel()] * (kind == "svd")
        assert sorted(v.numel() for v in part.rest.values()) == sorted(3 * width for width in widths)
    optimizer.close()
    assert sum(part.a.shape[0] for part in find(net)) == 48


def test_the_scale_is_that_of_the_largest_rank_where_alpha_over_rank_would_shrink_what_was_learned() -> None:
    x, rank, add = torch.ones(1, 4), 1, 1

    def update(r: int) -> Tensor:
        """What PEFT's adapter of rank r makes of the same first rank, the others at zero."""
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 4, bias=False))
        plain = base(x)
        model = get_peft_model(base, LoraConfig(r=r, lora_alpha=8, target_modules=["0"]))
        part = find(model)[0]
        part.a.data.fill_(0.5)
        part.b.data.fill_(0.0)
        part.b.data[:, 0] = torch.arange(4.0)
        return model(x) - plain

    torch.testing.assert_close(update(rank + add), update(rank) * rank / (rank + add))  # half of it is gone
    torch.testing.assert_close(update(9), update(8) * 8 / 9)

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    driver = IncreLoRA(target=4, matrices=1, warmup=0, every=1, ramp=0, orthogonality=0.0)
    optimizer = Selective(torch.optim.SGD(trainable(model), lr=0.1), model, driver, total_steps=8)
    seen = []
    for _ in range(3):
        model(x).square().sum().backward()
        before = find(model)[0]
        learned = before.b.detach() @ before.a.detach()
        grads = before.b.grad @ before.a.detach(), before.b.detach() @ before.a.grad  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        part = find(model)[0]
        with torch.no_grad():
            delta = model(x) - model.get_submodule("base_model.model.0").base_layer(x)
        torch.testing.assert_close(delta, 2.0 * x @ (part.b @ part.a).T, rtol=1e-5, atol=1e-6)
        moved = learned - 0.1 * (grads[0] + grads[1])
        torch.testing.assert_close((part.b @ part.a).detach(), moved, rtol=0, atol=0.05)  # to first order
        seen.append(part.a.shape[0])
    assert seen == [2, 3, 4]
    optimizer.close()


# What waits
# --------------------------------------------------------------------------------------------------------------------


class Still(pl.Callback):
    """Sees to it that ranks that wait keep every bit, in the model and in files."""

    def __init__(self, driver: SelectiveTuning, first: dict[str, Tensor]) -> None:
        self.driver, self.first = driver, first
        self.compared = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        state = pl_module.state_dict()
        for name, out in waiting(self.driver).items():
            for key, value in parts(state, name, out).items():
                dtype = value.dtype
                assert torch.equal(value, parts(self.first, name, out)[key].to(dtype)), key
                self.compared += value.numel()


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "overflows" not in s])
@pytest.mark.parametrize("name", ["increlora", "triadapt over dora"])
def test_what_waits_does_not_move_by_one_bit(name: str, setting: str) -> None:
    case = CASES[name]
    driver = case.make(target=30) if name == "triadapt" else case.make()
    task = task_for(case.net(), setting)
    first = {k: v.clone() for k, v in task.state_dict().items()}
    still = Still(driver, first)
    fit(task, [driver, still], steps=16 if setting == "two optimizers" else 8, **SETTINGS[setting]())
    assert still.compared > 1000
    last = task.state_dict()
    dtype = next(iter(last.values())).dtype
    for layer, out in waiting(driver).items():
        for key, value in parts(last, layer, out).items():
            assert torch.equal(value, parts(first, layer, out)[key].to(dtype)), key
    assert {k: v.shape for k, v in last.items()} == {k: v.shape for k, v in first.items()}


@pytest.mark.parametrize("name", GROWING)
def test_gradients_and_optimizer_state_are_as_large_as_what_is_in(name: str) -> None:
    case = CASES[name]
    driver = case.make()
    watch = Watch(driver)
    task = Task(case.net(), lambda m: torch.optim.AdamW(trainable(m)))
    fit(task, [driver, watch], steps=8)
    sizes = selection_of(driver).bound.sizes
    vectors = sum(p.numel() for n, p in task.named_parameters() if "magnitude" in n)
    weigh = {int(mask.sum()): int(sizes[mask].sum()) + vectors for mask in driver.history.masks}
    assert watch.entries == [weigh[k] for k in case.selected]
    assert watch.state == [2 * weigh[k] for k in case.selected]
    assert watch.grads == [weigh[k] for k in (12, *case.selected[:-1])]


def test_moments_of_the_ranks_that_were_in_are_kept_and_those_of_the_others_begin_at_zero() -> None:
    driver = IncreLoRA(**OPTIONS)
    found: list[tuple[dict[str, Tensor], dict[str, Tensor], int]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            names = [n for n, p in pl_module.named_parameters() if p.requires_grad]
            state = trainer.optimizers[0].state_dict()["state"]
            moments = {n: state[i]["exp_avg"].clone() for i, n in enumerate(names)}
            present = {k: v.clone() for k, v in pl_module.state_dict().items()}
            found.append((present, moments, int(sum(map(sum, map(torch.Tensor.bool, waiting(driver).values()))))))

    fit(Task(fresh_net()), [Look(), driver, Look()], steps=5)
    for (before, old, many), (after, new, fewer) in zip(found[::2], found[1::2], strict=True):
        assert all(torch.equal(value, after[key]) for key, value in before.items())  # new ones are as they waited
        assert all(torch.equal(value, new[key]) for key, value in old.items())  # zeros, as in the file before
        assert fewer <= many
    assert [f[2] for f in found[1::2]] == [36, 32, 32, 28, 28]


def test_the_ranks_that_are_left_out_in_the_end_are_as_they_were_built() -> None:
    net = fresh_net("lora")
    first = {k: v.clone() for k, v in net.state_dict().items()}
    driver = IncreLoRA(**OPTIONS)
    fit(Task(net), [driver], steps=8)
    last = net.state_dict()
    changed = [bool((last[k] != v).any()) for k, v in first.items() if "lora_A" in k]
    assert all(changed)
    for layer, out in waiting(driver).items():
        name = layer.removeprefix("net.")
        assert all(torch.equal(v, parts(first, name, out)[k]) for k, v in parts(last, name, out).items())
        assert not parts(last, name, out)[f"{name}.lora_B.default.weight"].any()


# The warm-up of new ranks
# --------------------------------------------------------------------------------------------------------------------


def grown(ramp: int, steps: int, make: Callable[[Any], Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """The net after some steps, and one step before."""
    net = fresh_net("lora", dropout=0.0)
    driver = IncreLoRA(**{**OPTIONS, "ramp": ramp, "warmup": 0, "target": 16, "orthogonality": 0.0})
    optimizer = Selective(make(trainable(net)), net, driver, total_steps=20)
    before: dict[str, Tensor] = {}
    for t in range(steps):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        net.loss(tokens(4, seed=t)).backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
    selection = optimizer.selection
    assert isinstance(selection, RankSelection)
    entered = dict(
        zip((a.name for a in selection.bound.adapters), selection.bound.split(selection.entered), strict=True)
    )
    return before, {k: v.clone() for k, v in net.state_dict().items()}, entered


@pytest.mark.parametrize(
    "make",
    [lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1), lambda ps: adamw(ps)],
    ids=["sgd", "adamw"],
)
def test_the_first_steps_of_new_ranks_are_shorter_and_those_of_the_others_are_not(make: Callable[[Any], Any]) -> None:
    before, fast, entered = grown(0, 3, make)  # two matrices of two ranks each come in after step 2
    same, slow, _ = grown(4, 3, make)
    assert_equal(before, same)
    young = [(k, v == 2) for k, v in entered.items() if bool((v == 2).any())]
    assert sum(int(v.sum()) for _, v in young) == 4
    for layer, new in young:
        for key in parts(fast, layer, new):
            old, far, near = (parts(s, layer, new)[key] for s in (before, fast, slow))
            torch.testing.assert_close(near - old, 0.25 * (far - old), rtol=1e-5, atol=1e-7)
            if "lora_B" in key:
                assert (far != old).any()
    for layer, steps in entered.items():
        for key, value in parts(slow, layer, steps == 0).items():
            assert torch.equal(value, parts(fast, layer, steps == 0)[key])


@pytest.mark.parametrize(("ramp", "factors"), [(3, [1 / 3, 2 / 3, 1.0, 1.0]), (0, [1.0, 1.0])])
def test_the_warm_up_rises_in_a_straight_line_and_ends(ramp: int, factors: list[float]) -> None:
    for age, expected in enumerate(factors):
        before, after, entered = grown(ramp, 3 + age, lambda ps: torch.optim.SGD(ps, lr=0.1))
        net = fresh_net("lora", dropout=0.0)
        net.load_state_dict(before)
        net.loss(tokens(4, seed=2 + age)).backward()  # type: ignore[operator]
        grads = {part.name: part.b.grad for part in find(net)}
        young = {
            layer: (steps == 2).nonzero().flatten() for layer, steps in entered.items() if bool((steps == 2).any())
        }
        assert sum(map(len, young.values())) == 4
        for layer, index in young.items():
            key, grad = f"{layer}.lora_B.default.weight", grads[layer]
            assert grad is not None
            moved = (after[key] - before[key])[:, index]
            torch.testing.assert_close(moved, -0.1 * expected * grad[:, index], rtol=1e-4, atol=1e-7)
            assert moved.any()


def test_each_of_two_optimizers_keeps_to_the_warm_up() -> None:
    def train(ramp: int) -> list[dict[str, Tensor]]:
        states: list[dict[str, Tensor]] = []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                states.append({k: v.clone() for k, v in pl_module.state_dict().items()})

        def halves(module: Any) -> list[torch.optim.Optimizer]:
            params = trainable(module)
            return [torch.optim.SGD(part, lr=0.1) for part in (params[:12], params[12:])]

        options = {**OPTIONS, "target": 24, "matrices": 12, "add": 1, "orthogonality": 0.0}
        driver = IncreLoRA(**options, ramp=ramp)
        fit(ManualTask(fresh_net("lora", dropout=0.0), halves), [driver, Look()], steps=8)
        assert driver.history.masks.sum(1).tolist() == [12, 24]
        return states

    (_, before, fast, *_), (_, same, slow, *_) = train(0), train(4)
    assert_equal(before, same)
    new = torch.tensor([False, True, False, False])
    for key, old in before.items():
        if ".lora_B." in key:
            far, near = (state[key][:, new] - old[:, new] for state in (fast, slow))
            torch.testing.assert_close(near, 0.25 * far, rtol=1e-5, atol=1e-8)
            assert far.any()


# Slots put together
# --------------------------------------------------------------------------------------------------------------------

FREE: dict[str, tuple[Callable[[], tuple[Any, Any, Any, Any]], tuple[int, ...]]] = {
    "linear growth by magnitude": (
        lambda: (RankMagnitude(), Growth(24, warmup=1, final=2), BestMatrices(), Grow()),
        (12, 14, 16, 19, 21, 24, 24, 24),
    ),
    "greedy growth": (
        lambda: (MatrixSensitivity(), Growth(24, warmup=1, final=2, every=2), TopK(grow=True), Grow(ramp=2)),
        (12, 14, 14, 19, 19, 24, 24, 24),
    ),
    "growth by points": (
        lambda: (NormGrowth(), Piecewise([(0, 12), (3, 20), (0.75, 0.5)]), BestMatrices(3), Grow()),
        (12, 12, 20, 20, 20, 24, 24, 24),
    ),
    "a constant budget, each matrix its share": (
        lambda: (RankGradient(), Fixed(mean_rank=2, warmup=2, final=2), TopK(per="tensor"), Prune()),
        (24,) * 8,
    ),
    "ups and downs": (
        lambda: (Sensitivity(), Piecewise([(0, 0.5), (2, 0.25), (4, 40), (6, 20)]), TopK(), Prune()),
        (24, 12, 12, 40, 40, 20, 20, 20),
    ),
    "straight lines": (
        lambda: (RankMagnitude(), Piecewise([(0, 1.0), (4, 24), (6, 12)], form="linear"), TopK(), Prune()),
        (42, 36, 30, 24, 18, 12, 12, 12),
    ),
}


@pytest.mark.parametrize("kind", ["svd", "lora"])
@pytest.mark.parametrize("name", FREE)
def test_slots_of_ranks_go_together(name: str, kind: str) -> None:
    make, expected = FREE[name]
    driver = SelectiveTuning(Ranks(), *make())
    watch = Watch(driver)
    net = fresh_net(kind)
    fit(Task(net), [driver, watch], steps=8)
    assert tuple(watch.selected) == expected
    assert driver.selection.state_dict()["final"]
    assert int(torch.cat(gates(net)).sum()) == expected[-1]
    if "share" in name:
        assert set(driver.history.masks.view(-1, 12, 4).sum(2).flatten().tolist()) == {2}
        assert watch.alive[-1] == 24
    if isinstance(driver.slots.effect, Grow):
        masks = driver.history.masks
        assert not bool((masks[:-1] & ~masks[1:]).any())  # what is in stays in


def test_a_threshold_leaves_as_many_ranks_as_are_above_it() -> None:
    net = svd_net()
    driver = SelectiveTuning(Ranks(), RankMagnitude(), Decay(warmup=2, final=2, every=2), Above(0.25), Prune())
    fit(Task(net), [driver], steps=8)
    counts = driver.history.masks.sum(1).tolist()
    assert counts[0] == 48
    assert 0 < counts[-1] < 48
    values = torch.cat([v.flatten() for k, v in net.state_dict().items() if ".lora_E." in k])
    assert int((values != 0).sum()) == counts[-1] != 24


def test_what_is_not_in_from_the_start_is_put_out_before_the_first_step() -> None:
    class Look(pl.Callback):
        alive = -1

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                self.alive = int(torch.cat(gates(pl_module)).sum())

    driver = SelectiveTuning(Ranks(), Sensitivity(), Fixed(30, warmup=4, final=2), TopK(), Prune())
    look = Look()
    fit(Task(svd_net()), [driver, look], steps=8)
    assert look.alive == 30
    assert driver.history.masks[0].view(12, 4).sum(1).tolist() == [3] * 6 + [2] * 6


# What is chosen
# --------------------------------------------------------------------------------------------------------------------


class Spy(pl.Callback):
    """Notes after every step what the adapters are, and the gradient of what gates them."""

    def __init__(self, driver: SelectiveTuning) -> None:
        self.driver = driver
        self.seen: list[list[tuple[Tensor, Tensor | None, Tensor, Tensor]]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self.look)

    def look(self, *args: Any) -> None:
        row = []
        for part in selection_of(self.driver).bound.adapters:
            grad = part.gate[0].grad
            assert grad is not None
            value = None if part.e is None else part.e.detach().clone()
            row.append((part.a.detach().clone(), value, part.b.detach().clone(), grad.clone()))
        self.seen.append(row)


@pytest.mark.parametrize("name", GROWING)
def test_every_choice_is_that_of_the_formulas(name: str) -> None:
    case = CASES[name]
    driver = case.make()
    spy = Spy(driver)
    fit(Task(case.net()), [driver, spy], steps=8)
    ranks_, means, doubts, cores = [1] * 12, [0.0] * 12, [0.0] * 12, [0.0] * 12
    choices = dict(zip(driver.history.steps, driver.history.masks, strict=True))
    assert len(choices) > 2
    for t, row in enumerate(spy.seen, 1):
        scores = []
        for m, (a, e, b, grad) in enumerate(row):
            if "increlora" in name:
                weight = b if e is None else e
                change = sum(
                    float((weight * grad).select(-1 if e is None else 0, i).sum().abs()) for i in range(len(a))
                )
                change /= a.shape[1] * b.shape[0]
                means[m] = 0.85 * means[m] + 0.15 * change
                doubts[m] = 0.85 * doubts[m] + 0.15 * abs(change - means[m])
                scores.append(means[m] * doubts[m])
            else:
                sizes = [float(a[i].norm() * b[:, i].norm()) if e is None else float(e[i]) for i in range(len(a))]
                core = sum(size**2 for size in sizes) ** 0.5 / len(a)
                scores.append(core - cores[m])
                cores[m] = core if t in choices else cores[m]
        if t in choices:
            left = case.selected[t - 1] - sum(ranks_)
            for m in sorted(range(12), key=lambda m: -scores[m]):
                more = min(2, left, 4 - ranks_[m])
                ranks_[m], left = ranks_[m] + more, left - more
            assert choices[t].view(12, 4).sum(1).tolist() == ranks_, t
    assert sum(ranks_) == 20


# Together with others
# --------------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], SelectiveTuning]] = {
    "lisa": lambda: LISA(2, 1),
    "lisa, keep": lambda: LISA(1, 3, state="keep"),
    "ist": lambda: IST(2, probe_interval=2),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_drawn_while_ranks_come_in_and_both_resume(name: str, order: int, tmp_path: Path) -> None:
    class Frozen(pl.Callback):
        """Sees to it that adapters of layers that are not drawn keep every bit, and have no gradient."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            bound, mask = self.layers.selection.bound, self.layers.selection.mask
            assert mask is not None
            chosen = bound.spread(mask)
            self.frozen = [n for n in dict(bound.covered()) if n not in chosen]
            self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            after = pl_module.state_dict()
            assert self.frozen
            assert all(torch.equal(after[n], self.before[n]) for n in self.frozen)

    def train(resume: Path | None) -> dict[str, Any]:
        layers, growing, frozen = LAYERS[name](), IncreLoRA(**OPTIONS), Frozen()
        frozen.layers = layers  # type: ignore[attr-defined]
        task = Task(fresh_net(dropout=0.2), lambda m: adamw(two_groups(m)))
        saver = [] if resume else [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)]
        options: dict[str, Any] = {} if resume else {"enable_checkpointing": True}
        where = None if resume is None else str(resume)
        callbacks = [*[layers, growing][::order], frozen, *saver]
        run = fit(task, callbacks, 8, loader(8), where, 11 if resume is None else 77, **options)
        state = run.optimizers[0].state_dict()["state"]
        shapes = {v.shape for v in task.state_dict().values()}
        assert {v.shape for s in state.values() for k, v in s.items() if k == "exp_avg"} <= shapes
        found = {"weights": task.state_dict(), "optimizer": state}
        return found | {c.label: c.selection.state_dict() for c in (layers, growing)}

    whole = train(None)
    assert whole["IncreLoRA"]["mask"].sum() == 20
    for step in (1, 2, 4, 5):
        assert_equal(train(tmp_path / f"step={step}.ckpt"), whole, f"{step}")


@pytest.mark.parametrize(
    ("train", "others"), [("task1", ("task10", "xtask1y")), ("a", ("default",)), ("b", ("a", "ab"))]
)
def test_names_that_contain_each_other_are_told_apart(train: str, others: tuple[str, ...]) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(Net(), config, adapter_name=others[0])
    for name in (*others[1:], train):
        model.add_adapter(name, config)
    model.set_adapter(train)
    before = weights(model)
    driver = IncreLoRA(target=13, warmup=0, every=1, matrices=1)
    fit(Task(model), [driver], steps=8)
    assert int(driver.history.masks[-1].sum()) == 13
    assert {part.adapter for part in selection_of(driver).bound.adapters} == {train}
    for name, value in weights(model).items():
        if f".{train}." not in name:
            assert torch.equal(value, before[name])


def test_two_adapters_that_train_grow_by_budgets_of_their_own() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(Net(), config, adapter_name="task1")
    model.add_adapter("task10", config)
    model.base_model.set_adapter(["task1", "task10"])
    first = weights(model)
    drivers = [
        IncreLoRA(target=t, adapter=a, name=a, warmup=0, every=1, matrices=2, ramp=2)
        for a, t in (("task1", 10), ("task10", 15))
    ]
    fit(Task(model), drivers, steps=8)
    for name, ranks_ in (("task1", 10), ("task10", 15)):
        parts_ = Ranks(adapter=name).bind(model).adapters
        assert sum(int((part.b != 0).any(0).sum()) for part in parts_) == ranks_
    assert {n: w.shape for n, w in weights(model).items()} == {n: w.shape for n, w in first.items()}


def test_convolutions_grow_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "2"]))
    driver = IncreLoRA(target=5, warmup=0, every=2, matrices=1, form="squares")
    optimizer = Selective(torch.optim.AdamW(trainable(model)), model, driver, total_steps=8)
    seen = []
    for _ in range(8):
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(sum(part.a.shape[0] for part in find(model)))
    assert seen == [2, 3, 3, 4, 4, 5, 5, 5]
    image = torch.randn(2, 3, 4, 4)
    live = model(image)
    optimizer.close()
    torch.testing.assert_close(model(image), live)
    assert sum(int(g.sum()) for g in gates(model)) == 5


def test_what_has_grown_is_exported_with_its_ranks(tmp_path: Path) -> None:
    net: Any = fresh_net()
    driver = IncreLoRA(**OPTIONS)
    fit(Task(net), [driver], steps=8)
    exported = to_lora(net, tmp_path)
    assert list(exported.values()) == list(selection_of(driver).per_adapter.values())
    again = PeftModel.from_pretrained(Net(), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(net), rtol=0, atol=1e-6)


# The end of a run
# --------------------------------------------------------------------------------------------------------------------


def test_a_run_that_stops_early_keeps_what_is_in_and_says_so() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    driver = IncreLoRA(**OPTIONS)
    net = fresh_net()
    with pytest.warns(UserWarning, match=r"`IncreLoRA`: the run ended after 3 steps, .* 16 of 48 ranks are in, fewer"):
        fit(Task(net), [driver, Stop()], steps=40)
    assert driver.history.steps == [0, 2]
    state = driver.selection.state_dict()
    assert (state["final"], state["forced"], state["score"]) == (True, True, {})
    assert int(torch.cat(gates(net)).sum()) == 16


def test_an_interrupted_run_is_left_with_the_shapes_it_came_with() -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("stop")

    task = Task(fresh_net("dora"))
    before = weights(task)
    flags = [p.requires_grad for p in task.parameters()]
    with pytest.raises(RuntimeError, match="stop"):
        fit(task, [IncreLoRA(**OPTIONS), Interrupt()], steps=8)
    assert {n: w.shape for n, w in weights(task).items()} == {n: w.shape for n, w in before.items()}
    assert [p.requires_grad for p in task.parameters()] == flags
    assert all(m.lora_A["default"].out_features == 4 for m in task.modules() if hasattr(m, "base_layer"))


def test_a_growing_budget_of_fractions_follows_a_time_limit() -> None:
    class Clock(Timer):
        now = 0.0

        def time_elapsed(self, stage: Any = "train") -> float:
            return self.now

    clock = Clock({"seconds": 100})

    class Tick(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            Clock.now = [0, 5, 30, 20, 45, 62, 80, 100][min(trainer.global_step, 7)]

    driver = SelectiveTuning(
        Ranks(), MatrixSensitivity(), Growth(24, warmup=0.1, final=0.4), BestMatrices(), Grow(), name="timed"
    )
    watch = Watch(driver)
    fit(Task(fresh_net()), [clock, Tick(), driver, watch], steps=-1, max_epochs=-1)
    assert watch.selected[:6] == [12, 12, 16, 16, 20, 24]  # 12 + 12 (progress - 0.1) / 0.5


# Refusals
# --------------------------------------------------------------------------------------------------------------------


def slots(**other: Any) -> SelectiveTuning:
    given = {"score": MatrixSensitivity(), "budget": Growth(20), "rule": BestMatrices(), "effect": Grow(), **other}
    return SelectiveTuning(Ranks(), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: slots(score=Sensitivity()), r"`Sensitivity` needs the grad of every unit, but `Grow` removes it"),
        (lambda: slots(score=RankGradient()), r"`RankGradient` needs the grad of every unit"),
        (lambda: slots(budget=Decay(20)), r"`Grow\(.*\)` .* a budget that grows, such as `Growth\(\)`"),
        (lambda: slots(rule=TopK()), r"a rule that adds to what is in, `BestMatrices\(\)` or `TopK\(grow=True\)`"),
        (lambda: IncreLoRA(target=49), r"asks for 49 ranks in the end, but the 12 adapters have 48"),
        (lambda: IncreLoRA(target=11), r"begins with 12 ranks in 12 matrices, but ends with 11"),
        (lambda: IncreLoRA(target=20, warmup=1, every=4), r"reaches its target after 8 steps, but the run has 7"),
        (lambda: TriAdaptLoRA(target=40, every=4), r"reaches its target after 8 steps, but the run has 7"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(make: Callable[[], Any], message: str) -> None:
    task = Task(fresh_net())
    before = weights(task)
    with pytest.raises(ValueError, match=message):
        fit(task, [make()], steps=7)
    assert all(torch.equal(w, before[n]) for n, w in weights(task).items())


@pytest.mark.parametrize("budget", [Rounds(20), Gap(20)])
def test_a_budget_that_counts_steps_is_refused_where_only_time_is_limited(budget: Any) -> None:
    clock = Timer({"seconds": 100})
    with pytest.raises(ValueError, match=r"counts steps, but only the time of the run is limited: .*`Growth\(\)`"):
        fit(Task(fresh_net()), [clock, slots(budget=budget)], steps=-1, max_epochs=-1)


@pytest.mark.parametrize("net", [svd_net, lambda: fresh_net("lora")])
def test_ranks_that_are_at_work_are_not_made_to_wait(net: Callable[[], Any]) -> None:
    task = Task(net())
    if net is not svd_net:
        nn.init.normal_(find(task.net)[3].b)
    before = weights(task)
    with pytest.raises(ValueError, match=r"lets ranks wait of which \d+, such as net\.\S+\.1, are at work"):
        fit(task, [IncreLoRA(**OPTIONS)], steps=8)
    assert all(torch.equal(w, before[n]) for n, w in weights(task).items())


@pytest.mark.parametrize(("kind", "zero"), [("svd", "b"), ("svd", "a"), ("lora", "a"), ("dora", "a")])
def test_adapters_that_could_never_learn_are_refused(kind: str, zero: str) -> None:
    net = fresh_net(kind)
    nn.init.zeros_(getattr(find(net)[2], zero))
    grads = [p.grad for p, _ in find(net)[2].tensors()]
    net.loss(tokens(4)).backward()  # type: ignore[operator]
    grads = [p.grad for p, _ in find(net)[2].tensors()]
    assert all(g is not None and not g.any() for g in grads)  # a dead start: no gradient moves any part of it
    with pytest.raises(ValueError, match=r"4 ranks, such as net\.\S+\.0, have two parts of zeros"):
        fit(Task(net), [IncreLoRA(**OPTIONS)], steps=8)


def test_a_choice_that_skips_ranks_is_refused() -> None:
    class Backwards(BestMatrices):
        def select(self, draw: Any) -> Any:
            return torch.tensor([False, False, False, True] * 12), {}

    driver = slots(rule=Backwards(), budget=Growth(12, warmup=1, final=1))
    with pytest.raises(ValueError, match=r"come in by their index, but of net\.\S+ \[3\] are to be in"):
        fit(Task(fresh_net()), [driver], steps=8)


def test_a_budget_that_falls_on_its_way_is_refused_when_it_does() -> None:
    class Last(BestMatrices):
        """Takes away what came last of every matrix."""

        def select(self, draw: Any) -> Any:
            return torch.arange(draw.bound.n) % 4 < draw.k // 12, {}

    budget = Piecewise([(0, 12), (2, 36), (4, 24), (6, 12)])
    task = Task(fresh_net())
    before = weights(task)
    with pytest.raises(ValueError, match=r"ranks wait of which 12, such as \S+, are at work.*budgets must not fall"):
        fit(task, [slots(score=NormGrowth(), budget=budget, rule=Last())], steps=8)
    assert {n: w.shape for n, w in weights(task).items()} == {n: w.shape for n, w in before.items()}


def test_weights_of_another_selection_are_not_trained_silently() -> None:
    net = fresh_net()
    trained = {k: v.clone() for k, v in net.state_dict().items()}
    for key, value in trained.items():
        if ".lora_E." in key:
            value.fill_(0.5)
    optimizer = Selective(adamw(trainable(net)), net, IncreLoRA(**OPTIONS), total_steps=8)
    net.load_state_dict(trained)
    net.loss(tokens(4)).backward()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"have ranks of 12 adapters at work, such as \S+, that are not in here"):
        optimizer.step()
    optimizer.close()
    assert_equal(dict(net.state_dict()), trained)


# Several processes
# --------------------------------------------------------------------------------------------------------------------


def train_growing(name: str, joined: int = 1) -> dict[str, Any]:
    """One fit, alone or as a rank; ``joined`` processes' batches in one."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    net = CASES[name].net(dropout=0.0)
    driver = CASES[name].make()
    source = StatefulLoader(tokens(12 * joined * world), batch_size=2 * joined, shuffle=True, seed=5)  # type: ignore[arg-type]
    more: dict[str, Any] = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    task = Task(net, lambda m: torch.optim.AdamW(trainable(m), lr=1e-2, eps=1e-3))
    trainer([driver], 8, use_distributed_sampler=False, **more).fit(task, source)
    return {"weights": {k: v.clone() for k, v in net.state_dict().items()}, "selection": driver.selection.state_dict()}


@pytest.mark.parametrize("name", ["increlora", "triadapt over lora"])
@pytest.mark.xdist_group("ranks")
def test_two_processes_grow_alike(name: str) -> None:
    first, second = ranks(2).run(train_growing, name)
    assert_equal(first, second)
    assert first["selection"]["final"]
    alone = train_growing(name, joined=2)
    assert torch.equal(first["selection"]["masks"], alone["selection"]["masks"])
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-3, atol=1e-4)
