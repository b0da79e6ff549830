"""Ranks agree on entries: the same selection and weights on all of them, those of one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from alike import assert_equal
from entry_witness import CASES, EVERYTHING, EntryWitness, best, method
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from test_ddp import Exact, Experts, Routed, Traffic, distance, loader, sgd, smooth_adamw
from torch import Tensor, nn
from toys import ManualTask, Net, Task, trainer, weights
from workers import RanksFailed, ranks

from apportion.budgets import Constant
from apportion.calibrated import Fisher
from apportion.candidates import Site
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import GradientMagnitude, Magnitude, RandomEntries
from apportion.optim import Selective
from apportion.rules import TopK
from apportion.types import When

pytestmark = pytest.mark.xdist_group("ranks")

UNHEADED = Entries(head="freeze")
METHODS: dict[str, Any] = {name: case.make for name, case in CASES.items()} | {
    "fisher by sample": method(
        Entries(), Fisher(batches=2, per="sample"), Constant(0.1), TopK(), Compact(), select_when=When(end=1)
    ),
    "large by weights": method(UNHEADED, Magnitude(), Constant(0.6), TopK(), Compact(), select_when=When(every=3)),
    "large by gradients": method(
        UNHEADED, GradientMagnitude(), Constant(0.6), TopK(), Compact(), select_when=When(every=3)
    ),
    "nearly all": method(
        Entries(**EVERYTHING), GradientMagnitude(), Constant(0.95), TopK(), Compact(), select_when=When(every=2)
    ),
    "half of all": method(
        Entries(**EVERYTHING), RandomEntries(), Constant(0.5), TopK(), Compact(), select_when=When(end=1)
    ),
}
OPTIMIZERS = {"sgd": sgd, "adamw": smooth_adamw}


def net_of(name: str, **options: Any) -> nn.Module:
    return CASES[name].net(dropout=0.0, **options) if name in CASES else Net(blocks=2, dropout=0.0, **options)


def train(
    name: str,
    joined: int = 1,
    precision: Any = "32-true",
    optimizer: str = "sgd",
    steps: int = 6,
    accumulate: int = 1,
    seed: int = 0,
    task: str = "Task",
    experts: bool = False,
    save: Path | None = None,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One fit, alone or as a rank: ``joined`` processes' batches in one, in one process."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(seed)
    # Ranks start from other weights, of which those of rank 0 count.
    net = Experts() if experts else net_of(name, seed=dist.get_rank() if world > 1 else 0)
    kinds = {"Task": Task, "Exact": Exact, "Routed": Routed, "ManualTask": ManualTask, "OverflowOnce": OverflowOnce}
    module = kinds[task](net, OPTIMIZERS[optimizer])
    driver = METHODS[name]()
    if task == "ManualTask" and "calibration" in driver.slots.score.needs:
        driver.probe_loss = lambda module, batch: module.loss(batch)
    saving = [] if save is None else [ModelCheckpoint(save, "{step}", every_n_train_steps=1, save_top_k=-1)]
    more = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    run = trainer(
        [driver, *saving],
        steps,
        precision=precision if precision != "scaled" else None,
        plugins=[scaled()] if precision == "scaled" else None,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        enable_checkpointing=bool(saving),
        **{**more, **options},
    )
    run.fit(
        module, loader(joined, world), **({} if resume is None else {"ckpt_path": str(resume), "weights_only": True})
    )
    state = driver.state_dict()["selection"]
    return {
        "weights": weights(module),
        "units": state["units"],
        "steps": driver.history.steps,
        "counts": state["counts"],
    }


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))


def train_as_rank(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(name, **{"seed": dist.get_rank(), **options})


def assert_agree(found: list[dict[str, Any]], expected: dict[str, Any], within: float) -> None:
    """Ranks are equal bit for bit, and equal one process up to rounding."""
    for rank in found[1:]:
        assert_equal(rank, found[0])
    assert found[0]["steps"] == expected["steps"]
    assert_same(found[0]["units"], expected["units"])
    assert torch.equal(found[0]["counts"], expected["counts"])
    assert distance(found[0]["weights"], expected["weights"]) < within


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Same on all ranks, and same as one process ---------------------------------------------------------------------------

BY_RANKS = [
    "growing",
    "growing every 2 steps, ages of entries",
    "principal",
    "gradients, reverting",
    "shrinking",
    "rows",
    "fisher by sample",
    "gradients, held, reverting",
    "growing on adapters",
    "blended",
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", BY_RANKS)
def test_ranks_hold_the_weights_of_one_process_on_the_joined_batch(name: str, accumulate: int) -> None:
    optimizer = "adamw" if "ages" in name else "sgd"
    options = {"accumulate": accumulate, "optimizer": optimizer}
    found = ranks(2).run(train_as_rank, name, options)
    assert_agree(found, train(name, joined=2, **options), 1e-6)
    start = weights(Task(net_of(name)))
    assert distance(found[0]["weights"], start) > 1e-3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "principal"])
def test_in_double_precision_the_difference_to_one_process_is_rounding(name: str, size: int) -> None:
    options = {"precision": "64-true", "optimizer": "adamw", "task": "Exact"}
    found = ranks(size).run(train_as_rank, name, options)
    assert_agree(found, train(name, joined=size, **options), 1e-12)


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "principal"])
def test_manual_optimization_reduces_what_is_selected(name: str) -> None:
    found = ranks(2).run(train_as_rank, name, {"task": "ManualTask"})
    assert_agree(found, train(name, joined=2, task="ManualTask"), 1e-6)


@pytest.mark.parametrize("name", ["growing", "principal"])
def test_half_precision_ranks_agree(name: str) -> None:
    found = ranks(2).run(train_as_rank, name, {"precision": "bf16-true", "optimizer": "adamw"})
    assert_equal(found[1], found[0])
    assert found[0]["steps"] == list(CASES[name].switches)


# What is looked at, and what is exchanged -----------------------------------------------------------------------------


def watch(name: str, accumulate: int) -> list[dict[str, Any]]:
    """What each rank's autograd made, what its optimizer got, and what was selected, step by step."""
    driver = METHODS[name]()
    witness = EntryWitness(driver)
    run = trainer(
        [driver, witness],
        5,
        accumulate_grad_batches=accumulate,
        strategy="ddp",
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
    )
    run.fit(Task(net_of(name), sgd), loader(1, dist.get_world_size()))
    keys = ("step", "before", "dense", "taken", "selected", "left", "full")
    return [{key: getattr(seen, key) for key in keys} for seen in witness.steps]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["growing", "gradients, reverting"])
def test_gradients_decide_by_their_average_over_ranks_and_move_what_they_choose(name: str, accumulate: int) -> None:
    found = ranks(2).run(watch, name, accumulate)
    driver = METHODS[name]()
    bound = driver.slots.units.bind(Task(net_of(name)))
    taken_before = [torch.zeros(size, dtype=torch.bool) for size in bound.counts]
    agreed_alone = 0
    for steps in zip(*found, strict=True):
        first = steps[0]
        assert not any(seen["left"] or seen["full"] for seen in steps)
        mean = {key: sum(seen["dense"][key] / 2 for seen in steps) for key in first["dense"]}
        masks = [first["selected"][key].flatten() for key in mean]
        for seen in steps:
            for key, value in seen["taken"].items():
                torch.testing.assert_close(value, mean[key][first["selected"][key]], rtol=1e-6, atol=1e-9)
        if first["step"] in CASES[name].switches:
            grows = driver.slots.rule.grow
            held = torch.cat(taken_before) & grows
            k = int(sum(mask.sum() for mask in masks)) - int(held.sum())

            def chosen(grads: dict[str, Tensor], first: Any = first, held: Tensor = held, k: int = k) -> Tensor:
                sites = [Site(key, i, first["before"][key], grads[key]) for i, key in enumerate(grads)]
                scores = torch.cat([driver.slots.score.entries(site).flatten() for site in sites])
                mask = held.clone()
                mask[~held] = best(scores[~held], k)
                return mask

            assert torch.equal(torch.cat(masks), chosen(mean))
            agreed_alone += torch.equal(torch.cat(masks), chosen(first["dense"]))
        taken_before = masks
    assert agreed_alone == 0, "one rank's gradients alone would have told the same"


def count_traffic(name: str, accumulate: int) -> dict[str, Any]:
    driver = METHODS[name]()
    counted: list[dict[str, int]] = []
    reduced: list[int] = []
    selected: list[int] = []
    modes: list[Traffic] = []

    class First(pl.Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % accumulate == 0:
                modes.append(Traffic())
                modes[-1].__enter__()

    class Last(pl.Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % accumulate == 0:
                modes[-1].__exit__(None, None, None)
                counted.append(dict(modes[-1].bytes))
                reduced.append(driver._reducer.bytes)
                selected.append(sum(p.numel() for g in run.optimizers[0].param_groups for p in g["params"]))

    run = trainer(
        [First(), driver, Last()],
        6,
        accumulate_grad_batches=accumulate,
        strategy="ddp",
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
    )
    run.fit(Task(Net(blocks=2, width=16, dropout=0.0), sgd), loader(1, dist.get_world_size()))
    return {"traffic": counted, "reduced": reduced, "selected": selected}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["large by weights", "large by gradients"])
def test_bytes_of_the_selected_entries_are_exchanged_and_hardly_any_others(name: str, accumulate: int) -> None:
    entries, tensors = 2 * (4 * 256 + 2 * 512), 12
    flags = 4 * tensors  # whether a tensor has a gradient on any rank
    compared = 16  # what ranks compare at a selection: two numbers
    for rank in ranks(2).run(count_traffic, name, accumulate):
        assert len(rank["traffic"]) == 6
        total = 0
        for step, (traffic, selected) in enumerate(zip(rank["traffic"], rank["selected"], strict=True)):
            assert selected == int(0.6 * entries)
            assert set(traffic) <= {"allreduce_", "broadcast_"}
            assert traffic.get("broadcast_", 0) <= 8 * (accumulate - 1)  # Lightning's question whether to stop
            small = 4 * selected + flags
            if step % 3:
                assert traffic["allreduce_"] == small <= 1.02 * 4 * selected
            elif name == "large by weights":
                assert traffic["allreduce_"] == small + (compared if step else 0)  # the first is made before
            else:
                assert traffic["allreduce_"] == 4 * entries + flags + compared
                small = 0
            total += small
            assert rank["reduced"][step] == total


# Gradients that are not everywhere ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*trains units of which some parameters got no gradient")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["growing", "nearly all", "half of all"])
def test_a_gradient_on_one_rank_only_counts_and_one_on_no_rank_moves_nothing(name: str, accumulate: int) -> None:
    options = {"task": "Routed", "experts": True, "accumulate": accumulate}
    found = ranks(2).run(train_as_rank, name, options)
    assert_agree(found, train(name, joined=2, **options), 1e-6)
    before = weights(Task(Experts()))
    after = found[0]["weights"]
    # Momentum and decay would move what has a gradient of zero.
    assert all(torch.equal(after[key], value) for key, value in before.items() if ".experts.2." in key)
    names = [key for key in before if ".experts.0.weight" in key or ".experts.1.weight" in key]
    assert any(not torch.equal(after[key], before[key]) for key in names)
    if name != "growing":
        assert all(not torch.equal(after[key], before[key]) for key in names)


class OverflowOnce(Task):  # type: ignore[misc, valid-type]
    """An infinite loss at one step of rank 1, and nowhere else."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 and dist.get_rank() == 1 else loss


@pytest.mark.parametrize("name", ["growing", "gradients, reverting"])
def test_an_overflow_on_one_rank_puts_the_choice_off_on_all(name: str) -> None:
    found = ranks(2).run(train_as_rank, name, {"task": "OverflowOnce", "precision": "scaled", "optimizer": "adamw"})
    assert_equal(found[1], found[0])
    assert found[0]["steps"] == sorted({3 if step == 2 else step for step in CASES[name].switches})
    assert all(bool(value.isfinite().all()) for value in found[0]["weights"].values())


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["growing", "principal", "gradients, reverting"])
def test_ranks_resumed_from_any_step_end_as_the_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    options = {"optimizer": "adamw"}
    expected = ranks(2).run(train_as_rank, name, {**options, "save": tmp_path})
    assert_equal(expected[1], expected[0])
    for step in (1, 2, 3, 5):
        found = ranks(2).run(train_as_rank, name, {**options, "resume": tmp_path / f"step={step}.ckpt", "seed": 7})
        assert_equal(found, expected, f"resumed at {step}")


def test_the_selection_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    name, path = "growing", tmp_path / "step=3.ckpt"
    expected = ranks(2).run(train_as_rank, name, {"save": tmp_path})[0]
    with pytest.warns(UserWarning, match="resumes a run of 2 processes on 1"):
        found = train(name, joined=2, resume=path)
    assert found["steps"] == expected["steps"]
    assert_same(found["units"], expected["units"])
    assert distance(found["weights"], expected["weights"]) < 1e-6


# Refusals -------------------------------------------------------------------------------------------------------------


def train_differently(what: str) -> None:
    rank = dist.get_rank()
    slots = METHODS["growing"]().slots
    budget = Constant(0.1 + 0.1 * rank) if what == "budget" else slots.budget
    units = Entries(exclude=r"layers\.0" if rank and what == "units" else None)
    driver = SelectiveTuning(units, slots.score, budget, slots.rule, slots.effect, seed=rank if what == "seed" else 0)
    run = trainer([driver], 4, strategy="ddp", devices=dist.get_world_size(), use_distributed_sampler=False)
    run.fit(Task(net_of("growing"), sgd), loader(1, 2))


def train_apart(name: str) -> None:
    """Rank 1's weights leave those of rank 0 after the first step."""

    class Apart(pl.Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if dist.get_rank() == 1 and batch_idx == 0:
                with torch.no_grad():
                    for p in module.net.layers.parameters():
                        p.copy_(p.flip(0))

    run = trainer([METHODS[name](), Apart()], 4, strategy="ddp", devices=2, use_distributed_sampler=False)
    run.fit(Task(net_of(name), sgd), loader(1, 2))


@pytest.mark.parametrize(
    ("task", "what", "words"),
    [
        (train_differently, "budget", "Ranks disagree on the configuration of `SelectiveTuning`"),
        (train_differently, "seed", "Ranks disagree on the configuration of `SelectiveTuning`"),
        (train_differently, "units", "Ranks disagree on the configuration of `SelectiveTuning`"),
        (train_apart, "principal", "Ranks disagree on the selection of `SelectiveTuning` at step 2"),
        (train_apart, "growing", "Ranks disagree on the selection of `SelectiveTuning` at step 1"),
    ],
)
def test_ranks_that_differ_stop_with_an_error_on_all(task: Any, what: str, words: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks(2).run(task, what)
    for error in failed.value.errors:
        assert error is not None
        assert error.startswith(f"RuntimeError: {words}")
        assert "same configuration and seed" in error


# Without Lightning ----------------------------------------------------------------------------------------------------


def train_plainly(name: str, joined: int = 1) -> dict[str, Any]:
    """The ten-line loop, in a process group without a DDP wrapper, or in one process."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    module = Task(net_of(name, seed=dist.get_rank() if world > 1 else 0), sgd)  # rank 0's weights count
    optimizer = Selective(sgd(module), module, METHODS[name]())
    for _, batch in zip(range(6), loader(joined, world), strict=False):
        module.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    counts = optimizer.selection.history.counts
    optimizer.close()
    return {"weights": weights(module), "counts": counts}


@pytest.mark.parametrize("name", ["growing", "gradients, reverting", "principal"])
def test_the_plain_loop_gives_the_weights_of_the_callback_on_every_rank(name: str) -> None:
    plain = ranks(2).run(train_plainly, name)
    callback = ranks(2).run(train_as_rank, name, {})
    assert_equal(plain[1], plain[0])
    assert_equal(plain[0]["weights"], callback[0]["weights"])
    assert distance(plain[0]["weights"], train_plainly(name, joined=2)["weights"]) < 1e-6
