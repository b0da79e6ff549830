"""Resume is exact for entries: interrupted at any optimizer step and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from alike import assert_equal
from entry_witness import CASES, Case, method, names_of
from methods import ENTRY_METHODS
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from resuming import Noisy, at, checkpoints, scheduler, seed
from torch import Tensor, nn
from toys import Task, adamw, moved, tokens, trainable, trainer, two_groups, weights

from apportion.budgets import Constant, Increment
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Hold
from apportion.entry_units import Entries
from apportion.entrywise import Magnitude
from apportion.loader import StatefulLoader
from apportion.optim import Selective
from apportion.rules import TopK
from apportion.types import When

STEPS = 6
EPOCH = 4  # optimizer steps: choices come every step or every second, before, at and after the end of an epoch

# Besides: a selection of weights that goes back on what it trained, and one that nobody has selected for yet.
METHODS: dict[str, Case] = {
    **{name: case for name, case in CASES.items() if name not in ENTRY_METHODS or name in ("id3", "sara", "ttc")},
    "smallest, reverting": Case(
        method(
            Entries(),
            Magnitude(reverse=True),
            Constant(0.1),
            TopK(per="block"),
            Compact(leaving="revert", age="entry"),
            select_when=When(every=2),
        ),
        (102,) * 6,
    ),
    "slowly growing": Case(
        method(Entries(), Magnitude(), Increment(2, finish=6), TopK(grow=True), Compact()), (0, 0, 1, 1, 1, 2)
    ),
}
OWN = [name for name in METHODS if name not in ENTRY_METHODS]
CORE = (
    "growing",
    "growing every 2 steps, ages of entries",
    "principal",
    "gradients, reverting",
    "shrinking",
    "blended",
)
HALF = ("growing every 2 steps, ages of entries", "principal", "gradients, held, reverting")
"""Also in bfloat16, where the optimizer holds more digits than the weights."""


def train(
    name: str,
    folder: Path,
    resume: Path | None = None,
    steps: int = STEPS,
    epochs: int | None = None,
    accumulate: int = 1,
    callbacks: Any = (),
    save: bool = False,
    driver: bool = True,
    half: bool = False,
) -> dict[str, Any]:
    """One fit; returns its last state as a checkpoint would hold it."""
    number = 1 if resume is None else 2  # a resumed run does not start with the same random numbers
    seed(number)
    module = Noisy(METHODS[name].net(dropout=0.2, seed=number), lambda m: adamw(two_groups(m)), scheduler)
    callback = METHODS[name].make() if driver else None
    more = [checkpoints(folder)] if save else []
    data: Any = tokens(4 * EPOCH * accumulate - (2 if accumulate > 1 else 0))  # the last window may be a short one
    run = trainer(
        [*([callback] if callback else []), *callbacks, *more],
        steps if epochs is None else -1,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in [*callbacks, *more]),
        precision="bf16-true" if half else "32-true",
    )
    source = StatefulLoader(data, batch_size=4, shuffle=True, seed=5)
    run.fit(module, source, **({} if resume is None else {"ckpt_path": str(resume), "weights_only": True}))
    run.save_checkpoint(folder / "end.ckpt")
    return state_of(folder / "end.ckpt", callback)


def state_of(path: Path, callback: SelectiveTuning | None = None) -> dict[str, Any]:
    """All that two runs are compared by."""
    found = torch.load(path, weights_only=True)
    kept = {k: found[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}
    ours = {k: v for k, v in found.get("callbacks", {}).items() if "name" in k and "Checkpoint" not in k}
    if callback is None:
        return {**kept, "callbacks": ours}
    history = callback.history
    return {**kept, "callbacks": ours, "steps": history.steps, "counts": history.counts}


# Any step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumed_from_any_step_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path, save=True)
    assert tuple(step for step in expected["steps"] if step < 6) == METHODS[name].switches or name == "slowly growing"
    for step in range(1, STEPS) if name in CORE else (2, 5):
        found = train(name, tmp_path, resume=at(tmp_path, step))
        assert_equal(found, expected, f"resumed at {step}")


@pytest.mark.parametrize("name", HALF)
def test_a_half_precision_run_resumes_with_all_digits(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path, save=True, half=True)
    for step in (2, 3):
        assert_equal(train(name, tmp_path, resume=at(tmp_path, step), half=True), expected, f"resumed at {step}")


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "shrinking"])
def test_a_run_with_accumulation_and_a_short_last_window_resumes_exactly(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path, accumulate=2, save=True)
    for step in (1, 4):
        assert_equal(train(name, tmp_path, resume=at(tmp_path, step), accumulate=2), expected, f"resumed at {step}")


@pytest.mark.parametrize("name", ["growing every 2 steps, ages of entries", "shrinking", "smallest, reverting"])
def test_a_run_interrupted_at_every_step_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path)
    last = None
    for step in range(1, STEPS + 1):
        found = train(name, tmp_path, resume=last, steps=step, save=True)
        last = at(tmp_path, step)
    assert_equal(found, expected)


def test_the_comparison_sees_what_another_seed_changes(tmp_path: Path) -> None:
    expected = train("drawn", tmp_path)
    METHODS["other"] = Case(lambda: CASES["drawn"].make(seed=1), None)
    try:
        with pytest.raises(AssertionError):
            assert_equal(train("other", tmp_path), expected)
    finally:
        del METHODS["other"]


# Other checkpoints, other runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CORE, "slowly growing", "gradients, held, reverting"])
def test_a_checkpoint_of_a_run_that_ended_starts_a_longer_one(name: str, tmp_path: Path) -> None:
    """What callbacks write as the run ends, and what is written when it is over."""
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    expected = train(name, tmp_path, epochs=2)
    assert train(name, tmp_path, epochs=1, callbacks=[last])["global_step"] == EPOCH
    for path in (tmp_path / "last.ckpt", copied(tmp_path / "end.ckpt")):
        assert_equal(train(name, tmp_path, resume=path, epochs=2), expected, path.name)


def copied(path: Path) -> Path:
    """The same file under another name, as the next run writes over it."""
    return path.rename(path.with_name("ended.ckpt"))


class Look(pl.Callback):
    """Weights and optimizer state by parameter name, when a fit begins or when a step has ended."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.state: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    def _look(self, run: Any, module: Any) -> None:
        state = run.optimizers[0].state
        owner = getattr(run.optimizers[0], "_apportion_owner", None)
        self.weights = weights(module)
        for name, p in module.named_parameters():
            leaf = owner.leaf(p) if owner is not None and p in owner.slots else p
            if leaf in state:
                self.state[name] = {k: v.clone() for k, v in state[leaf].items()}

    def on_train_start(self, run: Any, module: Any) -> None:
        if self.step is None:
            self._look(run, module)

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step == self.step:
            self._look(run, module)


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "shrinking", "growing, held", "blended"])
def test_a_run_without_the_callback_goes_on_with_the_weights(name: str, tmp_path: Path) -> None:
    """Of parameters of which entries were selected, the optimizer starts anew; of the others nothing is lost."""
    before, after = Look(3), Look()
    train(name, tmp_path, callbacks=[before], save=True)
    plain = train(name, tmp_path, resume=at(tmp_path, 3), callbacks=[after], driver=False)
    assert plain["global_step"] == STEPS
    assert_equal(after.weights, before.weights)
    whole = {key for key in before.state if "lm_head" in key} if name in names_of(Compact) else set(before.state)
    assert set(after.state) == whole
    assert whole
    for key in whole:
        assert_equal(after.state[key], before.state[key], key)
    assert "entries" not in plain["optimizer_states"][0]


@pytest.mark.parametrize("name", ["growing", "principal", "shrinking", "growing, held", "blended"])
def test_the_callback_joins_a_run_that_began_without_it(name: str, tmp_path: Path) -> None:
    before, after = Look(3), Look()
    train(name, tmp_path, callbacks=[before], save=True, driver=False)
    found = train(name, tmp_path, resume=at(tmp_path, 3), callbacks=[after])
    assert found["global_step"] == STEPS
    assert found["steps"][0] == 0  # its own count of steps: it has done none
    assert_equal(after.weights, before.weights)
    if name in names_of(Compact):
        assert set(after.state) == {"net.lm_head.weight"}
    for key, state in after.state.items():
        assert_equal(state, before.state[key], key)


def test_a_checkpoint_of_other_units_is_an_error(tmp_path: Path) -> None:
    train("growing", tmp_path, save=True)
    METHODS["fewer"] = Case(
        lambda: SelectiveTuning(
            Entries(exclude=r"layers\.1"), Magnitude(), Constant(9), TopK(), Compact(), select_when=When(every=2)
        ),
        None,
    )
    try:
        with pytest.raises(ValueError, match=r"was made on 12 units .* this model has"):
            train("fewer", tmp_path, resume=at(tmp_path, 4))
    finally:
        del METHODS["fewer"]


# Copies ---------------------------------------------------------------------------------------------------------------


class Copies(pl.Callback):
    """Copies everything in the middle of the backward passes and of the run."""

    def __init__(self, driver: Any, ids: Tensor) -> None:
        self.driver, self.ids, self.seen = driver, ids, 0

    def _copy(self, module: Any) -> None:
        for twin in (pickle.loads(pickle.dumps(self.driver)), copy.deepcopy(self.driver)):
            assert_equal(twin.state_dict(), self.driver.state_dict())
            assert_equal(twin.history.counts, self.driver.history.counts)
            assert repr(twin) == repr(self.driver)
        net = copy.deepcopy(module.net)
        training = module.net.training
        with torch.no_grad():
            assert torch.equal(net.eval()(self.ids), module.net.eval()(self.ids))
        module.net.train(training)
        assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
        net.train()(self.ids).sum().backward()  # a copy trains as a whole
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        self.seen += 1

    def on_after_backward(self, run: Any, module: Any) -> None:
        self._copy(module)

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._copy(module)


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "gradients by tiles", "shrinking", "blended"])
def test_copies_in_mid_run_are_whole_and_change_nothing(name: str) -> None:
    runs = []
    for copies in (True, False):
        torch.manual_seed(3)
        module = Task(METHODS[name].net(dropout=0.0), lambda m: adamw(trainable(m)))
        driver = METHODS[name].make()
        watch = Copies(driver, tokens(2, seed=9)[:, :-1])
        run = trainer([driver, *([watch] if copies else [])], 3)
        run.fit(module, StatefulLoader(tokens(12), batch_size=4, shuffle=True, seed=5))
        assert watch.seen == (6 if copies else 0)
        runs.append((weights(module), driver.state_dict()))
    assert_equal(runs[0], runs[1])


# Without Lightning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize(("name", "half"), [*((name, False) for name in OWN), *((name, True) for name in HALF)])
def test_the_plain_loop_resumes_from_any_step(name: str, half: bool, first: str, tmp_path: Path) -> None:
    """Whichever is loaded first, and also into an optimizer that has gone on in the meantime."""
    path = tmp_path / "saved.pt"

    def start(seed: int) -> tuple[Any, Selective]:
        net = METHODS[name].net(dropout=0.0, seed=seed).to(torch.bfloat16 if half else torch.float32)
        calls = iter(range(100))
        base = adamw(trainable(net))
        return net, Selective(base, net, METHODS[name].make(), probe=lambda: net.loss(tokens(4, seed=next(calls))))

    def go(net: Any, opt: Selective, begin: int, save: int | None) -> dict[str, Any]:
        for step in range(begin, STEPS):
            net.loss(tokens(4, seed=step)).backward()
            opt.step()
            opt.zero_grad()
            if step + 1 == save:
                torch.save({"model": net.state_dict(), "opt": opt.state_dict()}, path)
        return copy.deepcopy({"model": net.state_dict(), "opt": opt.state_dict()})

    for step in (1, 2, 3, 5) if name in CORE and first == "model" else (3,):
        used = start(0)
        expected = go(*used, 0, step)
        for net, opt in (start(1), used):
            saved = torch.load(path, weights_only=True)
            if first == "model":
                net.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
            if first == "optimizer":
                net.load_state_dict(saved["model"])
            assert_equal(net.state_dict(), saved["model"], "loading changed the weights")
            assert_equal(go(net, opt, step, None), expected, f"resumed at {step}")


def test_a_wrapper_without_entries_loads_what_is_not_of_entries() -> None:
    """The state dict is that of the plain optimizer, with what is selected beside it."""
    net = METHODS["growing"].net()
    opt = Selective(adamw(net.parameters()), net, METHODS["growing"].make())
    for step in range(3):
        net.loss(tokens(4, seed=step)).backward()
        opt.step()
        opt.zero_grad()
    saved = opt.state_dict()
    plain = adamw(net.parameters())
    plain.load_state_dict({k: v for k, v in saved.items() if k != "selection"})
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in plain.state} == {"lm_head.weight"}
    net.loss(tokens(4)).backward()
    plain.step()


def test_a_selection_that_is_not_the_saved_one_is_an_error(tmp_path: Path) -> None:
    """State of single entries means nothing without the indices that it is of."""
    net = METHODS["growing"].net()
    opt = Selective(adamw(trainable(net)), net, METHODS["growing"].make())
    net.loss(tokens(4)).backward()
    opt.step()
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="load the selection that was saved with it"):
        opt.load_state_dict({k: v for k, v in saved.items() if k != "selection"} | {"entries": shorter(saved)})


def shorter(saved: dict[str, Any]) -> dict[int, Any]:
    """State of one entry less than there are, of each tensor that has any."""
    return {
        i: {k: v[1:] if isinstance(v, Tensor) and v.ndim == 1 and len(v) else v for k, v in state.items()}
        for i, state in saved["entries"].items()
    }


def test_a_loaded_hold_keeps_its_first_values_and_moments() -> None:
    """As the twin that it is: the same run as with compact stores, also across an interruption."""
    runs = []
    saved: dict[str, Any] = {}
    for effect in (Compact(leaving="revert"), Hold(leaving="revert")):
        net: nn.Module = METHODS["growing"].net(dropout=0.0)
        slots = METHODS["gradients, reverting"].make().slots
        for part in range(2):
            driver = SelectiveTuning(slots.units, slots.score, slots.budget, slots.rule, effect, select_when=When(2))
            opt = Selective(adamw(trainable(net)), net, driver)
            if part:
                opt.load_state_dict(saved)
            for step in range(3 * part, 3 * part + 3):
                net.loss(tokens(4, seed=step)).backward()  # type: ignore[operator]
                opt.step()
                opt.zero_grad()
            saved = copy.deepcopy(opt.state_dict())
            opt.close()
        runs.append(weights(net))
    assert not moved(runs[0], runs[1])
