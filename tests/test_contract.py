"""The contract: every method under every setting. Selected is trained, unselected does not move by one bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning
import torch
from interrupted import Interrupted, Stop
from methods import METHODS
from settings import SETTINGS, two_optimizers
from torch import Tensor, nn
from toys import BLOCKS, ManualTask, Task, adamw, fit, loader, lora_net, moved, trainable, two_groups, weights
from toys import Net as PlainNet
from witness import Witness

from apportion.budgets import Constant
from apportion.callbacks import HFT, IST, LISA, RST, BAdam, OwLore
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.optim import Selective
from apportion.types import State, View, resolve


@dataclass(frozen=True)
class Case:
    """A method with arguments that make it switch often, and the net that it trains."""

    make: Callable[..., SelectiveTuning]
    net: Callable[[], nn.Module] = PlainNet


CASES: dict[str, Case] = {name: Case(row.make, row.net) for name, row in METHODS.items()} | {
    "lisa, nothing always on, offload": Case(
        lambda **o: LISA(2, 1, train_embeddings=False, train_head=False, train_norm=False, **{"state": "offload", **o})
    ),
    "lisa, without replacement, keep, masters": Case(
        lambda **o: LISA(0.5, 2, without_replacement=True, **{"state": "keep", "master": "fp32", **o})
    ),
    "ist on dora": Case(lambda **o: IST(1, probe_interval=1, **o), lambda: lora_net("dora")),
    "ist on ia3": Case(lambda **o: IST(2, probe_interval=2, **o), lambda: lora_net("ia3")),
    "ist on bottleneck adapters": Case(
        lambda **o: IST(2, probe_interval=2, adapters=r"\.adapter$", **o), lambda: PlainNet(adapter=True)
    ),
    "rst on all weights, drop": Case(lambda **o: RST(**{"active": 0.25, "state": "drop", **o})),
    "hft by size, every epoch": Case(lambda **o: HFT(0.5, by="size", redraw="epoch", **{"master": "fp32", **o})),
    "badam, all blocks, offload": Case(
        lambda **o: BAdam(1, "ascending", include_embeddings=True, include_head=True, **{"state": "offload", **o})
    ),
    "owlore by norm, keep": Case(lambda **o: OwLore(2, 1, score="norm", **{"state": "keep", **o})),
}


def task_for(case: Case, setting: str) -> Any:
    if setting in ("manual", "two optimizers"):
        optimizer = two_optimizers if setting == "two optimizers" else (lambda m: adamw(trainable(m)))
        return ManualTask(case.net(), optimizer, accumulate=2, clip=0.5)
    if setting == "two groups":
        # With decay in both groups: what has a tiny gradient must be seen to move.
        return Task(case.net(), lambda m: adamw([{**g, "weight_decay": 0.1} for g in two_groups(m)]))
    # In bf16 a step must be large to be seen next to a norm's weight of 1.
    return Task(case.net(), lambda m: adamw(trainable(m), lr=5e-2 if setting == "bf16-true" else 1e-2))


def driver_for(case: Case, setting: str, **options: Any) -> SelectiveTuning:
    driver = case.make(**options)
    if setting in ("manual", "two optimizers") and driver.slots.score.needs & {"loss", "activation"}:
        driver.probe_loss = lambda module, batch: module.loss(batch)
    return driver


def expected_count(driver: SelectiveTuning) -> int:
    return resolve(driver.slots.budget.at(0, None), driver.selection.bound.n)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_selected_is_trained_and_unselected_does_not_move_by_one_bit(name: str, setting: str) -> None:
    case = CASES[name]
    driver = driver_for(case, setting)
    witness = Witness(driver)
    task = task_for(case, setting)
    flags = [p.requires_grad for p in task.parameters()]
    # 5 batches in an epoch: with accumulation the last window of an epoch is a short one.
    run = fit(
        task,
        [driver, witness],
        steps=12 if setting == "two optimizers" else 6,
        limit_train_batches=5,
        **SETTINGS[setting](),
    )
    witness.check(still=1 if setting == "16-mixed" else 0)
    assert len(witness.steps) == 6
    for step in witness.steps:
        assert step.counts == [expected_count(driver)]
        assert step.state <= step.chosen
        assert step.state == step.chosen or not step.moved  # an overflow comes before the first state
    if driver.slots.select_when.end is None:
        assert len({frozenset(step.chosen) for step in witness.steps}) > 1, "the method never switched"
    assert [p.requires_grad for p in task.parameters()] == flags
    every = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, every)) == sorted(map(id, trainable(task)))
    assert not any(p._post_accumulate_grad_hooks for p in task.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods_is_right_about_units_counts_and_switches(name: str) -> None:
    row = METHODS[name]
    driver = row.make()
    fit(Task(row.net(), lambda m: adamw(trainable(m))), driver)
    history = driver.history
    assert history.masks.shape == (len(row.switches), row.units)
    assert tuple(history.steps) == row.switches
    assert (history.masks.sum(1) == row.selected).all()
    assert history.names == driver.selection.names


@dataclass(frozen=True)
class Given:
    """Scores that are what the test says."""

    kind: str
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, n: int) -> State:
        values = {
            "equal": torch.full((n,), 0.7),
            "zero": torch.zeros(n),
            "nan": torch.full((n,), float("nan")),
            "some nan": torch.where(torch.arange(n) % 2 == 0, float("nan"), 1.0),
            "infinite": torch.where(torch.arange(n) % 2 == 0, float("inf"), 0.0),
        }
        return {"score": values[self.kind].double()}

    def due(self, step: int) -> bool:
        return False

    def update(self, state: State, view: View) -> State:
        return state

    def read(self, state: State) -> Tensor:
        return state["score"]


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
    )


@pytest.mark.parametrize("scores", ["equal", "zero", "nan", "some nan", "infinite"])
@pytest.mark.parametrize("name", CASES)
def test_degenerate_scores_select_exactly_the_declared_count(name: str, scores: str) -> None:
    driver = composed(CASES[name].make(), score=Given(scores))
    witness = Witness(driver)
    fit(task_for(CASES[name], "plain"), [driver, witness], limit_train_batches=3)
    witness.check()
    assert {tuple(step.counts) for step in witness.steps} == {(expected_count(driver),)}
    assert (driver.history.masks.sum(1) == expected_count(driver)).all()


@pytest.mark.parametrize("budget", [1, 2, 3, 0.25, 0.5, 0.99, 1.0])
def test_a_budget_selects_its_count_or_its_truncated_share(budget: int | float) -> None:
    driver = LISA(budget, 1)
    witness = Witness(driver)
    fit(Task(), [driver, witness], steps=3)
    witness.check()
    expected = budget if isinstance(budget, int) else {0.25: 1, 0.5: 2, 0.99: 3, 1.0: 4}[budget]
    assert {tuple(step.counts) for step in witness.steps} == {(expected,)}


def trains_all(driver: SelectiveTuning) -> SelectiveTuning:
    """The same method with a full budget and nothing frozen for good."""
    roles = dict.fromkeys(("embeddings", "head", "norm"), "train")
    units: Any = driver.slots.units
    return composed(driver, units=replace(units, **roles), budget=Constant(1.0))


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s not in ("manual", "two optimizers", "bf16-true")])
@pytest.mark.parametrize("name", CASES)
def test_a_full_budget_is_plain_training_bit_for_bit(name: str, setting: str) -> None:
    case = CASES[name]
    selective, plain = task_for(case, setting), task_for(case, setting)
    driver = trains_all(driver_for(case, setting))
    fit(selective, driver, **SETTINGS[setting]())
    fit(plain, **SETTINGS[setting]())
    assert not moved(weights(plain), weights(selective))


def equal(a: Any, b: Any) -> bool:
    """Deep equality, bit for bit, of nested plain data and tensors."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class SaveAtThree(pytorch_lightning.Callback):
    """Writes a checkpoint right after the third step, in the middle of an epoch."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, False

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not self.saved and trainer.global_step == 3 * len(trainer.optimizers):
            self.saved = True
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("setting", ["plain", "accumulation", "bf16-true", "16-mixed", "two optimizers"])
@pytest.mark.parametrize("name", CASES)
def test_six_steps_are_three_steps_saved_loaded_and_three_more(name: str, setting: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "half.ckpt"
    options: dict[str, Any] = {"limit_train_batches": 10}
    several = 2 if setting == "two optimizers" else 1  # Lightning counts the steps of all optimizers
    whole, first, second = (task_for(case, setting) for _ in range(3))
    a, b, c = (driver_for(case, setting) for _ in range(3))
    run = fit(whole, a, steps=6 * several, **options, **SETTINGS[setting]())
    fit(first, [b, SaveAtThree(path)], steps=4 * several, **options, **SETTINGS[setting]())
    rest = fit(second, c, steps=6 * several, resume=path, seed=99, **options, **SETTINGS[setting]())
    assert rest.global_step == run.global_step == 6 * several
    assert not moved(weights(whole), weights(second))
    assert equal(a.state_dict(), c.state_dict())
    assert a.history.steps == c.history.steps
    assert equal(a.history.masks, c.history.masks)
    for x, y in zip(run.optimizers, rest.optimizers, strict=True):
        assert equal(x.state_dict()["state"], y.state_dict()["state"])


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_written_after_a_fit_goes_on_like_one_written_in_it(name: str, tmp_path: Path) -> None:
    whole, first, second = (task_for(CASES[name], "plain") for _ in range(3))
    a, b, c = (driver_for(CASES[name], "plain") for _ in range(3))
    epochs: dict[str, Any] = {"steps": -1, "limit_train_batches": 3}
    fit(whole, a, max_epochs=2, **epochs)
    fit(first, b, max_epochs=1, **epochs).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, c, max_epochs=2, resume=tmp_path / "half.ckpt", seed=99, **epochs)
    assert not moved(weights(whole), weights(second))
    assert equal(a.state_dict(), c.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_plain_data_only(name: str, tmp_path: Path) -> None:
    driver = CASES[name].make()
    run = fit(task_for(CASES[name], "plain"), driver)
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert equal(saved["callbacks"][driver.state_key]["selection"], driver.state_dict()["selection"])
    fit(task_for(CASES[name], "plain"), CASES[name].make(), steps=7, resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_found_after_an_exception(name: str) -> None:
    case = CASES[name]
    task = Interrupted(case.net())
    with pytest.raises(Stop):
        fit(task, case.make())
    task.assert_left_as_found()


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", CASES)
def test_optimizer_state_is_within_its_policy_at_every_step(name: str, state: str) -> None:
    driver = CASES[name].make()
    effect = replace(driver.slots.effect, state=state)  # type: ignore[type-var]
    driver = composed(driver, effect=effect)
    ever: set[str] = set()

    class Policy(Witness):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            owner, step = driver._owner, self.steps[-1]
            assert owner is not None
            assert step.state == step.chosen
            ever.update(step.chosen)
            names = {id(p): n for n, p in pl_module.named_parameters()}
            parked = {names[id(p)] for p, slot in owner.slots.items() if slot.parked}
            assert parked == (set() if state == "drop" else ever - step.chosen)
            masters = {names[id(p)] for p, slot in owner.slots.items() if slot.master is not None}
            assert masters == (step.chosen if effect.master == "fp32" else set())

    witness = Policy(driver)
    fit(task_for(CASES[name], "bf16-true"), [driver, witness], precision="bf16-true")
    witness.check()


@pytest.mark.parametrize("name", CASES)
def test_a_method_survives_pickle_and_deepcopy_before_and_after_a_fit(name: str) -> None:
    driver = CASES[name].make(seed=7, name="kept")
    for twin in (pickle.loads(pickle.dumps(driver)), copy.deepcopy(driver)):
        assert repr(twin) == repr(driver)
        assert twin.slots == driver.slots
        a, b = task_for(CASES[name], "plain"), task_for(CASES[name], "plain")
        fresh = CASES[name].make(seed=7, name="kept")
        fit(a, fresh)
        fit(b, twin)
        assert not moved(weights(a), weights(b))
        again = pickle.loads(pickle.dumps(twin))
        assert equal(again.state_dict(), fresh.state_dict())


PROBE_BATCHES = [torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]


@pytest.mark.parametrize("name", CASES)
def test_a_plain_loop_gives_the_weights_of_the_callback(name: str) -> None:
    case = CASES[name]
    driver = case.make()
    probes = bool(driver.slots.score.needs & {"loss", "activation"})
    if probes:
        driver.probe_data, driver.probe_loss = PROBE_BATCHES[:1], lambda module, batch: module.loss(batch)
    task, twin = task_for(case, "two groups"), task_for(case, "two groups")
    schedule: Any = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-2, total_steps=9)  # noqa: E731
    task.scheduler = lambda o: {"scheduler": schedule(o), "interval": "step"}
    fit(task, driver, limit_train_batches=4)

    base = twin.optimizer(twin)
    scheduler = schedule(base)
    probe = (lambda: twin.loss(PROBE_BATCHES[0])) if probes else None
    optimizer = Selective(base, twin, case.make(), probe=probe, epoch_steps=4)
    torch.manual_seed(11)
    twin.train()
    data = loader()
    for epoch in range(2):
        data.set_epoch(epoch)
        for _, batch in zip(range((4, 2)[epoch]), data, strict=False):
            twin.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert torch.equal(optimizer.selection.history.masks[: len(driver.history.masks)], driver.history.masks)
    optimizer.close()
    assert not moved(weights(task), weights(twin))
    assert len(trainable(twin)) == len(trainable(task))


def test_the_step_size_zero_of_a_learned_score_is_a_uniform_draw() -> None:
    learned, uniform = IST(2, probe_interval=1, rate=0.0, seed=5), RST(2, seed=5)
    a, b = Task(lora_net()), Task(lora_net())
    fit(a, learned, steps=12)
    fit(b, uniform, steps=12)
    assert torch.equal(learned.history.masks, uniform.history.masks)
    assert not moved(weights(a), weights(b))
    assert len({tuple(row) for row in learned.history.masks.tolist()}) > 1


def test_a_learned_score_learns() -> None:
    driver = IST(2, probe_interval=1, rate=1000.0, seed=5)
    fit(Task(lora_net()), driver, steps=12)
    score = driver.selection.state_dict()["score"]["score"]
    assert score.shape == (BLOCKS,)
    assert len(set(score.tolist())) > 1


def test_yaml_round_trips_through_hydra() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    for kind, arguments in (
        (LISA, {"active_layers": 2, "interval": 3, "master": "fp32"}),
        (IST, {"active": 0.5, "probe_interval": 4, "rate": 2.0}),
        (RST, {"active": 0.5, "every": 2}),
        (HFT, {"amount": 0.4, "by": "size"}),
        (BAdam, {"interval": 7, "order": "ascending"}),
        (OwLore, {"active_layers": 3, "score": "norm"}),
    ):
        text = OmegaConf.to_yaml({"_target_": f"apportion.callbacks.{kind.__name__}", "_convert_": "all", **arguments})
        built = instantiate(OmegaConf.create(text))
        assert type(built) is kind
        assert built.slots == kind(**arguments).slots
        assert repr(built) == repr(kind(**arguments))


def test_presets_fill_slots_and_override_nothing() -> None:
    for kind in (LISA, IST, RST, HFT, BAdam, OwLore):
        assert kind.__mro__[1] is SelectiveTuning
        own = {k for k, v in vars(kind).items() if callable(v) or isinstance(v, property)}
        assert own == {"__init__"}
        assert isinstance(kind().slots.effect, Freeze)
