"""A callback of a user who loops over folds, saves, freezes, or steps several optimizers: it is right, or an error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from alike import assert_equal
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from rank_methods import svd_net
from resuming import Noisy
from torch import Tensor, nn
from torch.nn import functional as F
from toys import ManualTask, Net, Task, adamw, fit, lora_net, moved, named, trainable, weights
from workers import ranks

from apportion import checks
from apportion.budgets import Constant, Polynomial
from apportion.callbacks import FISH, HFT, ID3, LIFT, LISA, RST, SIFT, AdaLoRA, BAdam, PaFI, Random
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.optim import Selective
from apportion.rules import Cycle, TopK
from apportion.scores import Uniform
from apportion.trainers import length
from apportion.units import Layers

METHODS: dict[str, Callable[[], SelectiveTuning]] = {
    "lisa": lambda: LISA(active_layers=2, interval=2),
    "badam": lambda: BAdam(interval=1),
    "hft": HFT,
    "lift": lambda: LIFT(rank=1, lra_rank=2, interval=2),
    "id3": lambda: ID3(budget=60, max_steps=4),
    "pafi": lambda: PaFI(budget=60),
    "sift": lambda: SIFT(amount=60),
    "fish": lambda: FISH(budget=200, batches=2),
}


def still(**options: Any) -> Task:
    """A task without dropout."""
    return Task(Net(dropout=0.0, **options))


# DDP of one process ---------------------------------------------------------------------------------------------------


def train_alone(name: str, strategy: str, manual: bool) -> Any:
    task = (ManualTask if manual else Task)(Net(dropout=0.0))
    driver = METHODS[name]()
    fit(task, driver, steps=4, strategy=strategy, devices=1)
    return weights(task), driver.history.steps


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", ["lisa", "badam", "lift", "id3"])
def test_ddp_with_one_process_trains_as_training_without_it(name: str, manual: bool) -> None:
    expected = train_alone(name, "auto", manual)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        assert_equal(ranks(1).run(train_alone, name, strategy, manual)[0], expected, strategy)


@pytest.mark.xdist_group("ranks")
def test_ddp_with_one_process_is_held_to_what_ddp_allows() -> None:
    run = pl.Trainer(strategy=pl.strategies.DDPStrategy(static_graph=True), devices=1, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="`static_graph=True` rules out"):
        checks.strategy(run, "LISA")


# Several optimizers ---------------------------------------------------------------------------------------------------


class Pair(pl.LightningModule):
    """Two networks with an optimizer each; how their losses and steps follow each other is up to ``order``."""

    def __init__(self, order: str, toggle: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.order, self.toggle = order, toggle
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a = nn.Sequential(nn.Linear(8, 8, bias=False))
            self.b = nn.Sequential(nn.Linear(8, 8, bias=False))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.a, self.b)]

    def loss_of(self, part: str, x: Tensor) -> Tensor:
        if part == "a":
            return (self.b(self.a(x)) if "through" in self.order else self.a(x)).square().mean()
        return F.l1_loss(self.b(x), x)

    def training_step(self, x: Tensor, index: int) -> None:
        optimizers = dict(zip("ab", self.optimizers(), strict=True))
        if self.order == "one loss":
            self.manual_backward(self.loss_of("a", x) + self.loss_of("b", x))
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            return
        parts = "ab" if "alternate" not in self.order else "ab"[index % 2]
        for part in parts:
            if self.toggle:
                self.toggle_optimizer(optimizers[part])
            optimizers[part].zero_grad()
            self.manual_backward(self.loss_of(part, x))
            optimizers[part].step()
            optimizers[part].zero_grad()
            if self.toggle:
                self.untoggle_optimizer(optimizers[part])


def fit_pair(module: Pair, driver: SelectiveTuning, batches: int = 3) -> None:
    x = torch.randn(batches, 8, generator=torch.Generator().manual_seed(1))
    fit(module, driver, steps=-1, max_epochs=1, data=torch.utils.data.DataLoader(x, batch_size=1))


BY_GRADIENTS: dict[str, Callable[[], SelectiveTuning]] = {
    "sift": lambda: SIFT(amount=16, train_head=False),
    "id3": lambda: ID3(budget=16, max_steps=3, train_head=False),
}


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("order", ["in turn", "in turn, through", "alternate", "alternate, through"])
@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_a_choice_by_gradients_that_come_after_it_is_refused(name: str, order: str, toggle: bool) -> None:
    module = Pair(order, toggle)
    with pytest.raises(RuntimeError, match="let all backward passes of a batch run before the first `step"):
        fit_pair(module, BY_GRADIENTS[name]())
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_a_choice_by_all_gradients_of_a_batch_serves_several_optimizers(name: str) -> None:
    module, driver = Pair("one loss"), BY_GRADIENTS[name]()
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(module.loss_of("a", x) + module.loss_of("b", x), list(module.parameters()))
    fit_pair(module, driver, 1)
    units = driver.selection.units  # type: ignore[attr-defined]
    assert all(map(len, units))
    if name == "sift":  # half of them in each tensor
        for grad, chosen in zip(grads, units, strict=True):
            size = grad.abs().flatten()
            assert len(chosen) == 8
            assert size[chosen.long()].min() == size.topk(8).values.min()


@pytest.mark.parametrize("order", ["in turn", "in turn, through", "alternate"])
def test_a_choice_by_weights_does_not_mind_the_order(order: str) -> None:
    module = Pair(order, toggle=True)
    start = weights(module)
    fit_pair(module, PaFI(budget=16, train_head=False), 4)
    assert moved(start, weights(module)) == set(start)


# One callback, several modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"blocks": 6}, {"width": 12}, {"width": 4}])
@pytest.mark.parametrize("name", METHODS)
def test_another_module_is_trained_as_by_a_new_callback(name: str, shape: dict[str, int]) -> None:
    again, alone = METHODS[name](), METHODS[name]()
    if shape.get("width") == 4 and name == "fish":
        again, alone = (FISH(budget=150, batches=2) for _ in range(2))
    fit(still(seed=5), again, steps=4)
    first, second = still(seed=6, **shape), still(seed=6, **shape)
    fit(first, again, steps=4)
    fit(second, alone, steps=4)
    assert_equal(weights(first), weights(second))
    assert_equal(again.state_dict(), alone.state_dict())


def test_the_same_module_goes_on_after_another_was_trained_and_a_fit_was_refused() -> None:
    task, driver = still(), METHODS["lisa"]()
    fit(task, driver, steps=3)
    fit(task, driver, steps=3)
    assert (driver.history.steps, driver.selection.step) == ([0, 2, 4], 6)
    fit(still(), driver, steps=1)
    assert (driver.history.steps, driver.selection.step) == ([0], 1)


def test_another_module_may_be_resumed(tmp_path: Path) -> None:
    whole, driver = still(), METHODS["lisa"]()
    fit(whole, [driver, Saves(tmp_path, 3)], steps=6)
    reused = METHODS["lisa"]()
    fit(still(seed=9), reused, steps=5)
    for twice in range(2):  # what was restored is for one module only
        task = still(seed=1)
        fit(task, reused, steps=6, resume=tmp_path / "3.ckpt", seed=50 + twice)
        assert_equal(weights(task), weights(whole))
        assert reused.history.steps == driver.history.steps
    fit(still(), reused, steps=1)
    assert reused.history.steps == [0]


def test_a_state_that_was_loaded_by_hand_is_not_forgotten() -> None:
    first, second = METHODS["pafi"](), METHODS["pafi"]()
    fit(still(seed=1), first, steps=2)
    fit(still(seed=2), second, steps=2)
    second.load_state_dict(first.state_dict())
    fit(still(seed=3), second, steps=2)
    assert second.selection.step == 4
    assert_equal(second.selection.units, first.selection.units)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["pafi", "lift"])
def test_a_selection_of_another_size_is_refused(name: str) -> None:
    driver = METHODS[name]()
    fit(still(), driver, steps=2)
    with pytest.raises(ValueError, match=r"was made on a unit net\.layers\.0.* of \d+ entries, this model's has \d+"):
        fit(still(width=12), copy.deepcopy(driver), steps=2)
    loaded = METHODS[name]()
    loaded.load_state_dict(driver.state_dict())
    with pytest.raises(ValueError, match=r"this model's has \d+: resume with the same model"):
        fit(still(width=12), loaded, steps=2)


# Checkpoints ----------------------------------------------------------------------------------------------------------


class Saves(pl.Callback):
    """Saves a checkpoint after a step, or in another hook of the batch that follows ``step`` optimizer steps."""

    def __init__(self, folder: Path, step: int, hook: str = "on_train_batch_end") -> None:
        self.folder, self.step = folder, step
        self.__dict__[hook] = self._save

    def _save(self, run: Any, *args: Any, **kwargs: Any) -> None:
        path = self.folder / f"{self.step}.ckpt"
        if run.global_step == self.step and not path.exists():
            run.save_checkpoint(path)


SAVED: dict[str, tuple[Callable[[], SelectiveTuning], Callable[[], Any]]] = {
    **{name: (METHODS[name], Net) for name in ("lisa", "badam", "lift", "id3")},
    "adalora": (lambda: AdaLoRA(target=0.3, every=1, warmup=1, final=2), svd_net),
}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_start"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_another_callback_resumes_exactly_wherever_it_stands(
    name: str, before: bool, hook: str, tmp_path: Path
) -> None:
    make, net = SAVED[name]
    whole, driver, saves = Noisy(net()), make(), Saves(tmp_path, 3, hook)
    fit(whole, [saves, driver] if before else [driver, saves], steps=7)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert saved["callbacks"][driver.state_key]["selection"]["step"] == saved["global_step"] == 3
    if hook == "on_train_batch_start":
        return  # the batch that was being prepared is not seen again: Lightning's loss
    task, again = Noisy(net()), make()
    fit(task, again, steps=7, resume=tmp_path / "3.ckpt", seed=99)
    assert_equal(weights(task), weights(whole))
    assert again.history.steps == driver.history.steps


@pytest.mark.parametrize("hook", ["training_step", "on_before_zero_grad", "lr_scheduler_step", "optimizer_step"])
def test_a_checkpoint_in_mid_batch_has_counted_what_lightning_has(hook: str, tmp_path: Path) -> None:
    class Inside(Task):  # type: ignore[misc, valid-type]
        def save(self) -> None:
            self.trainer.save_checkpoint(tmp_path / f"{self.trainer.global_step}.ckpt")

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(super(Inside, self), hook)(*args, **kwargs)
        self.save()
        return result

    setattr(Inside, hook, wrapped)
    driver = METHODS["lisa"]()
    fit(Inside(scheduler=lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1), "interval": "step"}), driver)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 6
    for path in files:
        saved = torch.load(path, weights_only=True)
        assert saved["callbacks"][driver.state_key]["selection"]["step"] == saved["global_step"]
    assert driver.selection.step == 6


def test_a_checkpoint_between_two_steps_of_a_batch_counts_the_batch_once(tmp_path: Path) -> None:
    class Twice(ManualTask):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                self.trainer.save_checkpoint(tmp_path / f"{self.trainer.global_step}.ckpt")
                optimizer.zero_grad()

    driver = METHODS["lisa"]()
    fit(Twice(optimizer=lambda m: [adamw(trainable(m)[::2]), adamw(trainable(m)[1::2])]), driver, steps=6)
    counted = [
        torch.load(tmp_path / f"{i}.ckpt", weights_only=True)["callbacks"][driver.state_key]["selection"]["step"]
        for i in range(1, 7)
    ]
    assert counted == [1, 1, 2, 2, 3, 3]
    assert driver.selection.step == 3


def test_a_checkpoint_of_a_run_that_failed_after_a_step_has_counted_it(tmp_path: Path) -> None:
    class Fails(Task):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, *args: Any) -> None:
            self.late()

        def lr_scheduler_step(self, *args: Any) -> None:
            super().lr_scheduler_step(*args)
            self.early()

        def early(self) -> None:
            """Before the step is counted."""

        late = early

    for moment in ("early", "late"):

        def fail(self: Any) -> None:
            if self.trainer.global_step == 3:
                raise ArithmeticError

        task = Fails(scheduler=lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1), "interval": "step"})
        setattr(task, moment, fail.__get__(task))
        driver = METHODS["lisa"]()
        with pytest.raises(ArithmeticError):
            fit(task, [driver, OnExceptionCheckpoint(tmp_path, moment)], enable_checkpointing=True)
        saved = torch.load(tmp_path / f"{moment}.ckpt", weights_only=True)
        assert saved["callbacks"][driver.state_key]["selection"]["step"] == saved["global_step"] == 3


# Flags ----------------------------------------------------------------------------------------------------------------


def freezing(hook: str, when: Callable[[Any], bool] = lambda self: True, keep: int = 2, on: bool = False) -> type[Any]:
    """A task that freezes (or unfreezes) the first layers in a hook."""

    class Freezing(Task):  # type: ignore[misc, valid-type]
        def freeze_some(self, *args: Any, **kwargs: Any) -> None:
            if when(self):
                for p in self.net.layers[:keep].parameters():
                    p.requires_grad_(on)

    setattr(Freezing, hook, Freezing.freeze_some)
    return Freezing


FREEZABLE = {
    **{name: METHODS[name] for name in ("lisa", "hft", "badam", "lift", "id3")},
    "random": lambda: Random(budget=60),
}


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("name", FREEZABLE)
def test_freezing_in_a_hook_of_the_fit_is_an_error_that_says_where_to(name: str, hook: str) -> None:
    def when(self: Any) -> bool:
        return "epoch" not in hook or self.current_epoch == 1

    task = freezing(hook, when)(still().net)
    with pytest.raises(RuntimeError, match=r"such as net\.layers\.0.*`requires_grad` was set to False.*before `fit`"):
        fit(task, FREEZABLE[name](), steps=-1, max_epochs=3, limit_train_batches=2)


def test_freezing_what_waits_for_its_turn_is_seen_at_the_start_of_an_epoch() -> None:
    driver = SelectiveTuning(Layers(), Uniform(), Constant(1), Cycle(), Freeze())
    task = freezing("on_train_epoch_start", lambda self: self.current_epoch == 1, keep=1)(still().net)
    start = weights(task)
    with pytest.raises(RuntimeError, match=r"`SelectiveTuning` decides about 15 parameters, such as net\.layers\.0"):
        fit(task, driver, steps=-1, max_epochs=2, limit_train_batches=2)
    assert moved(start, weights(task)) <= {n for n in start if "layers.0" in n or "layers.1" in n or "layers" not in n}


@pytest.mark.parametrize("batch", [1, 2])
def test_freezing_in_mid_epoch_is_an_error_at_the_next_step(batch: int) -> None:
    class Late(Task):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, outputs: Any, ids: Any, index: int) -> None:
            if index == batch:
                self.freeze()

    with pytest.raises(RuntimeError, match="was set to False by others"):
        fit(Late(), LISA(active_layers=2, interval=20))


def test_unfreezing_in_mid_epoch_is_an_error_and_at_its_start_costs_nothing() -> None:
    class Held(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_after_backward(self, run: Any, module: Any) -> None:
            self.seen.append(sum(p.grad is not None for p in module.parameters()))

    class Thaws(Task):  # type: ignore[misc, valid-type]
        hook = "on_train_batch_end"

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1 and self.hook == "on_train_epoch_start":
                self.unfreeze()

        def on_train_batch_end(self, *args: Any) -> None:
            if self.hook == "on_train_batch_end":
                self.unfreeze()

    with pytest.raises(RuntimeError, match=r"was set to True by others.*hold dense gradients"):
        fit(Thaws(), LISA(active_layers=1, interval=20))
    Thaws.hook = "on_train_epoch_start"
    held = Held()
    fit(Thaws(), [LISA(active_layers=1, interval=20), held], steps=-1, max_epochs=2, limit_train_batches=3)
    assert len(held.seen) == 6
    assert len(set(held.seen)) == 1


def test_what_is_frozen_at_the_end_of_the_last_epoch_stays_frozen() -> None:
    task = freezing("on_train_epoch_end", lambda self: self.current_epoch == 1)(still().net)
    fit(task, [LISA(active_layers=1, interval=1), second_selection()], steps=-1, max_epochs=2, limit_train_batches=2)
    for name, p in named(task).items():
        assert p.requires_grad == ("layers.0" not in name and "layers.1" not in name)


def second_selection() -> SelectiveTuning:
    """A second selection on the same parameters."""
    return SelectiveTuning(Layers(), Uniform(), Constant(2), Cycle(), Freeze(), name="second")


def test_flags_between_epochs_are_the_users_and_in_a_step_the_selections() -> None:
    class Looks(pl.Callback):
        def __init__(self) -> None:
            self.seen: dict[str, set[int]] = {}

        def _look(self, hook: str, module: Any) -> None:
            self.seen.setdefault(hook, set()).add(sum(p.requires_grad for p in module.parameters()))

        def on_train_epoch_start(self, run: Any, module: Any) -> None:
            self._look("between", module)

        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            self._look("between", module)

        def on_before_backward(self, run: Any, module: Any, loss: Any) -> None:
            self._look("step", module)

        def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
            self._look("step", module)

    looks = Looks()
    task = still()
    fit(task, [LISA(active_layers=1, interval=1), looks], steps=-1, max_epochs=2, limit_train_batches=2)
    whole = len(list(task.parameters()))
    assert looks.seen == {"between": {whole}, "step": {whole - 3 * 15}}


def test_toggled_optimizers_are_not_taken_for_a_users_flags() -> None:
    class Toggles(ManualTask):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                flags = optimizer.optimizer._apportion_owner.flags
                flags.check(self)  # as at the first batch of a window that begins with one toggled
                self.manual_backward(self.loss(batch))
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

    def two(module: Any) -> list[torch.optim.Optimizer]:
        half = len(trainable(module)) // 2
        return [adamw(trainable(module)[:half]), adamw(trainable(module)[half:])]

    for make in (lambda: LISA(active_layers=2, interval=3), lambda: PaFI(budget=60)):
        task = Toggles(Net(dropout=0.0), two)
        fit(task, make(), steps=-1, max_epochs=2, limit_train_batches=2)
        assert all(p.requires_grad for p in task.parameters())


def test_parameters_are_looked_at_in_turn_where_there_are_many() -> None:
    class Late(Task):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step == 1:
                self.net.layers[20].mlp.up_proj.weight.requires_grad_(False)

    driver = LISA(active_layers=24, interval=50)
    with pytest.raises(RuntimeError, match=r"1 parameters, such as net\.layers\.20\.mlp\.up_proj\.weight"):
        fit(Late(Net(blocks=24)), driver, steps=9)
    assert 2 < driver.selection.step < 9  # 360 parameters, 64 at a time


# Optimizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lisa", "badam", "lift", "id3"])
def test_optimizers_that_are_built_anew_in_a_fit_are_refused(name: str) -> None:
    class Resets(Task):  # type: ignore[misc, valid-type]
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    with pytest.raises(RuntimeError, match="what is selected would stop moving"):
        fit(Resets(), METHODS[name](), steps=-1, max_epochs=2, limit_train_batches=2)


# The length of the run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_epochs": -1, "max_time": {"seconds": 30}}, {"max_epochs": -1}])
def test_a_budget_that_ends_with_a_run_without_end_says_so(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`Increment\(finish=None\)` ends with the run, whose number .* is unknown"):
        fit(Task(), ID3(budget=60), steps=-1, **options)


def test_a_run_of_several_optimizers_is_as_long_as_its_batches() -> None:
    def task() -> Any:
        return ManualTask(Net(), lambda m: [adamw(trainable(m)[::2]), adamw(trainable(m)[1::2])])

    for steps, epochs, expected in ((8, None, 4), (-1, 1, 6), (100, 1, 6), (8, 1, 4)):
        seen: list[int | None] = []

        class Notes(pl.Callback):
            def on_train_start(self, run: Any, module: Any, seen: list[Any] = seen) -> None:
                seen.append(length(run))

        driver = SelectiveTuning(Layers(), Uniform(), Polynomial(4, 1), TopK(), Freeze())
        fit(task(), [driver, Notes()], steps=steps, max_epochs=epochs, limit_train_batches=6)
        assert seen == [expected]
        assert driver.history.masks.sum(1).tolist()[-1] == 1


# Other arguments ------------------------------------------------------------------------------------------------------


def warned(first: Any, second: Any, folder: Path, net: Callable[[], Any] = Net) -> list[str]:
    """What is said when ``second`` resumes a run of ``first``."""
    fit(Task(net()), [first, Saves(folder, 3)], steps=4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(Task(net()), second, steps=5, resume=folder / "3.ckpt")
    return [str(w.message) for w in seen if "goes on from a selection" in str(w.message)]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda: Random(budget=60), lambda: Random(budget=100), "budget was `Constant(amount=60)` and is"),
        (lambda: Random(budget=60), lambda: Random(budget=60, seed=4), "seed was `0` and is `4`"),
        (lambda: ID3(budget=60, max_steps=6), lambda: ID3(budget=20, max_steps=6), "budget was"),
        (lambda: LISA(2, 2), lambda: LISA(2, 3), "select_when was"),
        (lambda: LISA(2, 2), lambda: LISA(2, 2, state="keep"), "effect was"),
    ],
)
def test_a_resume_with_other_arguments_says_once_which(first: Any, second: Any, said: str, tmp_path: Path) -> None:
    messages = warned(first(), second(), tmp_path)
    assert len(messages) == 1
    assert said in messages[0]


@pytest.mark.parametrize("name", [*METHODS, "adalora", "rst"])
def test_a_resume_with_the_same_arguments_says_nothing(name: str, tmp_path: Path) -> None:
    makes: dict[str, Any] = {**METHODS, "adalora": SAVED["adalora"][0], "rst": lambda: RST(active=0.5)}
    net: Any = {"adalora": svd_net, "rst": lora_net}.get(name, Net)
    assert warned(makes[name](), makes[name](), tmp_path, net) == []


def test_a_wrapper_that_goes_on_with_other_arguments_says_so_too() -> None:
    first, second = Net(dropout=0.0), Net(dropout=0.0)
    saved = Selective(adamw(trainable(first)), first, Random(60, per="tensor")).state_dict()
    with pytest.warns(UserWarning, match=r"goes on from a selection.*budget was .*60.* and is .*100"):
        Selective(adamw(trainable(second)), second, Random(100, per="tensor")).load_state_dict(saved)


def test_a_checkpoint_of_an_earlier_version_is_taken_as_it_is(tmp_path: Path) -> None:
    driver = METHODS["lisa"]()
    fit(Task(), [driver, Saves(tmp_path, 3)], steps=4)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    for key in ("slots", "sizes"):
        del saved["callbacks"][driver.state_key]["selection"][key]
    torch.save(saved, tmp_path / "old.ckpt")
    again = LISA(active_layers=1, interval=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*goes on from a selection.*")
        fit(Task(), again, steps=5, resume=tmp_path / "old.ckpt")
    assert again.history.steps == [0, 2, 4]


def test_model_checkpoint_is_told_of_every_step_as_before(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    driver = METHODS["lisa"]()
    fit(Task(), [keep, driver], enable_checkpointing=True)
    for step in range(1, 7):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert saved["callbacks"][driver.state_key]["selection"]["step"] == step
