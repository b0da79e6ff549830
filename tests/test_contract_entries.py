"""The contract for entries: every method under every setting. Selected entries train, the others keep every bit."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_witness import CASES, Case, EntryWitness
from interrupted import Interrupted, Stop
from methods import ENTRY_METHODS
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from settings import SETTINGS, two_optimizers
from torch import Tensor, nn
from toys import ManualTask, Task, adamw, fit, loader, moved, tokens, trainable, two_groups, weights

from apportion.budgets import Constant, Increment
from apportion.candidates import Site
from apportion.driver import SelectiveTuning
from apportion.effects import Blend, Hold
from apportion.entry_rules import Threshold
from apportion.entry_units import Entries
from apportion.optim import Selective
from apportion.principal import Principal
from apportion.rules import TopK


def task_for(case: Case, setting: str) -> Any:
    if setting in ("manual", "two optimizers"):
        optimizer = two_optimizers if setting == "two optimizers" else (lambda m: adamw(trainable(m)))
        return ManualTask(case.net(), optimizer, accumulate=2)
    if setting == "two groups":
        return Task(case.net(), lambda m: adamw([{**g, "weight_decay": 0.1} for g in two_groups(m)]))
    return Task(case.net(), lambda m: adamw(trainable(m), lr=5e-2 if setting == "bf16-true" else 1e-2))


def driver_for(case: Case, setting: str, **options: Any) -> SelectiveTuning:
    driver = case.make(**options)
    if setting in ("manual", "two optimizers") and "calibration" in driver.slots.score.needs:
        driver.probe_loss = lambda module, batch: module.loss(batch)
    return driver


FEW = ("plain", "accumulation", "16-mixed", "two optimizers")
TWINS = ("gradients by tiles", "drawn", "fisher", "growing, held", "gradients, held, reverting")
PAIRS = [
    (name, setting)
    for name in CASES
    for setting in SETTINGS
    # Twins differ in few things from other cases, and presets only in their slots.
    if setting in (("accumulation",) if name in ENTRY_METHODS else FEW if name in TWINS else SETTINGS)
]


def hooks_of(module: nn.Module) -> list[Any]:
    """Hooks and exchanged forward passes, anywhere in ``module``."""
    found = [hook for p in module.parameters() for hook in (p._post_accumulate_grad_hooks or {}).values()]
    found += [hook for m in module.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return found + [m for m in module.modules() if "forward" in vars(m) and isinstance(m, nn.Linear)]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
@pytest.mark.parametrize(("name", "setting"), PAIRS)
def test_selected_entries_train_and_the_others_do_not_move_by_one_bit(name: str, setting: str) -> None:
    case = CASES[name]
    driver = driver_for(case, setting)
    witness = EntryWitness(driver, dense="tiles" not in name)
    task = task_for(case, setting)
    flags = [p.requires_grad for p in task.parameters()]
    plugins = SETTINGS[setting]()
    # 5 batches in an epoch: with accumulation the last window of an epoch is a short one.
    run = fit(
        task,
        [driver, witness],
        steps=12 if setting == "two optimizers" else 6,
        limit_train_batches=5,
        **plugins,
    )
    assert len(witness.steps) == 6
    overflown = setting == "16-mixed"
    witness.check(still=(0,) if overflown else (), exact=setting != "bf16-true")
    late = overflown and case.decided_by_gradients
    check_counts(case, driver, witness, late)
    if setting != "bf16-true" and "tiles" not in name and sorts(driver):
        witness.check_choices()
    if overflown:
        assert run.precision_plugin.scaler.get_scale() == 2.0**8
    assert [p.requires_grad for p in task.parameters()] == flags
    every = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, every)) == sorted(map(id, trainable(task)))
    assert not hooks_of(task)
    assert not any(hasattr(o, "_apportion_owner") for o in run.optimizers)
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in run.optimizers)


def check_counts(case: Case, driver: SelectiveTuning, witness: EntryWitness, late: bool) -> None:
    """What the case says of counts and switches; ``late``: the first choice had to wait for the second step."""
    history = driver.history
    assert history.steps == sorted({max(step, 1) for step in case.switches} if late else case.switches)
    counted = dict(zip(history.steps, history.counts.sum(1).tolist(), strict=True))
    present = 0
    for seen in witness.steps:
        present = counted.get(seen.step, present)
        assert seen.count == present
        if case.units is not None:
            assert seen.units == (0 if late and seen.step == 0 else case.units)
        # A growing choice that comes late has another count until the next one.
        if case.counts is not None and not (late and seen.step < 2):
            assert seen.count == case.counts[seen.step]
    assert history.names == driver.selection.names
    assert bool((history.amounts <= 1.0).all())


def sorts(driver: SelectiveTuning) -> bool:
    """Whether sorting the scores of one step gives the choice."""
    slots = driver.slots
    alone = "calibration" not in slots.score.needs and not isinstance(slots.score, Principal)
    return isinstance(slots.rule, TopK) and slots.rule.per == "model" and alone and not isinstance(slots.effect, Blend)


def test_there_is_a_history_before_the_first_choice() -> None:
    driver = CASES["growing"].make()
    assert driver.history.steps == []
    assert driver.history.counts.shape == (0, 0)
    driver.selection.bind(CASES["growing"].net())
    assert driver.history.counts.shape == driver.history.amounts.shape == (0, 12)
    assert driver.selection.metrics() == {"selected_entries": 0.0, "churn": 0.0}


# How many -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Scores that are what the test says, in the place of those of weights or of gradients."""

    kind: str
    needs: frozenset[str]

    def entries(self, site: Site) -> Tensor:
        if "grad" in self.needs:
            assert site.grad is not None
        odd = torch.arange(site.weight.numel()).view(site.weight.shape) % 2 == 1
        return {
            "equal": torch.zeros(site.weight.shape),
            "nan": torch.full(site.weight.shape, math.nan),
            "some nan": torch.where(odd, math.nan, 1.0),
            "infinite": torch.where(odd, math.inf, 0.0) - torch.where(odd, 0.0, math.inf) * float(site.index % 2),
        }[self.kind]


def composed(driver: SelectiveTuning, **slots: Any) -> SelectiveTuning:
    """The same method with other slots."""
    given = replace(driver.slots, **slots)
    return SelectiveTuning(
        given.units,
        given.score,
        given.budget,
        given.rule,
        given.effect,
        select_when=given.select_when,
        seed=driver.seed,
        probe_loss=driver.probe_loss,
    )


@pytest.mark.parametrize("scores", ["equal", "nan", "some nan", "infinite"])
@pytest.mark.parametrize("name", ["growing", "principal", "gradients, reverting", "rows"])
def test_degenerate_scores_select_exactly_the_declared_count(name: str, scores: str) -> None:
    case = CASES[name]
    driver = case.make()
    driver = composed(driver, score=Given(scores, driver.slots.score.needs & {"grad"}))
    witness = EntryWitness(driver)
    fit(task_for(case, "plain"), [driver, witness], limit_train_batches=3)
    witness.check()
    check_counts(case, driver, witness, late=False)
    if sorts(driver):
        witness.check_choices()


@pytest.mark.parametrize("budget", [1, 2, 1023, 1024, 0.0001, 0.29, 0.999, 1.0])
def test_a_budget_selects_its_count_or_its_truncated_share(budget: int | float) -> None:
    driver = composed(CASES["gradients, reverting"].make(), budget=Constant(budget))
    witness = EntryWitness(driver)
    fit(task_for(CASES["growing"], "plain"), [driver, witness], steps=3)
    witness.check()
    expected = budget if isinstance(budget, int) else {0.0001: 1, 0.29: 296, 0.999: 1022, 1.0: 1024}[budget]
    assert {seen.count for seen in witness.steps} == {expected}


def trains_all(driver: SelectiveTuning) -> SelectiveTuning:
    """The same method with a full budget and every tensor a candidate."""
    slots: Any = driver.slots
    effect = slots.effect if isinstance(slots.effect, Hold) else replace(slots.effect, kept="keep", penalty=None)
    units = replace(slots.units, embeddings="unit", head="unit", norm="unit", bias="unit")
    rule = replace(slots.rule, above=-1e9) if isinstance(slots.rule, Threshold) else slots.rule
    return composed(driver, units=units, budget=Constant(1.0), rule=rule, effect=effect)


WHOLE = [name for name in CASES if name not in (*ENTRY_METHODS, "blended", "drawn", "gradients, held, reverting")]
CLIPPED = [
    (name, setting)
    for name in ("growing", "gradients, reverting", "principal")
    for setting in ("clip by norm", "clip by value", "16-mixed", "two groups")
]


@pytest.mark.parametrize(("name", "setting"), [*((name, "accumulation") for name in WHOLE), *CLIPPED])
def test_a_full_budget_is_plain_training_bit_for_bit(name: str, setting: str) -> None:
    case = CASES[name]
    selective, plain = task_for(case, setting), task_for(case, setting)
    start = weights(plain)
    driver = trains_all(case.make())
    fit(selective, driver, **SETTINGS[setting]())
    fit(plain, **SETTINGS[setting]())
    assert moved(start, weights(plain)) == {name for name, p in plain.named_parameters() if p.requires_grad}
    if setting != "clip by norm":
        assert not moved(weights(plain), weights(selective))
    for key, value in weights(selective).items():  # a norm is a sum, whose order decides about its last bits
        torch.testing.assert_close(value, weights(plain)[key], rtol=1e-6, atol=1e-6)


# When something goes wrong --------------------------------------------------------------------------------------------


class Overflows(Task):  # type: ignore[misc, valid-type]
    """An infinite loss at its third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if batch_idx == 2 else 1.0)


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "rows", "principal", "gradients, held, reverting"])
def test_an_overflow_in_mid_run_moves_nothing_and_decides_nothing(name: str) -> None:
    """Neither values, nor moments, nor what is selected; the choice comes with the gradients of the next step."""
    case = CASES[name]
    driver = case.make()
    states: list[Any] = []

    class States(EntryWitness):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            owner = self.driver._owner
            assert owner is not None
            kept = {name: owner.narrow(p).index.clone() for name, p in self.candidates.items()}
            states.append(copy.deepcopy((trainer.optimizers[0].state_dict()["state"], kept)))

    witness = States(driver)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    task = Overflows(case.net(), lambda m: adamw(trainable(m)))
    fit(task, [driver, witness], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    witness.check(still=(2,))
    if case.decided_by_gradients:
        assert equal(states[1], states[2])
        assert driver.history.steps == sorted({3 if step == 2 else step for step in case.switches})
        witness.check_choices()
    assert scaler.get_scale() == 2.0**7


class Lossless(Task):  # type: ignore[misc, valid-type]
    """Two batches without a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (1, 2) else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "growing, held"])
def test_batches_without_a_loss_decide_nothing_and_leave_nothing(name: str, accumulate: int) -> None:
    """A window without any gradient hands its choice on; one whose last batch has none goes by the others."""
    case = CASES[name]
    driver = case.make()
    witness = EntryWitness(driver)
    task = Lossless(case.net(), lambda m: adamw(trainable(m)))
    fit(task, [driver, witness], limit_train_batches=6, accumulate_grad_batches=accumulate)
    still = (1, 2) if accumulate == 1 else ()
    witness.check(still)
    witness.check_choices()
    assert driver.history.steps == sorted({3 if step in still else step for step in case.switches})
    assert case.counts is not None
    assert witness.steps[-1].count == case.counts[-1]


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
@pytest.mark.parametrize("name", [n for n in CASES if n not in ENTRY_METHODS])
def test_the_model_is_left_as_found_after_an_exception(name: str, tmp_path: Path) -> None:
    """And with the values of the last whole step; what was saved then, and what is saved on the exception, go on."""
    case = CASES[name]
    task = Interrupted(case.net())
    driver = case.make()
    witness = EntryWitness(driver, dense="tiles" not in name)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    failed = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(Stop):
        fit(task, [driver, witness, saved, failed], enable_checkpointing=True)
    assert len(witness.steps) == 3
    task.assert_left_as_found()
    assert not hooks_of(task)
    assert not moved(witness.steps[-1].after, weights(task))
    for path in ("step=3.ckpt", "failed.ckpt"):
        again = Task(case.net(), lambda m: adamw(two_groups(m)))
        twin = case.make()
        after = EntryWitness(twin, dense="tiles" not in name)
        fit(again, [twin, after], steps=5, resume=tmp_path / path)
        assert after.steps[0].step == 3
        # Entries that left with a revert did so before the first witnessed step.
        assert not moved(witness.steps[-1].after, after.steps[0].before)
        assert twin.history.steps[: len(driver.history.steps)] == driver.history.steps


# Alone and together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "rows", "principal"])
def test_manual_optimization_clips_what_has_just_been_chosen(name: str, accumulate: int) -> None:
    """`self.clip_gradients` comes before the step, and finds the gradients of the entries that it trains."""
    case = CASES[name]
    driver = case.make()
    task = ManualTask(case.net(), lambda m: torch.optim.SGD(trainable(m), lr=0.1), accumulate=accumulate, clip=1e-2)
    norms: list[float] = []

    class Norms(EntryWitness):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    witness = Norms(driver)
    run = fit(task, [driver, witness])
    assert norms == pytest.approx([1e-2] * 6, rel=1e-3)
    assert [seen.count for seen in witness.steps] == list(case.counts or [seen.count for seen in witness.steps])
    if sorts(driver):
        witness.check_choices()
    assert "clip_gradients" not in vars(run.precision_plugin)


def test_manual_optimization_with_a_gradient_scaler_is_refused_for_choices_by_gradients() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    with pytest.raises(ValueError, match=r"manual optimization with '16-mixed'.*use 'bf16-mixed'"):
        fit(ManualTask(CASES["growing"].net()), CASES["growing"].make(), plugins=plugins)
    driver = CASES["principal"].make()
    witness = EntryWitness(driver)
    fit(ManualTask(CASES["principal"].net()), [driver, witness], plugins=plugins)
    witness.check()


def test_two_selections_share_a_model() -> None:
    """Each with its own tensors, counts and times; the one by gradients, the other by weights."""
    lower = composed(
        CASES["growing"].make(), units=Entries(pattern=r"layers\.0", head="freeze"), budget=Increment(60, finish=6)
    )
    lower.name = "lower"
    upper = composed(CASES["principal"].make(), units=Entries(pattern=r"layers\.1"))
    witnesses = [EntryWitness(lower), EntryWitness(upper)]
    task = task_for(CASES["growing"], "plain")
    start = weights(task)
    fit(task, [lower, upper, *witnesses])
    assert [seen.count for seen in witnesses[0].steps] == [10, 20, 30, 40, 50, 60]
    assert {seen.count for seen in witnesses[1].steps} == {4 * 16 + 2 * 24}
    for witness in witnesses:
        for seen in witness.steps:
            for name, mask in seen.selected.items():
                same = seen.before[name] == seen.after[name]
                assert bool(same[~mask].all())
                assert not bool(same[mask].any())
    still = {name for name in start if name not in moved(start, weights(task))}
    assert {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in still} >= {"embed_tokens", "norm", "input_norm"}


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "growing every 2 steps, ages of entries"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_in_a_plain_loop_changes_nothing(name: str, clip: bool) -> None:
    """Also where it skips a step that would have decided, and where a candidate never has a gradient."""
    runs = []
    for scale in (None, 2.0**10):
        net = CASES[name].net(dropout=0.0)
        net.unused = nn.Linear(8, 8, bias=False)
        nn.init.ones_(net.unused.weight)
        optimizer = Selective(adamw(net.parameters()), net, CASES[name].make())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        skipped = 0
        for i, batch in enumerate(tokens(28).view(7, 4, -1)):
            if i == 2 and scale is None:
                continue
            loss = net.loss(batch) * (math.inf if i == 2 else 1.0)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                leaves = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_value_(leaves, 1e-3)
            before = weights(net)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped += not moved(before, weights(net))
        assert skipped == (scale is not None)
        optimizer.close()
        runs.append((weights(net), optimizer.selection.state_dict()))
    assert not moved(runs[0][0], runs[1][0])
    assert equal(runs[0][1]["units"], runs[1][1]["units"])
    assert equal(runs[0][1]["steps"], runs[1][1]["steps"])


def test_a_gradient_scaler_that_comes_too_early_is_refused() -> None:
    net = CASES["growing"].net()
    optimizer = Selective(adamw(net.parameters()), net, CASES["growing"].make(), micro_batches=None)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net.loss(tokens(4))).backward()
    with pytest.raises(ValueError, match="pass `micro_batches=`"):
        scaler.step(optimizer)


def test_gradients_that_are_not_finite_choose_as_ever_where_there_is_no_scaler() -> None:
    """Entries with such a gradient come last, and no other is touched by them."""
    net = CASES["growing"].net(dropout=0.0)
    optimizer = Selective(adamw(net.parameters()), net, CASES["growing"].make())
    poisoned = net.layers[0].self_attn.q_proj.weight
    poisoned.register_hook(lambda grad: torch.full_like(grad, math.nan))
    for step in range(3):
        net.loss(tokens(4, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sum(map(len, optimizer.selection.units or ())) == 50 * (step + 1)
        assert len(optimizer.owner.narrow(poisoned).index) == 0
    assert all(bool(value.isfinite().all()) for value in weights(net).values())


@pytest.mark.parametrize("name", [n for n in CASES if n not in ENTRY_METHODS])
def test_a_plain_loop_gives_the_weights_of_the_callback(name: str) -> None:
    case = CASES[name]
    driver = case.make()
    probes = tokens(8, seed=8).view(2, 4, -1)
    driver.probe_data, driver.probe_loss = list(probes), lambda module, batch: module.loss(batch)
    task, twin = task_for(case, "two groups"), task_for(case, "two groups")
    fit(task, driver, limit_train_batches=6)
    upcoming = iter(probes)
    optimizer = Selective(
        twin.optimizer(twin), twin, case.make(), probe=lambda: twin.loss(next(upcoming)), total_steps=6
    )
    torch.manual_seed(11)
    twin.train()
    for _, batch in zip(range(6), loader(), strict=False):
        twin.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    assert not moved(weights(task), weights(twin))
    found = driver.history
    assert torch.equal(optimizer.selection.history.counts[: len(found.steps)], found.counts)


def equal(a: Any, b: Any) -> bool:
    """Deep equality, bit for bit, of nested plain data and tensors."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
