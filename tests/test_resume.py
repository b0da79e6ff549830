"""Resume is exact: interrupted at any optimizer step and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from alike import assert_equal
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from resuming import Noisy, at, checkpoints, scheduler, seed
from torch import nn
from torch.utils.data import DataLoader
from toys import Net, Task, adamw, lora_net, tokens, trainable, trainer, two_groups
from workers import RanksFailed, fork, ranks

from apportion.budgets import Polynomial
from apportion.callbacks import HFT, IST, LISA, RST, BAdam, OwLore
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.loader import StatefulLoader
from apportion.optim import Selective
from apportion.rules import Cycle, Sample
from apportion.scores import Uniform, WeightNorm
from apportion.types import When
from apportion.units import Layers

STEPS = 12
EPOCH = 5  # optimizer steps: switches every 3 steps meet ends of epochs nowhere, before, at and after


def probes(shuffle: bool) -> DataLoader[Any]:
    """Batches to probe with, in an order that a shuffling loader draws from the global random numbers."""
    data: Any = tokens(10, seed=8)
    return DataLoader(data, batch_size=4, shuffle=shuffle)


LORA = ("ist", "ist-data", "ist-shuffled", "rst", "rst-keep")
METHODS: dict[str, Callable[[], Any]] = {
    "lisa": lambda: LISA(active_layers=2, interval=3),
    "lisa-turns": lambda: LISA(active_layers=2, interval=3, without_replacement=True, state="keep"),
    "ist": lambda: IST(active=2, every=2, probe_interval=3, rate=5000.0),
    "ist-data": lambda: IST(active=2, probe_interval=3, rate=5000.0, probe_data=probes(False)),
    "ist-shuffled": lambda: IST(active=2, probe_interval=2, rate=5000.0, probe_data=probes(True)),
    "rst": lambda: RST(active=2),
    "rst-keep": lambda: RST(active=2, every=3, state="keep"),
    "hft": lambda: HFT(redraw="epoch"),
    "hft-round": lambda: HFT(by="size"),
    "badam": lambda: BAdam(interval=3, state="offload"),
    "badam-drop": lambda: BAdam(interval=3),
    "owlore": lambda: OwLore(active_layers=2, interval=3, threshold=1.5, state="keep"),
    "compose": lambda: SelectiveTuning(
        Layers(),
        WeightNorm(every=2),
        Polynomial(4, 1),
        Sample(),
        Freeze(state="offload"),
        select_when=When(every=3, begin=1),
    ),
    "epochs": lambda: SelectiveTuning(
        Layers(), Uniform(), Polynomial(3, 1, finish=9), Cycle("fixed"), Freeze("keep"), select_when=When(clock="epoch")
    ),
}
HALF = ("badam", "badam-drop")


def net(name: str) -> nn.Module:
    return lora_net(dropout=0.2) if name in LORA else Net(dropout=0.2)


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return adamw(two_groups(module))


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
) -> dict[str, Any]:
    """One fit, alone or as a rank; returns its last state as a checkpoint would hold it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    seed(100 * rank + (1 if resume is None else 2))  # a resumed run does not start with the same random numbers
    module = Noisy(net(name), optimizer, scheduler)
    method = METHODS[name]() if driver else None
    more = [checkpoints(folder)] if save else []
    data: Any = tokens(4 * EPOCH * accumulate - (2 if accumulate > 1 else 0))  # the last window may be a short one
    run = trainer(
        [*([method] if method else []), *callbacks, *more],
        steps if epochs is None else -1,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in [*callbacks, *more]),
        precision="bf16-true" if name in HALF else "32-true",
        use_distributed_sampler=False,
        **({"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}),
    )
    source = StatefulLoader(data, batch_size=4 // world, shuffle=True, seed=5)
    run.fit(module, source, **({} if resume is None else {"ckpt_path": str(resume), "weights_only": True}))
    end = folder / f"end-{rank if world == 1 else world}.ckpt"
    run.save_checkpoint(end)
    return state_of(end, method)


def state_of(path: Path, method: Any = None) -> dict[str, Any]:
    """All that two runs are compared by."""
    found = torch.load(path, weights_only=True)
    kept = {k: found[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}
    ours = {k: v for k, v in found.get("callbacks", {}).items() if "name" in k and "Checkpoint" not in k}
    if method is None:
        return {**kept, "callbacks": ours}
    scores = method.slots.score.read(method.selection._score)  # as it is, not as it is saved
    return {**kept, "callbacks": ours, "steps": method.history.steps, "masks": method.history.masks, "scores": scores}


# Any step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumed_from_any_step_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path, save=True)
    assert len(expected["steps"]) > (0 if name == "hft-round" else 2)
    for step in range(1, STEPS):
        found = train(name, tmp_path, resume=at(tmp_path, step))
        assert_equal(found, expected, f"resumed at {step}")


@pytest.mark.parametrize("name", ["lisa", "ist-data", "badam"])
def test_a_run_with_accumulation_and_a_short_last_window_resumes_exactly(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path, accumulate=2, save=True)
    for step in range(1, STEPS, 2):
        assert_equal(train(name, tmp_path, resume=at(tmp_path, step), accumulate=2), expected, f"resumed at {step}")


@pytest.mark.parametrize("name", ["lisa", "ist-shuffled", "badam", "hft"])
def test_a_run_interrupted_at_every_step_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path)
    last = None
    for step in range(1, STEPS + 1):
        found = train(name, tmp_path, resume=last, steps=step, save=True)
        last = at(tmp_path, step)
    assert_equal(found, expected)


def test_the_comparison_sees_what_another_seed_changes(tmp_path: Path) -> None:
    expected = train("lisa", tmp_path)
    METHODS["other"] = lambda: LISA(active_layers=2, interval=3, seed=1)
    try:
        with pytest.raises(AssertionError):
            assert_equal(train("other", tmp_path), expected)
    finally:
        del METHODS["other"]


# Killed ---------------------------------------------------------------------------------------------------------------


class Kill(pl.Callback):
    """Ends the process without a word: in the forward pass of a step, or after the step and before its checkpoint."""

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where = step, where

    def _strike(self, run: Any, where: str) -> None:
        if self.where == where and run.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._strike(run, "before")

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        self._strike(run, "backward")

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._strike(run, "after")


def train_to_the_kill(name: str, folder: Path, step: int, where: str) -> None:
    train(name, folder, callbacks=[Kill(step, where)], save=True)


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))


@pytest.mark.parametrize(
    ("name", "step", "where", "saved"),
    [
        ("lisa", 6, "after", 5),  # the step after which there is a switch, at an end of an epoch
        ("lisa", 6, "before", 6),  # the switch is made, nothing has run under it
        ("ist-shuffled", 7, "backward", 7),
        ("badam", 4, "after", 3),
        ("hft", 5, "backward", 5),
        ("rst", 10, "before", 10),
    ],
)
def test_a_run_killed_by_sigkill_ends_as_the_uninterrupted_one(
    name: str, step: int, where: str, saved: int, tmp_path: Path
) -> None:
    assert fork(train_to_the_kill, name, tmp_path, step, where) == -signal.SIGKILL
    last = last_checkpoint(tmp_path)
    assert last == at(tmp_path, saved)
    assert_equal(train(name, tmp_path, resume=last), train(name, tmp_path))


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ["lisa", "ist-shuffled", "badam", "hft", "rst"])
def test_ranks_resumed_from_any_step_end_as_the_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    expected = ranks(2).run(train_saving, name, tmp_path)
    for step in (1, 3, 5, 8, 10, 11):
        found = ranks(2).run(train, name, tmp_path, at(tmp_path, step))
        assert_equal(found, expected, f"resumed at {step}")
    assert len({str(state["python"]) for state in next(iter(expected[0]["callbacks"].values()))["rng"]}) == 2


def train_saving(name: str, folder: Path) -> dict[str, Any]:
    return train(name, folder, save=True)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("name", "step"), [("lisa", 6), ("ist", 4)])
def test_ranks_killed_by_sigkill_end_as_the_uninterrupted_ones(name: str, step: int, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="ProcessDied"):
        ranks(2).run(train_to_the_kill, name, tmp_path, step, "backward")
    last = last_checkpoint(tmp_path)
    assert last == at(tmp_path, step)
    assert_equal(ranks(2).run(train, name, tmp_path, last), ranks(2).run(train, name, tmp_path))


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ["lisa", "rst", "hft", "badam"])
def test_the_selection_goes_on_with_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    expected = train(name, one, save=True)
    assert_equal(ranks(2).run(train_saving, name, two)[0]["masks"], expected["masks"])
    for step in (3, 7):
        with pytest.warns(UserWarning, match="resumes a run of 2 processes on 1"):
            found = train(name, tmp_path, resume=at(two, step))
        for run in (found, *ranks(2).run(train, name, tmp_path, at(one, step))):
            assert_equal(run["steps"], expected["steps"])
            assert_equal(run["masks"], expected["masks"])


# Other checkpoints, other runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lisa", "badam", "ist", "rst-keep"])
@pytest.mark.parametrize("kind", ["after-fit", "save-last"])
def test_a_checkpoint_of_a_run_that_ended_starts_a_longer_one(name: str, kind: str, tmp_path: Path) -> None:
    callbacks = [ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)] if kind == "save-last" else []
    last = tmp_path / ("last.ckpt" if kind == "save-last" else "end-0.ckpt")
    expected = train(name, tmp_path, epochs=3)
    assert train(name, tmp_path, epochs=1, callbacks=callbacks)["global_step"] == EPOCH
    assert_equal(train(name, tmp_path, resume=last, epochs=3), expected)


@pytest.mark.parametrize("name", ["lisa", "badam", "ist", "rst-keep"])
def test_a_run_that_max_steps_ended_goes_on_with_its_selection(name: str, tmp_path: Path) -> None:
    expected = train(name, tmp_path)
    train(name, tmp_path, steps=EPOCH + 2)
    found = train(name, tmp_path, resume=tmp_path / "end-0.ckpt")
    assert_equal(found["steps"], expected["steps"])
    if name != "ist":  # Lightning counts the epoch that `max_steps` broke off as done: IST learns from other batches
        assert_equal(found["masks"], expected["masks"])


class Fail(pl.Callback):
    """Raises in the backward pass of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, run: Any, module: Any) -> None:
        if run.global_step == self.step:
            raise RuntimeError("stopped by the test")


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # Lightning looks for such a checkpoint by itself, and says so
@pytest.mark.parametrize("name", ["lisa", "badam", "ist", "rst-keep"])
@pytest.mark.parametrize("step", [4, 6])
def test_a_checkpoint_written_on_an_exception_resumes_the_selection(name: str, step: int, tmp_path: Path) -> None:
    expected = train(name, tmp_path, save=True)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(name, tmp_path, callbacks=[Fail(step), OnExceptionCheckpoint(tmp_path, "failed")])
    failed, saved = state_of(tmp_path / "failed.ckpt"), state_of(at(tmp_path, step))
    assert_equal(failed["state_dict"], saved["state_dict"])  # nothing of the broken step is in it
    found = train(name, tmp_path, resume=tmp_path / "failed.ckpt")
    assert found["global_step"] == STEPS
    assert_equal(found["steps"], expected["steps"])
    if name != "ist":  # what IST learns depends on the batches, and the one of the broken step is not seen again
        assert_equal(found["masks"], expected["masks"])


class Moments(pl.Callback):
    """The optimizer state by parameter name, at the start or at the end of a step."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.found = step, {}

    def _look(self, run: Any, module: Any) -> None:
        state = run.optimizers[0].state
        owner = getattr(run.optimizers[0], "_apportion_owner", None)
        for name, p in module.named_parameters():
            leaf = owner.leaf(p) if owner is not None and p in owner.slots else p
            if leaf in state:
                self.found[name] = {k: v.clone() for k, v in state[leaf].items()}

    def on_train_start(self, run: Any, module: Any) -> None:
        if self.step is None:
            self._look(run, module)

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step == self.step:
            self._look(run, module)


@pytest.mark.parametrize("name", ["lisa", "ist", "hft", "rst-keep"])
@pytest.mark.parametrize("step", [4, 6])
def test_a_run_without_the_callback_resumes_with_every_moment_in_its_place(
    name: str, step: int, tmp_path: Path
) -> None:
    before, after = Moments(step), Moments()
    train(name, tmp_path, callbacks=[before], save=True)
    plain = train(name, tmp_path, resume=at(tmp_path, step), callbacks=[after], driver=False)
    assert plain["global_step"] == STEPS
    assert before.found
    for key, state in before.found.items():
        assert_equal(after.found[key], state, key)
    kept = set(after.found) - set(before.found)
    assert bool(kept) == (name in ("ist", "rst-keep"))  # state that waited for its unit's turn comes along


@pytest.mark.parametrize("name", ["lisa", "rst-keep", "badam"])
def test_the_callback_joins_a_run_that_began_without_it(name: str, tmp_path: Path) -> None:
    before, after = Moments(5), Moments()
    train(name, tmp_path, callbacks=[before], save=True, driver=False)
    found = train(name, tmp_path, resume=at(tmp_path, 5), callbacks=[after])
    assert found["global_step"] == STEPS
    assert found["steps"][0] == 0  # its own count of steps: it has done none
    assert 0 < len(after.found) < len(before.found)
    for key, state in after.found.items():
        if name in HALF:  # moments of half precision go on in full precision beside the master
            assert_equal(after.found[key]["exp_avg"].bfloat16(), before.found[key]["exp_avg"].bfloat16(), key)
        else:
            assert_equal(state, before.found[key], key)


def test_another_method_in_the_place_of_the_saved_one_is_an_error(tmp_path: Path) -> None:
    train("lisa", tmp_path, save=True)
    METHODS["fewer"] = lambda: LISA(active_layers=1, interval=3, pattern=r"layers\.[012]")
    try:
        with pytest.raises(ValueError, match=r"was made on 4 units .* this model has 3"):
            train("fewer", tmp_path, resume=at(tmp_path, 4))
    finally:
        del METHODS["fewer"]


# Without Lightning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lisa-turns", "ist", "badam", "rst"])
def test_the_plain_loop_resumes_from_any_step(name: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if name in HALF else torch.float32

    def start() -> tuple[Any, Selective]:
        module = Task(net(name)).to(dtype).eval()  # no dropout: random numbers are the user's here
        base = adamw(trainable(module))
        return module, Selective(base, module, METHODS[name](), probe=lambda: module.loss(tokens(4)))

    def go(module: Any, opt: Selective, first: int, folder: Path | None) -> dict[str, Any]:
        for step in range(first, STEPS):
            module.loss(tokens(4, seed=step)).backward()
            opt.step()
            opt.zero_grad()
            if folder is not None:
                torch.save({"model": module.state_dict(), "opt": opt.state_dict()}, folder / f"{step + 1}.pt")
        return {"model": module.state_dict(), "opt": opt.state_dict()}

    expected = go(*start(), 0, tmp_path)
    for step in range(1, STEPS):
        module, opt = start()
        saved = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        module.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        assert_equal(go(module, opt, step, None), expected, f"resumed at {step}")
