"""The callback in the Trainer's loop: when it selects, what it frees, what it logs, what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from toys import Net, Task, adamw, fit, loader, lora_net, moved, trainable, weights
from witness import Witness

from apportion.budgets import Constant, Polynomial
from apportion.callbacks import HFT, IST, LISA, OwLore
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Cycle, Sample, TopK
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


def method(every: int = 1, **options: Any) -> SelectiveTuning:
    return SelectiveTuning(
        Layers(), Uniform(), Constant(1), Cycle(), Freeze(), select_when=When(every=every), **options
    )


def test_an_accumulation_window_never_mixes_two_sets() -> None:
    driver = method()
    witness = Witness(driver)
    # 5 batches: windows of 2, 2 and 1 in every epoch.
    run = fit(Task(), [driver, witness], steps=9, accumulate_grad_batches=2, limit_train_batches=5)
    assert run.current_epoch == 3
    assert driver.history.steps == list(range(9))
    witness.check()  # counts windows with two sets, too


def test_frozen_gradients_never_enter_the_clip_norm() -> None:
    class Norms(Witness):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.clipped: list[float] = []

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            stale = [n for n, p in pl_module.named_parameters() if not p.requires_grad and p.grad is not None]
            assert not stale

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            chosen = [p for n, p in pl_module.named_parameters() if n in self.present.chosen]  # type: ignore[union-attr]
            own = torch.stack([p.grad.norm() for p in chosen]).norm()
            held = [p.grad.norm() for g in optimizer.param_groups for p in g["params"]]
            self.clipped.append(abs(float(own - torch.stack(held).norm())))

    driver = method()
    norms = Norms(driver)
    fit(Task(), [driver, norms], steps=8, gradient_clip_val=0.1, accumulate_grad_batches=2)
    norms.check()
    assert max(norms.clipped) < 1e-6


def test_gradients_are_freed_after_the_step_and_not_held_through_the_next_forward_pass() -> None:
    class Held(pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert all(p.grad is None for p in pl_module.parameters())

    fit(Task(), [method(), Held()])


def test_a_switch_happens_before_the_step_it_is_due_at() -> None:
    for every, begin, expected in ((1, 0, [0, 1, 2, 3, 4, 5]), (2, 0, [0, 2, 4]), (3, 1, [0, 1, 4]), (7, 0, [0])):
        driver = SelectiveTuning(
            Layers(), Uniform(), Constant(1), Cycle(), Freeze(), select_when=When(every=every, begin=begin)
        )
        fit(Task(), driver)
        assert driver.history.steps == expected


def test_an_epoch_clock_switches_at_the_first_step_of_an_epoch() -> None:
    driver = HFT(redraw="epoch")
    fit(Task(), driver, steps=9, limit_train_batches=3)
    assert driver.history.steps == [0, 3, 6]


def test_a_budget_that_ends_with_the_run_is_told_its_length() -> None:
    driver = SelectiveTuning(Layers(), Uniform(), Polynomial(4, 1), TopK(), Freeze())
    fit(Task(), driver, steps=-1, max_epochs=2, limit_train_batches=3)
    assert driver.history.masks.sum(1).tolist()[0] == 4
    assert driver.history.masks.sum(1).tolist()[-1] == 1


def test_seeds_give_other_draws_and_one_seed_the_same() -> None:
    def masks(seed: int) -> list[list[bool]]:
        driver = LISA(2, 1, seed=seed)
        fit(Task(), driver)
        rows: list[list[bool]] = driver.history.masks.tolist()
        return rows

    assert masks(0) == masks(0)
    assert len({str(masks(seed)) for seed in range(4)}) == 4


def test_selection_draws_leave_the_global_random_numbers_alone() -> None:
    class Notes(pytorch_lightning.Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.states.append(torch.get_rng_state())

    plain, selective = Notes(), Notes()
    fit(Task(), plain)
    fit(Task(), [method(), selective])
    assert all(torch.equal(a, b) for a, b in zip(plain.states, selective.states, strict=True))


def test_shares_and_churn_are_logged() -> None:
    class Notes(pytorch_lightning.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    notes = Notes()
    fit(Task(), [LISA(2, 2, name="a"), notes])
    assert notes.seen[0]["LISA[a]/selected_units"] == 0.5
    assert notes.seen[0]["LISA[a]/selected_entries"] == pytest.approx(0.5)
    assert all(0.0 <= seen["LISA[a]/churn"] <= 1.0 for seen in notes.seen)


def test_a_batch_without_a_loss_is_passed_over() -> None:
    class Skips(Task):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    task, driver = Skips(), method(every=3)
    start = weights(task)
    fit(task, driver)
    assert moved(start, weights(task))
    assert all(p.requires_grad for p in task.parameters())


def test_a_unit_that_the_loss_does_not_depend_on_is_an_error_that_names_it() -> None:
    class Shallow(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.norm(self.layers[0](self.embed_tokens(ids))))

    with pytest.raises(
        RuntimeError, match=r"selected net\.layers\.[123], but none of its \d+ parameters got a gradient"
    ):
        fit(Task(Shallow()), LISA(4))


def test_a_parameter_without_gradient_in_a_unit_that_has_some_is_a_warning() -> None:
    class Gap(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                layer.post_norm.forward = lambda x: x  # type: ignore[method-assign, union-attr]
            return super().forward(ids)

    with pytest.warns(
        UserWarning, match=r"some parameters got no gradient, such as net\.layers\.\d\.post_norm\.weight"
    ):
        fit(Task(Gap()), LISA(2))


def test_a_loader_that_cannot_stop_in_an_epoch_is_a_warning_if_checkpoints_are_written(tmp_path: Path) -> None:
    keep = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path)
    plain = torch.utils.data.DataLoader(loader().dataset, batch_size=2)
    with pytest.warns(UserWarning, match="has no `state_dict`.*StatefulLoader"):
        fit(Task(), [method(), keep], data=plain, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(Task(), [method(), keep], enable_checkpointing=True)
    assert not [w for w in seen if "state_dict" in str(w.message)]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(Task(), method()).save_checkpoint(tmp_path / "a.ckpt")
    driver = SelectiveTuning(Layers(exclude=r"layers\.0"), Uniform(), Constant(1), Cycle(), Freeze())
    with pytest.raises(ValueError, match=r"made on 4 units .* this model has 3"):
        fit(Task(), driver, steps=8, resume=tmp_path / "a.ckpt")


def test_a_run_without_the_callback_goes_on_from_our_checkpoint(tmp_path: Path) -> None:
    for state in ("drop", "keep", "offload"):
        run = fit(Task(), LISA(2, 2, state=state))
        run.save_checkpoint(tmp_path / "a.ckpt")
        task = Task()
        plain = fit(task, steps=8, resume=tmp_path / "a.ckpt")
        assert plain.global_step == 8
        assert {int(s["step"]) for s in plain.optimizers[0].state.values()} >= {8}


def test_our_run_goes_on_from_a_checkpoint_of_a_run_without_the_callback(tmp_path: Path) -> None:
    fit(Task(), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    driver = method()
    witness = Witness(driver)
    fit(Task(), [driver, witness], resume=tmp_path / "a.ckpt")
    assert len(witness.steps) == 3
    witness.check()


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "adapter"])
def test_learned_importance_trains_adapters_end_to_end(kind: str) -> None:
    net = Net(adapter=True) if kind == "adapter" else lora_net(kind)
    driver = IST(2, probe_interval=2, adapters=r"\.adapter$" if kind == "adapter" else None, rate=100.0)
    task = Task(net, lambda m: adamw(trainable(m), lr=3e-2))
    data = loader(4)
    before = torch.stack([task.loss(batch) for batch in data]).mean()
    witness = Witness(driver)
    fit(task, [driver, witness], steps=30, data=data)
    witness.check()
    task.eval()
    with torch.no_grad():
        assert torch.stack([task.loss(batch) for batch in data]).mean() < before
    assert driver.selection.state_dict()["score"]["score"].unique().numel() > 1


def test_learned_importance_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="has no adapter"):
        fit(Task(), IST(2, probe_interval=1))


def test_the_first_batch_is_probed_where_a_score_needs_one_at_the_start() -> None:
    driver = OwLore(2, 2, threshold=1.0)
    witness = Witness(driver)
    fit(Task(), [driver, witness])
    witness.check()
    scores = driver.selection.state_dict()["score"]
    assert any(torch.is_floating_point(v) and bool((v != 0).any()) for v in scores.values())


def test_a_finder_before_the_first_batch_needs_probe_data(tmp_path: Path) -> None:
    def finder() -> Any:
        return pytorch_lightning.callbacks.LearningRateFinder(num_training_steps=5, min_lr=1e-5, max_lr=1e-2)

    with pytest.raises(ValueError, match=r"`LearningRateFinder` trains before that.*`probe_data`"):
        fit(Task(), [OwLore(2, 2), finder()], default_root_dir=tmp_path)
    driver = OwLore(2, 2, probe_data=loader(4))
    trained: list[set[str]] = []

    class Notes(Task):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.training:
                trained.append({n for n, p in self.named_parameters() if p.requires_grad})
            return super().training_step(batch, batch_idx)

    fit(Notes(), [driver, finder()], default_root_dir=tmp_path)
    chosen = {*driver.selection.bound.spread(driver.history.masks[0]), *driver.selection.bound.always}
    assert trained[:5] == [chosen] * 5


def test_slots_of_the_wrong_kind_are_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="`budget=2` is not a budget"):
        SelectiveTuning(Layers(), Uniform(), 2, Sample(), Freeze())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give an instance"):
        SelectiveTuning(Layers, Uniform(), Constant(2), Sample(), Freeze())  # type: ignore[arg-type]


def test_a_budget_that_does_not_fit_the_model_is_refused_at_the_start() -> None:
    task = Task()
    with pytest.raises(ValueError, match=r"budget of 5 over 4 units must lie in \[1, 4\]"):
        fit(task, LISA(5))
    assert all(p.requires_grad for p in task.parameters())
