"""Lives with others: finders, checkpoints, averages, several fits, several selections; or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from pytorch_lightning import callbacks as lightning_callbacks
from pytorch_lightning.tuner import Tuner
from torch.optim.swa_utils import get_ema_avg_fn
from toys import BLOCKS, OtherTask, Task, ValidatedTask, adamw, fit, moved, trainable, trainer, weights
from witness import Witness

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Cycle, Sample
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers, Modules


def method(every: int = 2, **options: Any) -> SelectiveTuning:
    return SelectiveTuning(
        Layers(), Uniform(), Constant(1), Cycle(), Freeze(), select_when=When(every=every), **options
    )


def same(a: Any, b: Any) -> bool:
    return not moved(weights(a), weights(b))


class Noted(Task):  # type: ignore[misc, valid-type]
    """Notes what moves and trains while it is being trained, whoever trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.start = weights(self)
        self.seen: list[tuple[set[str], set[str]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        trains = {name for name, p in self.named_parameters() if p.requires_grad}
        self.seen.append((moved(self.start, weights(self)), trains))
        return super().training_step(batch, batch_idx)


def assert_only_the_first_selection_trained(task: Noted, driver: SelectiveTuning, steps: int) -> None:
    first = driver.selection.bound.spread(driver.history.masks[0])
    allowed = {*first, *driver.selection.bound.always}
    assert len(task.seen) >= steps
    for moving, trains in task.seen[:steps]:
        assert trains == allowed
        assert moving <= allowed
    assert set(first) & task.seen[steps - 1][0]


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_learning_rate_finder_trains_the_first_selection_and_leaves_no_trace(
    ours_first: bool, tmp_path: Path
) -> None:
    driver = method()
    finder = lightning_callbacks.LearningRateFinder(num_training_steps=7, min_lr=1e-5, max_lr=1e-2, update_attr=False)
    task = Noted()
    fit(task, [driver, finder] if ours_first else [finder, driver], default_root_dir=tmp_path)
    assert_only_the_first_selection_trained(task, driver, 7)
    alone = Task()
    other = method()
    fit(alone, other)
    assert len(finder.optimal_lr.results["loss"]) == 7
    assert driver.history.steps == other.history.steps
    assert torch.equal(driver.history.masks, other.history.masks)
    assert same(task, alone)


def test_the_tuner_finds_a_learning_rate_with_the_first_selection_and_restores_all(tmp_path: Path) -> None:
    driver = method()
    task = Noted()
    run = trainer([driver], default_root_dir=tmp_path)
    torch.manual_seed(11)
    Tuner(run).lr_find(task, num_training=7, min_lr=1e-5, max_lr=1e-2, update_attr=False)
    assert_only_the_first_selection_trained(task, driver, 7)
    assert not moved(task.start, weights(task))
    assert all(p.requires_grad for p in task.parameters())
    torch.manual_seed(11)
    run.fit(task)
    alone, other = Task(), method()
    torch.manual_seed(11)
    trainer([other]).fit(alone)
    assert torch.equal(driver.history.masks, other.history.masks)
    assert same(task, alone)


@pytest.mark.parametrize("as_callback", [True, False])
def test_the_batch_size_finder_trains_the_first_selection_and_restores_all(as_callback: bool, tmp_path: Path) -> None:
    driver = method()
    task = Noted()
    if as_callback:
        finder = lightning_callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=2)
        trainer([driver, finder], default_root_dir=tmp_path, steps=3).fit(task)
    else:
        run = trainer([driver], default_root_dir=tmp_path, steps=3)
        Tuner(run).scale_batch_size(task, max_trials=2, steps_per_trial=2, init_val=2)
        assert not moved(task.start, weights(task))
        assert all(p.requires_grad for p in task.parameters())
        run.fit(task)
    assert_only_the_first_selection_trained(task, driver, 4)
    assert driver.history.steps == [0, 2]
    assert driver.selection.step == 3
    assert task.batch_size == 4


def test_early_stopping_stops_and_the_model_is_left_as_found() -> None:
    driver = method()
    stop = lightning_callbacks.EarlyStopping("val_loss", patience=0, min_delta=100.0)
    task = ValidatedTask()
    run = fit(task, [driver, stop], steps=-1, max_epochs=5, val_check_interval=3)
    assert run.global_step == 6
    assert all(p.requires_grad for p in task.parameters())
    assert driver.history.steps == [0, 2, 4]


def test_model_checkpoint_holds_the_selection_of_the_step_it_was_written_at(tmp_path: Path) -> None:
    driver = method()
    keep = lightning_callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Task(), [driver, keep], enable_checkpointing=True)
    for step in range(1, 7):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        selection = saved["callbacks"][driver.state_key]["selection"]
        assert selection["step"] == step
        assert selection["steps"].tolist() == [s for s in (0, 2, 4) if s < step]
        assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(Task().parameters()))


def test_weights_alone_are_saved_without_our_state(tmp_path: Path) -> None:
    driver = method()
    run = fit(Task(), driver)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "callbacks" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


def test_an_exponential_average_takes_no_part_in_what_moves() -> None:
    driver, alone = method(), method()
    witness = Witness(driver)
    average = lightning_callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5), use_buffers=False)
    task, other = Task(), Task()
    start = weights(task)
    run = fit(task, [driver, average, witness])
    witness.check()
    fit(other, alone)
    assert torch.equal(driver.history.masks, alone.history.masks)
    never = set(weights(task)) - set().union(*(step.chosen for step in witness.steps))
    assert never  # one layer of four at a time for six steps in twos leaves one out
    assert not moved(start, weights(task)) & never
    assert not same(task, other)
    assert all(p.requires_grad for p in run.lightning_module.parameters())


def test_stochastic_weight_averaging_runs_on_top() -> None:
    driver = method()
    witness = Witness(driver)
    average = lightning_callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    task = Task()
    fit(task, [driver, average, witness], steps=-1, max_epochs=3)
    witness.check()
    assert all(p.requires_grad for p in task.parameters())


def test_a_second_fit_on_the_same_trainer_goes_on() -> None:
    driver = method()
    witness = Witness(driver)
    task = Task()
    run = fit(task, [driver, witness], steps=-1, max_epochs=1, limit_train_batches=3)
    assert all(p.requires_grad for p in task.parameters())
    run.fit_loop.max_epochs = 2
    run.fit(task)
    witness.check()
    assert driver.history.steps == [0, 2, 4]
    assert driver.selection.step == 6
    assert all(p.requires_grad for p in task.parameters())


def test_a_second_fit_with_a_new_trainer_goes_on() -> None:
    driver = method()
    witness = Witness(driver)
    task = Task()
    fit(task, [driver, witness], steps=3)
    fit(task, [driver, witness], steps=3)
    witness.check()
    assert len(witness.steps) == 6
    assert driver.history.steps == [0, 2, 4]


def test_an_epoch_clock_starts_anew_with_every_fit() -> None:
    driver = SelectiveTuning(Layers(), Uniform(), Constant(1), Cycle(), Freeze(), select_when=When(clock="epoch"))
    task = Task()
    for _ in range(2):
        fit(task, driver, steps=-1, max_epochs=1, limit_train_batches=2)
    assert driver.history.steps == [0, 2]


def test_validate_and_test_between_fits_change_nothing() -> None:
    def run(between: bool) -> Any:
        task, driver = ValidatedTask(), method()
        one = trainer([driver], steps=-1, max_epochs=1, limit_train_batches=3)
        torch.manual_seed(11)
        if between:
            one.validate(task, verbose=False)
        one.fit(task)
        if between:
            one.validate(task, verbose=False)
            one.test(task, verbose=False)
        one.fit_loop.max_epochs = 2
        one.fit(task)
        return task, driver

    (a, first), (b, second) = run(False), run(True)
    assert same(a, b)
    assert torch.equal(first.history.masks, second.history.masks)
    assert all(p.requires_grad for p in b.parameters())


def test_a_finetuning_callback_is_refused() -> None:
    class Thaw(lightning_callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net.layers)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            raise AssertionError("never reached")

    with pytest.raises(ValueError, match=r"`SelectiveTuning` and `Thaw` both set `requires_grad`.*use one of them"):
        fit(Task(), [method(), Thaw()])


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAStrategy"])
def test_a_strategy_with_a_fixed_set_is_refused_with_advice(kind: str) -> None:
    base = pytorch_lightning.strategies.SingleDeviceStrategy
    strategy = type(kind, (base,), {})(device="cpu", accelerator=pytorch_lightning.accelerators.CPUAccelerator())
    with pytest.raises(ValueError, match=rf"does not run under .*`{kind}`.*strategy='ddp'"):
        fit(Task(), method(), strategy=strategy, accelerator="auto")


def test_two_selections_train_what_both_select() -> None:
    layers = method(name="layers")
    matrices = SelectiveTuning(
        Modules(), Uniform(), Constant(0.5), Sample(), Freeze(), select_when=When(every=3), seed=5, name="matrices"
    )
    witness = Witness(layers, matrices)
    task = Task()
    run = fit(task, [layers, matrices, witness], steps=12)
    witness.check()
    assert len({frozenset(step.chosen) for step in witness.steps}) >= 6
    for step in witness.steps:
        assert step.state == step.chosen
        assert step.counts == [1, matrices.selection.bound.n // 2]
    assert all(p.requires_grad for p in task.parameters())
    assert [len(g["params"]) for g in run.optimizers[0].param_groups] == [len(list(task.parameters()))]


def test_two_selections_resume_together(tmp_path: Path) -> None:
    def both() -> list[SelectiveTuning]:
        return [
            method(name="layers"),
            SelectiveTuning(Modules(), Uniform(), Constant(0.5), Sample(), Freeze(), seed=5, name="matrices"),
        ]

    class Save(pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    whole, again = Task(), Task()
    first, second = both(), both()
    fit(whole, [*first, Save()])
    fit(again, second, resume=tmp_path / "three.ckpt", seed=99)
    assert same(whole, again)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.history.masks, b.history.masks)


def test_two_effects_over_one_parameter_are_refused() -> None:
    other = SelectiveTuning(Layers(), Uniform(), Constant(1), Cycle(), Freeze(state="keep"), name="other")
    task = Task()
    with pytest.raises(ValueError, match="give both the same effect"):
        fit(task, [method(), other])
    assert all(p.requires_grad for p in task.parameters())


def test_two_selections_of_one_name_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([method(), method()])
    trainer([method(name="a"), method(name="b")])


def test_what_the_user_froze_stays_frozen() -> None:
    task = Task(optimizer=lambda m: adamw(m.parameters()))
    frozen = [task.net.layers[2].mlp.up_proj.weight, task.net.embed_tokens.weight]
    for p in frozen:
        p.requires_grad_(False)
    values = [p.detach().clone() for p in frozen]
    driver = method(every=1)
    fit(task, driver, steps=BLOCKS)
    assert driver.history.masks.any(0).all()  # every layer had its turn
    assert all(torch.equal(p, value) for p, value in zip(frozen, values, strict=True))
    assert [not p.requires_grad for p in frozen] == [True, True]
    assert sum(not p.requires_grad for p in task.parameters()) == 2


@pytest.mark.parametrize("in_a_list", [True, False])
@pytest.mark.parametrize(("package", "kind"), [(pytorch_lightning, Task), (lightning.pytorch, OtherTask)])
def test_both_packages_take_the_callback_alone_and_in_a_list(package: Any, kind: Any, in_a_list: bool) -> None:
    driver = method()
    witness = Witness(driver)
    task = kind(optimizer=lambda m: adamw(trainable(m)))
    fit(task, [driver, witness], package=package)
    witness.check()
    alone, other = method(), kind(optimizer=lambda m: adamw(trainable(m)))
    fit(other, [alone] if in_a_list else alone, package=package)
    assert same(task, other)
    assert torch.equal(driver.history.masks, alone.history.masks)
